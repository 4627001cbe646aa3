"""The same records in every kind of source."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from data_helpers import record
from PIL import Image

from jaxvlm.config import SourceConfig
from jaxvlm.data.array_records import write_manifest, write_shard
from jaxvlm.data.conversation import record_images
from jaxvlm.data.sources import Source, open_source

KINDS = ("json", "jsonl", "several", "array_record", "datasets", "tfds")


def write_images(folder: Path, count: int) -> list[str]:
    """Names of JPEG and PNG files of different sizes in `folder`."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"{i}.{'png' if i % 2 else 'jpg'}" for i in range(count)]
    for i, name in enumerate(names):
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(folder / name)
    return names


def records(names: Sequence[str]) -> list[dict]:
    """One record an image, some with another one, some with none."""
    made = []
    for i, name in enumerate(names):
        if i % 4 == 3:
            made.append(record(f"text {i}", "é yes", id=str(i)))
        elif i % 4 == 2:
            made.append(record(f"<image> or <image> {i}?", "the cat", id=str(i), image=[name, names[i - 1]]))
        else:
            made.append(
                record(f"<image>\nquestion {i}?", "answer " * (1 + i % 3), "more?", "no", id=str(i), image=name)
            )
    return made


def contents(source: Source, numbers: Sequence[int]) -> list[tuple[dict, list[bytes]]]:
    """Records with the bytes of their images."""
    return [(r, [image_bytes(source, n) for n in record_images(r)]) for r in (source[i] for i in numbers)]


def image_bytes(source: Source, name: str) -> bytes:
    image = source.image(name)
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def write_every_kind(folder: Path, count: int = 12) -> dict[str, SourceConfig]:
    """Sources with the same records by the names in KINDS."""
    made = records(write_images(folder / "images", count))
    (folder / "a.json").write_text(json.dumps(made))
    (folder / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))
    (folder / "part1.json").write_text(json.dumps(made[:5], indent=1))
    (folder / "part2.json").write_text("".join(json.dumps(one) + "\n" for one in made[5:]))
    source = open_source(SourceConfig(path=str(folder / "a.json"), images=str(folder / "images")))
    write_shards(folder / "shards", source, [range(5), range(5, count)])
    save_dataset(folder / "saved", source)
    from jaxvlm.data.tfds_builder import prepare

    paths = {"json": "a.json", "jsonl": "a.jsonl", "several": "part{1,2}.json", "array_record": "shards"}
    paths |= {"datasets": "saved", "tfds": prepare(source, folder / "tfds", "mix")}
    return {kind: SourceConfig(kind, str(folder / paths[kind]), str(folder / "images")) for kind in KINDS}


def write_shards(folder: Path, source: Source, parts: Sequence[Sequence[int]]) -> dict:
    names = [f"train-{i:05d}-of-{len(parts):05d}.array_record" for i in range(len(parts))]
    for name, numbers in zip(names, parts, strict=True):
        assert write_shard(folder / name, contents(source, numbers)) == len(numbers)
    return write_manifest(folder, names, source)


def save_dataset(folder: Path, source: Source) -> None:
    """LLaVA's columns with the images in them, as Hugging Face's `save_to_disk` writes them."""
    import datasets

    rows = contents(source, range(len(source)))
    text = datasets.Value("string")
    features = {
        "id": text,
        "images": datasets.List(datasets.Image()),
        "conversations": datasets.List({"from": text, "value": text}),
    }
    columns = {
        "id": [one["id"] for one, _ in rows],
        "images": [[{"bytes": image, "path": None} for image in images] for _, images in rows],
        "conversations": [one["conversations"] for one, _ in rows],
    }
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(folder)
