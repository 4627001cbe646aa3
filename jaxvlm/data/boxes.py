"""Boxes written in conversations, from the frame that a data set gives them in to the one that the model sees.

A box is `[x1, y1, x2, y2]` in parts of a frame, from 0 to 1, with decimals. Three frames are in use (recipes §1.2 P9):
the `original` image, whatever its shape (RefCOCO in LLaVA's mixture, by all accounts); the `square` that a letterbox
pads it to (Visual Genome there); and the `crop` from its middle. Which of them a model sees, its transform decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from jaxvlm.config import SourceConfig
from jaxvlm.data import DataError, llava_mix
from jaxvlm.data.conversation import record_images
from jaxvlm.data.image import image_size
from jaxvlm.data.sources import Source, image_address

FRAMES = ("original", "square")  # those that data sets have
# `naive` and the whole view of `anyres` squash the image: its parts stay its parts.
TRANSFORM_FRAMES = {"naive": "original", "anyres": "original", "anyres_max_9": "original"}
TRANSFORM_FRAMES |= {"crop": "crop"} | dict.fromkeys(("letterbox", "letterbox_unpad", "hd", "hd224"), "square")

_NUMBER = r"([01](?:\.\d+)?)"
_BOX = re.compile(rf"\[\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\]")


def with_boxes(record: Any, source: Source, config: SourceConfig, transform: str) -> Any:
    """The record of a source with the boxes in its turns as the transform shows them, by `config.boxes`.

    An image that cannot be read is for others to report. Raises `DataError` naming the record: a box that the model does not
    see, several images.
    """
    frame = config.boxes
    if frame == "mix":
        frame = llava_mix.FRAMES.get(llava_mix.source_of(record), "")
    turns = record.get("conversations") if isinstance(record, dict) and frame else None
    if not isinstance(turns, list) or not any(_BOX.search(text) for text in _texts(turns)):
        return record  # also what is malformed, which others report
    images = record_images(record)
    if not images:
        return record
    name = f"record {record.get('id')!r}"
    if len(images) > 1:
        raise DataError(f"{name} has boxes and {len(images)} images, and a box does not say which one it is in.")
    try:
        size = image_size(source.image(images[0]), image_address(source, images[0]))
    except DataError:
        return record

    def moved(turn: Any) -> Any:
        keys = [key for key in ("value", "content") if isinstance(turn.get(key), str)]
        return turn | {key: convert_boxes(turn[key], size, frame, TRANSFORM_FRAMES[transform]) for key in keys}

    try:
        return record | {"conversations": [moved(turn) if isinstance(turn, dict) else turn for turn in turns]}
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def _texts(turns: list) -> Iterator[str]:
    for turn in turns:
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if isinstance(text, str):
            yield text


def convert_boxes(text: str, size: tuple[int, int], source: str, target: str) -> str:
    """The text with its boxes moved from the frame `source` to the frame `target` of an image of (width, height) `size`.

    A box keeps its number of decimals, and stays without the zeros at their end if it was. What sticks out of the target
    frame is cut off. Brackets that are no box (numbers above 1 or none with decimals, x1 > x2, y1 > y2) stay as they are.
    Raises `DataError` for a box of which nothing is left, and for a frame that there is not.
    """
    for frame in (source, target):
        if frame not in (*FRAMES, "crop"):
            raise DataError(f"There is no frame {frame!r} for boxes; the frames are {', '.join(FRAMES)}.")
    if source == target or size[0] == size[1]:
        return text

    def moved(match: re.Match) -> str:
        written = match.groups()
        box = [float(number) for number in written]
        well_formed = max(box) <= 1 and box[0] <= box[2] and box[1] <= box[3] and "." in match[0]
        return _written(_moved(box, size, source, target, match[0]), written) if well_formed else match[0]

    return _BOX.sub(moved, text)


def _frame(frame: str, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Start and length of a frame along x and y, in pixels of the image."""
    if frame == "original":
        return [(0, size[0]), (0, size[1])]
    side = max(size) if frame == "square" else min(size)
    # A letterbox pastes the image at a whole pixel.
    return [(-((side - length) // 2) if frame == "square" else (length - side) / 2, side) for length in size]


def _moved(box: Sequence[float], size: tuple[int, int], source: str, target: str, name: str) -> list[float]:
    moved, step = [0.0] * 4, 10.0 ** -max(len(part) for part in re.findall(r"\.(\d+)", name))  # what rounding may shift
    for axis, ((start, length), (new_start, new_length)) in enumerate(
        zip(_frame(source, size), _frame(target, size), strict=True)
    ):
        low, high = ((start + box[i] * length - new_start) / new_length for i in (axis, axis + 2))
        slack = step * length / new_length
        if low > 1 + slack or high < -slack:
            raise DataError(
                f"the box {name} lies outside of the part of the image ({size[0]} x {size[1]}) that the model sees "
                f"(frame '{target}'); leave the record out, or choose a transform that keeps the whole image."
            )
        moved[axis], moved[axis + 2] = (min(max(edge, 0.0), 1.0) for edge in (low, high))
    return moved


def _written(box: Sequence[float], before: Sequence[str]) -> str:
    """The numbers with as many decimals as `before`: all alike, or each without the zeros at its end."""
    decimals = [len(number.partition(".")[2]) for number in before]
    texts = [f"{value:.{max(decimals)}f}" for value in box]
    if len(set(decimals)) > 1:
        texts = [f"{float(text)}" for text in texts]
    return f"[{', '.join(texts)}]"
