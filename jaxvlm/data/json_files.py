"""LLaVA's JSON lists and JSONL files as sources: where each record stands is found once, in a stream, and kept.

An index is `offsets` int64 [n + 1] in bytes. Record i is `offsets[i] : offsets[i + 1] - 1`, white space around it included;
the byte left out ends it: a comma, the list's `]` or a newline. So a record is read alone, from a file of any size, and
whether it is JSON at all is seen when it is read.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxvlm.data import DataError
from jaxvlm.data.columns import Columns, Log, cached, new_folder, open_array

VERSION = 1  # raise it when the same file would give another index
SMALL = 1 << 25  # bytes; a smaller file is scanned whenever it is opened, in a fraction of a second
BLOCK = 1 << 22
COUNTED = 1 << 22  # bytes whose lines are counted at a time
WHOLE = 1 << 28  # bytes of an unfinished record that are looked through for what is wrong with it
BOM = b"\xef\xbb\xbf"
CONTINUATION = bytes(range(0x80, 0xC0))  # what stands in UTF-8 after the first byte of a character


class JsonSource:
    """A file of records, as a list or one a line; the images are files in a folder."""

    def __init__(self, path: str, images: str, lines: bool, cache: Path, log: Log):
        self.path, self.images, self._lines = path, images, lines
        stat = os.stat(path)
        self._stat = [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]
        self._text = _TextFile(path)
        self._folder = cached(cache / "indices", [VERSION, lines, self._stat])
        self._offsets = None
        if stat.st_size < SMALL:
            self._offsets, self._folder = np.concatenate(list(_scan(path, lines))), None
        elif not self._folder.is_dir():
            _write_index(self._folder, path, lines, stat.st_size, log)
        self._count = len(self._spans()) - 1
        if self._count == 1 and not lines and not self._text.read(*self._span(0)).strip():
            raise DataError(f"{path} must hold a list of records (JSON), or one record a line (JSONL); it is empty.")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> dict:
        start, end = self._span(range(self._count)[i])
        try:
            return json.loads(self._text.read(start, end).decode("utf-8"))
        except json.JSONDecodeError as error:
            line, column = self._text.place(start, error.doc[: error.pos])
            each = " Each line must be one record." if self._lines else ""
            raise DataError(f"line {line} is not JSON: column {column}: {error.msg}.{each}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"line {self._text.place(start)[0]} is not UTF-8; convert the file to UTF-8.") from error

    def image(self, name: str) -> str:
        return os.path.abspath(os.path.join(self.images, name))

    image_file = image

    def fingerprint(self) -> list:
        return [self._stat]

    def __getstate__(self) -> dict:
        return self.__dict__ if self._folder is None else self.__dict__ | {"_offsets": None}

    def _spans(self) -> np.ndarray:
        if self._offsets is None:
            self._offsets = open_array(self._folder / "offsets.npy")
        return self._offsets

    def _span(self, i: int) -> tuple[int, int]:
        start, end = self._spans()[i : i + 2].tolist()
        return start, end - 1


class _TextFile:
    """Parts of a file, and where in it, for people, they stand. Shared by threads: reading has no position."""

    def __init__(self, path: str):
        self.path = path
        self._file: BinaryIO | None = None
        self._counted = (0, 1, 0)  # a place, the number of its line, and the characters of that before it

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}

    def read(self, start: int, end: int) -> bytes:
        file = self._file = self._file or open(self.path, "rb", buffering=0)
        return os.pread(file.fileno(), end - start, start)

    def place(self, start: int, text: str = "") -> tuple[int, int]:
        """Line and column of what comes after `text`, which stands at byte `start`. Best asked for from front to back."""
        place, line, column = self._counted if self._counted[0] <= start else (0, 1, 0)
        while place < start and (block := self.read(place, min(place + COUNTED, start))):
            place, line, before = place + len(block), line + block.count(b"\n"), block.rpartition(b"\n")
            characters = before[2].removeprefix(BOM).translate(None, CONTINUATION)
            column = (0 if before[1] else column) + len(characters)
        self._counted = (place, line, column)
        lines, newline, last = text.rpartition("\n")
        return line + lines.count("\n") + len(newline), (0 if newline else column) + len(last) + 1


def _write_index(folder: Path, path: str, lines: bool, size: int, log: Log) -> None:
    with new_folder(folder) as new:
        columns = Columns(new)
        started = said = time.perf_counter()
        count = -1
        for part in _scan(path, lines):
            columns.append("offsets", part)
            count += len(part)
            now = time.perf_counter()
            if now - said > 10 and count > 0:
                said, speed = now, part[-1] / 1e6 / (now - started)
                log(f"{path}: {part[-1] / size:.0%} indexed, {count:,} records, {speed:,.0f} MB/s")
        columns.close()
        speed = size / 1e6 / (time.perf_counter() - started)
        log(f"{path}: {count:,} records in {size / 1e6:,.0f} MB, indexed at {speed:,.0f} MB/s (kept for the next run)")


def _scan(path: str, lines: bool) -> Iterator[np.ndarray]:
    """The index of a file in parts. Raises `DataError` for a list that is none, naming line and column."""
    with open(path, "rb") as file:
        file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0)
        if lines:
            yield from _scan_lines(file)
            return
        try:
            yield from _scan_list(file)
        except _Broken as broken:
            raise _first_error(path, broken) from None


def _scan_lines(file: BinaryIO) -> Iterator[np.ndarray]:
    """A record is a line, and the blank ones after it."""
    starts, place, line = [], file.tell(), b""
    for line in file:
        if not line.isspace():
            starts.append(place)
        place += len(line)
        if len(starts) == 65536:
            yield np.asarray(starts, np.int64)
            starts = []
    yield np.asarray([*starts, place + (not line.endswith(b"\n"))], np.int64)


# ------------------------------------------------------------------------------------------------------- JSON lists


class _Broken(Exception):
    """What the scan of a list met that cannot be: the byte, and json's words for it."""


