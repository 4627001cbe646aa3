"""The typed configuration of a run: frozen dataclasses, and the reader that builds them from an ml_collections file.

Every other room may import this module; it imports none of them. A config file returns a plain `ConfigDict`; `build`
turns it into a `RunConfig` and rejects unknown keys by naming the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from typing import Any


class UserError(ValueError):
    """A failure its user can mend. The message names what is wrong and the fix; the command line shows it alone."""


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the key and the fix."""


# ---------------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on the projections of a decoder or a ViT (Hu et al. 2021); `rank` 0 means none."""

    rank: int = 0
    alpha: float = 256.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    dropout: float = 0.0  # of an adapter's input, in training


@dataclass(frozen=True)
class VisionConfig:
    """A vision tower: pixels `[*, image_size, image_size, 3]` to features `[*, num_tokens, feature_width]`.

    One ViT serves CLIP, SigLIP, DINOv2, EVA-CLIP and supervised ViTs by these values alone (recipes §1.1 A1, §3.5).
    `feature_layers` index Hugging Face's `hidden_states`: -1 is the output of the last layer, -2 of the one before;
    several are concatenated by channel. `kind = 'fused'` is several `towers` side by side, whose grids must match
    unless the connector takes each by itself (SVA); of the other fields it reads none.
    """

    kind: str = "vit"  # vit | convnext | efficientnet_lite | fused
    image_size: int = 336
    patch_size: int = 14  # the stride of the feature grid; 32 for the convolutional towers
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    mlp: str = "plain"  # plain | swiglu (DINOv2 giant)
    activation: str = "quick_gelu"  # quick_gelu | gelu_tanh | gelu_erf
    norm_eps: float = 1e-5
    class_token: bool = True
    num_registers: int = 0
    patch_bias: bool = False
    pre_norm: bool = True  # CLIP's norm before the first layer
    layer_scale: bool = False  # DINOv2's learned residual scales
    stage_depths: tuple[int, ...] = ()  # convnext: blocks of each stage
    stage_widths: tuple[int, ...] = ()
    feature_layers: tuple[int, ...] = (-2,)  # of a convnext: its stages, resized to one grid
    feature_norm: bool = False  # apply the tower's final norm to the selected features
    feature_tokens: str = "patch"  # patch | cls_patch
    pool: int = 1  # average the grid over pool x pool cells before the connector
    resized_grid: int = 0  # bilinear resizing of the grid to n x n cells (Cambrian's `-interp`); 0 leaves it
    scales: tuple[int, ...] = (1,)  # S2: also see the image at these multiples of image_size, in image_size tiles
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    fill: tuple[float, ...] = ()  # the colour of a letterbox's bars; () is the mean
    lora: LoRAConfig = field(default_factory=LoRAConfig)  # of a vit; where towers are fused, each has its own
    towers: tuple[VisionConfig, ...] = ()

    @property
    def parts(self) -> tuple[VisionConfig, ...]:
        """The towers that look at the image: this one, or those of a fused one."""
        return self.towers if self.kind == "fused" else (self,)

    @property
    def input_size(self) -> int:
        """Pixels on one side of what the host prepares for this tower (S2 takes its largest scale)."""
        return self.image_size * max(self.scales)

    @property
    def grid(self) -> int:
        """Cells on one side of the feature grid, after pooling and resizing."""
        if self.kind == "fused":
            return self.towers[0].grid
        return self.resized_grid or self.image_size // self.patch_size // self.pool

    @property
    def num_tokens(self) -> int:
        """Visual tokens of one tile, before the connector."""
        if self.kind == "fused":
            return self.towers[0].num_tokens
        return self.grid**2 + (self.feature_tokens == "cls_patch")

    @property
    def feature_width(self) -> int:
        """Channels of the features: all towers, scales and selected layers concatenated."""
        if self.kind == "fused":
            return sum(tower.feature_width for tower in self.towers)
        if self.kind == "convnext":
            layers = sum(self.stage_widths[layer] for layer in self.feature_layers)
        else:
            layers = self.width * len(self.feature_layers)
        return layers * len(self.scales)


@dataclass(frozen=True)
class QFormerConfig:
    """BLIP-2's querying transformer (Li et al. 2023), a BERT whose queries cross-attend to the image."""

    num_queries: int = 32
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    cross_every: int = 2  # layers 0, n, 2n, ... have cross-attention
    norm_eps: float = 1e-12
    text_vocab_size: int = 0  # InstructBLIP: the queries attend to the instruction's tokens too; 0 = BLIP-2
    text_positions: int = 512


