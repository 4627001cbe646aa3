"""Decoders: the Llama family (Llama, Vicuna, SmolLM2, Mistral, Qwen2)."""

from __future__ import annotations

from pathlib import Path

from jaxvlm.config import LLMConfig
from jaxvlm.weights.families.base import Family, Rule
from jaxvlm.weights.hf_config import refuse
from jaxvlm.weights.readers import WeightsError

_DEFAULTS = {
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "head_dim": None,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
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
}


def configure(given: dict, folder: Path) -> LLMConfig:
    kind = given.get("model_type", "llama")
    c = LLAMA.model_types[kind] | given
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise WeightsError(
            f"{folder}: RoPE scaling of type '{scaling}' is not supported; the positions would be wrong."
        )
    refuse(folder, c, attention_bias=True, mlp_bias=True)
    if c["hidden_act"] != "silu":
        raise WeightsError(f"{folder}: hidden_act '{c['hidden_act']}' is not supported in the language model; silu is.")
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    if window and 0 < c.get("max_window_layers", 0) < c["num_hidden_layers"]:
        raise WeightsError(f"{folder}: layers with and without a sliding window in one model are not supported.")
    if window and c.get("max_window_layers", 0) >= c["num_hidden_layers"]:
        window = None  # Qwen2 counts the layers *without* a window
    heads = c["num_attention_heads"]
    return LLMConfig(
        vocab_size=c["vocab_size"],
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=c["num_key_value_heads"] or heads,
        head_dim=c["head_dim"] or c["hidden_size"] // heads,
        mlp_dim=c["intermediate_size"],
        rope_theta=float(rope.get("rope_theta", c["rope_theta"])),
        norm_eps=c["rms_norm_eps"],
        qkv_bias=kind == "qwen2",
        tie_embeddings=c["tie_word_embeddings"],
        sliding_window=window,
        max_positions=c["max_position_embeddings"],
    )


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
    }


DECODER = {
    "part": "llm",
    "sizes": llm_sizes,
    "conditions": lambda config: {"qkv_bias": config.qkv_bias, "untied": not config.tie_embeddings},
    "layers": lambda config: range(config.depth),
}
TIED = "equal to the embedding, which is used instead"

LLAMA = Family(
    name="llama",
    model_types={"llama": _DEFAULTS | _LLAMA, "mistral": _DEFAULTS | _MISTRAL, "qwen2": _DEFAULTS | _QWEN2},
    configure=configure,
    rules=(
        Rule("embed_tokens.weight", "embed/embedding", "V D -> V D"),
        Rule("layers.{i}.input_layernorm.weight", "layers/attn_norm/scale", "D -> D"),
        Rule("layers.{i}.self_attn.q_proj.weight", "layers/attn/q/kernel", "(H h) D -> D H h"),
        Rule("layers.{i}.self_attn.q_proj.bias", "layers/attn/q/bias", "(H h) -> H h", when="qkv_bias"),
        Rule("layers.{i}.self_attn.k_proj.weight", "layers/attn/k/kernel", "(K h) D -> D K h"),
        Rule("layers.{i}.self_attn.k_proj.bias", "layers/attn/k/bias", "(K h) -> K h", when="qkv_bias"),
        Rule("layers.{i}.self_attn.v_proj.weight", "layers/attn/v/kernel", "(K h) D -> D K h"),
        Rule("layers.{i}.self_attn.v_proj.bias", "layers/attn/v/bias", "(K h) -> K h", when="qkv_bias"),
        Rule("layers.{i}.self_attn.o_proj.weight", "layers/attn/o/kernel", "D (H h) -> H h D"),
        Rule("layers.{i}.post_attention_layernorm.weight", "layers/mlp_norm/scale", "D -> D"),
        Rule("layers.{i}.mlp.gate_proj.weight", "layers/mlp/gate/kernel", "F D -> D F"),
        Rule("layers.{i}.mlp.up_proj.weight", "layers/mlp/up/kernel", "F D -> D F"),
        Rule("layers.{i}.mlp.down_proj.weight", "layers/mlp/down/kernel", "D F -> F D"),
        Rule("norm.weight", "final_norm/scale", "D -> D"),
        Rule("lm_head.weight", "head/kernel", "V D -> D V", when="untied"),
    ),
    unused=(
        (r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", "a constant"),
        (r"lm_head\.weight", TIED),
    ),
    prefixes=(r"model\.",),
    **DECODER,
)
