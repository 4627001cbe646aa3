"""LoRA adapters in PEFT's form: `adapter_config.json` beside `adapter_model.safetensors` (or `.bin`).

LLaVA's own LoRA folders hold the projector as well, in `non_lora_trainables.bin`. Adapters are either parameters of
their own beside the kernels they adapt, or merged into the base's tensors as these are read.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxvlm.config import LLMConfig, LoRAConfig, ModelConfig
from jaxvlm.weights import axes as layout
from jaxvlm.weights.families import describe_decoder
from jaxvlm.weights.families.base import Family, Rule
from jaxvlm.weights.families.connectors import connector_family
from jaxvlm.weights.hf_config import checked, explained, read_json
from jaxvlm.weights.readers import Index, TensorSource, WeightsError, open_source
from jaxvlm.weights.tensors_out import part_tensors, write_shards

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
OTHERS = "non_lora_trainables.bin"
CONNECTOR_MODULE = "multi_modal_projector"
PREFIX = "base_model.model."  # before every name in a PEFT file
_HALF = re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.weight")

# Settings of PEFT that change what an adapter computes, and that this package does not have.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "rank_pattern": "a rank for each module",
    "alpha_pattern": "an alpha for each module",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained rows of the embedding",
    "fan_in_fan_out": "transposed kernels",
    "lora_bias": "biases in the adapters",
    "target_parameters": "adapters on parameters that are no module's weight",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal matrices",
    "alora_invocation_tokens": "adapters that wait for a phrase",
    "arrow_config": "several adapters at once",
}
# Starts of `init_lora_weights` that take the adapter's first value out of the base, which PEFT does again as it loads.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")  # saved beside the adapters if tokens were added


@dataclass(frozen=True)
class Adapters:
    """`modules`: {module of the base, as its tensor without '.weight': (name of A [r, in], name of B [out, r])}.

    `others`: tensors that replace the base's: PEFT's `modules_to_save`, biases and embeddings, LLaVA's projector.
    """

    folder: Path
    source: TensorSource
    rank: int
    alpha: float  # such that the update is B A alpha / rank
    modules: dict[str, tuple[str, str]]
    others: list[TensorSource]
    base: str  # what the adapters were trained on, in the words of who trained them


def read_adapters(folder: Path) -> Adapters:
    """Raises `WeightsError` for adapters that are not plain LoRA, naming the setting or the tensors."""
    where = folder / CONFIG
    config = checked(read_json(where), where)
    if config.get("peft_type", "LORA") != "LORA":
        raise WeightsError(f"{where}: peft_type '{config['peft_type']}' is not supported; LORA is.")
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            raise WeightsError(
                f"{where}: {key} = {config[key]!r} ({what}) is not supported. Merge the adapters with PEFT first "
                "(merge_and_unload) and import the result."
            )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGE_THE_BASE):
        raise WeightsError(
            f"{where}: init_lora_weights = '{start}' changes the base's weights too, so the adapters alone do not say what "
            "the model is. Save them from PEFT with path_initial_model_for_weight_conversion, or merge them there first."
        )
    biases = config.get("bias", "none")
    if biases not in ("none", "all"):
        raise WeightsError(
            f"{where}: bias = '{biases}' is not supported: PEFT does not save the biases that it trained."
        )
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise WeightsError(f"{folder} has an {CONFIG} but none of {', '.join(FILES)}. Get the file that is missing.")
    with explained(where):
        rank = config["r"]
    source, alpha = open_source(file), config.get("lora_alpha", rank) * (rank**0.5 if config.get("use_rslora") else 1.0)
    modules, rest = _modules(source, rank)
    saved = tuple(f".{module}." for module in config.get("modules_to_save") or [])

    def whole(name: str) -> bool:
        """Whether this is a tensor of the base's, trained as it is."""
        plain = _of_base(name)
        return (
            any(module in f".{plain}" for module in saved)
            or (biases == "all" and plain.endswith(".bias"))
            or plain.endswith(_VOCABULARY)
        )

    if strange := [name for name in rest if not whole(name)]:
        listed = ", ".join(strange[:8]) + (", ..." if len(strange) > 8 else "")
        raise WeightsError(
            f"{file}: these are no pairs of LoRA matrices: {listed}. Merge the adapters with PEFT first."
        )
    others: list[TensorSource] = [Only(source, rest)] if rest else []
    others += [open_source(folder / OTHERS)] if (folder / OTHERS).is_file() else []
    return Adapters(folder, source, rank, alpha, modules, others, config.get("base_model_name_or_path") or "")


