"""Planned parameters to arrays, without ever holding more on the host than the result and a slice of one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxvlm.weights.plan import Leaf
from jaxvlm.weights.readers import Index, WeightsError

Dtype = Any  # a dtype, a function from a parameter's path to one, or None for the file's own


def build(leaves: Sequence[Leaf], dtype: Dtype, shardings: Any = None) -> dict:
    """The tree of the leaves' paths. `shardings` is a tree of at least these paths; without it, the default device."""
    placed = None if shardings is None else flatten_dict(shardings, sep="/")
    built = {}
    for leaf in leaves:
        kind = leaf.dtype if dtype is None else dtype_of(dtype, leaf.path)
        if placed is None:
            built[leaf.path] = jnp.asarray(leaf.read(tuple(slice(0, n) for n in leaf.shape)).astype(kind, copy=False))
        elif leaf.path not in placed:
            raise WeightsError(f"No sharding was given for {leaf.path}.")
        else:
            built[leaf.path] = _sharded(leaf, kind, placed[leaf.path])
    return unflatten_dict(built, sep="/")


def dtype_of(dtype: Dtype, path: str) -> np.dtype:
    is_function = callable(dtype) and not isinstance(dtype, type)
    return jnp.dtype(dtype(path) if is_function else dtype)


def _sharded(leaf: Leaf, dtype: np.dtype, sharding: jax.sharding.Sharding) -> jax.Array:
    shards: dict[tuple, np.ndarray] = {}  # a shard that several devices hold is read once

    def shard(index: Index) -> np.ndarray:
        key = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        if key not in shards:
            shards[key] = leaf.read(tuple(slice(*bounds) for bounds in key)).astype(dtype, copy=False)
        return shards[key]

    return jax.make_array_from_callback(leaf.shape, sharding, shard)
