"""Which tensor of a checkpoint is which parameter: one table per family (recipes §3), read in both directions.

A rule is `file name -> path in our tree : axes`. `{i}` in the file name counts layers; where the path has it too each
layer has its own leaf, otherwise the layers are stacked on a new leading axis. Families differ from each other in
tables only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxvlm.config import LLMConfig, VisionConfig


@dataclass(frozen=True)
class Rule:
    """File tensor(s) `keys` make parameter `path`; `axes` is read by `jaxvlm.weights.axes`.

    `when` names a condition of the family (see `Family.conditions`); without it the rule does not apply.
    `combine` makes one tensor (in the file's layout) of several; such a rule cannot be exported.
    `first` is the first layer that has it.
    """

    keys: str | tuple[str, ...]
    path: str
    axes: str
    when: str = ""
    combine: Callable[..., np.ndarray] | None = None
    first: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return (self.keys,) if isinstance(self.keys, str) else self.keys

    @property
    def stacked(self) -> bool:
        return "{i}" in self.names[0] and "{i}" not in self.path


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    `prefixes`: regular expressions of what may stand before the names of the table.
    `unused`: (regular expression of a whole name, why it is not needed).
    `sizes`: the sizes of the names in `axes`; names it leaves out are read off the file.
    """

    name: str
    part: str  # vision | connector | llm
    rules: tuple[Rule, ...]
    unused: tuple[tuple[str, str], ...]
    sizes: Callable[..., dict[str, int]]
    conditions: Callable[..., dict[str, bool]]
    layers: Callable[..., range]  # the layers to read
    prefixes: tuple[str, ...] = ("",)

    def canonical(self, name: str) -> str:
        """`name` without a known prefix."""
        for prefix in self.prefixes:
            found = re.match(prefix, name) if prefix else None
            if found:
                return name[found.end() :]
        return name

    def active(self, config) -> list[Rule]:
        conditions = self.conditions(config)
        return [rule for rule in self.rules if not rule.when or conditions[rule.when]]


def norm(key: str, path: str, when: str = "") -> tuple[Rule, Rule]:
    return Rule(f"{key}.weight", f"{path}/scale", "D -> D", when), Rule(f"{key}.bias", f"{path}/bias", "D -> D", when)


def dense(key: str, path: str, axes: str, when: str = "") -> tuple[Rule, Rule]:
    """A linear layer with a bias; `axes` describes the kernel, the bias has its output axes."""
    out = re.match(r"\([^)]*\)|\S+", axes).group()
    bias = f"{out} -> {out.strip('()')}"
    return Rule(f"{key}.weight", f"{path}/kernel", axes, when), Rule(f"{key}.bias", f"{path}/bias", bias, when)


HEADS_OUT, HEADS_IN = "(H h) D -> D H h", "D (H h) -> H h D"

# ------------------------------------------------------------------------------------------------------ vision: ViTs


def needed_layers(config: VisionConfig) -> int:
    """How many layers run before the selected features: `feature_layer` indexes HF's `hidden_states`."""
    layer = config.feature_layer
    return config.depth + 1 + layer if layer < 0 else layer


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
    }


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
_VIT = {
    "part": "vision",
    "sizes": vit_sizes,
    "conditions": vit_conditions,
    "layers": lambda config: range(needed_layers(config)),
}
_CONTRASTIVE_UNUSED = (
    (r"(text_model\.)?embeddings\.position_ids", "a constant"),
    (r"post_layernorm\..*", "the final norm, not applied to these features"),
    (r"text_model\..*", "the text tower"),
    (r"(text|visual)_projection\..*|logit_(scale|bias)", "the contrastive head"),
)

CLIP = Family(
    name="clip",
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
    **_VIT,
)

SIGLIP = Family(
    name="siglip",
    rules=(
        Rule("embeddings.patch_embedding.weight", "patch_embed/kernel", "D C p q -> p q C D"),
        Rule("embeddings.patch_embedding.bias", "patch_embed/bias", "D -> D"),
        Rule("embeddings.position_embedding.weight", "pos_embed", "N D -> N D"),
        *_HF_VIT_LAYER,
        *norm("post_layernorm", "post_norm", when="feature_norm"),
    ),
    unused=(*_CONTRASTIVE_UNUSED, (r"head\..*", "the pooling head")),
    prefixes=(r"vision_model\.",),
    **_VIT,
)

DINOV2 = Family(
    name="dinov2",
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
        *dense("encoder.layer.{i}.mlp.fc1", "layers/mlp/up", "F D -> D F"),
        *dense("encoder.layer.{i}.mlp.fc2", "layers/mlp/down", "D F -> F D"),
        Rule("encoder.layer.{i}.layer_scale2.lambda1", "layers/scale2", "D -> D"),
        *norm("layernorm", "post_norm", when="feature_norm"),
    ),
    unused=(
        (r"embeddings\.mask_token", "only used in DINOv2's own training"),
        (r"layernorm\..*", "the final norm, not applied to these features"),
        (r"classifier\..*", "the classifier"),
    ),
    prefixes=(r"dinov2(_with_registers)?\.",),
    **_VIT,
)

