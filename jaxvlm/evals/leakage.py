"""Leakage: which of a benchmark's pictures are in the training data, by perceptual hashes, and the score without them.

Cambrian-1 counts pictures whose difference hashes are equal (Tong et al. 2024, appendix on leakage). Here a few bits may differ, as
in a copy that was scaled or compressed again, and a second hash, of other content, must agree. A picture that was
seen is not a question that was seen: the answer to it may still be new.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxvlm.config import SourceConfig
from jaxvlm.data import DataError
from jaxvlm.data.assets import cache_dir
from jaxvlm.data.image import load_image
from jaxvlm.data.sources import open_source
from jaxvlm.evals.aggregates import Row
from jaxvlm.evals.compare import aggregate_of, row_intervals, rows_of
from jaxvlm.evals.question_file import EvalError
from jaxvlm.evals.scorers import Record
from jaxvlm.infer.answers import append_records, cut_torn_line
from jaxvlm.progress import Progress

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
DISTANCE = 4  # of 64 bits of the difference hash
BLOCK = 1 << 22  # pairs compared at once
CHUNK = 256  # pictures hashed before they are written down
VERSION = 1  # of the hashes: another one when they or the reading of pictures change
FAR = np.uint8(255)  # more bits than two hashes have


class Copy(NamedTuple):
    """A benchmark's picture and the training picture nearest to it, with the bits in which their hashes differ."""

    picture: str
    training: str
    difference_hash: int
    cosine_hash: int


def difference_hash(image: Image.Image) -> int:
    """64 bits: whether each of 9 x 8 grey cells is darker than its right neighbour (dHash; N. Krawetz 2013)."""
    cells = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return _number(cells[:, 1:] > cells[:, :-1])


def cosine_hash(image: Image.Image) -> int:
    """64 bits: which of the 8 x 8 slowest waves of the picture at 32 x 32 are above their median (pHash; C. Zauner 2010)."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), np.float64)
    waves = (WAVES @ grey @ WAVES.T).ravel()
    return _number(waves > np.median(waves[1:]))  # the first is the mean grey


WAVES = np.cos(np.pi * np.outer(np.arange(8), np.arange(32) + 0.5) / 32)  # rows of the discrete cosine transform


def _number(bits: np.ndarray) -> int:
    return int(np.packbits(bits).view(">u8")[0])


def hashes(
    pictures: Sequence[Callable[[], str | bytes]], label: str, kept: Path | None = None
) -> list[tuple[int, int] | None]:
    """Both hashes of each picture, which its function gives as a path or a file's bytes; None for an unreadable one.

    What `kept` (`kept_file`) holds of a file of this path, size and time of change, or of these bytes, is not computed again;
    what is computed is appended to it, so that an interrupted call goes on. Unreadable ones are tried again each time.
    """
    known = _known(kept) if kept else {}

    def both(picture: Callable[[], str | bytes]) -> tuple[tuple, tuple[int, int] | None]:
        item = picture()
        if isinstance(item, bytes):
            key: tuple = (hashlib.sha256(item).hexdigest(), len(item), 0)
        else:
            path = Path(item)
            stat = path.stat() if path.is_file() else None
            key = (str(path.absolute()), stat.st_size, stat.st_mtime_ns) if stat else (item, 0, 0)
        if key in known:
            return key, known[key]
        try:
            image = load_image(item)
        except DataError:
            return key, None
        return key, (difference_hash(image), cosine_hash(image))

    found = []
    with ThreadPoolExecutor(8) as pool, Progress("hash", len(pictures), label) as progress:
        for start in range(0, len(pictures), CHUNK):
            made = list(pool.map(both, pictures[start : start + CHUNK]))
            if kept and (new := {key: pair for key, pair in made if pair and key not in known}):
                append_records(kept, ([*key, pair] for key, pair in new.items()))
            found += [pair for _, pair in made]
            progress.add(len(made))
    return found


def kept_file(*place: str) -> Path:
    """Where the hashes of the pictures of a place (a folder, or a source and its folder) are kept between calls."""
    name = hashlib.sha256(json.dumps([VERSION, *(str(Path(part).absolute()) for part in place)]).encode()).hexdigest()
    return cache_dir() / "hashes" / f"{name[:16]}.jsonl"


def _known(kept: Path) -> dict[tuple, tuple[int, int]]:
    """Hashes by (path, size, time of change) or (digest, size, 0)."""
    found: dict[tuple, tuple[int, int]] = {}
    if not kept.is_file():
        return found
    cut_torn_line(kept)
    for line in kept.read_bytes().splitlines():
        try:
            path, size, changed, pair = json.loads(line)
        except (ValueError, TypeError):
            continue  # two processes wrote at once: that picture is hashed again
        found[path, size, changed] = tuple(pair)
    return found


def training_pictures(path: str, images: str = "") -> dict[str, Callable[[], str | bytes]]:
    """The pictures of a training source, or of a folder of them, by name.

    Records that training cannot use are passed over, as there. Raises `DataError` for a source that cannot be opened,
    `EvalError` for one without pictures.
    """
    if Path(path).is_dir():
        files = sorted(str(file) for file in Path(path).rglob("*") if file.suffix.lower() in PICTURES)
        if files:
            return {file: partial(str, file) for file in files}
    source, found = open_source(SourceConfig(path=path, images=images)), {}
    for i in range(len(source)):
        try:
            named = source[i].get("image") or []
        except DataError:
            continue
        for name in [named] if isinstance(named, str) else named:
            found.setdefault(name, partial(source.image, name))
    if not found:
        raise EvalError(f"{path} holds no pictures: neither files of them nor records that name any.")
    return found


def copies(
    pictures: Mapping[str, tuple[int, int]], training: Mapping[str, tuple[int, int]], distance: int = DISTANCE
) -> list[Copy]:
    """The pictures that have a copy in training: at most `distance` bits of the one hash differ and twice as many of the other.

    Both hold hashes by name. Of several copies the nearest is named.
    """
    names, places = list(pictures), list(training)
    mine, theirs = (np.array(list(h.values()), np.uint64).reshape(-1, 2) for h in (pictures, training))
    found, rows = [], max(1, BLOCK // max(1, len(theirs)))
    for start in range(0, len(mine) if len(theirs) else 0, rows):
        first, second = (np.bitwise_count(mine[start : start + rows, None, k] ^ theirs[None, :, k]) for k in (0, 1))
        apart = np.where((first <= distance) & (second <= 2 * distance), first + second, FAR)
        for row, near in enumerate(apart.argmin(1).tolist()):
            if apart[row, near] < FAR:
                found.append(Copy(names[start + row], places[near], int(first[row, near]), int(second[row, near])))
    return found


def without(
    result: Mapping[str, Any], references: Sequence[Record], seen: set[str], *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """A result's headline over all questions, without those in `seen` (ids), and over those alone, with 95 % intervals.

    Questions of one group (a pair, a circle) stand or fall together: one that was seen takes its group with it.
    """
    rows = rows_of(result, references)
    groups = {row.group for row in rows if row.id in seen}
    parts: dict[str, list[Row]] = {
        "all": rows,
        "clean": [row for row in rows if row.group not in groups],
        "seen": [row for row in rows if row.group in groups],
    }
    headline, aggregate = result["headline"], aggregate_of(result)
    found: dict[str, Any] = {"headline": headline}
    for name, part in parts.items():
        value = aggregate(part).get(headline) if part else None
        spans = row_intervals(part, aggregate, resamples=resamples, seed=seed) if part else {}
        found[name] = {"n": len(part), "value": value, "interval": spans.get(headline)}
    return found
