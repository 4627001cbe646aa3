"""Columns on disk: arrays and texts that are written piece by piece and opened as memory maps.

What is kept for the next run (indices of data files, tables of records, plans) is made of these, so that it may be larger
than the memory, costs a worker the pages that it touches, and is shared by the processes of a machine.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxvlm.data import DataError

Log = Callable[[str], Any]


def quiet(message: str) -> None:
    """A log that nobody reads."""


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """`cache_dir`, or $JAXVLM_CACHE, or ~/.cache/jaxvlm."""
    return Path(cache_dir or os.environ.get("JAXVLM_CACHE") or Path.home() / ".cache" / "jaxvlm")


def cached(cache: Path, key: list) -> Path:
    """The folder in a cache for what `key`, anything that is JSON, decides."""
    return cache / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of `folder` in the end, so that no reader sees half of one."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    except OSError as error:
        raise DataError(
            f"The cache {folder.parent} cannot be written: {error.strerror}. Set JAXVLM_CACHE to a folder that can be."
        ) from error
    try:
        yield new
        new.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


class Columns:
    """Arrays and texts by name, each in files of a folder, that grow at their end. Close it to have them."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, _Npy] = {}
        self._totals: dict[str, int] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """More rows of an array; all parts have one dtype."""
        if name not in self._files:
            self._files[name] = _Npy(self._folder / f"{name}.npy", values)
        self._files[name].append(values)

    def append_parts(self, name: str, offsets: str, parts: Sequence[np.ndarray], dtype) -> None:
        """More parts of a flat array; part i of all is `name[offsets[i] : offsets[i + 1]]`."""
        if offsets not in self._totals:
            self._totals[offsets] = 0
            self.append(offsets, np.zeros(1, np.int64))
        ends = self._totals[offsets] + np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._totals[offsets] = int(ends[-1]) if len(ends) else self._totals[offsets]
        self.append(offsets, ends)
        self.append(name, np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False))

    def append_texts(self, name: str, texts: Iterable[str]) -> None:
        # A lone surrogate is what JSON makes of a broken escape.
        coded = [np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8) for text in texts]
        self.append_parts(name, f"{name}_offsets", coded, np.uint8)

    def close(self) -> str:
        """Ends the files. Returns a digest of all that was written, which does not depend on how it was cut."""
        for file in self._files.values():
            file.close()
        digest = hashlib.sha256()
        for name, file in sorted(self._files.items()):
            digest.update(f"{name} {file.dtype.str} {file.digest.hexdigest()}\n".encode())
        return digest.hexdigest()


class _Npy:
    """A .npy file whose number of rows is written when it is known; numpy leaves room for it."""

    def __init__(self, path: Path, like: np.ndarray):
        self.dtype, self.shape, self.rows = like.dtype, like.shape[1:], 0
        self.digest = hashlib.sha256()
        self._file = open(path, "wb")
        self._header()

    def append(self, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, self.dtype)
        self._file.write(values.data)
        self.digest.update(values.data)
        self.rows += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._header()
        self._file.close()

    def _header(self) -> None:
        about = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.rows, *self.shape)}
        np.lib.format.write_array_header_1_0(self._file, about)


_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_lock = threading.Lock()


def open_array(path: Path) -> np.ndarray:
    """An array file as an ndarray over a memory map; it cannot be written to."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if 0 in shape:
            return np.zeros(shape, dtype)
        start, mapped = file.tell(), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with _lock:
        _maps.add(mapped)
    return np.frombuffer(mapped, dtype, math.prod(shape), start).reshape(shape)


def release_maps() -> None:
    """Gives back the memory that arrays of `open_array` have taken. What is looked at again comes from the system's cache.

    A process that reads here and there in large files would in time have all of them in its memory, as far as the system
    counts it: every look maps the pages around too.
    """
    with _lock:
        maps = list(_maps)
    for mapped in maps:
        mapped.madvise(mmap.MADV_DONTNEED)


class Texts(Sequence):
    """A column of texts, or of what `parse` makes of them: a list that stays on disk."""

    def __init__(self, folder: Path, name: str, parse: Callable[[str], Any] = str):
        self._bytes, self._offsets = (open_array(folder / f"{part}.npy") for part in (name, f"{name}_offsets"))
        self._parse = parse

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> Any:
        i = range(len(self))[i]
        return self._read(*self._offsets[i : i + 2].tolist())

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self), 65536):
            for start, end in itertools.pairwise(self._offsets[first : first + 65537].tolist()):
                yield self._read(start, end)

    def _read(self, start: int, end: int) -> Any:
        return self._parse(self._bytes[start:end].tobytes().decode("utf-8", "surrogatepass"))
