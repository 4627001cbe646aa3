"""Records that cannot be used: left out as the stage's policy says, counted by source and reason, and listed in a file.

An entry is a dict of `source`, `file`, `record` (its number), `id` and `reason`, with `image` if that is what is wrong, and
`part` for the source inside a mix. A quarantine list has one a line, so a list of skipped records is one too.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxvlm.config import DataConfig, SourceConfig
from jaxvlm.data import DataError

POLICIES = ("error", "skip", "quarantine")


def check_policy(data: DataConfig) -> None:
    """Raises `DataError` for settings that cannot be used."""
    if data.bad_records not in POLICIES:
        raise DataError(f"bad_records must be {', '.join(map(repr, POLICIES))}, not {data.bad_records!r}.")
    if (data.bad_records == "quarantine") != bool(data.quarantine):
        raise DataError(
            "bad_records = 'quarantine' goes with `quarantine`, the list that `jaxvlm data verify` writes; they are"
            f" {data.bad_records!r} and {data.quarantine!r}."
        )
    if not 0 <= data.max_bad_share <= 1:
        raise DataError(f"max_bad_share is a share between 0 and 1, not {data.max_bad_share}.")


def read_quarantine(path: str, sources: Sequence[SourceConfig]) -> list[dict[int, dict]]:
    """Of each source the entries of a quarantine list that are about it, by record number.

    An entry is about a source if it names its file, or one of that name and the source's own (so that data may move).
    Raises `DataError` for a list that cannot be read or is about none of them.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The quarantine list {path} cannot be read: {error}.") from error
    found: list[dict[int, dict]] = [{} for _ in sources]
    entries = [_entry(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    for entry in entries:
        for mine, source in zip(found, sources, strict=True):
            if _about(entry, source):
                mine[entry["record"]] = entry
    if entries and not any(found):
        raise DataError(
            f"The quarantine list {path} is about {entries[0]['file']}, which none of the sources reads"
            f" ({', '.join(source.path for source in sources)}). Write one for them with `jaxvlm data verify`."
        )
    return found


def _entry(line: str, where: str) -> dict:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg}.") from error
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("record"), int)
        or not isinstance(entry.get("file"), str)
    ):
        raise DataError(f"{where} must be an object with `file` and `record` (its number), not {line[:80]}.")
    return entry


def _about(entry: Mapping[str, Any], source: SourceConfig) -> bool:
    if os.path.abspath(entry["file"]) == os.path.abspath(source.path):
        return True
    return entry.get("source") == source.name and Path(entry["file"]).name == Path(source.path).name


def check_identity(entry: Mapping[str, Any], identity: object, path: str) -> None:
    """Raises `DataError` if the record that an entry means has another id by now."""
    if entry.get("id") != identity:
        raise DataError(
            f"The quarantine list {path} was made for another {entry['file']}: its record {entry['record']} has id"
            f" {identity!r}, not {entry.get('id')!r}. Make it anew with `jaxvlm data verify`."
        )


def kind(entry: Mapping[str, Any]) -> str:
    """An entry's reason without what is particular to its record, so that equal reasons can be counted."""
    reason = str(entry.get("reason", "")).strip()
    if entry.get("image"):
        reason = reason.replace(entry["image"], "…")
    reason = re.sub(r"""(["'])(?:\\.|(?!\1).)*\1""", "…", reason)
    reason = re.sub(r"(?<![\w`])(?:/[^\s:;,]+)+", "…", reason)
    reason = re.sub(r"\brecord (?:…|\d+|None):? ?", "", reason)
    return re.sub(r"\d[\d,.]*(?<=\d)", "N", reason)


def reasons(entries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many entries there are of each kind of reason, the most frequent first."""
    return dict(Counter(map(kind, entries)).most_common())


def check_share(name: str, lost: int, records: int, data: DataConfig, why: Mapping[str, int]) -> None:
    """Raises `DataError` if a source has lost more of its records than it may."""
    if lost > data.max_bad_share * records:
        counted = "\n".join(f"  {count:,} x {reason}" for reason, count in list(why.items())[:10])
        raise DataError(
            f"{name} loses {lost:,} of {records:,} records ({lost / records:.1%}), more than data.max_bad_share ="
            f" {data.max_bad_share}:\n{counted}\nRepair the data (`jaxvlm data verify` says how), or raise max_bad_share."
        )


def report(entries: Sequence[Mapping[str, Any]], data: DataConfig, path: str | os.PathLike, write: bool) -> str | None:
    """Lists bad records in the file `path` if they may be skipped. Raises `DataError` if not."""
    if not entries:
        return None
    if data.bad_records == "skip":
        if write:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        return str(path)
    lines = []
    images = list(dict.fromkeys(entry["image"] for entry in entries if "image" in entry))
    if images:
        folders = ", ".join(dict.fromkeys(repr(source.images) for source in data.sources))
        lines.append(f"{len(images)} image files are missing or empty, the first: {', '.join(images[:5])}.")
        lines.append(f"  Check the sources' `images` folder ({folders}) or complete the download.")
    others = [entry for entry in entries if "image" not in entry]
    if others:
        lines.append(f"{len(others)} records cannot be used, the first:")
        lines += [f"  {entry['file']}, record number {entry['record']}: {entry['reason']}" for entry in others[:5]]
    if data.quarantine:
        lines.append(f"{data.quarantine} does not list them: make it anew with `jaxvlm data verify`.")
    lines.append("bad_records = 'skip' in the stage's data leaves such records out and lists them in a file.")
    raise DataError("\n".join(lines))


def broken_conversations(batch: Mapping[str, np.ndarray], num_sources: int) -> np.ndarray:
    """How many conversations of each source in a batch have lost their supervision to a broken image, int [num_sources].

    Every other conversation has a supervised token: records without one are not used.
    """
    segments = batch["segment_ids"]  # [B, S]
    rows = np.arange(len(segments))[:, None]
    number = segments + rows * (int(segments.max(initial=0)) + 1)
    supervised = np.bincount(number.reshape(-1), weights=(batch["loss_weights"] > 0).reshape(-1))
    broken = (batch["positions"] == 0) & (segments > 0) & (supervised[number] == 0)  # at their first tokens
    return np.bincount(batch["source_ids"][broken], minlength=num_sources)


class BrokenImages:
    """The list of images that turn out to be broken when they are decoded, each once, however often a run is resumed."""

    def __init__(self, path: str):
        self.path = path
        self._lines: set[str] | None = None

    def add(self, entry: Mapping[str, Any]) -> None:
        """Writes an entry down unless it is there. A line is written at once, so processes may share the file."""
        file, line = Path(self.path), json.dumps(entry) + "\n"
        if self._lines is None:
            self._lines = set(file.read_text(encoding="utf-8").splitlines(keepends=True)) if file.is_file() else set()
        if line not in self._lines:
            self._lines.add(line)
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a", encoding="utf-8") as out:
                out.write(line)
