"""Connectors. Their tables follow from the model's configuration: how many layers, towers and groups there are.

An MLP's tensors have had many names, which `mlp_name` tells apart; the others' tables use the file's own, without what
stands before them.
"""

from __future__ import annotations

import dataclasses
import re

from jaxvlm.config import ModelConfig
from jaxvlm.models.connectors.mlp import widths
from jaxvlm.models.connectors.sva import window_sides
from jaxvlm.weights.families.base import Family, Rule, dense

# (a whole name, the layer that its number stands for; a name without a number is of layer 1).
_MLP_NAMES = (
    (r"(?:model\.)?multi_modal_projector\.linear_(\d+)\.(weight|bias)", lambda n: n),  # llava-hf
    (r"(?:base_model\.model\.)?(?:model\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)", lambda n: n // 2 + 1),  # LLaVA
    (r"projector\.(?:projector\.)?(?:(\d+)\.)?(weight|bias)", lambda n: n // 2 + 1),  # Prismatic
    (r"MP\.proj()\.(weight|bias)", lambda n: n),  # nanoVLM
    (r"(?:model\.)?connector\.modality_projection\.proj()\.(weight|bias)", lambda n: n),  # Idefics 3, SmolVLM
)


def mlp_name(name: str) -> str | None:
    """'linear_{n}.weight' (or bias), or 'newline', of a linear connector's tensor; None if the name is of no such one.

    Between LLaVA's and Prismatic's linear layers, which are numbered, stands an activation.
    """
    if re.fullmatch(r"(base_model\.model\.)?(model\.)?image_newline", name):
        return "newline"
    for pattern, layer in _MLP_NAMES:
        found = re.fullmatch(pattern, name)
        if found:
            return f"linear_{layer(int(found[1])) if found[1] else 1}.{found[2]}"
    return None


def connector_family(model: ModelConfig) -> Family:
    """The table of the connector that `model` has; its functions read a ModelConfig."""
    c = model.connector
    newline = "newline" if c.kind not in ("qformer", "resampler", "sva") else "image_newline"
    makers = {"qformer": _qformer, "resampler": _resampler, "sva": _sva}
    name, rules, sizes, unused = makers.get(c.kind, _mlp)(model)
    if c.row_end:
        rules += (Rule(newline, "newline", "D -> D"),)
    return Family(
        name=name,
        part="connector",
        rules=rules,
        unused=unused,
        sizes=lambda config: sizes | {"D": model.llm.width, "O": model.llm.width},
        conditions=lambda config: {},
        layers=lambda config: range(0),  # every rule names its own
        prefixes=(r"(transformer\.)?visual\.", r"model\.(?=mm_projector|vision_|image_newline)"),  # Qwen-VL, Cambrian
    )


def _mlp(model: ModelConfig):
    sizes = {f"d{n}": width for n, width in enumerate(widths(model))}
    rules: tuple[Rule, ...] = ()
    for n in range(1, len(sizes)):
        layer = dense(f"linear_{n}", f"linear_{n}", f"d{n} d{n - 1} -> d{n - 1} d{n}")
        rules += layer if model.connector.bias else layer[:1]
    return "projector", rules, sizes, ()


def _norm(key: str, path: str, axis: str = "W") -> tuple[Rule, Rule]:
    axes = f"{axis} -> {axis}"
    return Rule(f"{key}.weight", f"{path}/scale", axes), Rule(f"{key}.bias", f"{path}/bias", axes)


def _of_layers(rules: tuple[Rule, ...], layers: range) -> tuple[Rule, ...]:
    return tuple(dataclasses.replace(rule, layers=layers) for rule in rules)


def _qformer(model: ModelConfig):
    """BLIP-2's and InstructBLIP's, as transformers names them."""
    c = model.connector.qformer
    with_text = c.text_vocab_size > 0
    embeddings = "qformer.embeddings." if with_text else "qformer."
    rules = (
        Rule("query_tokens", "query", "1 Q W -> Q W"),
        *_norm(f"{embeddings}layernorm", "norm"),
        *dense("language_projection", "linear_1", "D W -> W D"),
    )
    if with_text:
        rules += (
            Rule("qformer.embeddings.word_embeddings.weight", "word_embed", "T W -> T W"),
            Rule("qformer.embeddings.position_embeddings.weight", "word_positions", "P W -> P W"),
        )
    for first in range(c.cross_every):
        to, key = f"layers/layer_{first}", "qformer.encoder.layer.{i}."
        parts = _qformer_attention(f"{key}attention", f"{to}/attn", "W")
        if first == 0:
            parts += _qformer_attention(f"{key}crossattention", f"{to}/cross", "V")
        for text in range(1 + with_text):
            inner, suffix = ("mlp", "_query") if not text else ("text_mlp", "")
            parts += (
                *dense(f"{key}intermediate{suffix}.dense", f"{to}/{inner}/up", "F W -> W F"),
                *dense(f"{key}output{suffix}.dense", f"{to}/{inner}/down", "W F -> F W"),
                *_norm(f"{key}output{suffix}.LayerNorm", f"{to}/{inner}_norm"),
            )
        rules += _of_layers(parts, range(first, c.depth, c.cross_every))
    sizes = {"Q": c.num_queries, "W": c.width, "F": c.mlp_dim, "H": c.num_heads, "h": c.width // c.num_heads}
    sizes |= {"V": model.vision.feature_width, "T": c.text_vocab_size, "P": c.text_positions}
    return "qformer", rules, sizes, ((r"qformer\.embeddings\.position_ids", "a constant"),)


def _qformer_attention(key: str, path: str, source: str) -> tuple[Rule, ...]:
    return (
        *dense(f"{key}.attention.query", f"{path}/q", "(H h) W -> W H h"),
        *dense(f"{key}.attention.key", f"{path}/k", f"(H h) {source} -> {source} H h"),
        *dense(f"{key}.attention.value", f"{path}/v", f"(H h) {source} -> {source} H h"),
        *dense(f"{key}.output.dense", f"{path}/o", "W (H h) -> H h W"),
        *_norm(f"{key}.output.LayerNorm", f"{path}_norm"),
    )


def _resampler(model: ModelConfig):
    """Qwen-VL's, with the names of its `visual` module."""
    c, width = model.connector.resampler, model.llm.width
    rules: tuple[Rule, ...] = (
        Rule("attn_pool.query", "query", "Q D -> Q D"),
        *_norm("attn_pool.ln_q", "q_norm", "D"),
        *_norm("attn_pool.ln_kv", "kv_norm", "D"),
        *dense("attn_pool.attn.out_proj", "attn/o", "D (H h) -> H h D"),
        *_norm("ln_post", "post_norm", "D"),
        Rule("proj", "linear_1/kernel", "D O -> D O"),  # applied from the right in the file too
    )
    for slot, name in enumerate("qkv"):
        thirds = {"slots": ("H h",) * 3, "slot": slot}
        rules += (
            Rule("attn_pool.attn.in_proj_weight", f"attn/{name}/kernel", "(H h) D -> D H h", **thirds),
            Rule("attn_pool.attn.in_proj_bias", f"attn/{name}/bias", "(H h) -> H h", **thirds),
        )
    if model.vision.feature_width != width:
        rules += (Rule("attn_pool.kv_proj.weight", "kv_proj/kernel", "D V -> V D"),)
    sizes = {"Q": c.num_queries, "V": model.vision.feature_width, "H": c.num_heads, "h": width // c.num_heads}
    unused = (
        (r"attn_pool\.pos_embed", "a constant"),
        (r"(conv1|positional_embedding|ln_pre|transformer\.resblocks)\b.*", "the vision tower"),
        (r"(transformer\.(wte|h|ln_f)|lm_head)\b.*", "the language model"),
    )
    return "qwen-vl-resampler", rules, sizes, unused


def _sva(model: ModelConfig):
    """Cambrian's (recipes §3.4)."""
    c, sides, towers = model.connector.sva, window_sides(model), model.vision.parts
    rules: tuple[Rule, ...] = (
        Rule("vision_query", "query", "G W -> G W"),
        *dense("mm_projector.0", "linear_1", "D GW -> GW D"),
        *dense("mm_projector.2", "linear_2", "O D -> D O"),
    )
    for tower in range(len(towers)):
        key, path = f"mm_projector_aux_{tower}", f"aux_{tower}"
        rules += (
            *dense(f"{key}.0", f"{path}/linear_1", f"W V{tower} -> V{tower} W"),
            *dense(f"{key}.2", f"{path}/linear_2", "X W -> W X"),
            *_norm(f"{key}.3", f"{path}/norm"),
        )
    for group in range(c.groups):
        aggregator = _aggregator(f"vision_sampler_{group}.layers.{{i}}.", f"group_{group}", sides, "W", "QW")
        rules += _of_layers(aggregator, range(c.depth))
    if c.llm_layers:
        aggregator = _aggregator("vision_sampler_layers.{i}.layers.0.", "llm_layers", sides, "D", "QD")
        rules += _of_layers(aggregator, range(len(c.llm_layers)))
    sizes = {name: c.width for name in "WXY"} | {"G": c.groups, "GW": c.groups * c.width}
    sizes |= {"QW": 2 * c.width, "QD": model.llm.width + c.width, "H": c.num_heads, "h": c.width // c.num_heads}
    sizes |= {f"V{i}": tower.feature_width for i, tower in enumerate(towers)}
    sizes |= {f"M{i}": side**2 for i, side in enumerate(sides)}
    return "cambrian-sva", rules, sizes, ()


def _aggregator(key: str, path: str, sides: tuple[int, ...], width: str, joint: str) -> tuple[Rule, ...]:
    """One layer of it. `width` is the axis of its queries, `joint` that of queries and context together."""

    def linear(name: str, to: str, axes: str) -> Rule:
        return Rule(f"{key}{name}.weight", f"{path}/{to}/kernel", axes)

    def projection(name: str, to: str) -> tuple[Rule, ...]:  # a norm and a linear layer
        axes = "(H h) W -> W H h"
        return *_norm(f"{key}cross_attn.{name}.0", f"{path}/attn/{to}_norm"), linear(
            f"cross_attn.{name}.1", f"attn/{to}", axes
        )

    rules = (
        linear("proj_context", "context", "X W -> W X"),
        linear("proj_in", "in", f"W {joint} -> {joint} W"),
        *projection("q_proj", "q"),
        linear("cross_attn.o_proj", "attn/o", "W (H h) -> H h W"),
        *_norm(f"{key}norm", f"{path}/norm"),
        linear("proj_out.linear_1", "up", "X W -> W X"),
        linear(
            "proj_out.linear_2", "down", f"{'Y' if width == 'W' else width} W -> W {'Y' if width == 'W' else width}"
        ),
    )
    for tower, side in enumerate(sides):
        rules += (*projection(f"k_proj_{tower}", f"k_{tower}"), *projection(f"v_proj_{tower}", f"v_{tower}"))
        if side > 1:
            rules += (Rule(f"{key}pos_embed_{tower}", f"{path}/pos_embed_{tower}", f"M{tower} W -> M{tower} W"),)
    return rules
