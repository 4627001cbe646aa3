"""The Llama family (Llama 1 to 3, Vicuna, SmolLM2, Mistral, Qwen2, Qwen3)."""

from __future__ import annotations

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
from jaxvlm.weights.hf_config import activation

_DEFAULTS = {
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "head_dim": None,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "attention_bias": False,
    "mlp_bias": False,
}
_LLAMA = {
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
}
_MISTRAL = {
    "vocab_size": 32000,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN2 = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "layer_types": None,
}


def configure(given: dict, folder: Path) -> LLMConfig:
    kind = given.get("model_type", "llama")
    c = LLAMA.model_types[kind] | given
    heads = c["num_attention_heads"]
    head_dim = c["head_dim"] or c["hidden_size"] // heads
    return LLMConfig(
        vocab_size=c["vocab_size"],
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=c["num_key_value_heads"] or heads,
        head_dim=head_dim,
        mlp_dim=c["intermediate_size"],
        norm_eps=c["rms_norm_eps"],
        qk_norm=kind == "qwen3",
        activation=activation(c["hidden_act"], folder),
        qkv_bias=kind == "qwen2" or c["attention_bias"],
        out_bias=kind != "qwen2" and c["attention_bias"],
        mlp_bias=c["mlp_bias"],
        tie_embeddings=c["tie_word_embeddings"],
        max_positions=c["max_position_embeddings"],
        **rope(c, folder, dim=head_dim),
        **_windows(c, kind, folder),
    )


def _windows(c: dict, kind: str, folder: Path) -> dict[str, Any]:
    if kind == "llama":
        return {}
    if kind == "mistral":
        return {"sliding_window": c["sliding_window"]}
    if not c["use_sliding_window"]:
        return {}
    sliding = range(c["max_window_layers"], c["num_hidden_layers"])  # Qwen counts the layers *without* a window
    kinds = ["sliding_attention" if i in sliding else "full_attention" for i in range(c["num_hidden_layers"])]
    return windows(c, c["layer_types"] or kinds, folder)


def describe(c: LLMConfig, kind: str) -> dict[str, Any]:
    values = describe_shape(c) | describe_rope(c)
    values |= {"hidden_act": describe_activation(c), "rms_norm_eps": c.norm_eps}
    if kind in ("llama", "qwen3"):
        values["attention_bias"] = c.out_bias
    if kind == "llama":
        values["mlp_bias"] = c.mlp_bias
    elif kind == "mistral":
        values["sliding_window"] = c.sliding_window
    else:
        values |= describe_windows(c)
        windowed = values["layer_types"].count("full_attention")  # where the windows begin, as older versions read it
        values |= {"use_sliding_window": c.sliding_window is not None, "max_window_layers": windowed}
    return values


LLAMA = Family(
    name="llama",
    model_types={
        "llama": _DEFAULTS | _LLAMA,
        "mistral": _DEFAULTS | _MISTRAL,
        "qwen2": _DEFAULTS | _QWEN2,
        "qwen3": _DEFAULTS | _QWEN2 | {"head_dim": 128},
    },
    configure=configure,
    describe=describe,
    rules=(
        EMBEDDING,
        Rule("layers.{i}.input_layernorm.weight", "layers/attn_norm/scale", "D -> D"),
        *QKV,
        *QK_NORM,
        *OUT,
        Rule("layers.{i}.post_attention_layernorm.weight", "layers/mlp_norm/scale", "D -> D"),
        *GATED_MLP,
        Rule("norm.weight", "final_norm/scale", "D -> D"),
        HEAD,
    ),
    unused=UNUSED,
    prefixes=(r"model\.",),
    **DECODER,
)
