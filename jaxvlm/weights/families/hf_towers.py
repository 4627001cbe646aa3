"""The vision towers that transformers' LLaVA classes compute: a configuration back to a config.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxvlm.config import VisionConfig
from jaxvlm.weights.families.base import Family
from jaxvlm.weights.families.vit import CLIP, DINOV2, SIGLIP
from jaxvlm.weights.hf_config import ACTIVATIONS
from jaxvlm.weights.readers import WeightsError

HF_ACTIVATIONS = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
# Which features are taken is LLaVA's business, and how images are prepared its processor's.
_NOT_THE_TOWERS = {"feature_layers", "feature_norm", "feature_tokens", "pool", "resized_grid", "scales", "mean", "std"}
_NOT_THE_TOWERS |= {"lora"}


def describe_tower(config: VisionConfig) -> tuple[Family, dict[str, Any]]:
    """The table and the config.json of the tower. Read again it must give `config`, so nothing can be lost silently.

    Raises `WeightsError` naming what no tower of LLaVA's does.
    """
    if config.kind != "vit":
        raise WeightsError(f"LLaVA there takes a CLIP, SigLIP or DINOv2 tower, and this one is of kind '{config.kind}'")
    common = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": HF_ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
    }
    swiglu = config.mlp == "swiglu"  # whose width is 2/3 of what the ratio says
    ratio = round(1.5 * config.mlp_dim / config.width) if swiglu else config.mlp_dim // config.width
    candidates = (
        (CLIP, {"model_type": "clip_vision_model", "intermediate_size": config.mlp_dim}),
        # SigLIP's pooling head has no part in LLaVA.
        (SIGLIP, {"model_type": "siglip_vision_model", "intermediate_size": config.mlp_dim, "vision_use_head": False}),
        (
            DINOV2,
            {"model_type": "dinov2", "mlp_ratio": ratio, "use_swiglu_ffn": swiglu, "use_mask_token": False},
        ),
    )
    differing = {}
    for family, values in candidates:
        given = values | common
        found = family.configure(given, Path("config.json"))
        names = [item.name for item in dataclasses.fields(config) if item.name not in _NOT_THE_TOWERS]
        differing[family.name] = [name for name in names if getattr(found, name) != getattr(config, name)]
        if not differing[family.name]:
            return family, given
    nearest = min(differing, key=lambda name: len(differing[name]))
    settings = ", ".join(f"vision.{name} = {getattr(config, name)}" for name in differing[nearest])
    raise WeightsError(
        f"LLaVA there takes a CLIP, SigLIP or DINOv2 tower, and this one is neither; the nearest, {nearest}, lacks {settings}"
    )
