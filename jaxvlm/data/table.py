"""The records of one source, tokenised once and kept on disk as flat arrays that are memory-mapped.

A table is a folder of .npy files. It holds what the rows need (tokens, labels, image names and sizes) for every
record that can be used, and the list of those that cannot, each with its reason.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from jaxvlm.config import PromptConfig, SourceConfig
from jaxvlm.data import DataError
from jaxvlm.data.conversation import IMAGE_TOKEN, Encoded, encode_all, record_images
from jaxvlm.data.image import image_size
from jaxvlm.data.instruction import InstructionTokenizer
from jaxvlm.data.layout import Spliced, splice
from jaxvlm.data.sources import file_stats, image_path, read_records, select
from jaxvlm.data.tiles import ImagePlan, Tiling, image_plan, image_plans
from jaxvlm.data.tokenizer import Tokenizer

VERSION = 2  # raise it when the same records would give other arrays
CHUNK = 512  # records tokenised in one call


class Splicing(NamedTuple):
    """How the conversations of a table become sequences."""

    tiling: Tiling
    tiles_per_row: int
    settings: dict  # further arguments of `splice`


def splicing_for(prompt: PromptConfig, tokenizer: Tokenizer, tiling: Tiling, tiles_per_row: int) -> Splicing:
    """The splicing for planning and assembling. Raises `DataError` if the settings are unusable."""
    one = len(image_plan(tiling, 1, 1).index)
    settings = {
        "layout": prompt.layout,
        "length": prompt.length,
        "truncation": prompt.truncation,
        "tile_tokens": tiling.tile_tokens,
        "reserved": tiles_per_row * one if prompt.truncation == "before_splice" else 0,
        "bos_id": tokenizer.bos_id if tokenizer.adds_bos else None,
        "pad_id": tokenizer.pad_id or 0,
    }
    splice(Encoded(np.zeros(0, np.int32), np.zeros(0, np.float32)), [], **settings)  # raises for unusable settings
    return Splicing(tiling, tiles_per_row, settings)


def cached_table(
    source: SourceConfig,
    template: str,
    splicing: Splicing,
    tokenizer: Tokenizer,
    seed: Sequence[int],
    cache: Path,
    log: Callable[[str], Any],
    instructions: InstructionTokenizer | None = None,
) -> str:
    """The folder of the source's table, made unless the cache has it for these files, tokenizer and settings.

    There are two: what tokenising gives, and upon it what splicing gives, which is cheap to make anew.
    """
    try:
        stat = os.stat(source.path)
    except OSError as error:
        raise DataError(f"The data file {source.path!r} does not exist. Check the source's `path`.") from error
    whole, layout = float(source.fraction).is_integer(), splicing.settings["layout"]
    key = [VERSION, os.path.abspath(source.path), stat.st_size, stat.st_mtime_ns, template, layout]
    key += [tokenizer.fingerprint_text, source.fraction, None if whole else list(seed)]
    key += [instructions.fingerprint_text] if instructions else []
    texts = _folder(cache, key)
    if not (texts / "meta.json").is_file():
        _write(texts, *_encode_records(source, template, layout, tokenizer, seed, log, instructions))

    base = open_table(str(texts))
    stats = None
    if splicing.tiling.sized:
        stats = file_stats([image_path(source.images, name) for name in base.image_names])
    key = [texts.name, asdict(splicing.tiling), splicing.tiles_per_row, splicing.settings, source.images, stats]
    folder = _folder(cache, key)
    if not (folder / "meta.json").is_file():
        sizes, why = np.zeros((len(base.image_names), 2), np.int64), {}
        if stats is not None:
            sizes, why = _image_sizes(base.image_names, source.images, stats, log)
        arrays, bad = _splice_records(base, source, splicing, sizes, why)
        _write(folder, arrays, bad, {"base": texts.name, "base_digest": base.digest})
    return str(folder)


def _folder(cache: Path, key: list) -> Path:
    return cache / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def _encode_records(source, template, layout, tokenizer, seed, log, instructions) -> tuple[dict, list[dict], dict]:
    records = read_records(source.path)
    indices, copies = np.unique(select(len(records), source.fraction, seed), return_counts=True)
    if len(indices) > 2000:
        log(f"{source.name or source.path}: tokenising {len(indices):,} records (kept for the next run)")
    tokens, supervised, images, asked, rows, ids, bad = [], [], [], [], [], [], []
    names: dict[str, int] = {}
    for start in range(0, len(indices), CHUNK):
        numbers = indices[start : start + CHUNK].tolist()
        chunk = [_read(records, number) for number in numbers]
        encoded = encode_all(chunk, tokenizer, template, layout)
        for k, (number, record, one) in enumerate(zip(numbers, chunk, encoded, strict=True), start=start):
            error = next((part for part in (record, one) if isinstance(part, DataError)), None)
            if error:
                identity = record.get("id") if isinstance(record, dict) else None
                bad.append(_place(source, number, identity) | {"reason": str(error)})
                continue
            ids.append(record.get("id"))
            tokens.append(one.tokens)
            supervised.append(one.weights > 0)
            images.append([names.setdefault(name, len(names)) for name in record_images(record)])
            asked += instructions.encode(record["conversations"]) if instructions else []
            rows.append((number, copies[k]))
    record, copies = np.asarray(rows, np.int64).reshape(-1, 2).T
    arrays = {
        "tokens": _flat(tokens, np.int32),
        "supervised": _flat(supervised, np.bool_),
        "offsets": _offsets(tokens),
        "images": _flat(images, np.int32),
        "image_offsets": _offsets(images),
        "record": record,
        "copies": copies,
    }
    if instructions:  # one for each entry of `images`
        arrays |= {"instructions": _flat(asked, np.int32), "instruction_offsets": _offsets(asked)}
    return arrays, bad, {"image_names": list(names), "ids": ids}


def _place(source: SourceConfig, number: int, identity: object) -> dict:
    return {"source": source.name, "file": source.path, "record": number, "id": identity}


def _read(records: Sequence, number: int) -> dict | DataError:
    try:
        return records[number]
    except DataError as error:
        return error


def _image_sizes(names: list[str], folder: str, stats: list, log) -> tuple[np.ndarray, dict[int, dict]]:
    """Upright sizes (width, height) of images, int64 [n, 2], and for those that have none the reason."""

    def read(name: str, stat: tuple | None) -> tuple[int, int] | dict:
        path = image_path(folder, name)
        if stat is None:
            return {"reason": f"image file {path} is missing or empty", "image": path}
        try:
            return image_size(path)
        except DataError as error:
            return {"reason": str(error)}

    if len(names) > 2000:
        log(f"{folder}: reading the sizes of {len(names):,} images (kept for the next run)")
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(read, names, stats, chunksize=64))
    why = {i: one for i, one in enumerate(found) if isinstance(one, dict)}
    sizes = [(0, 0) if i in why else one for i, one in enumerate(found)]
    return np.asarray(sizes, np.int64).reshape(-1, 2), why


def _splice_records(base, source, splicing: Splicing, sizes: np.ndarray, why: dict) -> tuple[dict, list[dict]]:
    """The columns that depend on the splicing, and the records that cannot be used with it (of which there are then no
    copies). `why` says of images why they have no size.
    """
    bad = list(base.bad)
    columns = np.zeros((6, len(base.record)), np.int64)
    copies = np.array(base.copies)
    for row in range(len(base.record)):
        names = base.images[base.image_offsets[row] : base.image_offsets[row + 1]]
        reason = next((why[n] for n in names.tolist() if n in why), None) if why else None
        try:
            spliced = None if reason else _usable(base, row, splicing, sizes[names])
        except DataError as error:
            reason = {"reason": str(error)}
        if reason:
            bad.append(_place(source, int(base.record[row]), base.ids[row]) | reason)
            copies[row] = 0
            continue
        scored = int((spliced.weights > 0).sum())
        used = (spliced.num_images, spliced.num_tiles, spliced.dropped_images, spliced.truncated)
        columns[:, row] = (len(spliced.tokens), scored, *used)
    names = ("lengths", "supervised_tokens", "used_images", "tiles", "dropped_images", "truncated")
    arrays = dict(zip(names, columns, strict=True)) | {"copies": copies, "sizes": sizes}
    return arrays, sorted(bad, key=lambda one: one["record"])


def _usable(base: SimpleNamespace, row: int, splicing: Splicing, sizes: np.ndarray) -> Spliced:
    """The encoded record spliced, to learn its length. Raises `DataError` if no row can be made of it."""
    name = f"record {base.ids[row]!r}"
    try:
        spliced = splice(table_encoded(base, row), image_plans(splicing.tiling, sizes), **splicing.settings)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    length, limit = splicing.settings["length"], splicing.tiles_per_row
    if spliced is None:
        raise DataError(f"{name} is longer than `length` ({length}), and `truncation` is 'drop'.")
    if not spliced.weights.any():
        raise DataError(
            f"{name} has no supervised token within `length` ({length}); raise it, or leave the record out."
        )
    if spliced.num_tiles > limit:
        what = f"{spliced.num_images} images" + (f" in {spliced.num_tiles} tiles" if splicing.tiling.sized else "")
        raise DataError(f"{name} has {what}, but a row holds {limit}; raise `tiles_per_row`.")
    return spliced


def _flat(parts: list, dtype) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype) for part in parts]) if parts else np.zeros(0, dtype)


def _offsets(parts: list) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)


def _write(folder: Path, arrays: dict, bad: list[dict], meta: dict) -> None:
    """Writes the table beside its place and renames it, so that no reader sees half of one."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    except OSError as error:
        raise DataError(
            f"The cache {folder.parent} cannot be written: {error.strerror}. Set JAXVLM_CACHE to a folder that can be."
        ) from error
    digest = hashlib.sha256(json.dumps(meta).encode())
    for name, array in sorted(arrays.items()):
        np.save(new / f"{name}.npy", array)
        digest.update(np.ascontiguousarray(array))
    (new / "bad.json").write_text(json.dumps(bad), encoding="utf-8")
    (new / "meta.json").write_text(json.dumps(meta | {"digest": digest.hexdigest()}), encoding="utf-8")
    try:
        new.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(new)
        if not (folder / "meta.json").is_file():
            raise


@functools.lru_cache(maxsize=64)
def open_table(folder: str) -> SimpleNamespace:
    """A table's arrays (memory-mapped), `image_names`, `bad` records and content `digest`."""
    path = Path(folder)
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    arrays = dict(vars(open_table(str(path.parent / meta["base"])))) if "base" in meta else {}
    for file in path.glob("*.npy"):
        array = np.load(file, mmap_mode="r")
        arrays[file.stem] = array.view(np.ndarray) if array.size else np.array(array)  # a memmap is slow to slice
    bad = json.loads((path / "bad.json").read_text(encoding="utf-8"))
    return SimpleNamespace(**arrays | {"bad": bad} | meta)


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
