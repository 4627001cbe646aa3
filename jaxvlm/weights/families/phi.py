"""Phi: the parallel blocks of Phi-1 to Phi-2, and Phi-3 (also Phi-3.5 and Phi-4-mini), a Llama with joined matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxvlm.config import LLMConfig
from jaxvlm.weights.families.base import HEADS_IN, HEADS_OUT, Family, Rule, dense, joined, norm
from jaxvlm.weights.families.decoder import (
    DECODER,
    EMBEDDING,
    HEAD,
    KV_OUT,
    MLP_IN,
    MLP_OUT,
    QKV,
    UNUSED,
    describe_activation,
    describe_rope,
    describe_shape,
    rope,
)
from jaxvlm.weights.hf_config import activation, refuse
from jaxvlm.weights.readers import WeightsError

_PHI = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "gelu_new",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
}
_PHI3 = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
}


def _shape(c: dict) -> dict[str, int]:
    heads = c["num_attention_heads"]
    return {
        "vocab_size": c["vocab_size"],
        "width": c["hidden_size"],
        "depth": c["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": c["num_key_value_heads"] or heads,
        "head_dim": c["hidden_size"] // heads,
        "mlp_dim": c["intermediate_size"],
        "max_positions": c["max_position_embeddings"],
    }


def _turning(c: dict) -> float:
    """The share of each head's dimensions that turn."""
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor")
    return float(c["partial_rotary_factor"] if share is None else share)


def configure_phi(given: dict, folder: Path) -> LLMConfig:
    c = PHI.model_types["phi"] | given
    refuse(folder, c, qk_layernorm=True)
    if c["tie_word_embeddings"]:
        raise WeightsError(f"{folder}/config.json: tie_word_embeddings with a bias on the head is not supported.")
    shape, turning = _shape(c), _turning(c)
    return LLMConfig(
        **shape,
        norm="layer",
        norm_eps=c["layer_norm_eps"],
        parallel=True,
        activation=activation(c["hidden_act"], folder),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
        rope_fraction=turning,
        **rope(c, folder, dim=int(shape["head_dim"] * turning)),
    )


def configure_phi3(given: dict, folder: Path) -> LLMConfig:
    c = PHI3.model_types["phi3"] | given
    for name in ("rope_scaling", "rope_parameters"):  # older files' names of longrope
        old = c.get(name) or {}
        if (old.get("rope_type") or old.get("type")) in ("su", "yarn"):
            c[name] = old | {"rope_type": "longrope"}
    shape, turning = _shape(c), _turning(c)
    return LLMConfig(
        **shape,
        norm_eps=c["rms_norm_eps"],
        activation=activation(c["hidden_act"], folder),
        tie_embeddings=c["tie_word_embeddings"],
        rope_fraction=turning,
        sliding_window=c["sliding_window"],
        **rope(c, folder, dim=int(shape["head_dim"] * turning), kinds=("default", "longrope")),
    )


def describe(c: LLMConfig, kind: str) -> dict[str, Any]:
    values = describe_shape(c) | describe_rope(c)
    del values["head_dim"]  # these classes divide the width
    values |= {"hidden_act": describe_activation(c), "partial_rotary_factor": c.rope_fraction}
    values["rope_parameters"]["partial_rotary_factor"] = c.rope_fraction
    if kind == "phi":
        return values | {"layer_norm_eps": c.norm_eps}
    original = c.rope_scaling.original_max_positions if c.rope_scaling.kind == "longrope" else c.max_positions
    values |= {"rms_norm_eps": c.norm_eps, "original_max_position_embeddings": original}
    return values | {"sliding_window": c.sliding_window}


PHI = Family(
    name="phi",
    model_types={"phi": _PHI},
    configure=configure_phi,
    describe=describe,
    rules=(
        EMBEDDING,
        *norm("layers.{i}.input_layernorm", "layers/attn_norm"),
        *QKV,
        *dense("layers.{i}.self_attn.dense", "layers/attn/o", HEADS_IN),
        *dense("layers.{i}.mlp.fc1", "layers/mlp/up", MLP_IN),
        *dense("layers.{i}.mlp.fc2", "layers/mlp/down", MLP_OUT),
        *norm("final_layernorm", "final_norm"),
        *dense("lm_head", "head", "V D -> D V"),
    ),
    unused=UNUSED[:1],
    prefixes=(r"model\.",),
    **DECODER,
)

_QKV = {"layers/attn/q": HEADS_OUT, "layers/attn/k": KV_OUT, "layers/attn/v": KV_OUT}
_GATE_UP = {"layers/mlp/gate": MLP_IN, "layers/mlp/up": MLP_IN}

PHI3 = Family(
    name="phi3",
    model_types={"phi3": _PHI3},
    configure=configure_phi3,
    describe=describe,
    rules=(
        EMBEDDING,
        Rule("layers.{i}.input_layernorm.weight", "layers/attn_norm/scale", "D -> D"),
        *joined("layers.{i}.self_attn.qkv_proj", _QKV, bias=False),
        Rule("layers.{i}.self_attn.o_proj.weight", "layers/attn/o/kernel", HEADS_IN),
        Rule("layers.{i}.post_attention_layernorm.weight", "layers/mlp_norm/scale", "D -> D"),
        *joined("layers.{i}.mlp.gate_up_proj", _GATE_UP, bias=False),
        Rule("layers.{i}.mlp.down_proj.weight", "layers/mlp/down/kernel", MLP_OUT),
        Rule("norm.weight", "final_norm/scale", "D -> D"),
        HEAD,
    ),
    unused=UNUSED,
    prefixes=(r"model\.",),
    **DECODER,
)
