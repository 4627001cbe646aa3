"""Gemma, Gemma 2 and the text model of Gemma 3."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxvlm.config import LLMConfig
from jaxvlm.weights.families.base import Family, Rule
from jaxvlm.weights.families.decoder import (
    DECODER,
    EMBEDDING,
    GATED_MLP,
    HEAD,
    OUT,
    QK_NORM,
    QKV,
    UNUSED,
    describe_activation,
    describe_rope,
    describe_shape,
    describe_windows,
    rope,
    windows,
)
from jaxvlm.weights.families.llama import LLAMA
from jaxvlm.weights.hf_config import activation, refuse

_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
_GEMMA = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
_GEMMA2 = {
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "sliding_window_pattern": 2,
}
_GEMMA3 = {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "sliding_window_pattern": 6,
}


def configure(given: dict, folder: Path) -> LLMConfig:
    kind = given["model_type"]
    c = GEMMA.model_types[kind] | given
    refuse(folder, c, use_bidirectional_attention=True)
    third = kind == "gemma3_text"
    pattern = c["sliding_window_pattern"]  # every n-th layer sees everything
    kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(c["num_hidden_layers"])]
    window = windows(c, c["layer_types"] or kinds, folder)
    return LLMConfig(
        vocab_size=c["vocab_size"],
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        mlp_dim=c["intermediate_size"],
        norm="rms_plus_one",
        norm_eps=c["rms_norm_eps"],
        post_norms=True,
        qk_norm=third,
        activation=activation(c["hidden_activation"], folder),
        qkv_bias=c["attention_bias"],
        out_bias=c["attention_bias"],
        tie_embeddings=c["tie_word_embeddings"],
        embed_scale=c["hidden_size"] ** 0.5,
        attn_scale=c["query_pre_attn_scalar"] ** -0.5,
        # Gemma 3's config has this field too, but its attention does not read it.
        attn_softcap=None if third else c["attn_logit_softcapping"],
        logit_softcap=c["final_logit_softcapping"],
        max_positions=c["max_position_embeddings"],
        **window,
        **(_two_ropes(c, window, folder) if third else rope(c, folder, dim=c["head_dim"])),
    )


def _two_ropes(c: dict, window: dict, folder: Path) -> dict[str, Any]:
    """Gemma 3 turns its windowed layers by angles of their own: `rope_parameters` by kind of layer, or older names."""
    both = c.get("rope_parameters") or {}
    full = (both.get("full_attention") or {}) | (c.get("rope_scaling") or {})
    local = {"rope_theta": c["rope_local_base_freq"]} | (both.get("sliding_attention") or {})
    local = rope(c, folder, dim=c["head_dim"], given=local, kinds=("default",))["rope_theta"]
    values = rope(c, folder, dim=c["head_dim"], given=full)
    return values if window["sliding_window"] is None else values | {"rope_local_theta": local}


def describe(c: LLMConfig, kind: str) -> dict[str, Any]:
    values = describe_shape(c) | describe_rope(c) | describe_windows(c)
    values |= {"hidden_activation": describe_activation(c), "rms_norm_eps": c.norm_eps, "attention_bias": c.qkv_bias}
    values["query_pre_attn_scalar"] = round((c.attn_scale or c.head_dim**-0.5) ** -2)
    values["final_logit_softcapping"] = c.logit_softcap
    if kind == "gemma2":
        return values | {"attn_logit_softcapping": c.attn_softcap}
    local = c.rope_theta if c.rope_local_theta is None else c.rope_local_theta
    both = {
        "full_attention": values["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
    return values | {"rope_parameters": both, "rope_local_base_freq": local}


def configure_first(given: dict, folder: Path) -> LLMConfig:
    """The first Gemma: a Llama with another norm and activation, and scaled embeddings."""
    c = GEMMA_FIRST.model_types["gemma"] | given
    refuse(folder, c, use_bidirectional_attention=True)
    kind = "gelu_pytorch_tanh" if c["hidden_act"] == "gelu" else c["hidden_act"]  # what the first files meant
    return LLMConfig(
        vocab_size=c["vocab_size"],
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        mlp_dim=c["intermediate_size"],
        norm="rms_plus_one",
        norm_eps=c["rms_norm_eps"],
        activation=activation(kind, folder),
        qkv_bias=c["attention_bias"],
        out_bias=c["attention_bias"],
        tie_embeddings=c["tie_word_embeddings"],
        embed_scale=c["hidden_size"] ** 0.5,
        max_positions=c["max_position_embeddings"],
        **rope(c, folder, dim=c["head_dim"]),
    )


def describe_first(c: LLMConfig, kind: str) -> dict[str, Any]:
    values = describe_shape(c) | describe_rope(c)
    return values | {
        "hidden_act": describe_activation(c),
        "rms_norm_eps": c.norm_eps,
        "attention_bias": c.qkv_bias,
    }


GEMMA_FIRST = dataclasses.replace(
    LLAMA, name="gemma-first", model_types={"gemma": _GEMMA}, configure=configure_first, describe=describe_first
)

GEMMA = Family(
    name="gemma",
    model_types={"gemma2": _DEFAULTS | _GEMMA2, "gemma3_text": _DEFAULTS | _GEMMA3},
    configure=configure,
    describe=describe,
    rules=(
        EMBEDDING,
        Rule("layers.{i}.input_layernorm.weight", "layers/attn_norm/scale", "D -> D"),
        *QKV,
        *QK_NORM,
        *OUT,
        Rule("layers.{i}.post_attention_layernorm.weight", "layers/attn_post_norm/scale", "D -> D"),
        Rule("layers.{i}.pre_feedforward_layernorm.weight", "layers/mlp_norm/scale", "D -> D"),
        *GATED_MLP,
        Rule("layers.{i}.post_feedforward_layernorm.weight", "layers/mlp_post_norm/scale", "D -> D"),
        Rule("norm.weight", "final_norm/scale", "D -> D"),
        HEAD,
    ),
    unused=UNUSED,
    prefixes=(r"model\.",),
    **DECODER,
)
