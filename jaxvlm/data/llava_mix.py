"""The sources inside LLaVA-1.5's mixture `llava_v1_5_mix665k.json`, told apart by rule.

The file does not say where a record is from, but the folder of its image and the form of its first question do (recipes
§1.2 P9, §1.3 D4-D5). VQAv2 and OKVQA share both: VQAv2 has at least three questions on every image, OKVQA one or two, and
the questions on one image were merged to one conversation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

MIX = "llava_v1_5_mix665k"  # what `SourceConfig.mix` calls it
OTHER = "other"  # a record that no rule fits
ASKS = ("human", "user")  # roles


class Rule(NamedTuple):
    """A record is of this source if its image lies in `folder`, its first question matches, and it asks so many questions."""

    name: str
    folder: str | None  # None: the record has no image
    question: str = ""  # a regular expression, searched for
    at_least: int = 1  # questions


_SHORT = r"Answer the question using a single word or phrase\."
_LETTER = r"Answer with the option['’]s letter from the given choices directly\."
_REGION = r"[Pp]rovide (?:the bounding box coordinate of the region this sentence describes|a short description for this region)"

# The first rule that fits decides.
RULES = (
    Rule("sharegpt", None),
    Rule("gqa", "gqa"),
    Rule("ocrvqa", "ocr_vqa"),
    Rule("textcaps", "textvqa"),
    Rule("vg", "vg"),
    Rule("aokvqa", "coco", _LETTER),
    Rule("refcoco", "coco", _REGION),
    Rule("vqav2", "coco", _SHORT, at_least=3),
    Rule("okvqa", "coco", _SHORT),
    Rule("llava", "coco"),
)

# Records of each in the published file (LLaVA #702).
COUNTS = {
    "llava": 157_712,
    "sharegpt": 40_688,
    "vqav2": 82_783,
    "gqa": 72_140,
    "okvqa": 8_998,
    "ocrvqa": 80_000,
    "aokvqa": 66_160,
    "textcaps": 21_953,
    "refcoco": 48_447,
    "vg": 86_417,
}

PARTS = (*COUNTS, OTHER)

# Where boxes are written: parts of the image as it is, or of the square that a letterbox pads it to. The file does not
# say; these are what users have found to fit (LLaVA #606, #619, #623, #822; recipes §1.2 P9).
FRAMES = {"refcoco": "original", "vg": "square"}

# Sentences that ask for a form of answer, each on a line of its own after the question. What TextCaps, RefCOCO and VG ask
# is the question itself, and stays.
FORMAT_PROMPTS = (
    _SHORT,
    _LETTER,
    r"When the provided information is insufficient, respond with 'Unanswerable'\.",
)
_FORMAT = re.compile(rf"\s*(?:{'|'.join(FORMAT_PROMPTS)})")


def source_of(record: Any) -> str:
    """The name of the source that a LLaVA record is from, or OTHER."""
    if not isinstance(record, dict):
        return OTHER
    images = record.get("image_file", record.get("image"))  # the first: of a source that holds its images
    image = images[0] if isinstance(images, list) and images else images
    folders = f"/{image}".split("/")[:-1] if image else []
    asked = [
        turn["value"] for turn in _turns(record) if turn.get("from") in ASKS and isinstance(turn.get("value"), str)
    ]
    for rule in RULES:
        where = rule.folder in folders if rule.folder else not image
        if where and len(asked) >= rule.at_least and re.search(rule.question, asked[0]):
            return rule.name
    return OTHER


def without_format_prompts(record: dict) -> dict:
    """The record without the FORMAT_PROMPTS of its questions; a question that is nothing else keeps them."""

    def stripped(turn: Any) -> Any:
        if not isinstance(turn, dict) or turn.get("from") not in ASKS or not isinstance(turn.get("value"), str):
            return turn
        text = _FORMAT.sub("", turn["value"])
        return turn | {"value": text} if text.replace("<image>", "").strip() else turn

    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        return record  # malformed, which others report
    return record | {"conversations": [stripped(turn) for turn in record["conversations"]]}


def looks_like(counts: Mapping[str, int]) -> bool:
    """Whether records with so many of each `source_of` are this mixture, or a part of it."""
    known = sum(counts.get(name, 0) for name in COUNTS)
    return sum(counts.get(name, 0) > 0 for name in COUNTS) >= 8 and known > 0.9 * sum(counts.values())


def _turns(record: dict) -> list[dict]:
    turns = record.get("conversations")
    return [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
