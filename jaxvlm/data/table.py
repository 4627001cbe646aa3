"""The records of one source, tokenised once and kept on disk as flat arrays that are memory-mapped.

A table is a folder of .npy files. It holds what the rows need (tokens, labels, image names and sizes) for every
record that can be used, and the list of those that cannot, each with its reason. It is written as a stream and stays on disk:
ten million records take no more memory than the columns that are being looked at.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from jaxvlm.config import PromptConfig, SourceConfig
from jaxvlm.data import DataError, llava_mix
from jaxvlm.data.boxes import with_boxes
from jaxvlm.data.columns import Columns, Log, Texts, cached, new_folder, open_array
from jaxvlm.data.conversation import IMAGE_TOKEN, Encoded, encode_all, record_images
from jaxvlm.data.image import image_size
from jaxvlm.data.instruction import InstructionTokenizer
from jaxvlm.data.layout import DROPPED, Spliced, splice
from jaxvlm.data.mixture import choose, prepared
from jaxvlm.data.processes import in_order
from jaxvlm.data.sources import Source, image_address, image_stats, in_threads
from jaxvlm.data.tiles import ImagePlan, Tiling, image_plan, image_plans
from jaxvlm.data.tokenizer import Tokenizer

VERSION = 6  # raise it when the same records would give other arrays
CHUNK = 512  # records tokenised in one call
LARGE = 50_000  # records; more of them are worth starting processes for
ROWS = 8192  # records counted at a time
COUNTS = ("lengths", "supervised_tokens", "used_images", "tiles", "dropped_images", "truncated")


class Splicing(NamedTuple):
    """How the conversations of a table become sequences."""

    tiling: Tiling
    tiles_per_row: int  # 0: any number
    settings: dict  # further arguments of `splice`


def splicing_for(prompt: PromptConfig, tokenizer: Tokenizer, tiling: Tiling, tiles_per_row: int) -> Splicing:
    """The splicing for planning and assembling. Raises `DataError` if the settings are unusable."""
    one = len(image_plan(tiling, 1, 1).index)
    settings = {
        "layout": prompt.layout,
        "length": prompt.length,
        "truncation": prompt.truncation,
        "tile_tokens": tiling.tile_tokens,
        "reserved": max(tiles_per_row, 1) * one if prompt.truncation == "before_splice" else 0,
        "bos_id": tokenizer.bos_id if tokenizer.adds_bos else None,
        "pad_id": tokenizer.pad_id or 0,
    }
    splice(Encoded(np.zeros(0, np.int32), np.zeros(0, np.float32)), [], **settings)  # raises for unusable settings
    return Splicing(tiling, tiles_per_row, settings)


def cached_table(
    source: Source,
    config: SourceConfig,
    template: str,
    splicing: Splicing,
    tokenizer: Tokenizer,
    seed: int,
    cache: Path,
    log: Log,
    instructions: InstructionTokenizer | None = None,
    processes: int = 0,
    held_out: bool = False,
) -> str:
    """The folder of the source's table, made unless the cache has it for these files, tokenizer and settings.

    It is of the records that training uses, or of those that `config.held_out` keeps from it.

    There are two: what tokenising gives, and upon it what splicing gives, which is cheap to make anew. A large one is
    tokenised by `processes` worker processes, if any.
    """
    whole, layout = float(config.fraction).is_integer(), splicing.settings["layout"]
    key = [VERSION, source.fingerprint(), template, layout]
    key += [tokenizer.fingerprint_text, config.fraction, None if whole else seed]
    key += [config.mix, config.keep, config.text_only, config.format_prompts]
    key += [config.boxes, splicing.tiling.transform] if config.boxes else []
    key += [config.held_out, held_out] if config.held_out else []
    key += [instructions.fingerprint_text] if instructions else []
    encode = _Encode(source, config, tokenizer, template, layout, splicing.tiling.transform, instructions)

    def encoded(key: list) -> tuple[Path, SimpleNamespace]:
        folder = cached(cache, key)
        if not folder.is_dir():
            with new_folder(folder) as new:
                _encode_records(new, source, config, encode, choose(source, config, seed, held_out), processes, log)
        return folder, open_table(str(folder))

    texts, base = encoded(key)
    if config.boxes and base.files != (now := _files_digest(source, base.image_names)):
        texts, base = encoded([*key, now])  # boxes were moved by the sizes that images had then
    digest = _files_digest(source, base.image_names) if splicing.tiling.sized else None
    key = [texts.name, asdict(splicing.tiling), splicing.tiles_per_row, splicing.settings, config.images, digest]
    folder = cached(cache, key)
    if not folder.is_dir():
        with new_folder(folder) as new:
            sizes = np.zeros((len(base.image_names), 2), np.int32)
            if digest is not None:
                sizes = _image_sizes(base.image_names, source, log)
            content = _splice_records(new, base, source, config, splicing, sizes)
            _write_meta(new, {"base": texts.name, "digest": content})
    return str(folder)


def _files_digest(source: Source, names: Sequence[str]) -> str:
    """A hash of the images' file sizes and times of change."""
    return hashlib.sha256(image_stats(source, names)).hexdigest()


