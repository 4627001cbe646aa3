"""Reading Hugging Face's JSON files: what the families' `configure` functions share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxvlm.weights.readers import WeightsError

ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu_erf",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def image_processor(folder: Path) -> dict:
    """The image part of `preprocessor_config.json` or, in newer folders, of `processor_config.json`."""
    for file in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        if file.is_file():
            values = read_json(file)
            return values.get("image_processor", values) if file.name == "processor_config.json" else values
    return {}


def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise WeightsError(f"{file} is not valid JSON: {error}") from error


def activation(name: str, folder: Path) -> str:
    if name not in ACTIVATIONS:
        raise WeightsError(f"{folder}: activation '{name}' is not supported; known: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def refuse(folder: Path, config: dict, **values: Any) -> None:
    for key, value in values.items():
        if config.get(key) == value:
            raise WeightsError(f"{folder}/config.json: {key} = {value} is not supported.")
