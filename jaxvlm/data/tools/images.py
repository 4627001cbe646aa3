"""One look at each image of a data set: is it there, what is it really, does it decode."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import NamedTuple

from PIL import Image

from jaxvlm.data import DataError
from jaxvlm.data.image import MAX_PIXELS, image_size, load_image
from jaxvlm.data.sources import Source, image_address

# What can be wrong with an image, and what that means where the word does not say it. The order is that of a report.
FAULTS = {
    "missing": "",
    "empty": " (0 bytes)",
    "page": " (a web page or message saved as an image, as a dead link gives)",
    "unknown": " (the content is of no known image type)",
    "broken": " (the file breaks off or is damaged)",
    "too large": f" (over {MAX_PIXELS:,} pixels, refused as a decompression bomb)",
}


class Look(NamedTuple):
    """What was seen of one image."""

    fault: str = ""  # a key of FAULTS, or ''
    reason: str = ""  # of the fault, naming the file
    kind: str = ""  # PIL's name of the true type, as in 'GIF'
    size: tuple[int, int] = (0, 0)  # width, height, upright


def look(source: Source, name: str, quick: bool = False) -> Look:
    """Looks at an image: decodes all of it, or reads no more than its header with `quick`."""
    path = source.image_file(name)
    shown = image_address(source, name)
    try:
        if path and not os.path.getsize(path):
            return Look("empty", f"image file {path} is missing or empty")
        content = source.image(name)
        if path and not quick:
            with open(path, "rb") as file:
                content = file.read()
    except (OSError, DataError) as error:
        return Look("missing", f"image file {path} is missing or empty" if path else str(error))
    try:
        size = image_size(content, shown)
        kind = _kind(content)
        if not quick:
            load_image(content, shown)
    except DataError as error:
        return Look(_fault(content), str(error))
    return Look(kind=kind, size=size)


def _kind(content: str | bytes) -> str:
    with Image.open(content if isinstance(content, str) else io.BytesIO(content)) as image:
        return image.format or ""


def _fault(content: str | bytes) -> str:
    """Why an image cannot be used."""
    if isinstance(content, str):
        with open(content, "rb") as file:
            start = file.read(64)
    else:
        start = content[:64]
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"{", b"not found", b"error")):
        return "page"
    try:
        with Image.open(content if isinstance(content, str) else io.BytesIO(content)) as image:
            return "too large" if image.width * image.height > MAX_PIXELS else "broken"
    except Image.DecompressionBombError:
        return "too large"
    except Exception:  # PIL's readers raise OSError, SyntaxError, ValueError, struct.error and more
        return "unknown"


def misnamed(name: str, kind: str) -> str:
    """'GIF named .jpg' if the file's name promises another type than `kind`, or ''."""
    suffix = PurePosixPath(name).suffix.lower()
    promised = Image.registered_extensions().get(suffix)
    same = promised == kind or {promised, kind} == {"JPEG", "MPO"}  # several JPEGs in a file, as cameras write
    return "" if promised is None or same else f"{kind} named {suffix}"


def in_threads(function: Callable, items: Iterable, workers: int) -> Iterator:
    """`map` in threads, in order and never far ahead. Decoding releases Python's lock, so threads use all cores."""
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 8 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
