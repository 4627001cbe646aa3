"""easy-VQA (Victor Zhou, MIT): 5,000 images of one coloured shape each, 48,248 questions, an official split.

Numbers and blind baselines: assets §3.
"""

from __future__ import annotations

import json
import random
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from jaxvlm.data.assets.download import Package
from jaxvlm.data.assets.llava_json import caption, conversation, question, write_json, write_jsonl

PACKAGE = Package(
    name="easy-vqa",
    version="1.0",
    file="easy_vqa-1.0-py3-none-any.whl",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    megabytes=3.2,
)
SEED = 0
# At most so many questions of each kind about an image; None: all. Three of four questions in the data are yes/no,
# most of them answered by their wording alone; a short run learns to see from the others.
TURNS = {"what": 3, "yesno": 1}

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("green", "red", "gray", "teal", "black", "yellow", "brown", "blue")
Question = tuple[str, str]  # text, answer


def prepare(files: dict[str, Path], out: Path, log: Callable[[str], None]) -> None:
    """align.json, instruct.json, test.jsonl and images/{train,test}/N.png"""
    with zipfile.ZipFile(files[PACKAGE.name]) as wheel:
        for split in ("train", "test"):
            (out / "images" / split).mkdir(parents=True)
            for member in wheel.namelist():
                if found := re.fullmatch(rf"easy_vqa/data/{split}/images/(\d+\.png)", member):
                    (out / "images" / split / found[1]).write_bytes(wheel.read(member))
        train, test = (read(wheel.read(f"easy_vqa/data/{split}/questions.json")) for split in ("train", "test"))
    captions = align(train)
    write_json(out / "align.json", captions)
    write_json(out / "instruct.json", instruct(train))
    write_jsonl(out / "test.jsonl", test_questions(test))
    log(f"  {len(captions):,} captions, {len(train):,} conversations, {sum(map(len, test.values())):,} test questions")


def read(text: bytes) -> dict[int, list[Question]]:
    """{image: its questions} in the file's order."""
    questions = defaultdict(list)
    for asked, answer, image in json.loads(text):
        questions[image].append((asked, answer))
    return dict(sorted(questions.items()))


def kind(answer: str) -> str:
    return "yesno" if answer in ("yes", "no") else "what"


def facts(questions: list[Question]) -> tuple[str | None, str | None]:
    """(colour, shape) as far as the questions and answers about one image tell.

    A colour or shape named in an open question is there; in a yes/no question it is there if the answer affirms it,
    where "is no teal shape present?" is affirmed by "no".
    """
    told = set()
    for asked, answer in questions:
        words = re.findall(r"\w+", asked)
        negated = "not" in words or "no" in words
        if kind(answer) == "what":
            told |= {answer, *words}
        elif (answer == "yes") != negated:
            told |= set(words)
    colour = next((word for word in COLOURS if word in told), None)
    return colour, next((word for word in SHAPES if word in told), None)


def align(train: dict[int, list[Question]]) -> list[dict]:
    """A caption for each image whose colour and shape are both told; 'a teal circle'."""
    rng, records = random.Random(SEED), []
    for image, questions in train.items():
        colour, shape = facts(questions)
        if colour and shape:
            records.append(caption(f"align-{image}", f"train/{image}.png", f"a {colour} {shape}", rng))
    return records


def instruct(train: dict[int, list[Question]]) -> list[dict]:
    """One conversation for each image, its questions shuffled and limited to `TURNS`."""
    rng, records = random.Random(SEED), []
    for image, questions in train.items():
        shuffled, left = rng.sample(questions, len(questions)), dict(TURNS)
        kept = []
        for asked, answer in shuffled:
            limit = left[kind(answer)]
            if limit is None or limit > 0:
                kept.append((asked, answer))
                left[kind(answer)] = None if limit is None else limit - 1
        if kept:
            records.append(conversation(f"train-{image}", f"train/{image}.png", kept))
    return records


def test_questions(test: dict[int, list[Question]]) -> list[dict]:
    return [
        question(f"test-{image}-{number}", f"test/{image}.png", asked, answer, kind(answer))
        for image, questions in test.items()
        for number, (asked, answer) in enumerate(questions)
    ]
