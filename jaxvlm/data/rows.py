"""Planned rows as arrays: reads a row's conversations, decodes their images, and stacks rows to a batch."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxvlm.config import SourceConfig
from jaxvlm.data import DataError
from jaxvlm.data.bad import BrokenImages
from jaxvlm.data.columns import cached, new_folder, open_array, release_maps
from jaxvlm.data.image import load_image
from jaxvlm.data.instruction import instruction_fields
from jaxvlm.data.packing import assemble
from jaxvlm.data.sources import Source, image_address
from jaxvlm.data.table import (
    Splicing,
    open_table,
    record_place,
    table_images,
    table_instructions,
    table_plans,
    table_spliced,
)
from jaxvlm.data.tiles import ImagePlan, image_tiles, tile_regions, tower_names

RELEASED = 256  # samples; after so many the maps of tables are given back: each may have taken half a megabyte


class Plan(NamedTuple):
    """The samples of the run's rows, flat: row r has those from offsets[r] to offsets[r + 1]."""

    source: np.ndarray  # int16 [m]
    row: np.ndarray  # int32 [m], in the source's table
    name: np.ndarray  # int16 [m], what 'source_ids' are of this sample
    offsets: np.ndarray  # int64 [rows + 1]


def saved_plan(plan: Plan, cache: Path) -> str:
    """A folder with the plan, so that worker processes map it into memory instead of each having a copy."""
    digest = hashlib.sha256()
    for array in plan:
        digest.update(np.ascontiguousarray(array))
    folder = cached(cache, [digest.hexdigest()])
    if not folder.is_dir():
        with new_folder(folder) as new:
            for name, array in plan._asdict().items():
                np.save(new / f"{name}.npy", array)
    return str(folder)


@functools.lru_cache(maxsize=4)
def _opened_plan(folder: str) -> Plan:
    return Plan(*(open_array(Path(folder) / f"{name}.npy") for name in Plan._fields))


@dataclass
class RowReader:
    """Rows by their number in the run. Picklable: it holds paths and arrays, and reopens memory maps."""

    tables: list[str]
    plan: Plan | str  # or the folder of a saved one
    has_images: bool
    configs: Sequence[SourceConfig]
    sources: Sequence[Source]
    splicing: Splicing
    broken: BrokenImages | None  # where images that cannot be decoded are written down; None: they raise
    features: tuple[Sequence[np.ndarray], Mapping[str, int]] | None
    qformer_length: int = 0  # L; 0: the connector reads no instructions

    def __post_init__(self):
        self._seen = 0  # samples since memory was given back; approximate, as threads count too
        self.feature_rows = None
        if self.features is not None:
            arrays, index = self.features
            self.features = [_file_of(array) for array in arrays]
            self.feature_rows = [
                np.asarray(
                    [index.get(image_address(source, name), -1) for name in open_table(table).image_names], np.int64
                )
                for source, table in zip(self.sources, self.tables, strict=True)
            ]

    def batch(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """The rows stacked; rows past the end of the run are empty (segment 0, weight 0)."""
        made = [self.row(row) for row in rows]
        self._seen += sum(int(row["segment_ids"].max()) for row in made)
        if self._seen > RELEASED:
            self._seen = 0
            release_maps()
        return {key: np.stack([row[key] for row in made]) for key in made[0]}

    def row(self, row: int) -> dict[str, np.ndarray]:
        plan = _opened_plan(self.plan) if isinstance(self.plan, str) else self.plan
        here = slice(*plan.offsets[row : row + 2]) if row < len(plan.offsets) - 1 else slice(0)
        places = list(zip(plan.source[here].tolist(), plan.row[here].tolist(), strict=True))
        tables = [open_table(self.tables[source]) for source, _ in places]
        parts = [table_spliced(t, row, self.splicing) for t, (_, row) in zip(tables, places, strict=True)]
        tiling, settings = self.splicing.tiling, self.splicing.settings
        arrays = assemble(
            parts,
            settings["length"],
            tiling.tile_tokens,
            source_ids=plan.name[here].tolist(),
            pad_id=settings["pad_id"],
            blends=tiling.blends and self.has_images,
        )
        if self.has_images:
            images = [
                (segment, source, int(name), plan)
                for segment, (table, (source, row)) in enumerate(zip(tables, places, strict=True), start=1)
                for name, plan in zip(table_images(table, row), table_plans(table, row, self.splicing), strict=False)
            ]
            arrays |= self._tiles(images, arrays, places)
        if self.has_images and self.qformer_length:
            asked = [text for t, (_, row) in zip(tables, places, strict=True) for text in table_instructions(t, row)]
            tiles = [plan.tiles for *_, plan in images]
            arrays |= instruction_fields(asked, tiles, self.splicing.tiles_per_row, self.qformer_length)
        return arrays

    def _tiles(
        self, images: list[tuple[int, int, int, ImagePlan]], arrays: dict, places: list[tuple[int, int]]
    ) -> dict[str, np.ndarray]:
        """The tile slots of a row: 'pixels' [T, H, W, 3] or 'features' [T, N, Dv], of several towers one each, 'tile_mask'
        [T], and for some 'tile_regions' (see `tiles.tile_regions`).
        """
        slots, tiling = self.splicing.tiles_per_row, self.splicing.tiling
        mask = np.arange(slots) < sum(plan.tiles for *_, plan in images)
        rest = {"tile_mask": mask} | tile_regions(tiling, [plan for *_, plan in images], slots)
        tile = 0
        if self.features is not None:
            towers = [_features(array) for array in self.features]
            made = [np.zeros((slots, *array.shape[1:]), array.dtype) for array in towers]
            for _, source, name, plan in images:
                first = self.feature_rows[source][name]
                for tiles, array in zip(made, towers, strict=True):
                    tiles[tile : tile + plan.tiles] = array[first : first + plan.tiles]
                tile += plan.tiles
            return dict(zip(tower_names("features", len(made)), made, strict=True)) | rest
        made = [np.zeros((slots, size, size, 3), np.uint8) for size, _ in tiling.views]
        for segment, source, name, plan in images:
            held_by, called = self.sources[source], open_table(self.tables[source]).image_names[name]
            path = image_address(held_by, called)
            try:
                image = load_image(held_by.image(called), path)
                for view, tiles in zip(made, image_tiles(image, tiling, plan, path), strict=True):
                    view[tile : tile + plan.tiles] = tiles
            except DataError as error:
                if self.broken is None:
                    raise
                # The rows are planned, so the conversation keeps its place and teaches nothing.
                warnings.warn(f"Left out of the loss: {error}", stacklevel=2)
                self.broken.add(self._place(*places[segment - 1]) | {"reason": str(error), "image": path})
                arrays["loss_weights"][arrays["segment_ids"] == segment] = 0.0
            tile += plan.tiles
        return dict(zip(tower_names("pixels", len(made)), made, strict=True)) | rest

    def _place(self, source: int, row: int) -> dict:
        table = open_table(self.tables[source])
        return record_place(self.configs[source], int(table.record[row]), table.ids[row], table.parts[row])


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