def _of_base(name: str) -> str:
    """The base's name of a tensor: without what PEFT puts before it, and into it where a module has an adapter."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def require_untied(adapters: Adapters) -> None:
    """Raises `WeightsError` for adapters that change the embedding or the head of a model that has both in one."""
    names = [f"{module}.weight" for module in adapters.modules] + [
        n for other in adapters.others for n in other.names()
    ]
    if changed := [name for name in names if _of_base(name).endswith(_VOCABULARY)]:
        raise WeightsError(
            f"{adapters.folder} changes {', '.join(changed)}, and the base's head is its embedding "
            "(tie_word_embeddings), so the result would be another model. Merge the adapters with PEFT first and untie it."
        )


def _modules(source: TensorSource, rank: int) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """({module: its pair}, the names of no pair)."""
    halves: dict[str, dict[str, str]] = {}
    rest = []
    for name in source.names():
        found = _HALF.fullmatch(name.removeprefix(PREFIX))
        if found is None:
            rest.append(name)
            continue
        halves.setdefault(found[1], {})[found[2]] = name
        shape = source.shape(name)
        if len(shape) != 2 or shape[0 if found[2] == "A" else 1] != rank:
            raise WeightsError(
                f"{source.path}: '{name}' is {list(shape)}, which is no half of an adapter of rank {rank}."
            )
    rest += [name for pair in halves.values() if len(pair) == 1 for name in pair.values()]
    return {module: (pair["A"], pair["B"]) for module, pair in halves.items() if len(pair) == 2}, rest


# ------------------------------------------------------------------------------------------------- as their own leaves


def lora_config(adapters: Adapters, family: Family, config: LLMConfig, keys: set[str]) -> LoRAConfig:
    """The adapters as the decoder's own; `keys` are their modules as the family's table names them.

    Raises `WeightsError` for modules that are no projection of the decoder's layers.
    """
    known = {}
    for rule in _kernels(family, config):
        known.setdefault(_module(rule), []).append(rule.path.split("/")[-2])
    targets: set[str] = set()
    strange = []
    for key in keys:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{i}", key, count=1)
        targets |= set(known.get(pattern, ()))
        strange += [] if pattern in known else [key]
    if strange:
        raise WeightsError(
            f"{adapters.folder}: adapters on {', '.join(sorted(strange)[:8])} can only be merged; only those on the "
            "decoder's projections can be trained on. Use --merge (merge=True)."
        )
    order = [target for target in LoRAConfig().targets if target in targets]
    return LoRAConfig(adapters.rank, adapters.alpha, tuple(order))


def lora_family(family: Family, config: LLMConfig) -> Family:
    """The table of the adapters `config.lora`, made of the table of the kernels that they adapt.

    'OUT IN -> IN OUT' of a kernel gives A 'r IN -> IN r' and B 'OUT r -> r OUT'. A kernel that is joined with others in
    the file shares A with them and has its own rows of B.
    """
    rules: list[Rule] = []
    for rule in _kernels(family, config):
        if rule.path.split("/")[-2] not in config.lora.targets:
            continue
        out, inner = ("(" + " ".join(group) + ")" for group in layout.parse(rule.axes)[0])
        path, flat = rule.path.removesuffix("kernel"), (inner.strip("()"), out.strip("()"))
        low = Rule(f"{_module(rule)}.lora_A.weight", f"{path}lora_a", f"r {inner} -> {flat[0]} r")
        up = Rule(f"{_module(rule)}.lora_B.weight", f"{path}lora_b", f"{out} r -> r {flat[1]}")
        rules += [low, dataclasses.replace(up, slots=rule.slots, slot=rule.slot)]
    return dataclasses.replace(
        family,
        name="peft",
        rules=tuple(rules),
        table=None,
        unused=(),
        prefixes=("",),
        sizes=lambda c: family.sizes(c) | {"r": c.lora.rank},
        conditions=lambda c: {},
    )


def _kernels(family: Family, config: LLMConfig) -> list[Rule]:
    """The rules of what can be adapted: the projections in the decoder's layers."""
    rules = family.at(config).active(config)
    return [rule for rule in rules if rule.path.startswith("layers/") and rule.path.endswith("/kernel")]


def _module(rule: Rule) -> str:
    return rule.names[0].removesuffix(".weight")


def joined_modules(config: LLMConfig) -> list[str]:
    """The modules that hold several adapted projections in one matrix, whose adapters PEFT has no form for."""
    rules = lora_family(describe_decoder(config)[0], config).rules
    return list(dict.fromkeys(rule.names[0].split(".lora_")[0].rpartition(".")[2] for rule in rules if rule.slots))


