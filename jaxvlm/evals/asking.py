"""What a model is asked: a benchmark's questions under a protocol as a question file, sighted or blind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxvlm.evals import tasks
from jaxvlm.evals.blind import picture_of
from jaxvlm.evals.question_file import EvalError
from jaxvlm.evals.readers import completed
from jaxvlm.evals.scorers import Record

# What a picture may be called: as it is, with an ending, by COCO's number.
NAMES = (
    "{}",
    "{}.jpg",
    "{}.png",
    "COCO_val2014_{:0>12}.jpg",
    "COCO_test2015_{:0>12}.jpg",
    "COCO_train2014_{:0>12}.jpg",
)


def write_questions(
    task: str,
    protocol: str,
    references: Iterable[Record],
    out: str | Path,
    *,
    images: str | Path = "",
    blind: str = "",
    seed: int = 0,
) -> int:
    """Writes LLaVA's question JSONL, which `jaxvlm generate --input` and LLaVA's scripts answer; returns how many.

    `images` is the folder of the pictures, which the paths written are relative to. Where the protocol takes the first
    token's probabilities, a record has the `candidates`; where it takes losses, the `options`. Raises `EvalError` for a
    picture that is not there, and for a question of a benchmark of pictures that names none.
    """
    about, how = tasks.find(task, protocol)
    references = completed(references, about.complete)
    shown = [None if blind == "noimage" else picture_name(task, reference, Path(images)) for reference in references]
    seen = picture_of(blind, [name for name in shown if name], seed, Path(images), Path(out).parent)
    records = []
    for reference, name in zip(references, shown, strict=True):
        record = {"question_id": reference["id"], "text": how.prompt(reference)}
        if name and (picture := seen(name)):
            record["image"] = picture
        if how.candidates:
            record["candidates"] = list(how.candidates)
        if how.takes == "losses":
            record["options"] = reference["choices"]
        records.append(record)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    written = Path(f"{out}.{os.getpid()}")  # replaced at once: of processes that share the work each writes it
    written.write_text("".join(lines), encoding="utf-8")
    written.replace(out)
    return len(records)


def draw(references: Sequence[dict], count: int, seed: int) -> list[dict]:
    """Whole groups of questions (images, pairs, circles), drawn by the seed, until there are `count` questions or more.

    The groups are shuffled once, so a smaller draw lies inside a larger one. In the references' order.
    """
    groups: dict[str, list[dict]] = {}
    for reference in references:
        groups.setdefault(reference["group"], []).append(reference)
    parts, drawn = list(groups.values()), set()
    for place in np.random.default_rng(seed).permutation(len(parts)):
        if len(drawn) >= count:
            break
        drawn |= {reference["id"] for reference in parts[place]}
    return [reference for reference in references if reference["id"] in drawn]


def picture_name(task: str, reference: Record, images: Path) -> str | None:
    """The file of a question's picture in the folder `images`; None where the benchmark asks without. Raises `EvalError`."""
    name = reference.get("image")
    if not name:
        if task in ("scienceqa", "questions"):  # some of theirs have none
            return None
        raise EvalError(
            f"Question {reference['id']} of {task} names no picture: give its record an `image`, a file's name."
        )
    folder = f"{reference['id']}/" if task == "scienceqa" else ""  # each of its pictures is called image.png
    tried = [folder + form.format(name) for form in NAMES]
    found = next((path for path in tried if (images / path).is_file()), None)
    if found is None:
        raise EvalError(f"{images} holds no picture of question {reference['id']}: none of {', '.join(tried)}.")
    return found