def _write_meta(folder: Path, meta: dict) -> None:
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _encode_records(new: Path, source: Source, config, encode: _Encode, copies, processes: int, log: Log) -> None:
    """Writes what does not depend on the splicing: tokens and labels, image names, and the records that are unusable.

    `copies` int [n] says how often each record is used.
    """
    indices = np.flatnonzero(copies)
    name, total = config.name or source.path, len(indices)
    if total > 2000:
        log(f"{name}: tokenising {total:,} records (kept for the next run)")
    columns, others, images = Columns(new), Columns(new), _ImageNames(new / "names")
    chunks = (indices[start : start + CHUNK].tolist() for start in range(0, total, CHUNK))
    started = said = time.perf_counter()
    for start, chunk in zip(
        range(0, total, CHUNK), in_order(encode, chunks, processes if total > LARGE else 0), strict=True
    ):
        records = indices[start : start + CHUNK]
        bad = (
            record_place(config, int(records[k]), identity, part) | {"reason": reason}
            for k, identity, part, reason in chunk.bad
        )
        others.append_texts("bad", map(json.dumps, bad))
        columns.append_texts("ids", map(json.dumps, chunk.ids))
        columns.append_parts("tokens", "offsets", [one.tokens for one in chunk.encoded], np.int32)
        columns.append("supervised", np.concatenate([np.zeros(0, bool), *(one.weights > 0 for one in chunk.encoded)]))
        columns.append("record", records[chunk.kept].astype(np.int32))
        columns.append("copies", copies[records[chunk.kept]].astype(np.int32))
        columns.append("parts", np.asarray(chunk.parts, np.int16))  # of a mix, indices into `llava_mix.PARTS`
        images.append(chunk.images)
        if encode.instructions:  # one for each entry of `images`
            columns.append_parts("instructions", "instruction_offsets", chunk.instructions, np.int32)
        now, done = time.perf_counter(), start + len(records)
        if now - said > 30:
            said = now
            log(f"{name}: {done:,} of {total:,} records tokenised, {done / (now - started):,.0f} a second")
    images.write(columns)
    others.close()
    meta = {"digest": columns.close()}
    if config.boxes:
        meta["files"] = _files_digest(source, Texts(new, "image_names", str))
    _write_meta(new, meta)


class _Chunk(NamedTuple):
    """Some records, encoded."""

    kept: list[int]  # which of them can be used
    encoded: list[Encoded]
    ids: list[Any]
    images: list[list[str]]
    instructions: list[np.ndarray]
    parts: list[int]
    bad: list[tuple[int, Any, int, str]]  # the others: which, its id, its part, the reason


