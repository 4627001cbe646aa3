"""A toy world for tests: a tokenizer, a LLaVA-format data set with pictures, and a model config small enough to train."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxvlm.config import (
    ConnectorConfig,
    DataConfig,
    EvalConfig,
    LLMConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    VisionConfig,
)
from jaxvlm.data.conversation import TEMPLATES

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 210), "yellow": (230, 220, 40)}
SIDES = ("left", "right")


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokenizer with Llama's special tokens, trained on the toy sentences."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [f"What colour is the {side} half? {colour}" for side in SIDES for colour in COLOURS]
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([*words, *(f"{t.system} USER: ASSISTANT:" for t in TEMPLATES.values())] * 9, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_dataset(folder: Path, count: int = 24, seed: int = 0) -> Path:
    """Pictures of two coloured halves; captions.json, instruct.json (one text-only record in six) and test.jsonl."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    captions, conversations, questions = [], [], []
    for i in range(count):
        colours = rng.choice(list(COLOURS), 2)
        pixels = np.zeros((20, 28, 3), np.uint8)
        pixels[:, :14], pixels[:, 14:] = COLOURS[colours[0]], COLOURS[colours[1]]
        pixels = np.clip(pixels + rng.integers(-9, 9, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        image = f"{i}.png"
        captions.append(_record(f"cap{i}", image, [("Describe it.\n<image>", f"{colours[0]} and {colours[1]}")]))
        turns = [(f"What colour is the {side} half?", colour) for side, colour in zip(SIDES, colours, strict=True)]
        if i % 6 == 5:
            conversations.append(_record(f"text{i}", None, [("Say a colour.", str(colours[0]))]))
        else:
            conversations.append(_record(f"conv{i}", image, [("<image>\n" + turns[0][0], turns[0][1]), turns[1]]))
        for side, (text, answer) in zip(SIDES, turns, strict=True):
            record = {"question_id": f"{i}{side}", "image": image, "text": text, "answer": answer, "category": side}
            questions.append(json.dumps(record))
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "instruct.json").write_text(json.dumps(conversations))
    (folder / "test.jsonl").write_text("\n".join(questions) + "\n")
    return folder


def _record(name: str, image: str | None, turns: list[tuple[str, str]]) -> dict:
    values = [part for human, gpt in turns for part in (("human", human), ("gpt", str(gpt)))]
    record = {"id": name, "conversations": [{"from": role, "value": text} for role, text in values]}
    return record | ({"image": image} if image else {})


def model_config(**changes) -> ModelConfig:
    """CLIP-shaped tower of 4 tokens and a Llama-shaped decoder, float32."""
    lora = LoRAConfig(rank=changes.pop("lora", 0), alpha=8.0)
    vision = VisionConfig(image_size=28, patch_size=14, width=32, depth=3, num_heads=4, mlp_dim=64)
    llm = LLMConfig(
        vocab_size=512, width=64, depth=2, num_heads=4, num_kv_heads=4, head_dim=16, mlp_dim=128, lora=lora
    )
    values = dict(vision=vision, connector=ConnectorConfig(), llm=llm, dtype="float32", remat="none")
    return ModelConfig(**(values | changes))


def run_config(data: Path, tokenizer: Path, **changes) -> RunConfig:
    """Two stages of a few steps and an evaluation."""

    def stage(name, trainable, file, template, steps, lr):
        source = SourceConfig(name=name, path=str(data / file), images=str(data / "images"))
        return StageConfig(
            name=name,
            trainable=trainable,
            data=DataConfig(
                sources=(source,), template=template, packing=True, images_per_row=3, virtual_shards=2, length=128
            ),
            optimizer=OptimizerConfig(learning_rate=lr),
            batch_size=2,
            steps=steps,
        )

    values = dict(
        name="tiny",
        model=model_config(),
        prompt=PromptConfig(tokenizer=str(tokenizer), template="vicuna_v1", transform="naive", length=128),
        stages=(
            stage("align", ("connector/.*",), "captions.json", "plain", 4, 1e-2),
            stage("instruct", ("connector/.*", "llm/.*"), "instruct.json", None, 6, 3e-3),
        ),
        eval=EvalConfig(
            task="vqa",
            path=str(data / "test.jsonl"),
            images=str(data / "images"),
            limits=(("left", 8), ("right", 4)),
            batch_size=4,
            max_new_tokens=4,
            samples=6,
        ),
    )
    return RunConfig(**(values | changes))
