"""The loader beside PyTorch's DataLoader, on JPEG files with the sizes of COCO's, in one run on the same cores.

  python benchmarks/data_bench.py [--images 1000] [--workers 1 2] [--rounds 3] [--out benchmarks/results/data.json]

Three sides take the same records (an image and a conversation of three rounds each) to batches for a 336-pixel CLIP:
  jaxvlm          Loader: letterboxed uint8 pixels, one conversation a row; normalising is the device's work
  llava           DataLoader over the steps of LLaVA's own dataset: pad to a square, CLIP's image processor, tokens and labels
  hf              DataLoader whose collate function calls transformers' LlavaProcessor on the batch
Each side runs in a process of its own with the same number of worker processes, in turn; the files are in the page cache. Timed
are the first batch from the start of the loader (jaxvlm's tables made before, as from the second run on; their making is
reported apart), and the rest of the epoch: by the clock, and by the time that the processes computed, which neighbours on a
shared machine disturb less. Reported are medians.

The pictures are synthetic: noise with the spectrum of photographs, compressed to COCO's mean of about 160 KB a file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

SIDES = ("jaxvlm", "llava", "hf")
# (width, height) of COCO train2017 and their rough shares; the long side is 640 in nearly all.
SIZES = {(640, 480): 34, (480, 640): 12, (640, 427): 22, (427, 640): 8, (640, 426): 7, (640, 360): 5, (500, 375): 7}
SIZES |= {(612, 612): 3, (375, 500): 2}
SIDE, PATCH, LENGTH, BATCH = 336, 14, 1024, 16
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ROUNDS_OF_TALK = 3


# ------------------------------------------------------------------------------------------------------------ the data


def write_data(folder: Path, count: int) -> int:
    """images/N.jpg, records.json and a tokenizer; the mean size of a file in bytes."""
    from jaxvlm.data.assets.toy import write_tokenizer

    write_tokenizer(folder / "tokenizer")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    shapes = rng.choice(len(SIZES), count, p=np.array(list(SIZES.values())) / sum(SIZES.values()))
    noise = photograph_noise(rng)
    for i, shape in enumerate(shapes):
        width, height = list(SIZES)[shape]
        top, left = rng.integers(0, 1024 - height), rng.integers(0, 1024 - width)
        piece = noise[top : top + height, left : left + width]
        Image.fromarray(piece).save(folder / "images" / f"{i}.jpg", quality=90)
    talk = []
    for n in range(ROUNDS_OF_TALK):
        ask = f"What is there in part {n} of this picture, and which colour has it?"
        talk.append({"from": "human", "value": f"<image>\n{ask}" if n == 0 else ask})
        talk.append({"from": "gpt", "value": f"In part {n} there is something of a warm colour beside a darker one."})
    records = [{"id": str(i), "image": f"{i}.jpg", "conversations": talk} for i in range(count)]
    (folder / "records.json").write_text(json.dumps(records))
    return sum(file.stat().st_size for file in (folder / "images").iterdir()) // count


def photograph_noise(rng: np.random.Generator, size: int = 1024) -> np.ndarray:
    """uint8 [size, size, 3]: random phases under amplitudes that fall as 1 / frequency, as in photographs."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    amplitude = 1 / np.maximum(frequency, 1 / size)
    grey = np.fft.ifft2(amplitude * np.exp(2j * np.pi * rng.random((size, size)))).real
    colour = [np.fft.ifft2(amplitude**1.3 * np.exp(2j * np.pi * rng.random((size, size)))).real for _ in range(3)]
    made = np.stack([grey / grey.std() * 48 + part / part.std() * 14 for part in colour], -1) + 118
    return np.clip(made + rng.normal(0, 4, made.shape), 0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------- the sides


def jaxvlm_batches(folder: Path, workers: int):
    from jaxvlm.config import DataConfig, ModelConfig, PromptConfig, SourceConfig
    from jaxvlm.data.loader import Loader

    source = SourceConfig("bench", str(folder / "records.json"), str(folder / "images"))
    data = DataConfig(sources=(source,), num_workers=workers, num_threads=1)
    prompt = PromptConfig(tokenizer=str(folder / "tokenizer"), length=LENGTH)
    loader = Loader(data, prompt, ModelConfig(), batch_size=BATCH, seed=0, epochs=1, cache_dir=folder / "cache")
    for batch in loader.batches():
        yield len(batch["tokens"])


def llava_batches(folder: Path, workers: int):
    import torch

    data = LlavaDataset(folder)
    loader = torch.utils.data.DataLoader(
        data, BATCH, shuffle=True, num_workers=workers, collate_fn=data.collate, pin_memory=False
    )
    for batch in loader:
        yield len(batch["input_ids"])


class LlavaDataset:
    """What LLaVA's LazySupervisedDataset and its collator do to a record (recipes §1.2 P1, P4, P7; §1.3 D10)."""

    IGNORE, IMAGE, SYSTEM = -100, -200, "A chat between a curious user and an artificial intelligence assistant. "

    def __init__(self, folder: Path):
        self.records = json.loads((folder / "records.json").read_text())
        self.images, self.processor = folder / "images", image_processor()
        self.tokenizer = fast_tokenizer(folder)
        self.fill = tuple(int(value * 255) for value in MEAN)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        record = self.records[i]
        with Image.open(self.images / record["image"]) as file:
            image = file.convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), self.fill)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        pixels = self.processor.preprocess(square, return_tensors="pt")["pixel_values"][0]
        ids, labels = self._talk([turn["value"] for turn in record["conversations"]])
        return {"input_ids": ids, "labels": labels, "image": pixels}

    def _talk(self, turns: list[str]):
        import torch

        rounds = [f"USER: {ask} ASSISTANT: {answer}</s>" for ask, answer in zip(turns[::2], turns[1::2], strict=True)]
        ids = self._ids(self.SYSTEM + "".join(rounds))
        labels, at = torch.full_like(ids, self.IGNORE), len(self._ids(self.SYSTEM))
        for part in rounds:
            length, asked = len(self._ids(part)), len(self._ids(part.split(" ASSISTANT: ")[0] + " ASSISTANT: "))
            labels[at + asked : at + length] = ids[at + asked : at + length]
            at += length
        return ids, labels

    def _ids(self, text: str):
        """Tokens with IMAGE where `<image>` stands: each piece between images is tokenised by itself."""
        import torch

        pieces = [self.tokenizer(piece).input_ids for piece in text.split("<image>")]
        ids = [id for n, piece in enumerate(pieces) for id in ([self.IMAGE] if n else []) + piece]
        return torch.tensor(ids)

    def collate(self, items: list[dict]) -> dict:
        import torch

        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([item["input_ids"] for item in items], batch_first=True, padding_value=0)
        labels = pad([item["labels"] for item in items], batch_first=True, padding_value=self.IGNORE)
        pixels = torch.stack([item["image"] for item in items])
        return {"input_ids": ids, "labels": labels, "attention_mask": ids.ne(0), "images": pixels}


