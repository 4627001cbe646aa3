"""Planned rows as arrays: reads a row's conversations, decodes their images, and stacks rows to a batch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxvlm.data import DataError
from jaxvlm.data.image import load_image, transform
from jaxvlm.data.layout import splice
from jaxvlm.data.packing import assemble
from jaxvlm.data.sources import image_path
from jaxvlm.data.table import open_table, table_encoded, table_images


class Samples(NamedTuple):
    """Every sample of every source, as columns int64 [n]."""

    source: np.ndarray
    row: np.ndarray  # in the source's table
    length: np.ndarray  # tokens, visual ones included
    images: np.ndarray
    supervised: np.ndarray
    dropped_images: np.ndarray
    truncated: np.ndarray


@dataclass
class RowReader:
    """Rows by their number in the run. Picklable: it holds paths and arrays, and reopens memory maps."""

    tables: list[str]
    samples: Samples
    rows: np.ndarray  # flat sample indices
    row_offsets: np.ndarray
    folders: list[str]
    splicing: dict
    transform: str
    image_size: int
    mean: tuple[float, ...]
    skip_bad_images: bool
    features: tuple[np.ndarray, Mapping[str, int]] | None

    def __post_init__(self):
        self.has_images = bool(self.samples.images.any())
        self.feature_rows = None
        if self.features is not None:
            array, index = self.features
            self.features = _file_of(array)
            self.feature_rows = [
                np.asarray(
                    [index.get(image_path(folder, name), -1) for name in open_table(table).image_names],
                    np.int64,
                )
                for folder, table in zip(self.folders, self.tables, strict=True)
            ]

    def batch(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """The rows stacked; rows past the end of the run are empty (segment 0, weight 0)."""
        made = [self.row(row) for row in rows]
        return {key: np.stack([row[key] for row in made]) for key in made[0]}

    def row(self, row: int) -> dict[str, np.ndarray]:
        inside = row < len(self.row_offsets) - 1
        chosen = self.rows[self.row_offsets[row] : self.row_offsets[row + 1]] if inside else []
        places = [(int(self.samples.source[i]), int(self.samples.row[i])) for i in chosen]
        tables = [open_table(self.tables[source]) for source, _ in places]
        parts = [splice(table_encoded(t, row), **self.splicing) for t, (_, row) in zip(tables, places, strict=True)]
        patches, pad_id = self.splicing["num_visual_tokens"], self.splicing["pad_id"]
        sources = [source for source, _ in places]
        arrays = assemble(parts, self.splicing["length"], patches, source_ids=sources, pad_id=pad_id)
        if self.has_images:
            images = [
                (segment, source, int(name))
                for segment, (table, (source, row)) in enumerate(zip(tables, places, strict=True), start=1)
                for name in table_images(table, row)
            ]
            arrays |= self._tiles(images, arrays)
        return arrays

    def _tiles(self, images: list[tuple[int, int, int]], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tile slots of a row: 'pixels' [T, H, W, 3] or 'features' [T, N, Dv], and 'tile_mask' [T]."""
        slots = self.splicing["images_per_row"]
        mask = np.arange(slots) < len(images)
        if self.features is not None:
            array = _features(self.features)
            tiles = np.zeros((slots, *array.shape[1:]), array.dtype)
            for tile, (_, source, name) in enumerate(images):
                tiles[tile] = array[self.feature_rows[source][name]]
            return {"features": tiles, "tile_mask": mask}
        tiles = np.zeros((slots, self.image_size, self.image_size, 3), np.uint8)
        for tile, (segment, source, name) in enumerate(images):
            path = image_path(self.folders[source], open_table(self.tables[source]).image_names[name])
            try:
                tiles[tile] = transform(load_image(path), self.transform, self.image_size, self.mean)
            except DataError as error:
                if not self.skip_bad_images:
                    raise
                # The rows are planned, so the conversation keeps its place and teaches nothing.
                warnings.warn(f"Left out of the loss: {error}", stacklevel=2)
                arrays["loss_weights"][arrays["segment_ids"] == segment] = 0.0
        return {"pixels": tiles, "tile_mask": mask}


def _file_of(array: np.ndarray) -> np.ndarray | tuple:
    """A memory map as what is needed to open it again, so that pickling does not copy it."""
    if isinstance(array, np.memmap) and array.filename is not None:
        return (str(array.filename), array.dtype, int(array.offset), array.shape)
    return array


def _features(features: np.ndarray | tuple) -> np.ndarray:
    return _reopened(features) if isinstance(features, tuple) else features


@functools.lru_cache(maxsize=8)
def _reopened(place: tuple) -> np.ndarray:
    filename, dtype, offset, shape = place
    return np.memmap(filename, dtype=dtype, mode="r", offset=offset, shape=shape)
