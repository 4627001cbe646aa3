"""Sources: what a data set on disk is to everything that reads one, whatever its format.

A source is a random-access sequence of LLaVA records, {"id", "image": name | [names] | absent, "conversations": [{"from":
"human" | "gpt", "value": text}, …]} (recipes §2.1), and it knows where each record's images are: files in a folder, or bytes
that it holds itself under the names 'record:position'. The table builder, the row reader, the feature cache, the evaluation
readers and the `data` verbs read data through this and nothing else.
"""

from __future__ import annotations

import bisect
import functools
import glob
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISREG
from typing import Protocol

import numpy as np

from jaxvlm.config import SourceConfig
from jaxvlm.data import DataError
from jaxvlm.data.columns import Log, cache_folder, quiet
from jaxvlm.data.json_files import BOM, JsonSource


class Source(Protocol):
    """The records of a data set. Picklable; opens its files lazily; safe in worker processes and threads."""

    path: str  # named in errors

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict:
        """Record `i`. Raises `DataError` saying what is wrong with it, the line in its file included."""

    def image(self, name: str) -> str | bytes:
        """What `load_image` and `image_size` take: an absolute path, or the file's bytes."""

    def image_file(self, name: str) -> str | None:
        """The absolute path of an image that is a file; None for one that the source itself holds ('123:0')."""

    def fingerprint(self) -> list:
        """What differs when the content differs, for JSON: path, size and time of change of every file."""


def open_source(config: SourceConfig, cache_dir: str | os.PathLike | None = None, log: Log = quiet) -> Source:
    """The source at `config.path`, whose kind is recognised from its content.

    A file: a JSON list of records, JSONL, or an ArrayRecord shard. A folder: shards that jaxvlm wrote, what `datasets` saved
    to disk, or what TFDS prepared as array_record; a folder with several splits is asked for one of them by `FOLDER/SPLIT`.
    Several paths, as `{a,b}.json` or with `*`, are one source after the other. Large JSON files are indexed once, in the
    cache.

    Raises `DataError` for a path that is missing, empty, broken, or of no known kind.
    """
    cache = cache_folder(cache_dir)
    paths = source_paths(config.path)
    parts = [_open(path, config.images, cache, log) for path in paths]
    return parts[0] if len(parts) == 1 else Several(config.path, config.images, parts)


def source_paths(path: str) -> list[str]:
    """The paths that a path with braces and wildcards stands for; one that exists as it is stands for itself.

    Raises `DataError` for wildcards that match nothing.
    """
    if os.path.exists(path):
        return [path]
    if choices := _choices(path):
        return [one for choice in choices for one in source_paths(choice)]
    if not glob.has_magic(path):
        return [path]
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise DataError(f"No file matches {path!r}. Check the source's `path`.")
    return found