def hf_batches(folder: Path, workers: int):
    import torch

    data = HuggingFaceDataset(folder)
    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=workers, collate_fn=data.collate)
    for batch in loader:
        yield len(batch["input_ids"])


class HuggingFaceDataset:
    """Records as they are; LlavaProcessor on a whole batch, its own centre crop included."""

    def __init__(self, folder: Path):
        import transformers

        self.records = json.loads((folder / "records.json").read_text())
        self.images = folder / "images"
        self.processor = transformers.LlavaProcessor(
            image_processor(), fast_tokenizer(folder), PATCH, "default", num_additional_image_tokens=1
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        record = self.records[i]
        with Image.open(self.images / record["image"]) as file:
            image = file.convert("RGB")
        turns = [turn["value"] for turn in record["conversations"]]
        pairs = zip(turns[::2], turns[1::2], strict=True)
        return {"image": image, "text": "".join(f"USER: {ask} ASSISTANT: {answer}</s>" for ask, answer in pairs)}

    def collate(self, items: list[dict]) -> dict:
        images, texts = ([item[key] for item in items] for key in ("image", "text"))
        batch = self.processor(images=images, text=texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].clone()
        labels[batch["attention_mask"] == 0] = -100
        return {**batch, "labels": labels}


def image_processor():
    """CLIP's for 336 pixels: the one for torchvision where that is installed, otherwise the one for PIL."""
    import transformers

    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    try:
        import torchvision  # noqa: F401

        return transformers.CLIPImageProcessor(**size)
    except ImportError:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        return CLIPImageProcessorPil(**size)


def fast_tokenizer(folder: Path):
    import transformers

    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"), **special
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


# ------------------------------------------------------------------------------------------------------------- timing


def measure(side: str, folder: Path, workers: int) -> None:
    """In a process of its own: prints {first, seconds, cpu_seconds, images} as JSON; imports are not timed."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    if side == "jaxvlm":
        import grain  # noqa: F401

        from jaxvlm.data import loader  # noqa: F401
    else:
        import torch

        torch.set_num_threads(1)  # as in every worker of a DataLoader
    start, seen = time.perf_counter(), []
    for images in {"jaxvlm": jaxvlm_batches, "llava": llava_batches, "hf": hf_batches}[side](folder, workers):
        seen.append((time.perf_counter(), cpu_seconds(), images))
    warm = 2 * workers + 3  # what was prepared while the first batch was waited for is not timed
    (begun, busy, _), (ended, worked, _) = seen[warm], seen[-1]
    images = sum(images for *_, images in seen[warm + 1 :])
    cost = {"seconds": ended - begun, "cpu_seconds": worked - busy, "images": images}
    print(json.dumps({"first": seen[0][0] - start, **cost}))


def cpu_seconds() -> float:
    """What this process and all below it have computed so far."""
    ticks, parents = {}, {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(entry.parent.name)] = int(fields[1])
        ticks[int(entry.parent.name)] = int(fields[11]) + int(fields[12])

    def ours(process: int) -> bool:
        return process == os.getpid() or (process in parents and ours(parents[process]))

    return sum(count for process, count in ticks.items() if ours(process)) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="worker processes; 0 is none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="benchmarks/results/data.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return measure(options.side, options.folder, options.workers[0])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        mean = write_data(folder, options.images)
        print(f"{options.images} images of {mean / 1e3:.0f} KB on average")
        start = time.perf_counter()
        next(iter(jaxvlm_batches(folder, 0)))
        tables = time.perf_counter() - start
        found = {workers: rounds(folder, workers, options.rounds) for workers in options.workers}
    names = ("jax", "grain", "torch", "transformers", "pillow", "numpy")
    result = {
        "what": "records to batches for a 336-pixel CLIP, 16 conversations a batch",
        "device": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {name: metadata.version(name) for name in names},
        "image_processor": type(image_processor()).__name__,
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "images": options.images,
        "mean_file_bytes": mean,
        "first_batch_with_tables_made_seconds": tables,
        "workers": {workers: summary(each, workers) for workers, each in found.items()},
    }
    Path(options.out).write_text(json.dumps(result, indent=2) + "\n")
    print(f"Written: {options.out}")


def rounds(folder: Path, workers: int, count: int) -> dict[str, list[dict]]:
    """What each side measured, in turn, `count` times."""
    found: dict[str, list[dict]] = {side: [] for side in SIDES}
    for number in range(count):
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--workers", str(workers)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
            last = json.loads(done.stdout.splitlines()[-1])
            found[side].append(last)
            wall, cpu = (last["images"] / last[kind] for kind in ("seconds", "cpu_seconds"))
            print(
                f"{workers} workers, round {number + 1} {side:7} first batch {last['first']:.2f} s, {wall:.1f} images/s, "
                f"{cpu:.1f} images/s of a core"
            )
    return found


def summary(found: dict[str, list[dict]], workers: int) -> dict:
    made = {"first_batch_seconds": {side: statistics.median(r["first"] for r in found[side]) for side in SIDES}}
    kinds = {"images_per_second": "seconds", "images_per_second_of_a_core": "cpu_seconds"}
    for name, kind in kinds.items():
        rate = {side: statistics.median(r["images"] / r[kind] for r in found[side]) for side in SIDES}
        made[name] = rate | {f"ours_over_{side}": rate["jaxvlm"] / rate[side] for side in SIDES[1:]}
        print(f"{workers} workers, {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in made[name].items()))
    return {**made, "rounds": found}


if __name__ == "__main__":
    main()