@dataclass(frozen=True)
class ResamplerConfig:
    """Qwen-VL's single cross-attention with fixed 2-D sine-cosine positions."""

    num_queries: int = 256
    num_heads: int = 32


@dataclass(frozen=True)
class SVAConfig:
    """Cambrian's Spatial Vision Aggregator (Tong et al. 2024, §3; recipes §1.1 A7)."""

    width: int = 1024
    num_heads: int = 16
    depth: int = 3
    groups: int = 1
    grid: int = 24  # queries on one side
    llm_layers: tuple[int, ...] = ()  # decoder layers after which an aggregator adds to the visual tokens


@dataclass(frozen=True)
class ConnectorConfig:
    """Vision features to the language model's width (recipes §1.1 A2).

    Kinds: `linear`; LLaVA's `mlp{N}x_gelu`; Prismatic's `fused_mlp`; `pixel_shuffle` (cells folded into channels, then
    one linear layer); `qformer`; `resampler`; `sva`.
    """

    kind: str = "mlp2x_gelu"
    activation: str = "gelu_erf"
    input_norm: bool = False  # a LayerNorm on the features first (towers whose features have uneven scales)
    bias: bool = True
    row_end: bool = False  # a learned token, `image_newline`, where the layout ends a row of the grid
    shuffle: int = 2  # pixel_shuffle: n x n cells become one
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    sva: SVAConfig = field(default_factory=SVAConfig)

    @property
    def reads_text(self) -> bool:  # the instruction, beside the image
        return self.kind == "qformer" and self.qformer.text_vocab_size > 0


@dataclass(frozen=True)
class RopeScalingConfig:
    """Rotary positions stretched beyond the pre-training length, as Hugging Face names and computes the kinds."""

    kind: str = "default"  # default | linear | llama3 | yarn | longrope
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192  # llama3, yarn, longrope
    short_factor: tuple[float, ...] = ()  # longrope: a factor for each pair of dimensions
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0  # yarn, longrope: multiplies cos and sin
    beta_fast: float = 32.0  # yarn: what turns more often than this over the original length stays,
    beta_slow: float = 1.0  # and what turns less often is stretched by the whole factor


@dataclass(frozen=True)
class LLMConfig:
    """A decoder: Llama, Vicuna, Mistral, Qwen2 and 3, Phi-2 and 3, Gemma 2 and 3, OPT, SmolLM2 differ in these values only."""

    vocab_size: int = 32000
    width: int = 4096
    depth: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    mlp_dim: int = 11008
    norm: str = "rms"  # rms | rms_plus_one (Gemma: the scale is 1 + the parameter) | layer (with a bias)
    norm_eps: float = 1e-5
    post_norms: bool = False  # Gemma: also after attention and after the MLP, before the residual
    qk_norm: bool = False  # the same norm over each head of q and k (Qwen3, Gemma 3)
    parallel: bool = False  # Phi-2: attention and MLP read one norm's output and are added together
    activation: str = "silu"  # silu | gelu_tanh | gelu_erf | relu
    gated: bool = True  # act(gate) * up (SwiGLU and kin), or act(up) alone
    qkv_bias: bool = False
    out_bias: bool = False  # on attention's output projection
    mlp_bias: bool = False
    head_bias: bool = False
    tie_embeddings: bool = False
    embed_scale: float = 1.0  # multiplies the embeddings of tokens (Gemma: sqrt(width))
    learned_positions: bool = False  # OPT: a table of max_positions rows in place of rotary angles
    rope_theta: float = 10000.0
    rope_local_theta: float | None = None  # Gemma 3: of the layers with a sliding window
    rope_fraction: float = 1.0  # Phi-2 turns only the first dimensions of each head
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    attn_scale: float | None = None  # of the scores; None is head_dim ** -0.5
    attn_softcap: float | None = None  # Gemma 2: cap * tanh(scores / cap)
    logit_softcap: float | None = None
    sliding_window: int | None = None
    full_layers: tuple[int, ...] = ()  # layers that see everything although there is a sliding window
    max_positions: int = 4096
    lora: LoRAConfig = field(default_factory=LoRAConfig)


