"""Every family of checkpoints that jaxvlm reads: one table and one config reader each."""

from __future__ import annotations

from pathlib import Path

from jaxvlm.weights.families.base import Family
from jaxvlm.weights.families.connectors import CONNECTOR
from jaxvlm.weights.families.efficientnet import EFFICIENTNET_LITE
from jaxvlm.weights.families.gguf import GGUF_LLAMA
from jaxvlm.weights.families.llama import LLAMA
from jaxvlm.weights.families.vit import CLIP, DINOV2, SIGLIP
from jaxvlm.weights.readers import WeightsError

FAMILIES = {family.name: family for family in (CLIP, SIGLIP, DINOV2, EFFICIENTNET_LITE, CONNECTOR, LLAMA, GGUF_LLAMA)}
BY_MODEL_TYPE = {model_type: family for family in FAMILIES.values() for model_type in family.model_types}


def part_family(part: str, model_type: str, folder: Path) -> Family:
    """The family of a part of the `model_type` in a config.json. Raises `WeightsError` naming the known ones."""
    family = BY_MODEL_TYPE.get(model_type)
    if family is None or family.part != part:
        known = ", ".join(name for name, family in BY_MODEL_TYPE.items() if family.part == part)
        what = {"vision": "vision tower", "llm": "language model"}[part]
        raise WeightsError(f"{folder}: a {what} of model_type '{model_type}' is not supported. Known: {known}.")
    return family
