"""Sources: what a data set on disk is to everything that reads one, whatever its format.

A source is a random-access sequence of LLaVA records, {"id", "image": name | [names] | absent, "conversations": [{"from":
"human" | "gpt", "value": text}, …]} (recipes §2.1), and it knows where each record's images are. The table builder, the row
reader, the feature cache, the evaluation readers and the `data` verbs read data through this and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISREG
from typing import Protocol

import numpy as np

from jaxvlm.config import SourceConfig
from jaxvlm.data import DataError


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


def open_source(config: SourceConfig) -> Source:
    """The source that `config.path` is, recognised from its content.

    Raises `DataError` for a file that is missing, empty, or not of a known kind.
    """
    return JsonSource(config)


class JsonSource:
    """LLaVA's JSON lists and JSONL files; the images are files in a folder."""

    def __init__(self, config: SourceConfig):
        self.path = config.path
        self.images = config.images
        self.records = read_records(config.path)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        return self.records[i]

    def image(self, name: str) -> str:
        return image_path(self.images, name)

    image_file = image

    def fingerprint(self) -> list:
        stat = os.stat(self.path)
        return [[os.path.abspath(self.path), stat.st_size, stat.st_mtime_ns]]


def read_records(path: str | os.PathLike) -> Sequence[dict]:
    """The records of a file: a JSON list is parsed at once, a JSONL file line by line when asked.

    Raises `DataError` for a file that is missing, empty, or not JSON, naming the line. A bad line of a JSONL
    file raises when that record is read.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            first = file.read(65536).removeprefix(b"\xef\xbb\xbf").strip()[:1]
    except OSError as error:
        raise DataError(f"The data file {path} cannot be read: {error.strerror}. Check the source's `path`.") from error
    if not first:
        raise DataError(f"The data file {path} is empty.")
    return Jsonl(path) if first == b"{" or (first != b"[" and path.suffix == ".jsonl") else _read_list(path)


def _read_list(path: Path) -> list:
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}."
            " A list that breaks off is a sign of an incomplete download."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}; convert it to UTF-8.") from error
    if not isinstance(records, list) or not records:
        raise DataError(f"{path} must hold a list of records (JSON), or one record a line (JSONL).")
    return records


class Jsonl(Sequence):
    """A JSONL file, kept as the byte offsets of its lines (blank lines are left out)."""

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        offsets, lines, position = [], [], 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    offsets.append(position)
                    lines.append(number)
                position += len(line)
        self.offsets = np.asarray(offsets, np.int64)
        self.lines = np.asarray(lines, np.int64)
        self._file = None

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> dict:
        if self._file is None:
            self._file = open(self.path, "rb")
        self._file.seek(self.offsets[i])
        try:
            return json.loads(self._file.readline().decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise DataError(
                f"line {self.lines[i]} is not JSON: column {error.colno}: {error.msg}. Each line must be one record."
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(f"line {self.lines[i]} is not UTF-8; convert the file to UTF-8.") from error

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}


def image_path(images: str, name: str) -> str:
    """The absolute path of a record's image in the source's `images` folder."""
    return os.path.abspath(os.path.join(images, name))


def file_stats(paths: Sequence[str]) -> list[tuple[int, int] | None]:
    """Size and time of change (ns) of each file; None where there is none, or an empty one. Threads, for file systems
    over a network.
    """

    def stat(path: str) -> tuple[int, int] | None:
        try:
            found = os.stat(path)
        except OSError:
            return None
        return (found.st_size, found.st_mtime_ns) if S_ISREG(found.st_mode) and found.st_size else None

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(stat, paths, chunksize=256))


def missing_files(paths: Sequence[str]) -> list[int]:
    """Indices of the paths that are not files with something in them."""
    return [i for i, found in enumerate(file_stats(paths)) if found is None]