@dataclass(frozen=True)
class _Encode:
    """Records of a source, by their numbers, encoded; in this process or another."""

    source: Source
    config: SourceConfig
    tokenizer: Tokenizer
    template: str
    layout: str
    transform: str  # whose frame boxes are moved to
    instructions: InstructionTokenizer | None

    def __call__(self, numbers: Sequence[int]) -> _Chunk:
        records = [_read(self.source, number) for number in numbers]
        ready = [self._ready(record) for record in records]
        encoded = encode_all(ready, self.tokenizer, self.template, self.layout)
        chunk = _Chunk([], [], [], [], [], [], [])
        for k, (record, one) in enumerate(zip(records, encoded, strict=True)):
            identity = record.get("id") if isinstance(record, dict) else None
            part = llava_mix.PARTS.index(llava_mix.source_of(record)) if self.config.mix else 0
            error = next((given for given in (record, ready[k], one) if isinstance(given, DataError)), None)
            if error:
                chunk.bad.append((k, identity, part, str(error)))
                continue
            chunk.kept.append(k)
            chunk.encoded.append(one)
            chunk.ids.append(identity)
            chunk.images.append(record_images(record))
            if self.instructions:
                chunk.instructions.extend(self.instructions.encode(ready[k]["conversations"]))
            chunk.parts.append(part)
        return chunk

    def _ready(self, record: dict | DataError) -> Any:
        try:
            return with_boxes(prepared(record, self.config), self.source, self.config, self.transform)
        except DataError as error:
            return error


class _ImageNames:
    """Every image's name once, in the order in which they come first, and which of them each record has.

    Names are told apart by a digest of 128 bits, sorted in arrays: a dict of ten million names would fill the memory.
    """

    def __init__(self, folder: Path):
        folder.mkdir()
        self._folder, self._all = folder, Columns(folder)
        self._digests, self._counts = [np.zeros((0, 2), np.uint64)], [np.zeros(1, np.int64)]

    def append(self, records: Sequence[Sequence[str]]) -> None:
        names = [name for images in records for name in images]
        self._all.append_texts("all", names)
        digests = (hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest() for name in names)
        self._digests.append(np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2))
        self._counts.append(np.asarray([len(images) for images in records], np.int64))

    def write(self, columns: Columns) -> None:
        """The columns `images` (indices of names), `image_offsets` and `image_names`."""
        self._all.close()
        first, index = first_seen(np.concatenate(self._digests))
        columns.append("images", index.astype(np.int32))
        columns.append("image_offsets", np.cumsum(np.concatenate(self._counts)))
        for start in range(0, max(1, len(first)), 65536):
            names = Texts(self._folder, "all")
            columns.append_texts("image_names", (names[i] for i in first[start : start + 65536].tolist()))
        shutil.rmtree(self._folder)


