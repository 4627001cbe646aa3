"""Boxes: RefCOCO/+/g and OCID-Ref. A box is [x1, y1, x2, y2] in fractions of the image's width and height."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from jaxvlm.evals.scorers import Record, Scored

Box = Sequence[float]


def parse_box(text: str) -> list[float] | None:
    """Prismatic's reading: a Python list of four numbers in [0, 1] with x1 < x2 and y1 < y2, else None.

    Its quirks are kept: [False, False, True, True] is a box, a sentence around the list is not.
    """
    try:
        box = ast.literal_eval(text)
        proper = isinstance(box, list) and len(box) == 4 and all(0 <= value <= 1 for value in box)
        return box if proper and box[0] < box[2] and box[1] < box[3] else None
    except (
        ValueError,
        SyntaxError,
        TypeError,
        MemoryError,
        RecursionError,
    ):  # the last two: text meant to break a parser
        return None


def iou(first: Box, second: Box) -> float:
    """Intersection over union; 0.0 for two boxes without an area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    union = sum(areas) - shared
    return shared / union if union > 0 else 0.0


def from_pixels(box: Box, width: float, height: float, decimals: int | None = None) -> list[float]:
    """A box in pixels as fractions, rounded to `decimals` if given."""
    scaled = [box[0] / width, box[1] / height, box[2] / width, box[3] / height]
    return scaled if decimals is None else [round(value, decimals) for value in scaled]


def unpad(box: Box, width: float, height: float) -> list[float]:
    """A box given on the image padded to a square, its centre kept, as fractions of the image itself.

    LLaVA-1.5's training boxes lie in the padded frame; scored in the image's they lose overlap (evaluation §0.8).
    """
    side = max(width, height)
    left, top = (side - width) / 2, (side - height) / 2
    return from_pixels(
        [v * side - offset for v, offset in zip(box, (left, top, left, top), strict=True)], width, height
    )


def _overlap(prediction: Record, truth: Box, threshold: float, frame: tuple[float, float] | None = None) -> Scored:
    box = parse_box(prediction["text"])
    if box is None:
        return Scored(None, {"accuracy": 0.0, "iou": 0.0}, valid=False)
    share = iou(unpad(box, *frame) if frame else box, truth)
    return Scored(box, {"accuracy": float(share >= threshold), "iou": share})


def refcoco(prediction: Record, reference: Record) -> Scored:
    """Accuracy at an IoU of 0.5 with the exact box (`bbox` xyxy in pixels, `width`, `height`)."""
    return _overlap(prediction, from_pixels(reference["bbox"], reference["width"], reference["height"]), 0.5)


def refcoco_prismatic(prediction: Record, reference: Record) -> Scored:
    """Prismatic's: the truth is rounded to two decimals, which moves the IoU around 0.5."""
    return _overlap(prediction, from_pixels(reference["bbox"], reference["width"], reference["height"], 2), 0.5)


def refcoco_padded(prediction: Record, reference: Record) -> Scored:
    """The exact box, the prediction understood in the square-padded frame that LLaVA-1.5 was trained in."""
    size = (reference["width"], reference["height"])
    return _overlap(prediction, from_pixels(reference["bbox"], *size), 0.5, size)


OCID_SIZE = (640, 480)  # every image


def ocid_ref(prediction: Record, reference: Record) -> Scored:
    """OCID-Ref in Prismatic: an IoU of 0.25 with the box read as xyxy (its instructions say xywh), two decimals."""
    return _overlap(prediction, from_pixels(reference["bbox"], *OCID_SIZE, 2), 0.25)
