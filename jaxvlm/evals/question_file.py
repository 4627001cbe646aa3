"""Question files: reading them, drawing subsets, and turning a question into a request.

A question file is JSONL in LLaVA's form with the truth beside it:
`{"question_id", "image", "text", "answer", "category"}`; `image` may be absent for a text-only question.
"""

from __future__ import annotations

import difflib
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxvlm.config import SourceConfig, UserError
from jaxvlm.data import DataError
from jaxvlm.data.sources import open_source

# The response formats of LLaVA-1.5 (recipes §1.2 P9). A question that already carries its format is left alone.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."
FORMATS = {"vqa": SHORT_ANSWER, "multiple_choice": OPTION_LETTER, "open": ""}
IMAGE_MARK = "<image>"


class EvalError(UserError):
    """An evaluation that cannot be run as asked; the message names the file or record and the fix."""


@dataclass(frozen=True)
class Question:
    """One test question; `image` is the path of its picture, or None."""

    id: str
    image: str | None
    text: str
    answer: str
    category: str


def response_format(task: str) -> str:
    """The text that the task adds to a question. Raises `EvalError` for an unknown task."""
    if task in FORMATS:
        return FORMATS[task]
    near = difflib.get_close_matches(task, FORMATS, n=1)
    hint = f"Did you mean '{near[0]}'?" if near else f"Tasks: {', '.join(FORMATS)}."
    raise EvalError(f"eval.task '{task}' is not known. {hint}")


def read_questions(path: str | Path, images: str | Path = "") -> list[Question]:
    """Reads a question file; image paths are joined to the folder `images`.

    Raises `EvalError` naming the file and line for bad JSON, a missing field, a repeated id or a missing image.
    """
    path = Path(path)
    if not path.is_file():
        raise EvalError(f"The question file {path} does not exist (eval.path).")
    questions, seen = [], set()
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):  # splitlines() splits at U+2028
        if not line.strip():
            continue
        question = _parse(line, f"{path}:{number}", Path(images))
        if question.id in seen:
            raise EvalError(f"{path}:{number}: question_id {question.id} occurs twice; ids must be unique.")
        seen.add(question.id)
        questions.append(question)
    if not questions:
        raise EvalError(f"{path} holds no questions.")
    return questions


def _parse(line: str, where: str, images: Path) -> Question:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise EvalError(f"{where} is not a line of JSON: {error}.") from None
    missing = [key for key in ("question_id", "text", "answer") if key not in record]
    if missing:
        raise EvalError(f"{where} has no '{missing[0]}'; a question needs question_id, text and answer.")
    image = record.get("image") or None
    if image is not None:
        image = images / image
        if not image.is_file():
            raise EvalError(f"{where}: the image {image} does not exist; is eval.images the right folder?")
    category = str(record.get("category") or "all questions")
    text = with_format(str(record["text"]), "")
    return Question(str(record["question_id"]), image and str(image), text, str(record["answer"]), category)


def subset(
    questions: Sequence[Question], limits: Iterable[tuple[str, int]], seed: int, setting: str = "eval.limits"
) -> list[Question]:
    """Draws `limits` = (category, how many) from `questions`, in file order; no limits means all of them.

    A category's questions are shuffled once by the seed and the first `count` taken, so a smaller subset lies inside a
    larger one and each category's draw does not depend on the other limits. Categories without a limit are left out.
    """
    limits = dict(limits)
    if not limits:
        return list(questions)
    kept = set()
    for category, count in limits.items():
        members = [i for i, question in enumerate(questions) if question.category == category]
        if not members:
            known = ", ".join(sorted({question.category for question in questions}))
            raise EvalError(f"{setting} names the category '{category}', which has no question. Known: {known}.")
        rng = np.random.default_rng([seed, zlib.crc32(category.encode())])
        kept.update(members[i] for i in rng.permutation(len(members))[:count])
    return [questions[i] for i in sorted(kept)]


def with_format(text: str, suffix: str) -> str:
    """A question without the image's marker, and the response format unless it ends with that already."""
    text = text.replace(IMAGE_MARK, "").strip()
    return text if text.endswith(suffix.strip()) else text + suffix


def request(question: Question, suffix: str, image: str | None) -> dict:
    """The engine's request for a question; with `image` None the picture and its marker are both withheld."""
    mark = f"{IMAGE_MARK}\n" if image else ""
    return {
        "id": question.id,
        "messages": [{"role": "user", "content": mark + with_format(question.text, suffix)}],
        "images": [image] if image else [],
    }


def read_training_answers(paths: Iterable[str | Path]) -> list[tuple[str, str]]:
    """The (question, answer) pairs of LLaVA-format training files, without image markers and response formats.

    They feed the question-only majority baseline. Reads any source, and question files; records that training cannot use
    either (its loader lists them) give none.
    """
    pairs = []
    for path in map(str, paths):
        source = open_source(SourceConfig(path=path))
        for i in range(len(source)):
            try:
                pairs += _record_pairs(source[i])
            except (DataError, AttributeError, KeyError, TypeError):
                continue
    return pairs


def _record_pairs(record: dict) -> list[tuple[str, str]]:
    if "answer" in record:
        return [(plain_question(str(record["text"])), str(record["answer"]))]
    turns = record.get("conversations", [])
    return [
        (plain_question(human["value"]), answer["value"].strip())
        for human, answer in zip(turns[::2], turns[1::2], strict=False)
    ]


# What prompts add to a question: response formats, the texts of the image's OCR.
_ADDED = re.compile(
    "|".join(re.escape(text) for text in (IMAGE_MARK, SHORT_ANSWER.strip(), OPTION_LETTER.strip()))
    + r"|When the provided information is insufficient, respond with 'Unanswerable'\.|Please answer yes or no\."
    + r"|Reference OCR tokens?:[^\n]*"
)


def plain_question(text: str) -> str:
    """A question without its image marker and response format, with single blanks."""
    return re.sub(r"\s+", " ", _ADDED.sub(" ", text)).strip()