@dataclass(frozen=True)
class ModelConfig:
    """A vision-language model."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    dtype: str = "bfloat16"  # compute dtype; trainable parameters are float32 masters
    remat: str = "full"  # none | dots | offload | attention | full: what is recomputed for gradients, in both towers
    attention: str = ""  # the implementation to take where it serves, such as `pallas_hopper`; '' chooses
    # Steps of training and of decoding take layers one by one and not in a loop: faster, longer to compile; None: on one GPU
    unroll: bool | None = None

    @property
    def lora(self) -> tuple[LoRAConfig, ...]:
        """The adapters of the decoder and of every tower."""
        return (self.llm.lora, *(tower.lora for tower in self.vision.parts))

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of one tile in the language model's sequence, row ends apart (P)."""
        connector = self.connector
        if connector.kind == "pixel_shuffle":
            return (self.vision.grid // connector.shuffle) ** 2
        if connector.kind == "sva":
            return connector.sva.grid**2
        if connector.kind in ("qformer", "resampler"):
            return getattr(connector, connector.kind).num_queries
        return self.vision.num_tokens


@dataclass(frozen=True)
class PromptConfig:
    """How a conversation and its images become tokens. Saved with every model; training and inference share it."""

    tokenizer: str = ""  # folder with a tokenizer.json
    template: str = "vicuna_v1"  # a name of `jaxvlm.templates`, or `tokenizer`: the tokenizer's own chat template
    transform: str = "letterbox"  # naive | crop | letterbox[_unpad], or tiled: anyres[_max_9] | hd[224] (docs/data.md)
    grids: tuple[tuple[int, int], ...] = ()  # where tiled: the (rows, columns) of tiles to choose from; () is its own
    max_tiles: int = 0  # `anyres_max_N`: a grid of more than N tiles' tokens is scaled down to that; 0 is no limit
    tile_several: bool = True  # False (OneVision): of several images in a conversation each is one letterboxed tile
    layout: str = "llava"  # llava | prismatic | hf | images_first
    length: int = 2048  # tokens in a row, visual tokens included
    truncation: str = "after_splice"  # after_splice | before_splice | drop | error
    qformer_tokenizer: str = ""  # folder of the tokenizer of a Q-Former that reads the instruction
    qformer_length: int = 128  # tokens of an instruction, which is cut to that (LAVIS's max_txt_len)


# ------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class SourceConfig:
    """A data set, and which of its records are used how often (see `jaxvlm.data.mixture`)."""

    name: str = ""
    path: str = ""  # of any kind that `jaxvlm.data.sources.open_source` lists; {a,b}.json or *.json are several as one
    images: str = ""  # folder that the records' image paths are relative to
    fraction: float = 1.0  # a seeded random part of the records (1.0 = all, 2.0 = each twice)
    held_out: int = 0  # so many of the records are never trained on; a stage's `watch` takes the loss on them
    weight: float | None = None  # share of an epoch's samples, relative to the others'; None: as many as there are
    mix: str = ""  # llava_v1_5_mix665k: tell the sources inside this file apart
    keep: tuple[str, ...] = ()  # the sources inside the mix to use; () is all
    text_only: bool = True  # use records without an image too
    format_prompts: bool = True  # False: without the sentences that ask for a form of answer
    boxes: str = ""  # frame of `[x1, y1, x2, y2]` in texts: original | square | mix (each source's own); '' leaves them


@dataclass(frozen=True)
class DataConfig:
    """What a stage reads and how its rows are made."""

    sources: tuple[SourceConfig, ...] = ()
    template: str | None = None  # overrides the run's prompt (LLaVA's stage 1 uses `plain`)
    transform: str | None = None
    length: int | None = None
    packing: bool = False
    tiles_per_row: int = 0  # room for image tiles in a row (untiled, an image is one); 0: as much as the data needs
    bad_records: str = "error"  # error | skip (counted, written to a file) | quarantine (what it lists, else error)
    quarantine: str = ""  # JSONL of records to leave out, as `jaxvlm data verify` writes it
    max_bad_share: float = 0.05  # of a source's records that may be lost; more of them stop the run
    num_threads: int = 2
    num_workers: int = 0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a warmed-up schedule, as in the LLaVA scripts (recipes §1.3 D2-D3), unless it says otherwise.

    Groups are (parameter pattern, factor); the first pattern that matches wins, and what none matches has factor 1.
    """

    name: str = "adamw"  # adamw | adafactor | lion | sgd (see docs/training.md)
    learning_rate: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)  # the first is sgd's momentum; sgd and Adafactor have none where it is 0
    eps: float = 1e-8  # AdamW's
    moment_dtype: str = "float32"  # of the first moment: float32 | bfloat16
    weight_decay: float = 0.0  # decoupled, in every optimiser; never of biases and norms
    weight_decay_scales: tuple[tuple[str, float], ...] = ()
    clip_norm: float | None = None
    schedule: str = "cosine"  # cosine | linear | constant
    warmup_ratio: float = 0.03
    warmup_rounding: str = "ceil"  # ceil (LLaVA, HF) | floor (Prismatic)
    learning_rate_scales: tuple[tuple[str, float], ...] = ()
    ema_decay: float = 0.0  # > 0: the stage's result is this moving average of its parameters
    offload: bool = False  # keep moments and average in the host's memory between steps


@dataclass(frozen=True)
class WatchConfig:
    """Evaluation while a stage trains: the loss on what its sources hold out, and some of `eval`'s questions asked."""

    every_steps: int = 0  # and after the stage's last step; 0 = never
    questions: tuple[tuple[str, int], ...] = ()  # (question type, how many, drawn as `eval.limits` draws); () = none


@dataclass(frozen=True)
class StageConfig:
    """One training stage: which parameters move, on what, and for how long."""

    name: str = ""
    trainable: tuple[str, ...] = ()  # regular expressions, matched from the start of 'connector/...', 'llm/...'
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_size: int = 128  # rows of a global batch
    accumulate: int = 1  # micro-batches a step
    steps: int | None = None
    epochs: float | None = None
    cache_features: bool = False  # run a frozen vision tower once per image and keep its features on disk
    watch: WatchConfig = field(default_factory=WatchConfig)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 takes what is left. `data` runs over the slower network between slices."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1  # splits rows of tokens; a row's length must be a multiple
    slices: int = 0  # 0: as the devices say; `data` must be a multiple


@dataclass(frozen=True)
class InitConfig:
    """Where the parameters come from: a path for each part, or '' for random initialisation."""

    model: str = ""  # a whole VLM: llava-hf folder or jaxvlm run
    vision: str = ""
    connector: str = ""
    llm: str = ""
    connector_start: str = "random"  # random | ridge (closed form, from stage 1's own captions)


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 500
    keep: int = 2  # the newest so many
    keep_every: int = 0  # and for good those whose step is a multiple of this; 0 = none
    watchdog_seconds: float = 1800.0  # no step done for so long: exit 75 with all stacks; 0 = wait for ever


@dataclass(frozen=True)
class LogConfig:
    """What a run tells while it trains, beside the line on the terminal (docs/training.md says what the numbers are)."""

    every_steps: int = 1  # lines of metrics.jsonl
    to: tuple[str, ...] = ()  # also to: tensorboard, wandb
    profile_steps: tuple[int, ...] = ()  # (first, last): trace these steps of every stage with jax.profiler


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation after training: a VQA file of question records (see `jaxvlm.evals.question_file`)."""

    task: str = ""  # '' = no evaluation
    path: str = ""
    images: str = ""
    limits: tuple[tuple[str, int], ...] = ()  # (question type, how many, drawn with the run's seed); () = all
    blind: str = "noimage"  # '' = sighted only | noimage | gray | shuffle
    batch_size: int = 32
    max_new_tokens: int = 16
    samples: int = 6  # shown at the end and in the report


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    name: str = "run"
    description: str = ""
    expected: str = ""  # printed before the run: how long it takes and where that was measured
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    stages: tuple[StageConfig, ...] = ()
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


# ------------------------------------------------------------------------------------------------- building from dicts


def build(cls: type, values: Any, where: str = "config") -> Any:
    """Builds the dataclass `cls` from a mapping, recursively.

    Raises `ConfigError` for an unknown key (naming the nearest valid one) or a value of the wrong type.
    """
    if not hasattr(values, "items"):
        raise ConfigError(f"{where} must be a mapping of {cls.__name__} fields, not {values!r}.")
    hints = typing.get_type_hints(cls)
    for key in values.keys():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            hint = f" Did you mean '{near[0]}'?" if near else f" Valid keys: {', '.join(sorted(hints))}."
            raise ConfigError(f"{where}.{key} is not a setting.{hint}")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
        return _convert(kind, value, where)
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where)
    if origin is tuple:
        items = typing.get_args(kind)
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ConfigError(f"{where} must be a list, not {value!r}.")
        if len(items) == 2 and items[1] is Ellipsis:
            return tuple(_convert(items[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(items) != len(value):
            raise ConfigError(f"{where} must have {len(items)} entries, not {value!r}.")
        return tuple(
            _convert(item, part, f"{where}[{i}]") for i, (item, part) in enumerate(zip(items, value, strict=True))
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {kind.__name__}, not {value!r}.")
    return value


def to_dict(config: Any) -> dict:
    """The config as plain JSON-able values; `build(type(config), to_dict(config))` gives it back."""
    return dataclasses.asdict(config)


def differences(old: dict, new: dict, where: str = "config") -> list[str]:
    """The settings that differ between two `to_dict` results, one line each."""
    lines = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{where}.{key}")
        elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
            lines += differences(dict(enumerate(a)), dict(enumerate(b)), f"{where}.{key}")
        elif a != b:
            lines.append(f"{where}.{key}: {a!r} -> {b!r}")
    return lines
