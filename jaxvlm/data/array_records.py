"""ArrayRecord shards that hold records with their images, written and read.

A shard is an ArrayRecord file of `group_size:1`, uncompressed (images are already). Its entries are each record as JSON
(UTF-8), followed by its images as the bytes of their files; so text is read without images, and an image without the others.
The last entry is an index: `INDEX`, then int32 little-endian, which entry each record is. The shards of a set stand in a
folder beside `manifest.json`, which says what they are, how many records each holds, and what they were made from.

Reading needs the package array_record (`pip install jaxvlm[data]`) and nothing of TensorFlow.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxvlm.data import DataError
from jaxvlm.data.conversation import record_images
from jaxvlm.data.sources import file_fingerprint, held_place, read_about

INDEX = b"jaxvlm records 1\n"
KIND = "jaxvlm array records"
MANIFEST = "manifest.json"
SUFFIX = ".array_record"


def array_record_module() -> Any:
    """The package's reader and writer. Raises `DataError` where it is not installed."""
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise DataError(
            f"ArrayRecord files need a package that is not installed: pip install jaxvlm[data] ({error})."
        ) from error
    return array_record_module


OPEN = 256  # files; each costs 8 bytes of memory an entry, and opening one a millisecond


class Entries:
    """An ArrayRecord file's entries. Picklable; opened when asked; safe in threads."""

    def __init__(self, path: str):
        stat = os.stat(path)
        self.path, self._stamp = path, (stat.st_size, stat.st_mtime_ns)

    def __len__(self) -> int:
        return _reader(self.path, self._stamp).num_records()

    def __getitem__(self, i: int) -> bytes:
        return _reader(self.path, self._stamp).read(i, i + 1)[0]  # of the ways to read one entry much the fastest


@functools.lru_cache(maxsize=OPEN)  # a set may have more shards than a process may have files
def _reader(path: str, stamp: tuple[int, int]) -> Any:
    # No reading ahead: what is read next is somewhere else.
    options = {"options": "readahead_buffer_size:0,max_parallelism:0", "file_reader_buffer_size": 32768}
    reader = array_record_module().ArrayRecordReader(path, **options)
    if not reader.num_records():
        raise DataError(f"{path} is no whole ArrayRecord file. Copy or convert it again.")
    return reader


def write_shard(path: str | os.PathLike, records: Iterable[tuple[dict, Sequence[bytes]]]) -> int:
    """Writes a shard of (record, its images' bytes in order) and returns how many it holds.

    It has its name only when it is whole. A record keeps its other keys; the names of its images are kept for people.
    Raises `DataError` for a record with another number of images than names.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    writer = array_record_module().ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")
    starts, entry = [], 0
    try:
        for record, images in records:
            kept = {key: value for key, value in record.items() if key not in ("image", "image_file")}
            names = record.get("image_file", record.get("image"))
            if len(record_images(record)) != len(images):
                raise DataError(f"record {record.get('id')!r} names {names!r} but comes with {len(images)} images.")
            writer.write(
                json.dumps(kept | {"image": names} if names else kept, ensure_ascii=False).encode(
                    "utf-8", "surrogatepass"
                )
            )
            for image in images:
                writer.write(bytes(image))
            starts.append(entry)
            entry += 1 + len(images)
        writer.write(INDEX + np.asarray([*starts, entry], "<i4").tobytes())
        writer.close()
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return len(starts)


def write_manifest(folder: str | os.PathLike, shards: Sequence[str], source: Any) -> dict:
    """Writes and returns the manifest of finished shards, names of files in `folder`, made from `source`."""
    folder = Path(folder)
    entries = [_index(Entries(str(folder / name))) for name in shards]
    files = [
        {
            "file": name,
            "records": len(starts) - 1,
            "images": int(starts[-1]) - len(starts) + 1,
            "bytes": os.path.getsize(folder / name),
        }
        for name, starts in zip(shards, entries, strict=True)
    ]
    manifest = {
        "kind": KIND,
        "version": 1,
        "records": sum(file["records"] for file in files),
        "images": sum(file["images"] for file in files),
        "source": {"path": source.path, "fingerprint": source.fingerprint()},
        "shards": files,
    }
    part = folder / f".{MANIFEST}.part"
    part.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    part.replace(folder / MANIFEST)
    return manifest


def _index(entries: Entries) -> np.ndarray:
    """Which entry each record is, and one past the last image: int32 [n + 1]."""
    last = entries[len(entries) - 1]
    if not last.startswith(INDEX):
        raise DataError(f"{entries.path} ends with no index of records: jaxvlm did not write it, or a newer one did.")
    return np.frombuffer(last, "<i4", offset=len(INDEX))


def open_shards(path: str, files: Sequence[str], images: str) -> Any:
    """The source of a shard, or of the shards in a folder: those of its manifest, which must be whole."""
    manifest = Path(path) / MANIFEST
    if not manifest.is_file():
        entries = Entries(files[0])
        if not entries[len(entries) - 1].startswith(INDEX):
            from jaxvlm.data.tfds_files import open_examples

            return open_examples(path, files, images)
        return ArrayRecordSource(path, files, [len(_index(Entries(file))) - 1 for file in files])
    about = read_about(manifest, "kind", "version", "shards")
    if (about["kind"], about["version"]) != (KIND, 1):
        raise DataError(f"{manifest} is not of a set that this version of jaxvlm reads: it is {about['kind']!r}.")
    for shard in about["shards"]:
        file = Path(path) / shard["file"]
        if not file.is_file() or file.stat().st_size != shard["bytes"]:
            raise DataError(f"{file} is missing or not whole: {manifest} says {shard['bytes']:,} bytes. Copy it again.")
    files = [str(Path(path) / shard["file"]) for shard in about["shards"]]
    return ArrayRecordSource(path, files, [shard["records"] for shard in about["shards"]], [str(manifest)])


class ArrayRecordSource:
    """Shards of records with their images."""

    def __init__(self, path: str, files: Sequence[str], counts: Sequence[int], others: Sequence[str] = ()):
        array_record_module()  # where it is missing, that is said at once
        self.path = path
        self._shards = [Entries(file) for file in files]
        self._starts = list(itertools.accumulate(counts, initial=0))
        self._fingerprint = file_fingerprint([*others, *files])
        self._indices: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> dict:
        i = range(len(self))[i]
        entries, starts = self._place(i)
        record = json.loads(entries[starts[0]].decode("utf-8", "surrogatepass"))
        if "image" in record:
            record["image_file"] = names = record["image"]
            one, count = isinstance(names, str), starts[1] - starts[0] - 1
            record["image"] = f"{i}:0" if one else [f"{i}:{k}" for k in range(count)]
        return record

    def image(self, name: str) -> bytes:
        record, position = held_place(self, name)
        entries, (start, end) = self._place(record)
        if position >= end - start - 1:
            raise DataError(f"{self.path} has no image {name!r}: its record has {end - start - 1}.")
        return entries[start + 1 + position]

    def image_file(self, name: str) -> None:
        return None

    def fingerprint(self) -> list:
        return self._fingerprint

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_indices": {}}

    def _place(self, i: int) -> tuple[Entries, tuple[int, int]]:
        """The shard of a record, its entry there, and the entry of the next record."""
        shard = bisect.bisect_right(self._starts, i) - 1
        if shard not in self._indices:
            self._indices[shard] = _index(self._shards[shard])
        start, end = self._indices[shard][i - self._starts[shard] :][:2].tolist()
        return self._shards[shard], (start, end)
