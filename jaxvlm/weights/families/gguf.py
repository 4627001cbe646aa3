"""Llama-shaped decoders in a GGUF file, as llama.cpp names them."""

from __future__ import annotations

from typing import Any

from jaxvlm.config import LLMConfig
from jaxvlm.weights.families.base import Family, Rule
from jaxvlm.weights.families.llama import DECODER, TIED
from jaxvlm.weights.gguf_file import GGUFFile
from jaxvlm.weights.readers import WeightsError

GGUF_LLAMA = Family(
    name="gguf-llama",
    rules=(
        Rule("token_embd.weight", "embed/embedding", "V D -> V D"),
        Rule("blk.{i}.attn_norm.weight", "layers/attn_norm/scale", "D -> D"),
        # llama.cpp rotates neighbouring pairs and stores the rows of q and k in that order; ours rotates halves.
        Rule("blk.{i}.attn_q.weight", "layers/attn/q/kernel", "(H half two) D -> D H (two half)"),
        Rule("blk.{i}.attn_k.weight", "layers/attn/k/kernel", "(K half two) D -> D K (two half)"),
        Rule("blk.{i}.attn_v.weight", "layers/attn/v/kernel", "(K h) D -> D K h"),
        Rule("blk.{i}.attn_output.weight", "layers/attn/o/kernel", "D (H h) -> H h D"),
        Rule("blk.{i}.ffn_norm.weight", "layers/mlp_norm/scale", "D -> D"),
        Rule("blk.{i}.ffn_gate.weight", "layers/mlp/gate/kernel", "F D -> D F"),
        Rule("blk.{i}.ffn_up.weight", "layers/mlp/up/kernel", "F D -> D F"),
        Rule("blk.{i}.ffn_down.weight", "layers/mlp/down/kernel", "D F -> F D"),
        Rule("output_norm.weight", "final_norm/scale", "D -> D"),
        Rule("output.weight", "head/kernel", "V D -> D V", when="untied"),
    ),
    unused=((r"output\.weight", TIED),),
    **DECODER,
)


def gguf_config(source: GGUFFile) -> LLMConfig:
    meta = source.metadata
    kind = meta.get("general.architecture")
    if kind != "llama":
        raise WeightsError(f"{source.path}: GGUF architecture '{kind}' is not supported; llama is.")

    def get(name: str, default: Any = None) -> Any:
        value = meta.get(f"llama.{name}", default)
        if value is None:
            raise WeightsError(f"{source.path}: the GGUF metadata lacks 'llama.{name}'. Convert the model again.")
        return value

    if get("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in source.names():
        raise WeightsError(f"{source.path}: RoPE scaling is not supported; the positions would be wrong.")
    heads, width = get("attention.head_count"), get("embedding_length")
    return LLMConfig(
        vocab_size=source.shape("token_embd.weight")[0],
        width=width,
        depth=get("block_count"),
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length", get("rope.dimension_count", width // heads)),
        mlp_dim=get("feed_forward_length"),
        rope_theta=float(get("rope.freq_base", 10000.0)),
        norm_eps=round(float(get("attention.layer_norm_rms_epsilon")), 12),  # a float32 in the file
        tie_embeddings="output.weight" not in source.names(),
        max_positions=get("context_length"),
    )
