"""Vision transformers: CLIP, SigLIP, DINOv2."""

from __future__ import annotations

from pathlib import Path

from jaxvlm.config import VisionConfig
from jaxvlm.models.vit import num_layers
from jaxvlm.weights.families.base import HEADS_IN, HEADS_OUT, Family, Rule, dense, norm
from jaxvlm.weights.hf_config import activation, image_processor, refuse
from jaxvlm.weights.readers import WeightsError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALISATION = {
    "clip": (CLIP_MEAN, CLIP_STD),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "dinov2": (IMAGENET_MEAN, IMAGENET_STD),
}
_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
_DINO = {"mlp_ratio": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6}


def configure(given: dict, folder: Path) -> VisionConfig:
    """The tower of a CLIP, SigLIP or DINOv2 config.json, with LLaVA's choice of features."""
    kind = given.get("model_type", "clip_vision_model")
    family = next(family for family in (CLIP, SIGLIP, DINOV2) if kind in family.model_types)
    c = family.model_types[kind] | given
    refuse(folder, c, use_swiglu_ffn=True, qkv_bias=False)
    mean, std = NORMALISATION[family.name]
    processor = image_processor(folder)
    sizes = {name: c[name] if isinstance(c[name], int) else set(c[name]) for name in ("image_size", "patch_size")}
    for name, size in sizes.items():
        if not isinstance(size, int):
            if len(size) != 1:
                raise WeightsError(f"{folder}: {name} {c[name]} is not square.")
            sizes[name] = size.pop()
    dino = family.name == "dinov2"
    return VisionConfig(
        kind="vit",
        **sizes,
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        mlp_dim=c["hidden_size"] * c["mlp_ratio"] if dino else c["intermediate_size"],
        activation=activation(c["hidden_act"], folder),
        norm_eps=c["layer_norm_eps"],
        class_token=family.name != "siglip",
        num_registers=c.get("num_register_tokens", 0),
        patch_bias=family.name != "clip",
        pre_norm=family.name == "clip",
        layer_scale=dino,
        mean=tuple(processor.get("image_mean", mean)),
        std=tuple(processor.get("image_std", std)),
    )