_SLASH = ord("\\")
_MARKS = bytes(chr(i) in '"{}[],' for i in range(256))
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"{[")], _STEPS[list(b"}]")] = 1, -1


def _scan_list(file: BinaryIO) -> Iterator[np.ndarray]:
    """Where the list's records start, and one past its end. Raises `_Broken`."""
    skipped = file.read(65536)
    place = file.tell() - len(skipped) + skipped.index(b"[")
    file.seek(place)
    yield np.asarray([place + 1], np.int64)
    scanner = _ListScanner()
    while block := file.read(BLOCK):
        if scanner.depth or not scanner.started:
            ends = scanner.feed(block)
            if not scanner.depth and block[ends[-1]] != ord("]"):
                yield place + 1 + ends[:-1]
                raise _Broken(place + int(ends[-1]), "Expecting ',' delimiter")
            yield place + 1 + ends
            rest = b"" if scanner.depth else block[ends[-1] + 1 :]
        else:
            rest = block
        if rest.strip():
            raise _Broken(place + len(block) - len(rest.lstrip()), "Extra data")
        place += len(block)
    if scanner.depth:
        raise _Broken(place, "Expecting ',' delimiter")


class _ListScanner:
    """Finds the commas between a list's elements, and its end, without parsing them.

    Only seven characters matter. A quote opens or closes a text unless a backslash escapes it; brackets outside of texts
    count the depth; a comma outside of texts at depth 1 ends an element.
    """

    def __init__(self):
        self.started = self.in_text = self.escaped = False
        self.depth = 0

    def feed(self, data: bytes) -> np.ndarray:
        """Places in the next block where an element ends; at depth 0 afterwards the last of them ends the list."""
        block = np.frombuffer(data, np.uint8)
        places = np.flatnonzero(np.frombuffer(data.translate(_MARKS), bool))
        marks = block[places]
        quote = marks == ord('"')
        self._leave_out_escaped(block, places, quote)
        inside = np.bitwise_xor.accumulate(quote.view(np.uint8)) ^ np.uint8(self.in_text)
        if len(inside):
            self.in_text = bool(inside[-1])
        outside = np.flatnonzero(inside | (marks == ord('"')) == 0)
        marks = marks[outside]
        depth = self.depth + np.cumsum(_STEPS[marks], dtype=np.int32)
        closed = np.flatnonzero(depth == 0)[:1]
        ends = (marks == ord(",")) & (depth == 1)
        if len(closed):
            ends[closed], ends[closed[0] + 1 :] = True, False
        if len(depth):
            self.depth = 0 if len(closed) else int(depth[-1])
        self.started = True
        return places[outside[ends]]

    def _leave_out_escaped(self, block: np.ndarray, places: np.ndarray, quote: np.ndarray) -> None:
        """Unmarks the quotes that stand after an odd number of backslashes."""
        which = np.flatnonzero(quote)
        which = which[(block[places[which] - 1] == _SLASH) | (places[which] == 0)]
        at = places[which]
        count, run = np.zeros(len(at), np.int64), np.arange(len(at))
        while len(run := run[(at[run] > count[run]) & (block[at[run] - count[run] - 1] == _SLASH)]):
            count[run] += 1
        quote[which[(count + (self.escaped & (count == at))) % 2 == 1]] = False
        end = len(block) - len(block.tobytes().rstrip(b"\\")) if block[-1] == _SLASH else 0
        self.escaped = (end + (self.escaped and end == len(block))) % 2 == 1


def _first_error(path: str, broken: _Broken) -> DataError:
    """The first record that is not JSON says best where a list went wrong; the scan itself may see it much later."""
    file, (at, message) = _TextFile(path), broken.args
    try:
        with open(path, "rb") as scanned:
            offsets = itertools.chain.from_iterable(part.tolist() for part in _scan_list(scanned))
            start = first = next(offsets)
            try:
                for end in offsets:
                    data = file.read(start, end)
                    if start > first or data.strip() != b"]":
                        json.loads(data[:-1].decode("utf-8"))
                    start = end
            except _Broken:
                if message != "Extra data":  # what comes after the last whole record, as if it came first
                    start -= 1
                    rest = file.read(start, min(at, start + WHOLE))
                    json.loads((b"[" + rest[1:]).decode("utf-8"))
    except UnicodeDecodeError as error:
        return DataError(f"{path} is not UTF-8 at byte {start + error.start}; convert it to UTF-8.")
    except json.JSONDecodeError as error:
        (line, column), message = file.place(start, error.doc[: error.pos]), error.msg
    else:
        line, column = file.place(at)
    return DataError(
        f"{path} is not JSON: line {line}, column {column}: {message}."
        " A list that breaks off is a sign of an incomplete download."
    )
