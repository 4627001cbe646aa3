"""What the prepared data sets have in common: LLaVA-format records, prompts and files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."  # LLaVA-1.5, Table 7
DESCRIBE = (  # our own wording of LLaVA's requests for a brief description
    "Say in a few words what this picture shows.",
    "What can be seen here, in short?",
    "Describe the picture briefly.",
    "Give a short caption for this image.",
    "Sum up the image in one phrase.",
    "Write a brief description of what is shown.",
    "Name what you see, concisely.",
    "What does this image depict, in brief?",
    "Put the content of the picture into a few words.",
    "Provide a compact caption of the photo.",
    "Shortly describe what is visible.",
)


def caption(name: str, image: str, text: str, rng: random.Random) -> dict:
    """A record of LLaVA's pre-training form: a request that does not matter, with the image before or after it."""
    request = rng.choice(DESCRIBE)
    request = f"<image>\n{request}" if rng.random() < 0.5 else f"{request}\n<image>"
    return record(name, image, [(request, text)])


def conversation(name: str, image: str, pairs: Iterable[tuple[str, str]]) -> dict:
    """All questions about an image as turns; the first carries the image and the response format."""
    turns = list(pairs)
    turns[0] = (f"<image>\n{turns[0][0]}{SHORT_ANSWER}", turns[0][1])
    return record(name, image, turns)


def record(name: str, image: str | None, turns: list[tuple[str, str]]) -> dict:
    """A LLaVA record of (human, gpt) turns, as they stand."""
    said = [
        {"from": role, "value": text}
        for question, answer in turns
        for role, text in (("human", question), ("gpt", answer))
    ]
    return {"id": name, **({"image": image} if image else {}), "conversations": said}


def question(name: str, image: str, text: str, answer: str, category: str) -> dict:
    """A line of a test file."""
    return {"question_id": name, "image": image, "text": text, "answer": answer, "category": category}


def write_json(path: Path, records: list[dict]) -> None:
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
