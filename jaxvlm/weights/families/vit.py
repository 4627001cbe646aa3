"""Vision transformers as transformers names them: CLIP, SigLIP, DINOv2, supervised ViTs and EVA-CLIP."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from jaxvlm.config import VisionConfig
from jaxvlm.models.vit import num_layers
from jaxvlm.weights.families.base import HEADS_IN, HEADS_OUT, Family, Rule, dense, joined, norm
from jaxvlm.weights.hf_config import activation, image_processor, refuse
from jaxvlm.weights.readers import WeightsError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

# What a family is apart from its sizes. A tower alone gets LLaVA's choice of features.
CLIP_TRAITS = {"mean": CLIP_MEAN, "std": CLIP_STD}
SIGLIP_TRAITS = {"class_token": False, "patch_bias": True, "pre_norm": False, "mean": HALF, "std": HALF}
VIT_TRAITS = SIGLIP_TRAITS | {"class_token": True}
DINOV2_TRAITS = VIT_TRAITS | {"layer_scale": True, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
# BLIP-2's choice: the layer that LLaVA would skip is not in the checkpoints, and the class token is a feature too.
EVA_TRAITS = VIT_TRAITS | CLIP_TRAITS
EVA_TRAITS |= {"feature_layers": (-1,), "feature_norm": True, "feature_tokens": "cls_patch"}

_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
_DINO = {"mlp_ratio": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "use_swiglu_ffn": False}
_EVA = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16}
_EVA |= {"image_size": 224, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6}


def configure(model_types: dict[str, dict], traits: dict[str, Any], given: dict, folder: Path) -> VisionConfig:
    """The tower that a config.json describes: the defaults of its `model_type`, and its family's `traits`."""
    c = model_types[given.get("model_type") or next(iter(model_types))] | given
    refuse(folder, c, qkv_bias=False)
    swiglu = c.get("use_swiglu_ffn", False)
    mlp_dim = int(c["hidden_size"] * c["mlp_ratio"]) if "mlp_ratio" in c else c["intermediate_size"]
    return VisionConfig(
        image_size=square(c, "image_size", folder),
        patch_size=square(c, "patch_size", folder),
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        # A SwiGLU's three matrices have the size of two: 2/3 of the width, up to a multiple of 8.
        mlp_dim=(int(mlp_dim * 2 / 3) + 7) // 8 * 8 if swiglu else mlp_dim,
        mlp="swiglu" if swiglu else "plain",
        activation=activation(c["hidden_act"], folder),
        norm_eps=c["layer_norm_eps"],
        num_registers=c.get("num_register_tokens", 0),
        **traits | normalisation(folder),
    )


def square(c: dict, key: str, folder: Path) -> int:
    """The one number of `image_size` or `patch_size`, which may be a list of equal ones."""
    sizes = {c[key]} if isinstance(c[key], int) else set(c[key])
    if len(sizes) != 1:
        raise WeightsError(f"{folder}/config.json: {key} {c[key]} is not square.")
    return sizes.pop()


def normalisation(folder: Path) -> dict[str, tuple[float, ...]]:
    """The folder's image processor's `mean` and `std`, as far as it has one that says."""
    processor = image_processor(folder)
    found = {name: processor.get(f"image_{name}") for name in ("mean", "std")}
    return {name: tuple(values) for name, values in found.items() if values}


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
        "P": grid,
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
        "swiglu": config.mlp == "swiglu",
        "plain_mlp": config.mlp == "plain",
    }


VIT_FUNCTIONS = {
    "part": "vision",
    "sizes": vit_sizes,
    "conditions": vit_conditions,
    "layers": lambda config: range(num_layers(config)),
}
QKV = {f"layers/attn/{name}": HEADS_OUT for name in "qkv"}
GATE_UP = {f"layers/mlp/{name}": "F D -> D F" for name in ("gate", "up")}


def _family(name: str, traits: dict[str, Any], model_types: dict[str, dict], **rest: Any) -> Family:
    read = partial(configure, model_types, traits)
    return Family(name=name, model_types=model_types, configure=read, **VIT_FUNCTIONS, **rest)


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
_CONTRASTIVE_UNUSED = (
    (r"(text_model\.)?embeddings\.position_ids", "a constant"),
    (r"post_layernorm\..*", "the final norm, not applied to these features"),
    (r"text_model\..*", "the text tower"),
    (r"(text|visual)_projection\..*|logit_(scale|bias)", "the contrastive head"),
)