def first_seen(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each distinct row of `keys` [n, 2] is first, ascending; and for each row which of these it is, [n]."""
    order = np.lexsort(keys.T)  # stable, so the first of equal ones is the first of its run
    new = np.ones(len(keys), bool)
    new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(1)
    first = order[new]
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    index = np.empty(len(keys), np.int64)
    index[order] = rank[np.cumsum(new) - 1]
    return np.sort(first), index


def record_place(config: SourceConfig, number: int, identity: object, part: int) -> dict:
    """What names a record in a list of bad ones; `part` is an index into `llava_mix.PARTS`."""
    place = {"source": config.name, "file": config.path, "record": number, "id": identity}
    return place | ({"part": llava_mix.PARTS[part]} if config.mix else {})


def _read(source: Source, number: int) -> dict | DataError:
    try:
        return source[number]
    except DataError as error:
        return error


def _image_sizes(names: Sequence[str], source: Source, log: Log) -> np.ndarray:
    """Upright sizes (width, height) of images, int32 [n, 2]; (0, 0) for those that `_no_size` has a reason for."""

    def read(name: str) -> tuple[int, int]:
        try:
            return image_size(source.image(name))
        except DataError:
            return 0, 0

    if len(names) > 2000:
        log(f"{source.path}: reading the sizes of {len(names):,} images (kept for the next run)")
    return in_threads(read, names, np.int32)


def _no_size(source: Source, name: str) -> dict:
    """Why an image has no size, as part of a bad record's entry."""
    if image_stats(source, [name])[0, 0] < 0:
        return missing_image(source, name)
    try:
        image_size(source.image(name), image_address(source, name))
    except DataError as error:
        return {"reason": str(error)}
    return {"reason": f"{image_address(source, name)} was changed while it was read. Start again."}


def missing_image(source: Source, name: str) -> dict:
    """What a bad record's entry says of a file that is not there."""
    path = image_address(source, name)
    return {"reason": f"image file {path} is missing or empty", "image": path}


def _splice_records(new: Path, base: SimpleNamespace, source, config, splicing: Splicing, sizes: np.ndarray) -> str:
    """Writes what depends on the splicing, and the records that cannot be used with it (of which there are no copies).

    Returns a digest of all that decides the rows.
    """
    columns, others = Columns(new), Columns(new)
    alone, together = (_image_counts(splicing.tiling, sizes, one) for one in (True, False))
    without = splicing.tiling.sized & (sizes[:, 0] == 0)
    for start in range(0, max(1, len(base.record)), ROWS):
        rows = np.arange(start, min(start + ROWS, len(base.record)))
        counts, whole = _whole_records(base, rows, splicing, alone, together, without)
        copies = np.array(base.copies[rows])
        bad = []
        for row in rows[~whole].tolist():
            names = base.images[base.image_offsets[row] : base.image_offsets[row + 1]]
            failed = next((_no_size(source, base.image_names[n]) for n in names.tolist() if without[n]), None)
            try:
                spliced = None if failed else _usable(base, row, splicing, sizes[names])
            except DataError as error:
                failed = {"reason": str(error)}
            if failed:
                bad.append(
                    json.dumps(record_place(config, int(base.record[row]), base.ids[row], base.parts[row]) | failed)
                )
                copies[row - start], counts[:, row - start] = 0, 0
                continue
            scored = int((spliced.weights > 0).sum())
            used = (spliced.num_images, spliced.num_tiles, spliced.dropped_images, spliced.truncated)
            counts[:, row - start] = (len(spliced.tokens), scored, *used)
        for name, column in zip(COUNTS, counts, strict=True):
            columns.append(name, column)
        columns.append("copies", copies)
        others.append_texts("bad", bad)
    columns.append("sizes", sizes)
    others.close()
    return hashlib.sha256((base.digest + columns.close()).encode()).hexdigest()


def _image_counts(tiling: Tiling, sizes: np.ndarray, alone: bool) -> np.ndarray:
    """Visual tokens and tiles of each image, int32 [n, 2], where it is a record's only one or one of several."""
    distinct, which = np.unique(sizes[:, 0].astype(np.int64) << 32 | sizes[:, 1], return_inverse=True)
    plans = [
        image_plan(tiling, size >> 32, size & 0xFFFFFFFF, alone) if size or not tiling.sized else None
        for size in distinct.tolist()
    ]
    counts = [(len(plan.index), plan.tiles) if plan else (0, 0) for plan in plans]
    return np.asarray(counts, np.int32).reshape(-1, 2)[which]


def _whole_records(
    base, rows: np.ndarray, splicing: Splicing, alone, together, without
) -> tuple[np.ndarray, np.ndarray]:
    """The counts int32 [6, rows] of records that stay whole, and which ones do: they need no splice to be counted."""
    settings = splicing.settings
    tokens, images = (
        offsets[rows[0] : rows[-1] + 2] if len(rows) else np.zeros(1, np.int64)
        for offsets in (base.offsets, base.image_offsets)
    )
    supervised = base.supervised[tokens[0] : tokens[-1]]
    names = base.images[images[0] : images[-1]]
    count = np.diff(images)
    of_image = np.where(np.repeat(count == 1, count)[:, None], alone[names], together[names])
    visual, tiles = _sums(of_image, images).T
    text = np.diff(tokens) - count
    length, limit = text + visual, settings["length"]
    fits = text <= limit - settings["reserved"] if settings["truncation"] == "before_splice" else length <= limit
    scored = _sums(supervised, tokens)
    # The first token is never predicted; where it would count, the splice decides which one that is.
    fits &= ~supervised[tokens[:-1] - tokens[0]] & (scored > 0) & (length <= settings["length"])
    fits &= (tiles <= (splicing.tiles_per_row or np.inf)) & (_sums(without[names], images) == 0)
    nothing = np.zeros(len(rows), np.int32)
    return np.stack([length, scored, count, tiles, nothing, nothing]).astype(np.int32), fits


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The sum of each part of `values` [n, ...], whose parts begin at `offsets`, the first with the first value."""
    total = np.concatenate([np.zeros((1, *values.shape[1:]), np.int64), np.cumsum(values, 0, np.int64)])
    return np.diff(total[offsets - offsets[0]], axis=0)


def _usable(base: SimpleNamespace, row: int, splicing: Splicing, sizes: np.ndarray) -> Spliced:
    """The encoded record spliced, to learn its length. Raises `DataError` if no row can be made of it."""
    name = f"record {base.ids[row]!r}"
    try:
        spliced = splice(table_encoded(base, row), image_plans(splicing.tiling, sizes), **splicing.settings)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    length, limit = splicing.settings["length"], splicing.tiles_per_row
    if spliced is None:
        raise DataError(f"{name} is longer than `length` ({length}), {DROPPED}")
    if not spliced.weights.any():
        raise DataError(
            f"{name} has no supervised token within `length` ({length}); raise it, or leave the record out."
        )
    if len(spliced.tokens) > length:
        raise DataError(f"{name} has {len(spliced.tokens)} tokens, but a row holds {length}; raise `length`.")
    if limit and spliced.num_tiles > limit:
        what = f"{spliced.num_images} images" + (f" in {spliced.num_tiles} tiles" if splicing.tiling.sized else "")
        raise DataError(f"{name} has {what}, but a row holds {limit}; raise `tiles_per_row`.")
    return spliced


@functools.lru_cache(maxsize=64)
def open_table(folder: str) -> SimpleNamespace:
    """A table's columns (memory-mapped), `image_names`, `ids`, `bad` records and content `digest`."""
    path = Path(folder)
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    base = open_table(str(path.parent / meta["base"])) if "base" in meta else SimpleNamespace()
    columns: dict[str, Any] = {file.stem: open_array(file) for file in path.glob("*.npy")}
    for name, parse in {"image_names": str, "ids": json.loads, "bad": json.loads}.items():
        if columns.pop(f"{name}_offsets", None) is not None:
            columns[name] = Texts(path, name, parse)
    if "base" in meta:
        columns["bad"] = _BadRecords(base.bad, columns["bad"])
    return SimpleNamespace(**vars(base) | columns | meta)


class _BadRecords:
    """The records that cannot be used, in order, from both tables; they stay on disk."""

    def __init__(self, *parts: Texts):
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __iter__(self) -> Iterator[dict]:
        return heapq.merge(*self._parts, key=lambda bad: bad["record"])


def table_encoded(table: SimpleNamespace, row: int) -> Encoded:
    """One record of a table as `encode` returned it."""
    part = slice(table.offsets[row], table.offsets[row + 1])
    return Encoded(np.asarray(table.tokens[part]), np.asarray(table.supervised[part], np.float32))


def table_images(table: SimpleNamespace, row: int) -> np.ndarray:
    """Indices into `image_names` of the images that a record uses."""
    start = table.image_offsets[row]
    return table.images[start : start + table.used_images[row]]


def table_instructions(table: SimpleNamespace, row: int) -> list[np.ndarray]:
    """The instruction of each image that a record uses, int32 [n], where the connector reads it."""
    first, ends = table.image_offsets[row], table.instruction_offsets
    return [table.instructions[ends[i] : ends[i + 1]] for i in range(first, first + table.used_images[row])]


def table_plans(table: SimpleNamespace, row: int, splicing: Splicing) -> list[ImagePlan]:
    """The plans of a record's images, those that were cut off included."""
    images = table.images[table.image_offsets[row] : table.image_offsets[row + 1]]
    return image_plans(splicing.tiling, table.sizes[images])


def table_spliced(table: SimpleNamespace, row: int, splicing: Splicing) -> Spliced:
    """One record of a table, spliced as when the table was made."""
    return splice(table_encoded(table, row), table_plans(table, row, splicing), **splicing.settings)


def table_text(table: SimpleNamespace, row: int, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """What a record's tokens say, in runs of (text, supervised); an image is ('<image>', False)."""
    encoded = table_encoded(table, row)
    kinds = np.where(encoded.tokens == IMAGE_TOKEN, -1, encoded.weights > 0)
    cuts = np.flatnonzero((np.diff(kinds) != 0) | (kinds[1:] == -1)) + 1
    runs = zip(np.split(encoded.tokens, cuts), np.split(kinds, cuts), strict=True)
    return [
        ("<image>", False) if kind[0] == -1 else (tokenizer.decode(ids, skip_special=False), bool(kind[0]))
        for ids, kind in runs
    ]