# ------------------------------------------------------------------------------------------- vision: EfficientNet-Lite

BATCH_NORM_EPS = 1e-3  # TensorFlow's, which the weights come from (assets §2)


def _fold_kernel(kernel, scale, variance):
    """Batch norm at inference is a per-channel affine map; its scale goes into the convolution before it."""
    return kernel * (scale / np.sqrt(variance + BATCH_NORM_EPS))[:, None, None, None]


def _fold_bias(bias, mean, scale, variance):
    return bias - mean * scale / np.sqrt(variance + BATCH_NORM_EPS)


def folded(conv: str, batch_norm: str, path: str, first: int = 0) -> tuple[Rule, Rule]:
    scale, bias, mean, var = (f"{batch_norm}.{n}" for n in ("weight", "bias", "running_mean", "running_var"))
    return (
        Rule((f"{conv}.weight", scale, var), f"{path}/kernel", "O I y x -> y x I O", "", _fold_kernel, first),
        Rule((bias, mean, scale, var), f"{path}/bias", "O -> O", "", _fold_bias, first),
    )


EFFICIENTNET_LITE = Family(
    name="efficientnet-lite",
    part="vision",
    rules=(
        *folded("_conv_stem", "_bn0", "stem"),
        # The first block widens nothing, so it alone has no expansion.
        *folded("_blocks.{i}._expand_conv", "_blocks.{i}._bn0", "blocks_{i}/expand", first=1),
        *folded("_blocks.{i}._depthwise_conv", "_blocks.{i}._bn1", "blocks_{i}/depthwise"),
        *folded("_blocks.{i}._project_conv", "_blocks.{i}._bn2", "blocks_{i}/project"),
        *folded("_conv_head", "_bn1", "head"),
    ),
    unused=((r".*\.num_batches_tracked", "a training counter"), (r"_fc\..*", "the ImageNet classifier")),
    sizes=lambda config: {},
    conditions=lambda config: {},
    layers=lambda config: range(config.depth),
)

# ------------------------------------------------------------------------------------------------------------ connector

CONNECTOR = Family(
    name="llava-projector",
    part="connector",
    rules=(
        *dense("linear_1", "linear_1", "D V -> V D"),
        *dense("linear_2", "linear_2", "O D -> D O", when="two_layers"),
    ),
    unused=(),
    sizes=lambda config: {"V": config.vision.width, "D": config.llm.width, "O": config.llm.width},
    conditions=lambda config: {"two_layers": config.connector.kind == "mlp2x_gelu"},
    layers=lambda config: range(0),
)

# ------------------------------------------------------------------------------------------------------ language models


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


_LLM = {
    "part": "llm",
    "sizes": llm_sizes,
    "conditions": lambda config: {"qkv_bias": config.qkv_bias, "untied": not config.tie_embeddings},
    "layers": lambda config: range(config.depth),
}
_TIED = "equal to the embedding, which is used instead"

LLAMA = Family(
    name="llama",
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
        (r"lm_head\.weight", _TIED),
    ),
    prefixes=(r"model\.",),
    **_LLM,
)

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
    unused=((r"output\.weight", _TIED),),
    **_LLM,
)

FAMILIES = {family.name: family for family in (CLIP, SIGLIP, DINOV2, EFFICIENTNET_LITE, CONNECTOR, LLAMA, GGUF_LLAMA)}

# --------------------------------------------------------------------------------------------------------- llava-hf

# A whole LLaVA in one checkpoint is its three parts behind prefixes, which changed over the years (recipes §3.2):
# (what the name starts with, what that becomes for the part's own table).
LLAVA_PREFIXES = {
    "vision": ((r"(model\.)?(vision_tower\.)+(vision_model\.)?", ""),),
    "connector": (
        (r"(model\.)?multi_modal_projector\.", ""),
        (r"(base_model\.model\.)?(model\.)?mm_projector\.0\.", "linear_1."),  # LLaVA's own mm_projector.bin
        (r"(base_model\.model\.)?(model\.)?mm_projector\.2\.", "linear_2."),
        (r"(base_model\.model\.)?(model\.)?mm_projector\.(?=weight|bias)", "linear_1."),
    ),
    "llm": ((r"(language_model\.)?lm_head\.", "lm_head."), (r"(model\.)?language_model\.(model\.)?", "")),
}
LLAVA_EXPORT = {
    "vision": "vision_tower.vision_model.",
    "connector": "multi_modal_projector.",
    "llm": "language_model.",
}


def split_llava_name(name: str) -> tuple[str, str] | None:
    """(part, the name in that part's table) of a tensor in a LLaVA checkpoint, or None if it belongs to no part."""
    for part, prefixes in LLAVA_PREFIXES.items():
        for prefix, replacement in prefixes:
            found = re.match(prefix, name)
            if found:
                return part, replacement + name[found.end() :]
    return None
