"""Prismatic VLMs: `config.json` and `checkpoints/latest-checkpoint.pt` (recipes §3.3, §7.2).

A checkpoint holds the projector, after the second stage the language model, and its vision tower only where that was
trained too. What it leaves out it names; the names stand for the architectures below. Three quirks of the released
models are in those values: SigLIP ran with the exact GELU instead of its tanh form, so did the CLIP beside a DINOv2, and
the Llama-2 chat models were prompted with `<<SYS>`.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from jaxvlm.config import ConnectorConfig, ModelConfig, VisionConfig
from jaxvlm.weights.families import part_family
from jaxvlm.weights.families.base import Family, Format
from jaxvlm.weights.families.connectors import mlp_name
from jaxvlm.weights.families.known import LANGUAGE_MODELS
from jaxvlm.weights.families.timm import TIMM_VIT, timm_config
from jaxvlm.weights.readers import WeightsError

_DINO, _CLIP = "vit_large_patch14_reg4_dinov2", "vit_large_patch14_clip_336"
# Image size, and the towers in the order in which their channels are joined, as timm names them.
TOWERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "clip-vit-b": (224, ("vit_base_patch16_clip_quickgelu_224",)),
    "clip-vit-l": (224, ("vit_large_patch14_clip_quickgelu_224",)),
    "clip-vit-l-336px": (336, ("vit_large_patch14_clip_quickgelu_336",)),
    "siglip-vit-b16-224px": (224, ("vit_base_patch16_siglip_224",)),
    "siglip-vit-b16-256px": (256, ("vit_base_patch16_siglip_256",)),
    "siglip-vit-b16-384px": (384, ("vit_base_patch16_siglip_384",)),
    "siglip-vit-so400m": (224, ("vit_so400m_patch14_siglip_224",)),
    "siglip-vit-so400m-384px": (384, ("vit_so400m_patch14_siglip_384",)),
    "dinov2-vit-l": (224, (_DINO,)),
    "in1k-vit-l": (224, ("vit_large_patch16_224",)),
    "dinoclip-vit-l-336px": (336, (_DINO, _CLIP)),  # a CLIP without its own activation
    "dinosiglip-vit-so-224px": (224, (_DINO, "vit_so400m_patch14_siglip_224")),
    "dinosiglip-vit-so-384px": (384, (_DINO, "vit_so400m_patch14_siglip_384")),
}
# The language model, its vocabulary with <PAD> and rounded up to 64, and the template it was prompted with.
LLMS = {
    "llama2-7b-pure": ("meta-llama/Llama-2-7b-hf", 32064, "prism"),
    "llama2-13b-pure": ("meta-llama/Llama-2-13b-hf", 32064, "prism"),
    "llama2-7b-chat": ("meta-llama/Llama-2-7b-chat-hf", 32064, "prism_llama_2"),
    "llama2-13b-chat": ("meta-llama/Llama-2-13b-chat-hf", 32064, "prism_llama_2"),
    "vicuna-v15-7b": ("lmsys/vicuna-7b-v1.5", 32064, "vicuna_v1"),
    "vicuna-v15-13b": ("lmsys/vicuna-13b-v1.5", 32064, "vicuna_v1"),
    "mistral-v0.1-7b-pure": ("mistralai/Mistral-7B-v0.1", 32064, "prism"),
    "mistral-v0.1-7b-instruct": ("mistralai/Mistral-7B-Instruct-v0.1", 32064, "prism_mistral"),
    "phi-2-3b": ("microsoft/phi-2", 50304, "prism_phi"),
}
_TRANSFORMS = {"resize-naive": "naive", "resize-crop": "crop", "letterbox": "letterbox"}
_PLACES = (
    (r"vision_backbone\.featurizer\.", "vision"),
    (r"vision_backbone\.dino_featurizer\.", "vision/towers_0"),
    (r"vision_backbone\.(siglip|clip)_featurizer\.", "vision/towers_1"),
    (r"llm_backbone\.llm\.", "llm"),
)


def split_name(name: str) -> tuple[str, str] | None:
    if connector := mlp_name(name):
        return "connector", connector
    for prefix, place in _PLACES:
        if found := re.match(prefix, name):
            return place, name[found.end() :]
    return None


def _lookup(table: dict[str, Any], given: dict, key: str, folder: Path) -> Any:
    name = given["model"].get(key)
    if name not in table:
        raise WeightsError(f"{folder}/config.json: {key} '{name}' is not known. Known: {', '.join(table)}.")
    return table[name]


def families(given: dict, folder: Path) -> dict[str, Family]:
    towers = _lookup(TOWERS, given, "vision_backbone_id", folder)[1]
    places = ["vision"] if len(towers) == 1 else [f"vision/towers_{i}" for i in range(len(towers))]
    kind = LANGUAGE_MODELS[_lookup(LLMS, given, "llm_backbone_id", folder)[0]]["model_type"]
    return dict.fromkeys(places, TIMM_VIT) | {"llm": part_family("llm", kind, folder)}


def configure(given: dict, folder: Path) -> ModelConfig:
    size, names = _lookup(TOWERS, given, "vision_backbone_id", folder)
    towers = tuple(dataclasses.replace(timm_config(name), image_size=size) for name in names)
    hub, vocab_size, _ = _lookup(LLMS, given, "llm_backbone_id", folder)
    text = dict(LANGUAGE_MODELS[hub])
    if given.get("stage") != "align":  # a first stage has not touched the language model
        text["vocab_size"] = vocab_size
    return ModelConfig(
        vision=towers[0] if len(towers) == 1 else VisionConfig(kind="fused", towers=towers),
        connector=ConnectorConfig(_connector(given["model"]["arch_specifier"], folder)),
        llm=part_family("llm", text["model_type"], folder).configure(text, folder),
    )


def _connector(specifier: str, folder: Path) -> str:
    for end, kind in (("fused-gelu-mlp", "fused_mlp"), ("gelu-mlp", "mlp2x_gelu"), ("linear", "linear")):
        if specifier.endswith(end):
            return kind
    raise WeightsError(f"{folder}/config.json: arch_specifier '{specifier}' is not known.")


def prompt(given: dict, folder: Path) -> dict[str, Any]:
    """Patches right after BOS; the text alone is cut to `llm_max_length` (recipes §0 fact 3)."""
    strategy = given["model"].get("image_resize_strategy")
    if strategy not in _TRANSFORMS:
        raise WeightsError(f"{folder}/config.json: image_resize_strategy '{strategy}' is not known.")
    return {
        "template": _lookup(LLMS, given, "llm_backbone_id", folder)[2],
        "transform": _TRANSFORMS[strategy],
        "layout": "prismatic",
        "length": given["model"].get("llm_max_length", 2048) + configure(given, folder).tile_tokens,
        "truncation": "before_splice",
    }


PRISMATIC = Format(
    name="prismatic",
    recognise=lambda given: isinstance(given.get("model"), dict) and "vision_backbone_id" in given["model"],
    configure=configure,
    families=families,
    split_name=split_name,
    prompt=prompt,
    outside=lambda given: {
        "vision": given["model"]["vision_backbone_id"],
        "llm": given["model"]["llm_backbone_id"],
    },
)
