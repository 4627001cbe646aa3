"""Towers as timm names them: ViTs of every kind (Prismatic's vision weights, OpenCLIP's SigLIP) and ConvNeXts.

timm's config.json has the architecture's name, from which everything but the image's normalisation follows (recipes
§3.3, §3.5). Two traps: a plain `clip` name means the exact GELU, `clip_quickgelu` OpenAI's; and SigLIPs have the exact
GELU under most names, although they were trained with the tanh form.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxvlm.config import VisionConfig
from jaxvlm.weights.families.base import HEADS_IN, Family, Rule, dense, joined, norm
from jaxvlm.weights.families.convnext import convnext, convnext_config
from jaxvlm.weights.families.vit import (
    CLIP_TRAITS,
    DINOV2_TRAITS,
    GATE_UP,
    IMAGENET_MEAN,
    IMAGENET_STD,
    QKV,
    SIGLIP_TRAITS,
    VIT_FUNCTIONS,
    VIT_TRAITS,
    vit_conditions,
)
from jaxvlm.weights.readers import WeightsError

# width, depth, heads, width of the MLP
_SIZES = {
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
    "so400m": (1152, 27, 16, 4304),
}
_GIANT_DINOV2 = (1536, 40, 24, 4096)
_KINDS: dict[str, dict[str, Any]] = {
    "clip": CLIP_TRAITS | {"norm_eps": 1e-5, "activation": "gelu_erf"},
    "clip_quickgelu": CLIP_TRAITS | {"norm_eps": 1e-5, "activation": "quick_gelu"},
    "siglip": SIGLIP_TRAITS | {"norm_eps": 1e-6, "activation": "gelu_erf"},
    "siglip_gap": SIGLIP_TRAITS | {"norm_eps": 1e-6, "activation": "gelu_erf"},
    "dinov2": DINOV2_TRAITS | {"norm_eps": 1e-6, "activation": "gelu_erf"},
    "reg4_dinov2": DINOV2_TRAITS | {"norm_eps": 1e-6, "activation": "gelu_erf", "num_registers": 4},
    "": VIT_TRAITS | {"norm_eps": 1e-6, "activation": "gelu_erf"},
}
# The SigLIPs whose names do mean the tanh GELU.
_TANH = r"vit_base_patch32_siglip_256|vit_large_patch16_siglip_512|vit_so400m_patch16_siglip_(256|384|512)"
_CONVNEXTS = {  # depths, widths, eps of the norms
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768), 1e-6),
    "convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768), 1e-6),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024), 1e-6),
    "convnext_large": ((3, 3, 27, 3), (192, 384, 768, 1536), 1e-6),
    "convnext_large_mlp": ((3, 3, 27, 3), (192, 384, 768, 1536), 1e-6),
    "convnext_xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048), 1e-6),
    "convnext_xxlarge": ((3, 4, 30, 3), (384, 768, 1536, 3072), 1e-5),
}


def given_of(config: dict) -> dict:
    """A config.json of timm, or the open_clip_config.json of a model with a tower of timm's, as `configure` reads it; that
    of a model with a tower of OpenCLIP's own as the configure function of those does.
    """
    if "model_cfg" in config:
        tower = config["model_cfg"]["vision_cfg"]
        if not tower.get("timm_model_name"):
            return {**config, "model_type": "open_clip"}
        values = config.get("preprocess_cfg", {}) | {"input_size": [tower.get("image_size", 224)]}
        config = {"architecture": tower["timm_model_name"], "pretrained_cfg": values}
    kind = "timm_convnext" if config["architecture"].startswith("convnext") else "timm_vit"
    return {**config, "model_type": kind}


def timm_config(name: str) -> VisionConfig:
    """The tower of a timm model's name, with or without the tag of its weights; images normalised as that kind's are.

    Raises `WeightsError` for a name that is of none of the supported kinds.
    """
    architecture = name.partition(".")[0]
    if architecture in _CONVNEXTS:
        depths, widths, eps = _CONVNEXTS[architecture]
        traits = {"activation": "gelu_erf", "norm_eps": eps, "layer_scale": True}
        if ".clip" in name:
            return convnext_config(depths, widths, 256, **traits, **CLIP_TRAITS)
        return convnext_config(depths, widths, 224, **traits, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    kinds = "|".join(filter(None, _KINDS))
    found = re.fullmatch(rf"vit_({'|'.join(_SIZES)})_patch(\d+)_?({kinds})?_?(\d+)?", architecture)
    if not found or not (found[4] or "dinov2" in (found[3] or "")):
        raise WeightsError(
            f"timm's '{name}' is not supported. Known: vit_SIZE_patchN with {kinds} or without, of sizes "
            f"{', '.join(_SIZES)}; {', '.join(_CONVNEXTS)}."
        )
    size, patch, kind = found[1], int(found[2]), found[3] or ""
    swiglu = size == "giant" and "dinov2" in kind
    width, depth, heads, mlp_dim = _GIANT_DINOV2 if swiglu else _SIZES[size]
    traits = _KINDS[kind] | ({"mlp": "swiglu"} if swiglu else {})
    if re.fullmatch(_TANH, architecture):
        traits |= {"activation": "gelu_tanh"}
    return VisionConfig(
        image_size=int(found[4] or 518),
        patch_size=patch,
        width=width,
        depth=depth,
        num_heads=heads,
        mlp_dim=mlp_dim,
        **traits,
    )


def configure(given: dict, folder: Path) -> VisionConfig:
    config, values = timm_config(given["architecture"]), given.get("pretrained_cfg", given)
    changes = {key: tuple(values[key]) for key in ("mean", "std") if key in values}
    if "input_size" in values:
        changes["image_size"] = values["input_size"][-1]
    return dataclasses.replace(config, **changes)


def _conditions(config: VisionConfig) -> dict[str, bool]:
    # With registers timm's positions are of the patches alone, and the class token's is part of the token.
    patches_only = config.class_token and config.num_registers > 0
    return vit_conditions(config) | {"patch_positions": patches_only, "all_positions": not patches_only}


def _with_zeros_first(table: np.ndarray) -> np.ndarray:
    return np.pad(table[0], ((1, 0), (0, 0)))


_OPEN_CLIP = (
    (r"text\..*|transformer\..*|token_embedding\.weight|positional_embedding|ln_final\..*|attn_mask", "the text tower"),
    (r"visual\.head\..*|text_projection|logit_(scale|bias)", "the contrastive head"),
)

TIMM_VIT = Family(
    name="timm-vit",
    model_types={"timm_vit": {}},
    configure=configure,
    rules=(
        Rule("patch_embed.proj.weight", "patch_embed/kernel", "D C p q -> p q C D"),
        Rule("patch_embed.proj.bias", "patch_embed/bias", "D -> D", when="patch_bias"),
        Rule("cls_token", "class_token", "1 1 D -> D", when="class_token"),
        Rule("reg_token", "register_tokens", "1 R D -> R D", when="registers"),
        Rule("pos_embed", "pos_embed", "1 N D -> N D", when="all_positions"),
        Rule("pos_embed", "pos_embed", "N D -> N D", "patch_positions", _with_zeros_first, file="1 P D"),
        *norm("norm_pre", "pre_norm", when="pre_norm"),
        *norm("blocks.{i}.norm1", "layers/norm1"),
        *joined("blocks.{i}.attn.qkv", QKV),
        *dense("blocks.{i}.attn.proj", "layers/attn/o", HEADS_IN),
        Rule("blocks.{i}.ls1.gamma", "layers/scale1", "D -> D", when="layer_scale"),
        *norm("blocks.{i}.norm2", "layers/norm2"),
        *dense("blocks.{i}.mlp.fc1", "layers/mlp/up", "F D -> D F", when="plain_mlp"),
        *joined("blocks.{i}.mlp.fc1", GATE_UP, when="swiglu"),
        *dense("blocks.{i}.mlp.fc2", "layers/mlp/down", "D F -> F D"),
        Rule("blocks.{i}.ls2.gamma", "layers/scale2", "D -> D", when="layer_scale"),
        *norm("norm", "post_norm", when="feature_norm"),
    ),
    unused=(
        (r"norm\..*", "the final norm, not applied to these features"),
        (r"(attn_pool|fc_norm|head)\..*", "the pooling and classification head"),
        *_OPEN_CLIP,
    ),
    prefixes=(r"visual\.trunk\.", r"timm_model\."),
    resample="bicubic_antialias",
    **VIT_FUNCTIONS | {"conditions": _conditions},
)

TIMM_CONVNEXT = convnext(
    "timm-convnext",
    {
        "stem": "stem.0",
        "stem_norm": "stem.1",
        "stages": "stages",
        "downsample_norm": "downsample.0",
        "downsample": "downsample.1",
        "blocks": "blocks",
        "depthwise": "conv_dw",
        "norm": "norm",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
        "scale": "gamma",
    },
    ((r"(norm_pre|head)\..*", "the classification head"), *_OPEN_CLIP),
    prefixes=(r"visual\.trunk\.", r"timm_model\."),
    model_types={"timm_convnext": {}},
    configure=configure,
)
