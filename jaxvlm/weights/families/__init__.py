"""Every family of checkpoints that jaxvlm reads: one table and one config reader each."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from jaxvlm.config import LLMConfig, LoRAConfig
from jaxvlm.weights.families.base import Family
from jaxvlm.weights.families.convnext import CONVNEXT
from jaxvlm.weights.families.efficientnet import EFFICIENTNET_LITE
from jaxvlm.weights.families.gemma import GEMMA, GEMMA_FIRST
from jaxvlm.weights.families.gguf import GGUF
from jaxvlm.weights.families.llama import LLAMA
from jaxvlm.weights.families.open_clip import EVA_LAVIS, OPEN_CLIP
from jaxvlm.weights.families.opt import OPT
from jaxvlm.weights.families.phi import PHI, PHI3
from jaxvlm.weights.families.timm import TIMM_CONVNEXT, TIMM_VIT
from jaxvlm.weights.families.vit import CLIP, DINOV2, DINOV2_REGISTERS, EVA_CLIP, SIGLIP, SUPERVISED_VIT
from jaxvlm.weights.readers import WeightsError

_TOWERS = (CLIP, SIGLIP, DINOV2, DINOV2_REGISTERS, SUPERVISED_VIT, EVA_CLIP, CONVNEXT)
_TOWERS += (TIMM_VIT, TIMM_CONVNEXT, OPEN_CLIP, EVA_LAVIS, EFFICIENTNET_LITE)
FAMILIES = {family.name: family for family in (*_TOWERS, LLAMA, GEMMA_FIRST, GEMMA, PHI, PHI3, OPT, *GGUF.values())}
BY_MODEL_TYPE = {model_type: family for family in FAMILIES.values() for model_type in family.model_types}
# What to use in place of a type that is not read.
HINTS = dict.fromkeys(
    ("siglip2", "siglip2_vision_model"),
    " It is SigLIP 2's NaFlex tower, for images of any shape; those of a fixed resolution are of type 'siglip'.",
)


def part_family(part: str, model_type: str, folder: Path) -> Family:
    """The family of a part of the `model_type` in a config.json. Raises `WeightsError` naming the known ones."""
    family = BY_MODEL_TYPE.get(model_type)
    if family is None or family.part != part:
        known = ", ".join(name for name, family in BY_MODEL_TYPE.items() if family.part == part)
        what = {"vision": "vision tower", "llm": "language model"}[part]
        hint = HINTS.get(model_type, "")
        raise WeightsError(
            f"{folder}/config.json: a {what} of model_type '{model_type}' is not supported.{hint} Known: {known}."
        )
    return family


def describe_decoder(config: LLMConfig) -> tuple[Family, dict[str, Any]]:
    """The table and the config.json of the class of transformers that computes this decoder, adapters apart.

    The config.json lacks the special tokens only. Read again it must give `config`, so nothing can be lost silently.
    Raises `WeightsError` naming what no class does.
    """
    plain, differing = replace(config, lora=LoRAConfig()), {}
    for kind, family in BY_MODEL_TYPE.items():
        if family.describe is None:
            continue
        given = {"model_type": kind} | family.describe(plain, kind)
        try:
            found = family.configure(given, Path("config.json"))
        except WeightsError:
            continue
        names = [item.name for item in fields(plain) if getattr(found, item.name) != getattr(plain, item.name)]
        if not names:
            return family, given
        differing[kind] = names
    kind = min(differing, key=lambda kind: len(differing[kind]))
    settings = ", ".join(f"llm.{name} = {getattr(plain, name)}" for name in differing[kind])
    raise WeightsError(
        f"No language model of transformers computes this decoder; the nearest, {kind}, lacks {settings}."
    )
