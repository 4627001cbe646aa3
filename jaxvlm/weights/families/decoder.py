"""What the decoders' families share: the sizes and conditions of their tables, and the reading of rotary settings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxvlm.config import LLMConfig, RopeScalingConfig
from jaxvlm.weights.families.base import HEADS_IN, HEADS_OUT, Rule, dense
from jaxvlm.weights.hf_config import ACTIVATIONS
from jaxvlm.weights.readers import WeightsError


def llm_sizes(config: LLMConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.width,
        "H": config.num_heads,
        "K": config.num_kv_heads,
        "h": config.head_dim,
        "two": 2,
        "half": config.head_dim // 2,
        "F": config.mlp_dim,
        "N": config.max_positions,
    }


def llm_conditions(config: LLMConfig) -> dict[str, bool]:
    return {
        "qkv_bias": config.qkv_bias,
        "out_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "head_bias": config.head_bias,
        "qk_norm": config.qk_norm,
        "untied": not config.tie_embeddings,
    }


DECODER = {
    "part": "llm",
    "sizes": llm_sizes,
    "conditions": llm_conditions,
    "layers": lambda config: range(config.depth),
}
TIED = "equal to the embedding, which is used instead"
UNUSED = (
    (r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", "a constant"),
    (r"lm_head\.weight", TIED),
)


def linear(key: str, path: str, axes: str, bias: str) -> tuple[Rule, Rule]:
    """A linear layer whose bias is there only on the condition `bias`."""
    kernel, offset = dense(key, path, axes)
    return kernel, replace(offset, when=bias)


KV_OUT, MLP_IN, MLP_OUT = "(K h) D -> D K h", "F D -> D F", "D F -> F D"

EMBEDDING = Rule("embed_tokens.weight", "embed/embedding", "V D -> V D")
HEAD = Rule("lm_head.weight", "head/kernel", "V D -> D V", when="untied")
QKV = (
    *linear("layers.{i}.self_attn.q_proj", "layers/attn/q", HEADS_OUT, "qkv_bias"),
    *linear("layers.{i}.self_attn.k_proj", "layers/attn/k", KV_OUT, "qkv_bias"),
    *linear("layers.{i}.self_attn.v_proj", "layers/attn/v", KV_OUT, "qkv_bias"),
)
QK_NORM = (
    Rule("layers.{i}.self_attn.q_norm.weight", "layers/attn/q_norm/scale", "h -> h", when="qk_norm"),
    Rule("layers.{i}.self_attn.k_norm.weight", "layers/attn/k_norm/scale", "h -> h", when="qk_norm"),
)
OUT = linear("layers.{i}.self_attn.o_proj", "layers/attn/o", HEADS_IN, "out_bias")
GATED_MLP = (
    *linear("layers.{i}.mlp.gate_proj", "layers/mlp/gate", MLP_IN, "mlp_bias"),
    *linear("layers.{i}.mlp.up_proj", "layers/mlp/up", MLP_IN, "mlp_bias"),
    *linear("layers.{i}.mlp.down_proj", "layers/mlp/down", MLP_OUT, "mlp_bias"),
)


def rope(
    c: dict[str, Any],
    folder: Path,
    *,
    dim: int,
    given: dict[str, Any] | None = None,
    kinds: tuple[str, ...] = ("default", "linear", "llama3", "yarn"),
) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a config.json, as transformers' `RotaryEmbeddingConfigMixin` reads them.

    `given` is the dict of rotary settings, by default `rope_scaling` (before transformers 5) or `rope_parameters`;
    what it lacks stands beside it. `dim` is the number of dimensions that turn. Raises `WeightsError` for a kind of
    scaling that is not among `kinds`.
    """
    rope = (c.get("rope_scaling") or c.get("rope_parameters") or {}) if given is None else given
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in kinds:
        raise WeightsError(
            f"{folder}/config.json: RoPE scaling of type '{kind}' is not supported here ({', '.join(kinds)} are); "
            "the positions would be wrong."
        )
    theta = rope.get("rope_theta")
    values: dict[str, Any] = {"rope_theta": float(c["rope_theta"] if theta is None else theta)}
    if kind == "default":
        return values
    # A length beside the dict precedes the one in it.
    original = c.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    original = original or c["max_position_embeddings"]
    try:
        if kind == "longrope":
            scaling = _longrope(c, rope, folder, original, dim)
        elif kind == "llama3":
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            scaling = RopeScalingConfig(kind, float(rope["factor"]), float(low), float(high), original)
        elif kind == "yarn":
            scaling = _yarn(rope, folder, original)
        else:
            scaling = RopeScalingConfig(kind, float(rope["factor"]))
    except KeyError as error:
        raise WeightsError(f"{folder}/config.json: RoPE scaling of type '{kind}' lacks {error}.") from None
    return values | {"rope_scaling": scaling}