def _choices(path: str) -> list[str]:
    """The paths that the first pair of braces stands for, as in a shell; none if there is no pair."""
    start, depth, cuts = path.find("{"), 0, []
    for at in range(start, len(path)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(path[at], 0)
        if path[at] == "," and depth == 1:
            cuts.append(at)
        if depth == 0:
            ends = [start, *cuts, at]
            return [path[:start] + path[a + 1 : b] + path[at + 1 :] for a, b in itertools.pairwise(ends)]
    return []


def _open(path: str, images: str, cache: Path, log: Log) -> Source:
    if os.path.isdir(path):
        return _open_folder(path, images)
    folder, split = os.path.split(path)
    if not os.path.exists(path) and os.path.isfile(os.path.join(folder, "features.json")):
        return _open_folder(folder, images, split)
    try:
        with open(path, "rb") as file:
            head = file.read(65536)
    except OSError as error:
        if not os.path.exists(path):
            raise DataError(f"The data file {path!r} does not exist. Check the source's `path`.") from error
        raise DataError(f"The data file {path} cannot be read: {error.strerror}. Check the source's `path`.") from error
    first = head.removeprefix(BOM).strip()[:1]
    if not first:
        raise DataError(f"The data file {path} is empty.")
    if head.startswith(RIEGELI):
        from jaxvlm.data.array_records import open_shards

        return open_shards(path, [path], images)
    if first in (b"[", b"{"):
        return JsonSource(path, images, first == b"{", cache, log)
    raise DataError(f"{path} is no data that can be read: it starts with {head[:20]!r}. {KNOWN}")


RIEGELI = b"\x83\xafp\xd1\r\x88J?"  # the first bytes of every ArrayRecord file
KNOWN = (
    "Sources are JSON lists, JSONL, ArrayRecord files, and folders that `jaxvlm data convert`, save_to_disk of the package "
    "datasets, or TFDS with file_format='array_record' wrote."
)


def _open_folder(folder: str, images: str, split: str = "") -> Source:
    """Imports only what the kind needs: the packages are optional, and large."""
    names = set(os.listdir(folder))
    if "features.json" in names:
        from jaxvlm.data.tfds_files import open_prepared

        return open_prepared(folder, split, images)
    if names & {"state.json", "dataset_dict.json"}:
        from jaxvlm.data.saved_datasets import open_saved

        return open_saved(folder, images)
    shards = sorted(name for name in names if ".array_record" in name and not name.startswith("."))
    if "manifest.json" in names or shards:
        from jaxvlm.data.array_records import open_shards

        return open_shards(folder, [os.path.join(folder, name) for name in shards], images)
    raise DataError(f"The folder {folder} is no data set that can be read. {KNOWN}")


class Several:
    """Sources one after the other, as one."""

    def __init__(self, path: str, images: str, parts: Sequence[Source]):
        self.path, self.images, self.parts = path, images, parts
        self._starts = list(itertools.accumulate((len(part) for part in parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> dict:
        i = range(len(self))[i]
        part, first = self._part(i)
        try:
            record = part[i - first]
        except DataError as error:
            raise DataError(f"{part.path}, its record number {i - first}: {error}") from error
        # Of any type: what is wrong with a record is seen later.
        names = record.get("image") if isinstance(record, dict) else None
        if isinstance(names, str):
            return record | {"image": self._renamed(part, names, first)}
        if isinstance(names, list):
            names = [self._renamed(part, name, first) if isinstance(name, str) else name for name in names]
            return record | {"image": names}
        return record

    def image(self, name: str) -> str | bytes:
        part, name = self._held(name)
        return part.image(name)

    def image_file(self, name: str) -> str | None:
        part, name = self._held(name)
        return part.image_file(name)

    def fingerprint(self) -> list:
        return [file for part in self.parts for file in part.fingerprint()]

    def _part(self, i: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self._starts, i) - 1
        return self.parts[number], self._starts[number]

    def _renamed(self, part: Source, name: str, first: int) -> str:
        if part.image_file(name) is not None:
            return name
        record, place = held(name)
        return f"{first + record}:{place}"

    def _held(self, name: str) -> tuple[Source, str]:
        """The part that has an image, and its name there. All have the same folder of files."""
        if (found := held(name)) and found[0] < len(self):
            part, first = self._part(found[0])
            inside = f"{found[0] - first}:{found[1]}"
            if part.image_file(inside) is None:
                return part, inside
        return self.parts[0], name


def read_about(file: Path, *keys: str) -> dict:
    """A JSON file that describes a data set. Raises `DataError` if it cannot be read, or lacks one of the keys."""
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}. Copy the data set again.") from error
    if not isinstance(about, dict) or not set(keys) <= set(about):
        raise DataError(
            f"{file} does not describe a data set: it must have {', '.join(keys)}. Copy the data set again."
        )
    return about


def held(name: str) -> tuple[int, int] | None:
    """Record and position in it of an image that a source holds, by its name; None for a file's name."""
    found = re.fullmatch(r"(\d+):(\d+)", name)
    return (int(found[1]), int(found[2])) if found else None


def held_place(source: Source, name: str) -> tuple[int, int]:
    """Record and position of an image that the source must hold. Raises `DataError` for any other name."""
    found = held(name)
    if found is None or found[0] >= len(source):
        raise DataError(f"{source.path} holds no image {name!r}; its images are called 'record:position'.")
    return found


def file_fingerprint(paths: Sequence[str]) -> list:
    """Absolute path, size and time of change (ns) of every file."""
    return [[os.path.abspath(path), (stat := os.stat(path)).st_size, stat.st_mtime_ns] for path in paths]


def image_address(source: Source, name: str) -> str:
    """What an image is called outside of its source: the absolute path of its file, or SOURCE#record:position."""
    return source.image_file(name) or f"{source.path}#{name}"


def image_at(address: str) -> str | bytes:
    """The image at an address, as `load_image` and `image_size` take it."""
    path, name = _split(address)
    return _opened(path).image(name) if name else path


def addresses_fingerprint(addresses: Sequence[str]) -> list:
    """What differs when one of the images at these addresses differs, for JSON."""
    files, sources = [], set()
    for address in addresses:
        path, name = _split(address)
        if name:
            sources.add(path)
        else:
            files.append(path)
    return [list(addresses), file_fingerprint(files), [_opened(path).fingerprint() for path in sorted(sources)]]


def _split(address: str) -> tuple[str, str]:
    """The path of a source, and an image that it holds; or of an image, and ''."""
    path, _, name = address.rpartition("#")
    return (path, name) if path and held(name) and not os.path.isfile(address) else (address, "")


@functools.lru_cache(maxsize=64)
def _opened(path: str) -> Source:
    return open_source(SourceConfig(path=path))


def in_threads(pair: Callable[[str], tuple[int, int]], names: Iterable[str], dtype) -> np.ndarray:
    """`pair` of every name, [n, 2]. A thread takes hundreds at a time: to hand over one costs more than a look at a file."""
    names, parts = iter(names), [np.zeros((0, 2), dtype)]
    with ThreadPoolExecutor(16) as pool:
        while window := list(itertools.islice(names, 65536)):
            chunks = (window[start : start + 256] for start in range(0, len(window), 256))
            parts += pool.map(lambda chunk: np.asarray([pair(name) for name in chunk], dtype), chunks)
    return np.concatenate(parts)


def image_stats(source: Source, names: Sequence[str]) -> np.ndarray:
    """Size and time of change (ns) of images that are files, int64 [n, 2]: -1 where there is none, or an empty one.

    Zeros for images that the source holds: they change with it. Threads, for file systems over a network.
    """

    def stat(name: str) -> tuple[int, int]:
        path = source.image_file(name)
        if path is None:
            return 0, 0
        try:
            found = os.stat(path)
        except OSError:
            return -1, -1
        return (found.st_size, found.st_mtime_ns) if S_ISREG(found.st_mode) and found.st_size else (-1, -1)

    return in_threads(stat, names, np.int64)
