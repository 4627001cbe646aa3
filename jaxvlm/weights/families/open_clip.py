"""OpenCLIP's own ViTs, among them CLIP bigG, and EVA-CLIP g as LAVIS keeps it: CLIPs by other names."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from jaxvlm.config import VisionConfig
from jaxvlm.weights.families.base import HEADS_IN, HEADS_OUT, Family, Rule, dense, norm
from jaxvlm.weights.families.vit import CLIP_TRAITS, VIT_FUNCTIONS, VIT_TRAITS, square
from jaxvlm.weights.readers import TensorSource, WeightsError

_DEFAULTS = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
# What else a tower of theirs may have. The pooling comes after the features.
_HARMLESS = {"attentional_pool", "attn_pooler_queries", "attn_pooler_heads", "pool_type", "final_ln_after_pool"}
_HARMLESS |= {"output_tokens", "patch_dropout", "timm_model_name", "timm_pool", "timm_proj"}


def configure(given: dict, folder: Path) -> VisionConfig:
    model, images = given["model_cfg"], given.get("preprocess_cfg", {})
    strange = {name for name, value in model["vision_cfg"].items() if value} - _DEFAULTS.keys() - _HARMLESS
    if strange or not isinstance(model["vision_cfg"].get("layers", 12), int):
        what = f"vision_cfg.{sorted(strange)[0]}" if strange else "a ResNet as its tower (vision_cfg.layers)"
        raise WeightsError(f"{folder}/open_clip_config.json: {what} is not supported.")
    c = _DEFAULTS | model["vision_cfg"]
    normalisation = {name: tuple(images[name]) for name in ("mean", "std") if images.get(name)}
    return VisionConfig(
        image_size=square(c, "image_size", folder),
        patch_size=square(c, "patch_size", folder),
        width=c["width"],
        depth=c["layers"],
        num_heads=c["width"] // c["head_width"],
        mlp_dim=int(c["width"] * c["mlp_ratio"]),
        activation="quick_gelu" if model.get("quick_gelu") else "gelu_erf",
        norm_eps=1e-5,
        **CLIP_TRAITS | normalisation,
    )


def _joined(key: str) -> tuple[Rule, ...]:
    """torch's MultiheadAttention has no dots in these names."""
    slots = {"slots": ("H h",) * 3}
    rules: tuple[Rule, ...] = ()
    for slot, name in enumerate("qkv"):
        rules += (
            Rule(f"{key}.in_proj_weight", f"layers/attn/{name}/kernel", HEADS_OUT, slot=slot, **slots),
            Rule(f"{key}.in_proj_bias", f"layers/attn/{name}/bias", "(H h) -> H h", slot=slot, **slots),
        )
    return rules


_BLOCK = "visual.transformer.resblocks.{i}"  # without 'visual.' these are the text tower's names

OPEN_CLIP = Family(
    name="open-clip",
    model_types={"open_clip": {}},
    configure=configure,
    rules=(
        Rule("visual.conv1.weight", "patch_embed/kernel", "D C p q -> p q C D"),
        Rule("visual.class_embedding", "class_token", "D -> D"),
        Rule("visual.positional_embedding", "pos_embed", "N D -> N D"),
        *norm("visual.ln_pre", "pre_norm"),
        *norm(f"{_BLOCK}.ln_1", "layers/norm1"),
        *_joined(f"{_BLOCK}.attn"),
        *dense(f"{_BLOCK}.attn.out_proj", "layers/attn/o", HEADS_IN),
        *norm(f"{_BLOCK}.ln_2", "layers/norm2"),
        *dense(f"{_BLOCK}.mlp.c_fc", "layers/mlp/up", "F D -> D F"),
        *dense(f"{_BLOCK}.mlp.c_proj", "layers/mlp/down", "D F -> F D"),
        *norm("visual.ln_post", "post_norm", when="feature_norm"),
    ),
    unused=(
        (r"visual\.ln_post\..*", "the final norm, not applied to these features"),
        (r"visual\.(proj|attn_pool\..*)|text_projection|logit_(scale|bias)", "the contrastive head"),
        (
            r"text\..*|transformer\..*|token_embedding\.weight|positional_embedding|ln_final\..*|attn_mask",
            "the text tower",
        ),
        (r"text_decoder\..*", "the caption decoder"),
    ),
    prefixes=(r"module\.",),
    resample="bicubic_antialias",
    **VIT_FUNCTIONS,
)

_HEAD_WIDTH = 88
EVA_NAMES = ("blocks.0.attn.q_bias", "patch_embed.proj.weight", "cls_token", "pos_embed")


def eva_config(source: TensorSource) -> VisionConfig:
    """EVA-CLIP g by the shapes of LAVIS's `eva_vit_g.pth`, which has no config.json. Of its 40 layers BLIP-2 runs 39."""
    width, _, patch, _ = source.shape("patch_embed.proj.weight")
    grid = math.isqrt(source.shape("pos_embed")[1])  # of the patches and one token more
    return VisionConfig(
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        depth=len({name.split(".")[1] for name in source.names() if name.startswith("blocks.")}),
        num_heads=width // _HEAD_WIDTH,
        mlp_dim=source.shape("blocks.0.mlp.fc1.weight")[0],
        activation="gelu_erf",
        norm_eps=1e-6,
        **VIT_TRAITS | CLIP_TRAITS,
    )


def _eva_rules() -> tuple[Rule, ...]:
    attention: tuple[Rule, ...] = ()
    for slot, name in enumerate("qkv"):
        kernel = Rule(
            "blocks.{i}.attn.qkv.weight", f"layers/attn/{name}/kernel", HEADS_OUT, slots=("H h",) * 3, slot=slot
        )
        # Keys have no bias, for which the model has zeros.
        bias = Rule(f"blocks.{{i}}.attn.{name}_bias", f"layers/attn/{name}/bias", "(H h) -> H h")
        zeros = dataclasses.replace(bias, keys="blocks.{i}.attn.q_bias", combine=np.zeros_like)
        attention += (kernel, zeros if name == "k" else bias)
    return (
        Rule("patch_embed.proj.weight", "patch_embed/kernel", "D C p q -> p q C D"),
        Rule("patch_embed.proj.bias", "patch_embed/bias", "D -> D"),
        Rule("cls_token", "class_token", "1 1 D -> D"),
        Rule("pos_embed", "pos_embed", "1 N D -> N D"),
        *norm("blocks.{i}.norm1", "layers/norm1"),
        *attention,
        *dense("blocks.{i}.attn.proj", "layers/attn/o", HEADS_IN),
        *norm("blocks.{i}.norm2", "layers/norm2"),
        *dense("blocks.{i}.mlp.fc1", "layers/mlp/up", "F D -> D F"),
        *dense("blocks.{i}.mlp.fc2", "layers/mlp/down", "D F -> F D"),
        *norm("norm", "post_norm", when="feature_norm"),
    )


EVA_LAVIS = Family(
    name="eva-clip-lavis",
    rules=_eva_rules(),
    unused=(
        (r"norm\..*", "the final norm, not applied to these features"),
        (r"(fc_norm|head)\..*|mask_token", "what EVA itself was trained with"),
    ),
    **VIT_FUNCTIONS,
)
