"""What a family of checkpoints is made of: a table of rules, read in both directions, and a reader of its config.

A rule is `file name -> path in our tree : axes`. `{i}` in the file name counts layers; where the path has it too each
layer has its own leaf, otherwise the layers are stacked on a new leading axis. Families differ from each other in
tables only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


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
    `model_types`: the `model_type`s of a Hugging Face config.json that are this family, each with its class's defaults:
        transformers leaves out of a config.json whatever equals them, so they are part of the format.
    `configure(given, folder)`: the configuration that a config.json describes, the defaults filled in.
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
