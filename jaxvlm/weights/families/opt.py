"""OPT (Zhang et al. 2022), the language model of BLIP-2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxvlm.config import LLMConfig
from jaxvlm.weights.families.base import HEADS_IN, Family, Rule, norm
from jaxvlm.weights.families.decoder import (
    DECODER,
    EMBEDDING,
    HEAD,
    MLP_IN,
    MLP_OUT,
    QKV,
    UNUSED,
    describe_activation,
    linear,
)
from jaxvlm.weights.hf_config import activation, refuse
from jaxvlm.weights.readers import WeightsError

_OPT = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
    "activation_function": "relu",
    "enable_bias": True,
    "tie_word_embeddings": True,
}


def configure(given: dict, folder: Path) -> LLMConfig:
    c = _OPT | given
    refuse(folder, c, do_layer_norm_before=False, _remove_final_layer_norm=True, layer_norm_elementwise_affine=False)
    if c.get("word_embed_proj_dim") not in (None, c["hidden_size"]):
        raise WeightsError(f"{folder}/config.json: embeddings narrower than the layers are not supported (OPT-350M).")
    heads = c["num_attention_heads"]
    return LLMConfig(
        vocab_size=c["vocab_size"],
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=c["hidden_size"] // heads,
        mlp_dim=c["ffn_dim"],
        norm="layer",
        norm_eps=1e-5,  # torch's own
        activation=activation(c["activation_function"], folder),
        gated=False,
        qkv_bias=c["enable_bias"],
        out_bias=c["enable_bias"],
        mlp_bias=c["enable_bias"],
        tie_embeddings=c["tie_word_embeddings"],
        learned_positions=True,
        max_positions=c["max_position_embeddings"],
    )


def describe(c: LLMConfig, kind: str) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "word_embed_proj_dim": c.width,
        "num_hidden_layers": c.depth,
        "ffn_dim": c.mlp_dim,
        "num_attention_heads": c.num_heads,
        "max_position_embeddings": c.max_positions,
        "activation_function": describe_activation(c),
        "enable_bias": c.out_bias,
        "tie_word_embeddings": c.tie_embeddings,
    }


# The first two rows of the file's table are of padding, which nothing sees.
_POSITIONS = Rule("embed_positions.weight", "pos_embed", "N D -> N D", slots=("two", "N"), slot=1)
_DECODER = (
    EMBEDDING,
    _POSITIONS,
    *norm("layers.{i}.self_attn_layer_norm", "layers/attn_norm"),
    *QKV,
    *linear("layers.{i}.self_attn.out_proj", "layers/attn/o", HEADS_IN, "out_bias"),
    *norm("layers.{i}.final_layer_norm", "layers/mlp_norm"),
    *linear("layers.{i}.fc1", "layers/mlp/up", MLP_IN, "mlp_bias"),
    *linear("layers.{i}.fc2", "layers/mlp/down", MLP_OUT, "mlp_bias"),
    *norm("final_layer_norm", "final_norm"),
)

OPT = Family(
    name="opt",
    model_types={"opt": _OPT},
    configure=configure,
    describe=describe,
    rules=(*(replace(rule, keys=f"decoder.{rule.keys}") for rule in _DECODER), HEAD),
    unused=UNUSED,
    prefixes=(r"model\.",),
    **DECODER,
)
