"""A toy world made on the spot, without any download: pictures of two coloured halves, and a tokenizer for their words.

For a smoke test of the whole pipeline in seconds (`configs/quickstart.py:tiny`) and for this project's own tests.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxvlm.data.assets.llava_json import caption, conversation, question, record, write_json, write_jsonl
from jaxvlm.templates import TEMPLATES

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 210), "yellow": (230, 220, 40)}
SIDES = ("left", "right")
VOCABULARY = 512


def prepare(files: dict[str, Path], out: Path, log: Callable[[str], None]) -> None:
    """tokenizer.json, align.json, instruct.json, test.jsonl and images/N.png"""
    write_tokenizer(out)
    write_dataset(out, 96)


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokenizer with Llama's special tokens, trained on the toy sentences and its template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    sentences = [f"What colour is the {side} half? {colour}" for side in SIDES for colour in COLOURS]
    sentences += [f"{TEMPLATES['vicuna_v1'].system} USER: ASSISTANT:"] * 9
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def write_dataset(folder: Path, count: int = 24, seed: int = 0) -> Path:
    """`count` pictures with a caption, a conversation (one in six is text only) and two questions each."""
    rng, choice = np.random.default_rng(seed), random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    captions, conversations, questions = [], [], []
    for i in range(count):
        colours = [str(colour) for colour in rng.choice(list(COLOURS), 2)]
        pixels = np.zeros((20, 28, 3), np.int64)
        pixels[:, :14], pixels[:, 14:] = COLOURS[colours[0]], COLOURS[colours[1]]
        pixels = np.clip(pixels + rng.integers(-9, 9, pixels.shape), 0, 255).astype(np.uint8)
        image = f"{i}.png"
        Image.fromarray(pixels).save(folder / "images" / image)
        asked = [f"What colour is the {side} half?" for side in SIDES]
        captions.append(caption(f"cap{i}", image, f"{colours[0]} and {colours[1]}", choice))
        if i % 6 == 5:
            conversations.append(record(f"text{i}", None, [("Say a colour.", colours[0])]))
        else:
            conversations.append(conversation(f"conv{i}", image, zip(asked, colours, strict=True)))
        questions += [question(f"{i}{s}", image, asked[n], colours[n], s) for n, s in enumerate(SIDES)]
    write_json(folder / "align.json", captions)
    write_json(folder / "instruct.json", conversations)
    write_jsonl(folder / "test.jsonl", questions)
    return folder
