"""Planned rows as arrays: reads a row's conversations, decodes their images, and stacks rows to a batch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxvlm.data import DataError
from jaxvlm.data.image import load_image
from jaxvlm.data.packing import assemble
from jaxvlm.data.sources import image_path
from jaxvlm.data.table import Splicing, open_table, table_images, table_plans, table_spliced
from jaxvlm.data.tiles import ImagePlan, image_tiles, tile_regions, tower_names


class Samples(NamedTuple):
    """Every sample of every source, as columns int64 [n]."""

    source: np.ndarray
    row: np.ndarray  # in the source's table
    length: np.ndarray  # tokens, visual ones included
    images: np.ndarray
    tiles: np.ndarray
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
    splicing: Splicing
    skip_bad_images: bool
    features: tuple[Sequence[np.ndarray], Mapping[str, int]] | None

    def __post_init__(self):
        self.has_images = bool(self.samples.images.any())
        self.feature_rows = None
        if self.features is not None:
            arrays, index = self.features
            self.features = [_file_of(array) for array in arrays]
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
        parts = [table_spliced(t, row, self.splicing) for t, (_, row) in zip(tables, places, strict=True)]
        tiling, settings = self.splicing.tiling, self.splicing.settings
        arrays = assemble(
            parts,
            settings["length"],
            tiling.tile_tokens,
            source_ids=[source for source, _ in places],
            pad_id=settings["pad_id"],
            blends=tiling.blends and self.has_images,
        )
        if self.has_images:
            images = [
                (segment, source, int(name), plan)
                for segment, (table, (source, row)) in enumerate(zip(tables, places, strict=True), start=1)
                for name, plan in zip(table_images(table, row), table_plans(table, row, self.splicing), strict=False)
            ]
            arrays |= self._tiles(images, arrays)
        return arrays

    def _tiles(self, images: list[tuple[int, int, int, ImagePlan]], arrays: dict) -> dict[str, np.ndarray]:
        """The tile slots of a row: 'pixels' [T, H, W, 3] or 'features' [T, N, Dv], of several towers one each, 'tile_mask'
        [T], and for some 'tile_regions' (see `tiles.tile_regions`).
        """
        slots, tiling = self.splicing.tiles_per_row, self.splicing.tiling
        mask = np.arange(slots) < sum(plan.tiles for *_, plan in images)
        rest = {"tile_mask": mask} | tile_regions(tiling, [plan for *_, plan in images], slots)
        tile = 0
        if self.features is not None:
            arrays = [_features(array) for array in self.features]
            made = [np.zeros((slots, *array.shape[1:]), array.dtype) for array in arrays]
            for _, source, name, plan in images:
                first = self.feature_rows[source][name]
                for tiles, array in zip(made, arrays, strict=True):
                    tiles[tile : tile + plan.tiles] = array[first : first + plan.tiles]
                tile += plan.tiles
            return dict(zip(tower_names("features", len(made)), made, strict=True)) | rest
        made = [np.zeros((slots, size, size, 3), np.uint8) for size, _ in tiling.views]
        for segment, source, name, plan in images:
            path = image_path(self.folders[source], open_table(self.tables[source]).image_names[name])
            try:
                for view, tiles in zip(made, image_tiles(load_image(path), tiling, plan, path), strict=True):
                    view[tile : tile + plan.tiles] = tiles
            except DataError as error:
                if not self.skip_bad_images:
                    raise
                # The rows are planned, so the conversation keeps its place and teaches nothing.
                warnings.warn(f"Left out of the loss: {error}", stacklevel=2)
                arrays["loss_weights"][arrays["segment_ids"] == segment] = 0.0
            tile += plan.tiles
        return dict(zip(tower_names("pixels", len(made)), made, strict=True)) | rest


def _file_of(array: np.ndarray) -> np.ndarray | tuple:
    """A memory map as what is needed to open it again, so that pickling does not copy it."""
    if isinstance(array, np.memmap) and array.filename is not None:
        return (str(array.filename), array.dtype, int(array.offset), array.shape)
    return array


def _features(array: np.ndarray | tuple) -> np.ndarray:
    return _reopened(array) if isinstance(array, tuple) else array


@functools.lru_cache(maxsize=8)
def _reopened(place: tuple) -> np.ndarray:
    filename, dtype, offset, shape = place
    return np.memmap(filename, dtype=dtype, mode="r", offset=offset, shape=shape)
