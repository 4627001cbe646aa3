"""The records of one source, tokenised once and kept on disk as flat arrays that are memory-mapped.

A table is a folder of .npy files. It holds what the rows need (tokens, labels, image names) for every usable
record, and the list of the records that cannot be used, each with its reason.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxvlm.config import PromptConfig, SourceConfig
from jaxvlm.data import DataError
from jaxvlm.data.conversation import IMAGE_TOKEN, Encoded, encode_all, record_images
from jaxvlm.data.layout import Spliced, splice
from jaxvlm.data.sources import read_records, select
from jaxvlm.data.tokenizer import Tokenizer

VERSION = 1  # raise it when the same records would give other arrays
CHUNK = 512  # records tokenised in one call


def splice_settings(prompt: PromptConfig, tokenizer: Tokenizer, num_visual_tokens: int, images_per_row: int) -> dict:
    """The arguments of `splice` for planning and assembling. Raises `DataError` if they are unusable."""
    settings = {
        "num_visual_tokens": num_visual_tokens,
        "layout": prompt.layout,
        "length": prompt.length,
        "truncation": prompt.truncation,
        "images_per_row": images_per_row,
        "bos_id": tokenizer.bos_id if tokenizer.adds_bos else None,
        "pad_id": tokenizer.pad_id or 0,
    }
    splice(Encoded(np.zeros(0, np.int32), np.zeros(0, np.float32)), **settings)  # raises for unusable settings
    return settings


def cached_table(
    source: SourceConfig,
    template: str,
    splicing: dict,
    tokenizer: Tokenizer,
    seed: Sequence[int],
    cache: Path,
    log: Callable[[str], Any],
) -> Path:
    """The folder of the source's table, made unless the cache has it for this file, tokenizer and these
    settings.
    """
    try:
        stat = os.stat(source.path)
    except OSError as error:
        raise DataError(f"The data file {source.path!r} does not exist. Check the source's `path`.") from error
    whole = float(source.fraction).is_integer()
    key = [VERSION, os.path.abspath(source.path), stat.st_size, stat.st_mtime_ns, template, splicing]
    key += [tokenizer.fingerprint_text, source.fraction, None if whole else list(seed)]
    folder = cache / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    if not (folder / "meta.json").is_file():
        arrays, bad, meta = _encode_records(source, template, splicing, tokenizer, seed, log)
        _write(folder, arrays, bad, meta)
    return folder


def _encode_records(source, template, splicing, tokenizer, seed, log) -> tuple[dict, list[dict], dict]:
    records = read_records(source.path)
    indices, copies = np.unique(select(len(records), source.fraction, seed), return_counts=True)
    if len(indices) > 2000:
        log(f"{source.name or source.path}: tokenising {len(indices):,} records (kept for the next run)")
    tokens, supervised, images, rows, ids, bad = [], [], [], [], [], []
    names: dict[str, int] = {}
    for start in range(0, len(indices), CHUNK):
        numbers = indices[start : start + CHUNK].tolist()
        chunk = [_read(records, number) for number in numbers]
        encoded = encode_all(chunk, tokenizer, template, splicing["layout"])
        for k, (number, record, one) in enumerate(zip(numbers, chunk, encoded, strict=True), start=start):
            try:
                spliced = _usable(record, one, splicing)
            except DataError as error:
                identity = record.get("id") if isinstance(record, dict) else None
                place = {"source": source.name, "file": source.path, "record": number, "id": identity}
                bad.append(place | {"reason": str(error)})
                continue
            ids.append(record.get("id"))
            tokens.append(one.tokens)
            supervised.append(one.weights > 0)
            images.append([names.setdefault(name, len(names)) for name in record_images(record)[: spliced.num_images]])
            scored = int((spliced.weights > 0).sum())
            cut = (spliced.dropped_images, spliced.truncated)
            rows.append((number, copies[k], len(spliced.tokens), scored, *cut))
    columns = np.asarray(rows, np.int64).reshape(-1, 6).T
    arrays = {
        "tokens": _flat(tokens, np.int32),
        "supervised": _flat(supervised, np.bool_),
        "offsets": _offsets(tokens),
        "images": _flat(images, np.int32),
        "image_offsets": _offsets(images),
        **dict(
            zip(
                ("record", "copies", "lengths", "supervised_tokens", "dropped_images", "truncated"),
                columns,
                strict=True,
            )
        ),
    }
    return arrays, bad, {"image_names": list(names), "ids": ids}


def _read(records: Sequence, number: int) -> dict | DataError:
    try:
        return records[number]
    except DataError as error:
        return error


def _usable(record: dict | DataError, encoded: Encoded | DataError, splicing: dict) -> Spliced:
    """The encoded record spliced, to learn its length. Raises `DataError` if no row can be made of it."""
    for error in (record, encoded):
        if isinstance(error, DataError):
            raise error
    name = f"record {record.get('id')!r}"
    try:
        spliced = splice(encoded, **splicing)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    length, limit = splicing["length"], splicing["images_per_row"]
    if spliced is None:
        raise DataError(f"{name} is longer than `length` ({length}), and `truncation` is 'drop'.")
    if not spliced.weights.any():
        raise DataError(
            f"{name} has no supervised token within `length` ({length}); raise it, or leave the record out."
        )
    if spliced.num_images > limit:
        raise DataError(f"{name} has {spliced.num_images} images, but a row holds {limit}; raise `images_per_row`.")
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
    arrays = {}
    for file in path.glob("*.npy"):
        array = np.load(file, mmap_mode="r")
        arrays[file.stem] = array if array.size else np.array(array)
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    bad = json.loads((path / "bad.json").read_text(encoding="utf-8"))
    return SimpleNamespace(**arrays, bad=bad, **meta)


def table_encoded(table: SimpleNamespace, row: int) -> Encoded:
    """One record of a table as `encode` returned it."""
    part = slice(table.offsets[row], table.offsets[row + 1])
    return Encoded(np.asarray(table.tokens[part]), np.asarray(table.supervised[part], np.float32))


def table_images(table: SimpleNamespace, row: int) -> np.ndarray:
    """Indices into `image_names` of the images that a record uses."""
    return table.images[table.image_offsets[row] : table.image_offsets[row + 1]]


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
