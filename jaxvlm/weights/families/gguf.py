"""Decoders in a GGUF file, as llama.cpp names them."""

from __future__ import annotations

from typing import Any

from jaxvlm.config import LLMConfig
from jaxvlm.weights.families.base import HEADS_IN, HEADS_OUT, Family, Rule, joined
from jaxvlm.weights.families.decoder import DECODER, KV_OUT, MLP_IN, MLP_OUT, TIED, linear
from jaxvlm.weights.gguf_file import GGUFFile
from jaxvlm.weights.readers import WeightsError

_ENDS = (
    Rule("token_embd.weight", "embed/embedding", "V D -> V D"),
    Rule("output_norm.weight", "final_norm/scale", "D -> D"),
    Rule("output.weight", "head/kernel", "V D -> D V", when="untied"),
)
_NORMS = (
    Rule("blk.{i}.attn_norm.weight", "layers/attn_norm/scale", "D -> D"),
    Rule("blk.{i}.ffn_norm.weight", "layers/mlp_norm/scale", "D -> D"),
)
_OUTPUTS = (
    Rule("blk.{i}.attn_output.weight", "layers/attn/o/kernel", HEADS_IN),
    Rule("blk.{i}.ffn_down.weight", "layers/mlp/down/kernel", MLP_OUT),
)
_GATED = (
    Rule("blk.{i}.ffn_gate.weight", "layers/mlp/gate/kernel", MLP_IN),
    Rule("blk.{i}.ffn_up.weight", "layers/mlp/up/kernel", MLP_IN),
)
_QKV = (
    *linear("blk.{i}.attn_q", "layers/attn/q", HEADS_OUT, "qkv_bias"),
    *linear("blk.{i}.attn_k", "layers/attn/k", KV_OUT, "qkv_bias"),
    *linear("blk.{i}.attn_v", "layers/attn/v", KV_OUT, "qkv_bias"),
    Rule("blk.{i}.attn_q_norm.weight", "layers/attn/q_norm/scale", "h -> h", when="qk_norm"),
    Rule("blk.{i}.attn_k_norm.weight", "layers/attn/k_norm/scale", "h -> h", when="qk_norm"),
)


def _family(name: str, *rules: Rule) -> Family:
    return Family(name, rules=(*_ENDS, *_NORMS, *_OUTPUTS, *rules), unused=((r"output\.weight", TIED),), **DECODER)


GGUF_LLAMA = _family(
    "gguf-llama",
    # llama.cpp rotates neighbouring pairs and stores the rows of q and k in that order; ours rotates halves.
    Rule("blk.{i}.attn_q.weight", "layers/attn/q/kernel", "(H half two) D -> D H (two half)"),
    Rule("blk.{i}.attn_k.weight", "layers/attn/k/kernel", "(K half two) D -> D K (two half)"),
    Rule("blk.{i}.attn_v.weight", "layers/attn/v/kernel", KV_OUT),
    *_GATED,
)
GGUF_QWEN = _family("gguf-qwen", *_QKV, *_GATED)
GGUF_GEMMA = _family(
    "gguf-gemma",
    *_QKV,
    *_GATED,
    Rule("blk.{i}.post_attention_norm.weight", "layers/attn_post_norm/scale", "D -> D"),
    Rule("blk.{i}.post_ffw_norm.weight", "layers/mlp_post_norm/scale", "D -> D"),
)
GGUF_PHI3 = _family(
    "gguf-phi3",
    *joined(
        "blk.{i}.attn_qkv",
        {"layers/attn/q": HEADS_OUT, "layers/attn/k": KV_OUT, "layers/attn/v": KV_OUT},
        bias=False,
    ),
    *joined("blk.{i}.ffn_up", {"layers/mlp/gate": MLP_IN, "layers/mlp/up": MLP_IN}, bias=False),
)
GGUF = {
    "llama": GGUF_LLAMA,
    "qwen2": GGUF_QWEN,
    "qwen3": GGUF_QWEN,
    "gemma2": GGUF_GEMMA,
    "phi3": GGUF_PHI3,
}


def gguf_family(source: GGUFFile) -> Family:
    """The table of the file's architecture. Raises `WeightsError` for one that there is none of."""
    kind = source.metadata.get("general.architecture")
    if kind not in GGUF:
        raise WeightsError(f"{source.path}: GGUF architecture '{kind}' is not supported; {', '.join(GGUF)} are.")
    return GGUF[kind]


def gguf_config(source: GGUFFile) -> LLMConfig:
    gguf_family(source)
    kind, names = source.metadata["general.architecture"], source.names()

    def get(name: str, default: Any = None) -> Any:
        value = source.metadata.get(f"{kind}.{name}", default)
        if value is None:
            raise WeightsError(f"{source.path}: the GGUF metadata lacks '{kind}.{name}'. Convert the model again.")
        return value

    factors = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    if get("rope.scaling.type", "none") != "none" or factors & set(names):
        raise WeightsError(
            f"{source.path}: RoPE scaling in a GGUF file is not supported; the positions would be wrong."
        )
    heads, width, depth = get("attention.head_count"), get("embedding_length"), get("block_count")
    turning = get("rope.dimension_count", width // heads)
    head_dim = get("attention.key_length", width // heads if kind == "phi3" else turning)
    values = {
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
        "rope_fraction": turning / head_dim if kind == "phi3" else 1.0,
    }
    if kind == "gemma2":
        values |= {
            "post_norms": True,  # the file's scales already have their 1 added, so the norm is the plain one
            "activation": "gelu_tanh",
            "embed_scale": width**0.5,
            # Of the largest model alone the scores are not scaled by the size of a head (llama.cpp, by the depth).
            "attn_scale": ((width // heads) if depth == 46 else head_dim) ** -0.5,
            "attn_softcap": float(get("attn_logit_softcapping", 50.0)),
            "logit_softcap": float(get("final_logit_softcapping", 30.0)),
            "sliding_window": get("attention.sliding_window", 4096),
            "full_layers": tuple(range(1, depth, 2)),
        }
    elif kind == "phi3":
        values["sliding_window"] = get("attention.sliding_window", 0) or None
    return LLMConfig(
        vocab_size=source.shape("token_embd.weight")[0],
        width=width,
        depth=depth,
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_dim=get("feed_forward_length"),
        rope_theta=float(get("rope.freq_base", 10000.0)),
        norm_eps=round(float(get("attention.layer_norm_rms_epsilon")), 12),  # a float32 in the file
        tie_embeddings="output.weight" not in names,
        max_positions=get("context_length"),
        **values,
    )
