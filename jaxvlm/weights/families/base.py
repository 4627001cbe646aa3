"""What a family of checkpoints is made of: a table of rules, read in both directions, and a reader of its config.

A rule is `file name -> path in our tree : axes`. `{i}` in the file name counts layers; where the path has it too each
layer has its own leaf, otherwise the layers are stacked on a new leading axis. Families differ from each other in
tables only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rule:
    """File tensor(s) `keys` make parameter `path`; `axes` is read by `jaxvlm.weights.axes`.

    `when` names a condition of the family (see `Family.conditions`); without it the rule does not apply.
    `combine` makes one tensor (in the left layout of `axes`) of several; such a rule cannot be exported. `file` is the
    layout of the first of them in the file, where it is not that.
    `first` is the first layer that has it, `layers` all that have it (None: the family's).
    `slots`: the file's tensor is several joined along its first axis, each as long as a product of axis names ('H h');
    this rule takes number `slot` of them, and other rules with the same key the others (see `joined`).
    """

    keys: str | tuple[str, ...]
    path: str
    axes: str
    when: str = ""
    combine: Callable[..., np.ndarray] | None = None
    first: int = 0
    file: str = ""
    slots: tuple[str, ...] = ()
    slot: int = 0
    layers: range | None = None

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
    `model_types`: the `model_type`s of a Hugging Face config.json that are this family, each with its class's defaults:
        transformers leaves out of a config.json whatever equals them, so they are part of the format.
    `configure(given, folder)`: the configuration that a config.json describes, the defaults filled in.
    `describe(config, model_type)`: the config.json of a decoder, as far as that class can compute it (`describe_decoder`).
    `resample`: how a tower's own code brings its position embeddings to another grid (see `weights.resample`).
    `table(config)`: (rules, unused), of families whose table follows from the configuration.
    """

    name: str
    part: str  # vision | connector | llm
    rules: tuple[Rule, ...]
    unused: tuple[tuple[str, str], ...]
    sizes: Callable[..., dict[str, int]]
    conditions: Callable[..., dict[str, bool]]
    layers: Callable[..., range]  # the layers to read
    prefixes: tuple[str, ...] = ("",)
    model_types: dict[str, dict[str, Any]] = field(default_factory=dict)
    configure: Callable[..., Any] | None = None
    describe: Callable[..., dict[str, Any]] | None = None
    resample: str = "bicubic"
    table: Callable[..., tuple[tuple[Rule, ...], tuple[tuple[str, str], ...]]] | None = None

    def canonical(self, name: str) -> str:
        """`name` without a known prefix."""
        for prefix in self.prefixes:
            found = re.match(prefix, name) if prefix else None
            if found:
                return name[found.end() :]
        return name

    def at(self, config) -> Family:
        """The family with the table that this configuration asks for."""
        if self.table is None:
            return self
        rules, unused = self.table(config)
        return replace(self, rules=rules, unused=unused)

    def active(self, config) -> list[Rule]:
        conditions = self.conditions(config)
        return [rule for rule in self.rules if not rule.when or conditions[rule.when]]


@dataclass(frozen=True)
class Format:
    """One way of keeping a whole model in one checkpoint: its parts behind prefixes, described by one config.json.

    Where a part's parameters stand in our tree is called its place: 'vision', 'vision/towers_0', 'connector', 'llm'.

    `recognise(given)`: whether a config.json with these values describes a model kept this way.
    `configure(given, folder)`: the model's configuration, the format's own defaults filled in.
    `families(given, folder)`: the tables of the towers and of the language model, by place; a connector's follows from
        the model's configuration.
    `split_name(name)`: (place, the name as the place's family knows it), or None for a tensor of no part.
    `prompt(given, folder)`: what the checkpoint says of `PromptConfig`; the rest keeps its defaults.
    `tower_key`: the entry of config.json that names the vision tower, where it is kept elsewhere.
    `outside(given)`: {part: its name} of the parts ('vision', 'llm') that such a checkpoint may leave out.
    """

    name: str
    recognise: Callable[[dict], bool]
    configure: Callable[[dict, Path], Any]
    families: Callable[[dict, Path], dict[str, Family]]
    split_name: Callable[[str], tuple[str, str] | None]
    prompt: Callable[[dict, Path], dict[str, Any]] = lambda given, folder: {}
    tower_key: str = ""
    outside: Callable[[dict], dict[str, str]] = lambda given: {}


def norm(key: str, path: str, when: str = "") -> tuple[Rule, Rule]:
    return Rule(f"{key}.weight", f"{path}/scale", "D -> D", when), Rule(f"{key}.bias", f"{path}/bias", "D -> D", when)


def dense(key: str, path: str, axes: str, when: str = "") -> tuple[Rule, Rule]:
    """A linear layer with a bias; `axes` describes the kernel, the bias has its output axes."""
    out = re.match(r"\([^)]*\)|\S+", axes).group()
    bias = f"{out} -> {out.strip('()')}"
    return Rule(f"{key}.weight", f"{path}/kernel", axes, when), Rule(f"{key}.bias", f"{path}/bias", bias, when)


def joined(key: str, parts: dict[str, str], when: str = "", bias: bool = True) -> tuple[Rule, ...]:
    """Linear layers that the file holds as one, their outputs in a row: {path: the kernel's axes}, as in `dense`."""
    rules = [dense(key, path, axes, when)[: 1 + bias] for path, axes in parts.items()]
    slots = tuple(re.match(r"\([^)]*\)|\S+", axes).group().strip("()") for axes in parts.values())
    return tuple(replace(rule, slots=slots, slot=slot) for slot, pair in enumerate(rules) for rule in pair)


HEADS_OUT, HEADS_IN = "(H h) D -> D H h", "D (H h) -> H h D"
