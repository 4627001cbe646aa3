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
class VisionConfig:
    """A vision tower: pixels `[*, image_size, image_size, 3]` to features `[*, num_tokens, width]`.

    One ViT serves CLIP, SigLIP and DINOv2 by these values alone (recipes §1.1 A1, §3.5).
    `feature_layer` indexes Hugging Face's `hidden_states`: -1 is the output of the last layer, -2 of the one before.
    """

    kind: str = "vit"  # vit | efficientnet_lite
    image_size: int = 336
    patch_size: int = 14  # the stride of the feature grid; 32 for efficientnet_lite
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    activation: str = "quick_gelu"  # quick_gelu | gelu_tanh | gelu_erf
    norm_eps: float = 1e-5
    class_token: bool = True
    num_registers: int = 0
    patch_bias: bool = False
    pre_norm: bool = True  # CLIP's norm before the first layer
    layer_scale: bool = False  # DINOv2's learned residual scales
    feature_layer: int = -2
    feature_norm: bool = False  # apply the tower's final norm to the selected features
    feature_tokens: str = "patch"  # patch | cls_patch
    pool: int = 1  # average the grid over pool x pool cells before the connector
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def grid(self) -> int:
        """Cells on one side of the feature grid, after pooling."""
        return self.image_size // self.patch_size // self.pool

    @property
    def num_tokens(self) -> int:
        """Visual tokens of one tile."""
        return self.grid**2 + (self.feature_tokens == "cls_patch")


@dataclass(frozen=True)
class ConnectorConfig:
    """Vision features to the language model's width: `linear`, or LLaVA's `mlp{N}x_gelu` (recipes §1.1 A2)."""

    kind: str = "mlp2x_gelu"
    activation: str = "gelu_erf"
    input_norm: bool = False  # a LayerNorm on the features first (towers whose features have uneven scales)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on the language model's projections (Hu et al. 2021); `rank` 0 means none."""

    rank: int = 0
    alpha: float = 256.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class LLMConfig:
    """A Llama-shaped decoder: Llama, Vicuna, Mistral, Qwen2 and SmolLM2 differ in these values only."""

    vocab_size: int = 32000
    width: int = 4096
    depth: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    mlp_dim: int = 11008
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    tie_embeddings: bool = False
    sliding_window: int | None = None
    max_positions: int = 4096
    lora: LoRAConfig = field(default_factory=LoRAConfig)


@dataclass(frozen=True)
class ModelConfig:
    """A vision-language model."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    dtype: str = "bfloat16"  # compute dtype; trainable parameters are float32 masters
    remat: str = "full"  # none | dots | full: what the backward pass recomputes, in both towers


@dataclass(frozen=True)
class PromptConfig:
    """How a conversation and its images become tokens. Saved with every model; training and inference share it."""

    tokenizer: str = ""  # folder with a tokenizer.json
    template: str = "vicuna_v1"
    transform: str = "letterbox"  # naive | crop | letterbox
    layout: str = "llava"  # llava | prismatic | hf
    length: int = 2048  # tokens in a row, visual tokens included
    truncation: str = "after_splice"  # after_splice | before_splice | drop | error


# ------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class SourceConfig:
    """One LLaVA JSON or JSONL file; `fraction` takes a seeded random part of it (1.0 = all, 2.0 = twice)."""

    name: str = ""
    path: str = ""
    images: str = ""  # folder that the records' image paths are relative to
    fraction: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """What a stage reads and how its rows are made."""

    sources: tuple[SourceConfig, ...] = ()
    template: str | None = None  # overrides the run's prompt (LLaVA's stage 1 uses `plain`)
    transform: str | None = None
    length: int | None = None
    packing: bool = False
    images_per_row: int = 1
    bad_records: str = "error"  # error | skip (counted and written to a file)
    virtual_shards: int = 16
    num_threads: int = 2
    num_workers: int = 0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a warmed-up schedule, as in the LLaVA scripts (recipes §1.3 D2-D3)."""

    name: str = "adamw"
    learning_rate: float = 2e-5
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None
    schedule: str = "cosine"  # cosine | linear | constant
    warmup_ratio: float = 0.03
    warmup_rounding: str = "ceil"  # ceil (LLaVA, HF) | floor (Prismatic)
    learning_rate_scales: tuple[tuple[str, float], ...] = ()  # (parameter pattern, factor); the first match wins


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


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 takes what is left. `data` runs over the slower network between slices."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1


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
    keep: int = 2


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation after training: a VQA file of question records (see `jaxvlm.evals.tasks`)."""

    task: str = ""  # '' = no evaluation
    path: str = ""
    images: str = ""
    limits: tuple[tuple[str, int], ...] = ()  # (question type, how many, drawn with the run's seed); () = all
    blind: str = "noimage"  # '' = sighted only | noimage | shuffle
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
    log_every_steps: int = 1


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


def complete(values: dict, cls: type = RunConfig) -> Any:
    """A config file's values with every default filled in, as the `ConfigDict` that command-line overrides need.

    Raises `ConfigError` as `build` does, so a misspelt key in a config file is caught before any override is read.
    """
    return _config_dict(build(cls, values))


def _config_dict(config: Any) -> Any:
    from ml_collections import ConfigDict, config_dict

    hints = typing.get_type_hints(type(config))
    result = ConfigDict()
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            value = _config_dict(value)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            value = [_config_dict(part) for part in value]  # a list, so that `stages[1]` can be overridden in place
        elif value is None:
            kind = next(option for option in typing.get_args(hints[item.name]) if option is not type(None))
            value = config_dict.placeholder(kind)
        result[item.name] = value
    return result


def parse_arg(arg: str | None, **defaults: Any) -> Any:
    """Reads a config file's argument: `'llm=13b,lora'` with `llm=('7b', '13b'), lora=False` gives `.llm`, `.lora`.

    A tuple lists the choices, the default first. Raises `ConfigError` for a name that has no default, a value that is no
    choice, or one that its default's type cannot read.
    """
    choices = {key: value for key, value in defaults.items() if isinstance(value, tuple)}
    defaults |= {key: value[0] for key, value in choices.items()}
    result = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        key, given, text = part.partition("=")
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.5)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"The config takes no argument '{key}'.{hint} It takes: {', '.join(defaults)}.")
        kind = type(defaults[key])
        if kind is bool:
            result[key] = text.lower() not in ("0", "false", "no") if given else True
        elif not given:
            raise ConfigError(f"The config's argument '{key}' needs a value, as in '{key}={defaults[key]}'.")
        else:
            try:
                result[key] = kind(text)
            except ValueError:
                raise ConfigError(f"The config's argument '{key}' must be {kind.__name__}, not '{text}'.") from None
        if key in choices and result[key] not in choices[key]:
            raise ConfigError(f"The config's argument '{key}' must be one of {', '.join(choices[key])}, not '{text}'.")
    return types.SimpleNamespace(**result)


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
