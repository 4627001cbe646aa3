"""`jaxvlm data stats`: how long records are, how much of them is supervised, what images they have, how well they pack.

With a tokenizer everything is counted in tokens, as a run of that config counts them; without one in words.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxvlm.config import SourceConfig
from jaxvlm.data import DataError, llava_mix
from jaxvlm.data.conversation import Encoded, encode_all, record_images, render_record
from jaxvlm.data.layout import splice
from jaxvlm.data.mixture import choose, prepared
from jaxvlm.data.packing import plan, slots_needed
from jaxvlm.data.sources import Source
from jaxvlm.data.tiles import image_plans
from jaxvlm.data.tools.findings import text_table
from jaxvlm.data.tools.images import in_threads, look
from jaxvlm.data.tools.samples import Viewer
from jaxvlm.progress import Progress

CHUNK = 512  # records tokenised in one call
PACKED = 100_000  # records that a group's fill is measured on
BINS = 40  # of a histogram of lengths
SIZE_EDGES = 2.0 ** np.arange(4, 12.01, 0.25)  # of a histogram of widths and heights, in pixels: 16 to 4096


class Measured(NamedTuple):
    """Columns of the usable records [n] and of the images in them [m], int64; lengths are in `unit`."""

    unit: str
    groups: list[str]  # the sources, or the parts of LLaVA's mixture
    group: np.ndarray  # [n] which of them
    length: np.ndarray  # [n] all that a row holds of a record, visual tokens included
    supervised: np.ndarray  # [n]
    images: np.ndarray  # [n]
    tiles: np.ndarray  # [n]
    cut: np.ndarray  # [n] 1 where something was cut off
    sizes: np.ndarray  # [m, 2] width, height
    size_group: np.ndarray  # [m]
    bad: int  # records that cannot be used


def measure(sources: Sequence[tuple[SourceConfig, Source]], viewer: Viewer, count: int | None, seed: int) -> Measured:
    """Reads the records that the sources' settings choose, as often as they do, with the headers of their images.

    With a `count` so many of them, drawn at random. Raises `DataError` if none can be used.
    """
    chosen = [np.repeat(np.arange(len(source)), choose(source, config, seed)) for config, source in sources]
    places = np.concatenate([np.stack([np.full(len(numbers), k), numbers], 1) for k, numbers in enumerate(chosen)])
    if count is not None and count < len(places):
        places = places[np.sort(np.random.default_rng(seed).permutation(len(places))[:count])]
    columns, sizes, names = [], [], {}
    with Progress("records", len(places), "measured") as progress:
        for start in range(0, len(places), CHUNK):
            chunk = places[start : start + CHUNK].tolist()
            rows = _rows(chunk, sources, viewer)
            numbers = [names.setdefault(row.pop("group"), len(names)) for row in rows]
            shapes = [(group, *size) for group, row in zip(numbers, rows, strict=True) for size in row.pop("sizes")]
            sizes.append(np.asarray(shapes, np.int64).reshape(-1, 3))
            columns.append(
                np.asarray([(group, *row.values()) for group, row in zip(numbers, rows, strict=True)], np.int64)
            )
            progress.add(len(chunk))
    columns = np.concatenate([part.reshape(-1, 6) for part in columns])
    sizes = np.concatenate(sizes)
    if not len(columns):
        raise DataError(f"Of {len(places):,} records none can be used. `jaxvlm data verify` says why.")
    titles, group = _groups(list(names), columns[:, 0], sources)
    unit, bad = "tokens" if viewer.tokenizer else "words", len(places) - len(columns)
    return Measured(unit, titles, group[columns[:, 0]], *columns[:, 1:].T, sizes[:, 1:], group[sizes[:, 0]], bad)


def _rows(chunk: list, sources: Sequence, viewer: Viewer) -> list[dict]:
    """What is measured of each record of a chunk that can be used."""
    records = [_read(*sources[k], number) for k, number in chunk]
    usable = [i for i, record in enumerate(records) if record is not None]
    uses = [(i, name) for i in usable for name in record_images(records[i])]
    looks = in_threads(lambda use: look(sources[chunk[use[0]][0]][1], use[1], quick=True), uses, os.cpu_count() or 1)
    seen: dict[int, list] = {i: [] for i in usable}
    for (i, _), one in zip(uses, looks, strict=True):
        seen[i].append(one)
    usable = [i for i in usable if not any(one.fault for one in seen[i])]
    texts: list[Any] = [records[i] for i in usable]
    if viewer.tokenizer:
        texts = encode_all(texts, viewer.tokenizer, viewer.template, viewer.layout)
    rows = []
    for i, text in zip(usable, texts, strict=True):
        sizes = [one.size for one in seen[i]]
        counted = _counted(text, sizes, viewer)
        if counted:
            group = (chunk[i][0], llava_mix.source_of(records[i]))
            rows.append({"group": group} | counted | {"sizes": sizes})
    return rows


def _read(config: SourceConfig, source: Source, number: int) -> dict | None:
    try:
        record = prepared(source[number], config)
        record_images(record)
    except (DataError, AttributeError):  # also of what is no record at all
        return None
    return record


def _counted(text: Encoded | DataError | dict, sizes: list, viewer: Viewer) -> dict | None:
    """Length, supervised part, images, tiles and whether it was cut; None for a record that cannot be used."""
    if isinstance(text, DataError):
        return None
    if not viewer.tokenizer:
        try:
            rendered = render_record(text, viewer.template, viewer.layout)
        except DataError:
            return None
        supervised = sum(len(rendered.text[a:b].split()) for a, b in rendered.spans)
        words = len(rendered.text.split())
        return dict(length=words, supervised=supervised, images=len(sizes), tiles=len(sizes), cut=False)
    plans, settings = image_plans(viewer.splicing.tiling, sizes), viewer.splicing.settings
    try:
        spliced = splice(text, plans, **settings)
    except DataError:
        return None
    if spliced is None or not spliced.weights.any():
        return None
    supervised = int((spliced.weights > 0).sum())
    counts = dict(images=spliced.num_images, tiles=spliced.num_tiles, cut=spliced.truncated)
    return dict(length=len(spliced.tokens), supervised=supervised) | counts


def _groups(names: list[tuple[int, str]], used: np.ndarray, sources: Sequence) -> tuple[list[str], np.ndarray]:
    """Titles, and for each (source, part) its title's number: parts only where a source looks like LLaVA's mixture."""
    counts = np.bincount(used, minlength=len(names)).tolist()
    parts = [
        Counter({part: n for (s, part), n in zip(names, counts, strict=True) if s == k}) for k in range(len(sources))
    ]
    titles: dict[str, int] = {}
    numbers = []
    for k, part in names:
        title = sources[k][0].name or sources[k][0].path
        if sources[k][0].mix or llava_mix.looks_like(parts[k]):
            title = f"{title}: {part}" if len(sources) > 1 else part
        numbers.append(titles.setdefault(title, len(titles)))
    return list(titles), np.asarray(numbers)


# ------------------------------------------------------------------------------------------------------------- summed up


def summary(measured: Measured, row_length: int, tiles_per_row: int) -> dict:
    """Numbers for JSON, the table and the page: of every group and of all together.

    `packed_fill` is the part of its rows of `row_length` tokens and `tiles_per_row` tiles (0: as many as suit it)
    that a group would fill if it were packed by itself, `unpacked_fill` with one conversation a row. Words have neither.
    """
    counts = np.bincount(measured.group, minlength=len(measured.groups))
    order = np.argsort(-counts, kind="stable").tolist()
    chosen = {measured.groups[k]: (measured.group == k, measured.size_group == k) for k in order}
    if len(chosen) > 1:
        chosen["all"] = (slice(None), slice(None))
    top = int(measured.length.max())
    groups = {}
    for title, (mine, sizes) in chosen.items():
        groups[title] = _texts(measured, mine, np.linspace(0, top, BINS + 1)) | _pictures(measured.sizes[sizes])
        if measured.unit == "tokens":
            groups[title] |= _fill(measured.length[mine], measured.tiles[mine], row_length, tiles_per_row)
    return {"unit": measured.unit, "row_length": row_length, "unusable": measured.bad, "groups": groups}


def _texts(measured: Measured, mine, edges: np.ndarray) -> dict:
    length, supervised, images = measured.length[mine], measured.supervised[mine], measured.images[mine]
    total, scored = int(length.sum()), int(supervised.sum())
    return {
        "records": len(length),
        "length": {
            "total": total,
            "mean": round(total / len(length), 1),
            "median": float(np.median(length)),
            "95%": float(np.percentile(length, 95)),
            "max": int(length.max()),
        },
        "length_histogram": {"edges": edges.round(1).tolist(), "records": np.histogram(length, edges)[0].tolist()},
        "supervised": scored,
        "supervised_share": scored / total,
        "cut": int(measured.cut[mine].sum()),
        "images": int(images.sum()),
        "images_per_record": {
            int(n): int(count) for n, count in zip(*np.unique(images, return_counts=True), strict=True)
        },
    }


def _pictures(sizes: np.ndarray) -> dict:
    """Sizes of images [m, 2] in pixels: the middle, the extremes, and how many have each width and height."""
    if not len(sizes):
        return {}
    filled = np.histogram2d(*np.clip(sizes, SIZE_EDGES[0], SIZE_EDGES[-1] - 1).T, [SIZE_EDGES, SIZE_EDGES])[0]
    cells = [[int(i), int(j), int(filled[i, j])] for i, j in zip(*filled.nonzero(), strict=True)]
    return {
        "image_size": {
            "median": np.median(sizes, 0).tolist(),
            "min": sizes.min(0).tolist(),
            "max": sizes.max(0).tolist(),
        },
        "image_histogram": {"edges": SIZE_EDGES.round().tolist(), "width_height_images": cells},
    }


def _fill(length: np.ndarray, tiles: np.ndarray, row_length: int, tiles_per_row: int) -> dict:
    """How full rows would be, of tokens and of tile slots."""
    order = np.random.default_rng(0).permutation(len(length))[:PACKED]
    length, tiles = length[order], tiles[order]
    slots = tiles_per_row or slots_needed(length, tiles, row_length)
    rows = len(plan(length, tiles, row_length, slots))
    return {
        "packed_fill": float(length.sum() / (rows * row_length)),
        "packed_tile_fill": float(tiles.sum() / (rows * slots)),
        "tiles_per_row": slots,
        "unpacked_fill": float(length.mean() / row_length),
    }


def summary_table(made: dict) -> list[str]:
    """The numbers as lines for a terminal."""
    packed = made["unit"] == "tokens"
    heads = ["", "records", made["unit"], "median", "95 %", "longest", "supervised", "images", "median size", "cut"]
    rows = []
    for title, group in made["groups"].items():
        length, size = group["length"], group.get("image_size")
        row = [
            title,
            f"{group['records']:,}",
            f"{length['total']:,}",
            f"{length['median']:,.0f}",
            f"{length['95%']:,.0f}",
        ]
        row += [f"{length['max']:,}", percent(group["supervised_share"]), f"{group['images']:,}"]
        row += ["{:.0f} x {:.0f}".format(*size["median"]) if size else "-", f"{group['cut']:,}"]
        if packed:
            tiles = percent(group["packed_tile_fill"]) if group["images"] else "-"
            row += [percent(group["packed_fill"]), tiles, percent(group["unpacked_fill"])]
        rows.append(row)
    return text_table(heads + ["packed", "tiles", "unpacked"] * packed, rows)


def percent(value: float) -> str:
    """0.785 as '78.5 %'."""
    return f"{100 * value:.1f} %"