def _yarn(rope: dict, folder: Path, original: int) -> RopeScalingConfig:
    """YaRN (Peng et al. 2023); without a factor of its own, cos and sin grow as its eq. 22 says."""
    for name, plain in (("truncate", True), ("mscale", None), ("mscale_all_dim", None)):
        if rope.get(name, plain) != plain:
            raise WeightsError(f"{folder}/config.json: RoPE scaling of type 'yarn' with {name} is not supported.")
    factor, attention = float(rope["factor"]), rope.get("attention_factor")
    growth = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return RopeScalingConfig(
        "yarn",
        factor,
        original_max_positions=original,
        attention_factor=growth if attention is None else float(attention),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
    )


def _longrope(c: dict, rope: dict, folder: Path, original: int, dim: int) -> RopeScalingConfig:
    """LongRoPE (Ding et al. 2024); without a factor of its own, cos and sin grow as its §3.3 says."""
    short, long = (tuple(float(factor) for factor in rope[f"{name}_factor"]) for name in ("short", "long"))
    if len(short) != dim // 2 or len(long) != dim // 2:
        raise WeightsError(
            f"{folder}/config.json: RoPE scaling has {len(short)} short and {len(long)} long factors for {dim} "
            "dimensions; it needs one for every two."
        )
    attention = rope.get("attention_factor")
    if attention is None:
        factor = rope.get("factor") or c["max_position_embeddings"] / original
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeScalingConfig(
        "longrope",
        original_max_positions=original,
        short_factor=short,
        long_factor=long,
        attention_factor=float(attention),
    )


def windows(c: dict[str, Any], layer_types: list[str], folder: Path) -> dict[str, Any]:
    """`sliding_window` and `full_layers` from the kind of each layer, in transformers' words."""
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise WeightsError(f"{folder}/config.json: layer_types '{sorted(unknown)[0]}' is not supported.")
    if len(layer_types) != c["num_hidden_layers"]:
        raise WeightsError(
            f"{folder}/config.json: {len(layer_types)} layer_types for {c['num_hidden_layers']} layers (num_hidden_layers)."
        )
    if c["sliding_window"] is None or "sliding_attention" not in layer_types:
        return {"sliding_window": None}
    full = tuple(i for i, kind in enumerate(layer_types) if kind == "full_attention")
    return {"sliding_window": c["sliding_window"], "full_layers": full}


# ------------------------------------------------------------------------------------------------------- the other way


def describe_shape(c: LLMConfig) -> dict[str, Any]:
    """What every decoder's config.json says in the same words."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": c.tie_embeddings,
    }


def describe_activation(c: LLMConfig) -> str | None:
    return next((name for name, ours in ACTIVATIONS.items() if ours == c.activation), None)


def describe_rope(c: LLMConfig) -> dict[str, Any]:
    """Rotary settings in the words of transformers 5, and in the older ones."""
    scaling = c.rope_scaling
    values: dict[str, Any] = {"rope_type": scaling.kind}
    if scaling.kind in ("linear", "llama3", "yarn"):
        values["factor"] = scaling.factor
    if scaling.kind == "llama3":
        values |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "longrope":
        values |= {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
    if scaling.kind == "yarn":
        values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    if scaling.kind in ("yarn", "longrope"):
        values["attention_factor"] = scaling.attention_factor
    if scaling.kind in ("llama3", "yarn", "longrope"):
        values["original_max_position_embeddings"] = scaling.original_max_positions
    older = {} if scaling.kind == "default" else {"rope_scaling": values}
    return older | {"rope_theta": c.rope_theta, "rope_parameters": values | {"rope_theta": c.rope_theta}}


def describe_windows(c: LLMConfig) -> dict[str, Any]:
    full = range(c.depth) if c.sliding_window is None else c.full_layers
    kinds = ["full_attention" if i in full else "sliding_attention" for i in range(c.depth)]
    return {"sliding_window": c.sliding_window, "layer_types": kinds}