def vit_sizes(config: VisionConfig) -> dict[str, int]:
    grid = (config.image_size // config.patch_size) ** 2
    return {
        "D": config.width,
        "H": config.num_heads,
        "h": config.width // config.num_heads,
        "F": config.mlp_dim,
        "p": config.patch_size,
        "q": config.patch_size,
        "C": 3,
        "N": grid + config.class_token,
        "R": config.num_registers,
    }


def vit_conditions(config: VisionConfig) -> dict[str, bool]:
    return {
        "class_token": config.class_token,
        "registers": config.num_registers > 0,
        "patch_bias": config.patch_bias,
        "pre_norm": config.pre_norm,
        "feature_norm": config.feature_norm,
        "layer_scale": config.layer_scale,
    }


_HF_VIT_LAYER = (
    *norm("encoder.layers.{i}.layer_norm1", "layers/norm1"),
    *dense("encoder.layers.{i}.self_attn.q_proj", "layers/attn/q", HEADS_OUT),
    *dense("encoder.layers.{i}.self_attn.k_proj", "layers/attn/k", HEADS_OUT),
    *dense("encoder.layers.{i}.self_attn.v_proj", "layers/attn/v", HEADS_OUT),
    *dense("encoder.layers.{i}.self_attn.out_proj", "layers/attn/o", HEADS_IN),
    *norm("encoder.layers.{i}.layer_norm2", "layers/norm2"),
    *dense("encoder.layers.{i}.mlp.fc1", "layers/mlp/up", "F D -> D F"),
    *dense("encoder.layers.{i}.mlp.fc2", "layers/mlp/down", "D F -> F D"),
)
_VIT = {
    "part": "vision",
    "sizes": vit_sizes,
    "conditions": vit_conditions,
    "layers": lambda config: range(num_layers(config)),
    "configure": configure,
}
_CONTRASTIVE_UNUSED = (
    (r"(text_model\.)?embeddings\.position_ids", "a constant"),
    (r"post_layernorm\..*", "the final norm, not applied to these features"),
    (r"text_model\..*", "the text tower"),
    (r"(text|visual)_projection\..*|logit_(scale|bias)", "the contrastive head"),
)

CLIP = Family(
    name="clip",
    model_types={
        "clip_vision_model": _DEFAULTS
        | {"intermediate_size": 3072, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    },
    rules=(
        Rule("embeddings.patch_embedding.weight", "patch_embed/kernel", "D C p q -> p q C D"),
        Rule("embeddings.class_embedding", "class_token", "D -> D"),
        Rule("embeddings.position_embedding.weight", "pos_embed", "N D -> N D"),
        *norm("pre_layrnorm", "pre_norm"),  # the file's own spelling
        *_HF_VIT_LAYER,
        *norm("post_layernorm", "post_norm", when="feature_norm"),
    ),
    unused=_CONTRASTIVE_UNUSED,
    prefixes=(r"vision_model\.",),
    **_VIT,
)

SIGLIP = Family(
    name="siglip",
    model_types={
        "siglip_vision_model": _DEFAULTS
        | {"intermediate_size": 3072, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    },
    rules=(
        Rule("embeddings.patch_embedding.weight", "patch_embed/kernel", "D C p q -> p q C D"),
        Rule("embeddings.patch_embedding.bias", "patch_embed/bias", "D -> D"),
        Rule("embeddings.position_embedding.weight", "pos_embed", "N D -> N D"),
        *_HF_VIT_LAYER,
        *norm("post_layernorm", "post_norm", when="feature_norm"),
    ),
    unused=(*_CONTRASTIVE_UNUSED, (r"head\..*", "the pooling head")),
    prefixes=(r"vision_model\.",),
    **_VIT,
)

DINOV2 = Family(
    name="dinov2",
    model_types={
        "dinov2": _DEFAULTS | _DINO | {"patch_size": 14},
        "dinov2_with_registers": _DEFAULTS | _DINO | {"patch_size": 16, "num_register_tokens": 4},
    },
    rules=(
        Rule("embeddings.patch_embeddings.projection.weight", "patch_embed/kernel", "D C p q -> p q C D"),
        Rule("embeddings.patch_embeddings.projection.bias", "patch_embed/bias", "D -> D"),
        Rule("embeddings.cls_token", "class_token", "1 1 D -> D"),
        Rule("embeddings.register_tokens", "register_tokens", "1 R D -> R D", when="registers"),
        Rule("embeddings.position_embeddings", "pos_embed", "1 N D -> N D"),
        *norm("encoder.layer.{i}.norm1", "layers/norm1"),
        *dense("encoder.layer.{i}.attention.attention.query", "layers/attn/q", HEADS_OUT),
        *dense("encoder.layer.{i}.attention.attention.key", "layers/attn/k", HEADS_OUT),
        *dense("encoder.layer.{i}.attention.attention.value", "layers/attn/v", HEADS_OUT),
        *dense("encoder.layer.{i}.attention.output.dense", "layers/attn/o", HEADS_IN),
        Rule("encoder.layer.{i}.layer_scale1.lambda1", "layers/scale1", "D -> D"),
        *norm("encoder.layer.{i}.norm2", "layers/norm2"),
        *dense("encoder.layer.{i}.mlp.fc1", "layers/mlp/up", "F D -> D F"),
        *dense("encoder.layer.{i}.mlp.fc2", "layers/mlp/down", "D F -> F D"),
        Rule("encoder.layer.{i}.layer_scale2.lambda1", "layers/scale2", "D -> D"),
        *norm("layernorm", "post_norm", when="feature_norm"),
    ),
    unused=(
        (r"embeddings\.mask_token", "only used in DINOv2's own training"),
        (r"layernorm\..*", "the final norm, not applied to these features"),
        (r"classifier\..*", "the classifier"),
    ),
    prefixes=(r"dinov2(_with_registers)?\.",),
    **_VIT,
)
