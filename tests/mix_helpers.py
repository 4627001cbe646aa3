"""A small look-alike of LLaVA's 665K file: every source's folder, prompt form and quirk, with pictures made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image.\nReference OCR token: "
REGION = "Please provide a short description for this region: "
BOX = "Please provide the bounding box coordinate of the region this sentence describes: "
SOURCES = ("llava", "sharegpt", "vqav2", "gqa", "okvqa", "ocrvqa", "aokvqa", "textcaps", "refcoco", "vg")


def write_mix(folder: Path, each: int = 4, seed: int = 0) -> Path:
    """`mix.json` with `each` records of every source, shuffled, and their images in the published layout. Returns the file."""
    choice = random.Random(seed)
    records = [_record(source, i, choice) for source in SOURCES for i in range(each)]
    choice.shuffle(records)
    for i, name in enumerate(sorted({record["image"] for record in records if "image" in record})):
        write_image(folder / name, i, gif=name.startswith("ocr_vqa") and i % 2 == 0)
    path = folder / "mix.json"
    path.write_text(json.dumps(records))
    return path


def write_image(path: Path, seed: int, gif: bool = False, size: tuple[int, int] | None = None) -> None:
    """A picture of soft colours, a JPEG whatever its name, or a GIF (as 900 of OCR-VQA's .jpg files are)."""
    rng = np.random.default_rng(seed)
    size = size or [(64, 48), (48, 64), (60, 60), (90, 40)][seed % 4]
    picture = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture.quantize(64) if gif else picture).save(path, "GIF" if gif else "JPEG")


def _record(source: str, i: int, choice: random.Random) -> dict:
    image, turns = _SHAPES[source](i, choice)
    identity = Path(image).stem if image else f"Sg{i:05d}_0"
    record = {"id": identity, "image": image} if image else {"id": identity, "model": ""}
    said = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(turns)]
    return record | {"conversations": said}


def _coco(i: int) -> str:
    return f"coco/train2017/{100 + i % 3:012d}.jpg"  # the sources share COCO's pictures


def _llava(i: int, choice: random.Random) -> tuple[str, list[str]]:
    question = choice.choice(["What is the man doing?", "Describe the scene in detail.", "Why might they be waiting?"])
    first = f"<image>\n{question}" if i % 2 else f"{question}\n<image>"
    turns = [first, "The picture shows a person who stands beside a red bus and looks at the street."]
    return _coco(i), turns + ["Is it raining?", "No, the sky is clear."] * (i % 3)


def _sharegpt(i: int, choice: random.Random) -> tuple[None, list[str]]:
    return None, [
        f"Write a haiku about the number {i}.",
        "One follows zero,\nstill water holds the moon,\ncounting has begun.",
    ]


def _short(image, thing: str, questions: int = 1):
    """Short answers; the questions about a picture are one conversation, of which the first asks for the form."""

    def make(i: int, choice: random.Random) -> tuple[str, list[str]]:
        turns = [f"<image>\nWhat colour is {thing} {i}?{SHORT}", choice.choice(["red", "blue", "green"])]
        return image(i), turns + ["How many are there?", str(i)] * (questions - 1)

    return make


def _letters(i: int, choice: random.Random) -> tuple[str, list[str]]:
    return _coco(i), [
        f"<image>\nWhat is he riding, {i}?\nA. bike\nB. horse\nC. bus\nD. wave{LETTER}",
        choice.choice("ABCD"),
    ]


def _caption(i: int, choice: random.Random) -> tuple[str, list[str]]:
    turns = [f"<image>\n{CAPTION}STOP, {i}", f"A sign that says stop, with number {i}."]
    return f"textvqa/train_images/{i:016x}.jpg", turns


def _region(image):
    def make(i: int, choice: random.Random) -> tuple[str, list[str]]:
        x, y = (round(choice.uniform(0, 0.5), 2) for _ in range(2))
        box = f"[{x}, {y}, {x + 0.4:.2f}, {y + 0.45:.2f}]"
        pairs = [(f"{REGION}{box}.", f"The dog number {i}."), (f"{BOX}the dog number {i}.", box)]
        turns = [text for pair in pairs[:: 1 if i % 2 else -1] for text in pair]
        return image(i), [f"<image>\n{turns[0]}", *turns[1:]]

    return make


_SHAPES = {
    "llava": _llava,
    "sharegpt": _sharegpt,
    "vqav2": _short(_coco, "hat", 3),
    "gqa": _short(lambda i: f"gqa/images/{2370000 + i}.jpg", "wall", 4),
    "okvqa": _short(_coco, "fruit", 2),
    "ocrvqa": _short(lambda i: f"ocr_vqa/images/{140031990 + i}.jpg", "cover"),
    "aokvqa": _letters,
    "textcaps": _caption,
    "refcoco": _region(_coco),
    "vg": _region(lambda i: f"vg/VG_100K{'_2' * (i % 2)}/{2300 + i}.jpg"),
}