def write_adapters(params: dict, model: ModelConfig, out: Path, base: str = "", dtype: Any = None) -> None:
    """A folder that PEFT loads onto the llava-hf form of the model, as transformers has it in memory since 4.52.

    The connector, which is trained too as a rule, is written whole (`modules_to_save`). `base` is the path or hub id of
    the model without adapters.
    """
    config = model.llm
    table = lora_family(describe_decoder(config)[0], config)
    flat = {path: leaf for path, leaf in flatten_dict(params["llm"], sep="/").items() if "/lora_" in path}
    tensors = [
        dataclasses.replace(tensor, name=f"{PREFIX}model.language_model.{tensor.name}")
        for tensor in part_tensors(flat, table, config)
    ]
    modules = dict.fromkeys(tensor.name.split(".lora_")[0].split(".")[-1] for tensor in tensors)
    connector = flatten_dict(params["connector"], sep="/")
    for tensor in part_tensors(connector, connector_family(model), model):
        tensors.append(dataclasses.replace(tensor, name=f"{PREFIX}model.{CONNECTOR_MODULE}.{tensor.name}"))
    tensors = tensors if dtype is None else [tensor.cast(jnp.dtype(dtype)) for tensor in tensors]
    write_shards(tensors, out, sys.maxsize, "adapter_model")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        # The tower has modules of the same names, so the decoder's are told by what they stand in.
        "target_modules": rf".*language_model\..*\.({'|'.join(modules)})",
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": [CONNECTOR_MODULE],
    }
    (out / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


# -------------------------------------------------------------------------------------------------------------- merged


def merged(base: TensorSource, adapters: Adapters, key: Callable[[str], Any]) -> Merged:
    """`key` of a tensor's name tells which tensor it is, however it is spelt. Raises `WeightsError`."""
    names = {key(name): name for name in base.names()}
    if lost := [module for module in adapters.modules if key(f"{module}.weight") not in names]:
        raise WeightsError(f"{adapters.folder}: {base.path} has no {', '.join(lost[:8])}, which the adapters are for.")
    return Merged(base, adapters, {names[key(f"{module}.weight")]: pair for module, pair in adapters.modules.items()})


class Merged:
    """A checkpoint with the adapters in it: every read of an adapted tensor adds its part of B A alpha / rank."""

    def __init__(self, base: TensorSource, adapters: Adapters, modules: dict[str, tuple[str, str]]):
        """`modules`: {name of the base's tensor: names of A and B}. Raises `WeightsError` where shapes disagree."""
        self.path, self._base, self._adapters, self._modules = base.path, base, adapters, modules
        for name, (low, up) in modules.items():
            needed = (adapters.source.shape(up)[0], adapters.source.shape(low)[1])
            if base.shape(name) != needed:
                raise WeightsError(
                    f"{adapters.folder} does not belong to {base.path}: '{name}' is {list(base.shape(name))}, and its "
                    f"adapter ('{up}') is for {list(needed)}."
                )

    def names(self) -> list[str]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._base.dtype(name)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """As of any source, but float32 where an adapter is added."""
        value = self._base.read(name, index)
        if name not in self._modules:
            return value
        source, whole = self._adapters.source, (slice(None), slice(None))
        rows, columns = (tuple(index) + whole)[:2]
        low, up = (source.read(half).astype(np.float32) for half in self._modules[name])
        return value.astype(np.float32) + up[rows] @ low[:, columns] * np.float32(
            self._adapters.alpha / self._adapters.rank
        )


class Overlay:
    """Several checkpoints as one; a tensor that more than one has, told by `key` of its name, is read from the first.

    What PEFT adds to a name is taken off.
    """

    def __init__(self, key: Callable[[str], Any], *sources: TensorSource):
        self.path = sources[-1].path
        self._where: dict[str, tuple[TensorSource, str]] = {}
        seen = set()
        for source in sources:
            mine = {_of_base(name): (source, name) for name in source.names()}
            self._where |= {name: place for name, place in mine.items() if key(name) not in seen}
            seen |= {key(name) for name in mine}

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        source, name = self._where[name]
        return source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        source, name = self._where[name]
        return source.dtype(name)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        source, name = self._where[name]
        return source.read(name, index)


class Only:
    """Some tensors of a checkpoint."""

    def __init__(self, source: TensorSource, names: list[str]):
        self.path, self.shape, self.dtype, self.read = source.path, source.shape, source.dtype, source.read
        self._names = names

    def names(self) -> list[str]:
        return self._names
