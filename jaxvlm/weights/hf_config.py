"""Reading Hugging Face's JSON files: what the families' `configure` functions share."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jaxvlm.templates import OWN, own_template
from jaxvlm.weights.readers import WeightsError

ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu_erf",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "relu": "relu",
}


def image_processor(folder: Path) -> dict:
    """The image part of `preprocessor_config.json` or, in newer folders, of `processor_config.json`."""
    for file in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        if file.is_file():
            values = read_json(file)
            return values.get("image_processor", values) if file.name == "processor_config.json" else values
    return {}


_CHATML = r"(?=[\s\S]*<\|im_start\|>)"
# What a chat template written for one of our templates contains; the first that fits is taken.
_MARKS = (
    (OWN, r"<\|im_sep\|>"),  # Phi-4's, which is not ChatML
    ("gemma", r"<start_of_turn>"),
    ("phi_3", r"<\|user\|>[\s\S]*<\|end\|>"),
    ("cambrian_chatml", rf"{_CHATML}[\s\S]*You are Cambrian"),
    ("chatml_direct", rf"{_CHATML}[\s\S]*Answer the questions\."),
    ("qwen_2_5", rf"{_CHATML}[\s\S]*You are Qwen, created by Alibaba Cloud"),
    ("qwen", rf"{_CHATML}[\s\S]*You are a helpful assistant\b"),
    ("chatml", _CHATML),
    ("llava_llama_2", r"\[INST\][\s\S]*<<SYS>>|<<SYS>>[\s\S]*\[INST\]"),
    ("prism_llama_2", r"<<SYS>(?!>)"),
    ("prism_mistral", r"\[INST\][\s\S]*\"</s>\""),
    ("mistral_instruct", r"\[INST\]"),
    ("cambrian_llama_3", r"You are Cambrian"),
    ("llama_3", r"<\|start_header_id\|>"),
    ("llava_v1", r"curious human"),
    ("vicuna_v1", r"USER: ?"),
    ("prism", r"In: "),
    ("prism_phi", r"Output:"),
)


def template_of(folder: Path) -> str | None:
    """The name of the conversation template that a folder's chat template is written for; its own where none is like it.

    None if the folder has none.
    """
    text = own_template(folder)
    return text and next((template for template, mark in _MARKS if re.search(mark, text)), OWN)


def config_file(folder: Path) -> Path | None:
    """The file in a folder that says what the checkpoint there is; OpenCLIP gives its own another name."""
    files = (folder / name for name in ("config.json", "open_clip_config.json"))
    return next((file for file in files if file.is_file()), None)


def read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{file} is not a JSON object but a {type(values).__name__}.")
    return values


def activation(name: str, folder: Path) -> str:
    if name not in ACTIVATIONS:
        raise WeightsError(f"{folder}: activation '{name}' is not supported; known: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def refuse(folder: Path, config: dict, **values: Any) -> None:
    for key, value in values.items():
        if config.get(key) == value:
            raise WeightsError(f"{folder}/config.json: {key} = {value} is not supported.")