CLIP = _family(
    "clip",
    CLIP_TRAITS,
    {
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
)

_SIGLIP = _DEFAULTS | {"intermediate_size": 3072, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh"}
_SIGLIP |= {"layer_norm_eps": 1e-6}
SIGLIP = _family(  # and SigLIP 2 at fixed resolutions
    "siglip",
    SIGLIP_TRAITS,
    {"siglip_vision_model": _SIGLIP},
    rules=(
        Rule("embeddings.patch_embedding.weight", "patch_embed/kernel", "D C p q -> p q C D"),
        Rule("embeddings.patch_embedding.bias", "patch_embed/bias", "D -> D"),
        Rule("embeddings.position_embedding.weight", "pos_embed", "N D -> N D"),
        *_HF_VIT_LAYER,
        *norm("post_layernorm", "post_norm", when="feature_norm"),
    ),
    unused=(*_CONTRASTIVE_UNUSED, (r"head\..*", "the pooling head")),
    prefixes=(r"vision_model\.",),
)

DINOV2 = _family(
    "dinov2",
    DINOV2_TRAITS,
    {"dinov2": _DEFAULTS | _DINO | {"patch_size": 14}},
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
        *dense("encoder.layer.{i}.mlp.fc1", "layers/mlp/up", "F D -> D F", when="plain_mlp"),
        *dense("encoder.layer.{i}.mlp.fc2", "layers/mlp/down", "D F -> F D", when="plain_mlp"),
        *joined("encoder.layer.{i}.mlp.weights_in", GATE_UP, when="swiglu"),
        *dense("encoder.layer.{i}.mlp.weights_out", "layers/mlp/down", "D F -> F D", when="swiglu"),
        Rule("encoder.layer.{i}.layer_scale2.lambda1", "layers/scale2", "D -> D"),
        *norm("layernorm", "post_norm", when="feature_norm"),
    ),
    unused=(
        (r"embeddings\.mask_token", "only used in DINOv2's own training"),
        (r"layernorm\..*", "the final norm, not applied to these features"),
        (r"classifier\..*", "the classifier"),
    ),
    prefixes=(r"dinov2(_with_registers)?\.",),
)

_REGISTERS = {"dinov2_with_registers": _DEFAULTS | _DINO | {"patch_size": 16, "num_register_tokens": 4}}
DINOV2_REGISTERS = dataclasses.replace(
    DINOV2,
    name="dinov2-registers",
    model_types=_REGISTERS,
    configure=partial(configure, _REGISTERS, DINOV2_TRAITS),
    resample="bicubic_antialias",  # unlike the one without registers
)

SUPERVISED_VIT = _family(
    "vit",
    VIT_TRAITS,
    {"vit": _DEFAULTS | {"intermediate_size": 3072, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12}},
    rules=(
        Rule("embeddings.patch_embeddings.projection.weight", "patch_embed/kernel", "D C p q -> p q C D"),
        Rule("embeddings.patch_embeddings.projection.bias", "patch_embed/bias", "D -> D"),
        Rule("embeddings.cls_token", "class_token", "1 1 D -> D"),
        Rule("embeddings.position_embeddings", "pos_embed", "1 N D -> N D"),
        *norm("encoder.layer.{i}.layernorm_before", "layers/norm1"),
        *dense("encoder.layer.{i}.attention.attention.query", "layers/attn/q", HEADS_OUT),
        *dense("encoder.layer.{i}.attention.attention.key", "layers/attn/k", HEADS_OUT),
        *dense("encoder.layer.{i}.attention.attention.value", "layers/attn/v", HEADS_OUT),
        *dense("encoder.layer.{i}.attention.output.dense", "layers/attn/o", HEADS_IN),
        *norm("encoder.layer.{i}.layernorm_after", "layers/norm2"),
        *dense("encoder.layer.{i}.intermediate.dense", "layers/mlp/up", "F D -> D F"),
        *dense("encoder.layer.{i}.output.dense", "layers/mlp/down", "D F -> F D"),
        *norm("layernorm", "post_norm", when="feature_norm"),
    ),
    unused=(
        (r"embeddings\.mask_token", "only used in masked pre-training"),
        (r"layernorm\..*", "the final norm, not applied to these features"),
        (r"(classifier|pooler\.dense)\..*", "the classifier"),
    ),
    prefixes=(r"vit\.",),
)

EVA_CLIP = _family(  # EVA-CLIP g/14, as BLIP-2 and InstructBLIP hold it
    "eva-clip",
    EVA_TRAITS,
    {"blip_2_vision_model": _EVA, "instructblip_vision_model": _EVA},
    rules=(
        Rule("embeddings.patch_embedding.weight", "patch_embed/kernel", "D C p q -> p q C D"),
        Rule("embeddings.patch_embedding.bias", "patch_embed/bias", "D -> D"),
        Rule("embeddings.class_embedding", "class_token", "1 1 D -> D"),
        Rule("embeddings.position_embedding", "pos_embed", "1 N D -> N D"),
        *norm("encoder.layers.{i}.layer_norm1", "layers/norm1"),
        *joined("encoder.layers.{i}.self_attn.qkv", QKV),
        *dense("encoder.layers.{i}.self_attn.projection", "layers/attn/o", HEADS_IN),
        *norm("encoder.layers.{i}.layer_norm2", "layers/norm2"),
        *dense("encoder.layers.{i}.mlp.fc1", "layers/mlp/up", "F D -> D F"),
        *dense("encoder.layers.{i}.mlp.fc2", "layers/mlp/down", "D F -> F D"),
        *norm("post_layernorm", "post_norm", when="feature_norm"),
    ),
    unused=((r"post_layernorm\..*", "the final norm, not applied to these features"),),
    prefixes=(r"vision_model\.",),
)
