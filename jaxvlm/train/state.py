"""The training state, and the split of a parameter tree into what moves and what does not."""

from __future__ import annotations

import difflib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxvlm.config import ConfigError


class TrainState(NamedTuple):
    """Everything a step reads and writes. `trainable` and `frozen` are disjoint parts of one parameter tree."""

    step: jax.Array  # int32 scalar: optimiser steps taken in this stage
    trainable: dict
    frozen: dict
    opt_state: Any


def flat(params: dict) -> dict[str, Any]:
    """The tree as {'llm/layers/attn/q/kernel': leaf}."""
    return flatten_dict(params, sep="/")


def split(params: dict, patterns: tuple[str, ...]) -> tuple[dict, dict]:
    """Splits a parameter tree into (trainable, frozen) by regular expressions matched from the start of the path.

    Frozen leaves leave the differentiated tree altogether: no gradient, no optimiser moments, no all-reduce.
    Raises `ConfigError` for a pattern that matches nothing, naming the nearest path.
    """
    leaves = flat(params)
    for pattern in patterns:
        if not any(re.match(pattern, path) for path in leaves):
            prefixes = sorted({"/".join(path.split("/")[:n]) for path in leaves for n in (1, 2, 3, 4)})
            near = difflib.get_close_matches(pattern.rstrip("/.*$"), prefixes, n=1, cutoff=0.3)
            hint = f" Did you mean '{near[0]}/.*'?" if near else ""
            raise ConfigError(f"Trainable pattern '{pattern}' matches no parameter.{hint}")
    moves = {path: any(re.match(pattern, path) for pattern in patterns) for path in leaves}
    trainable = {path: leaf for path, leaf in leaves.items() if moves[path]}
    frozen = {path: leaf for path, leaf in leaves.items() if not moves[path]}
    return unflatten_dict(trainable, sep="/"), unflatten_dict(frozen, sep="/")


def merge(trainable: dict, frozen: dict) -> dict:
    """The whole parameter tree again."""
    return unflatten_dict({**flat(frozen), **flat(trainable)}, sep="/")


def cast(tree: dict, dtype: Any) -> dict:
    """Floating leaves in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def count(tree: Any) -> int:
    """Number of scalars in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of a tree of arrays or ShapeDtypeStructs."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def describe(params: dict) -> list[str]:
    """Parameter counts by top-level part, for the run's opening lines."""
    parts: dict[str, int] = {}
    for path, leaf in flat(params).items():
        parts[path.split("/")[0]] = parts.get(path.split("/")[0], 0) + leaf.size
    return [f"{name} {size / 1e6:.1f} M" for name, size in parts.items()]
