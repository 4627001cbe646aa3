"""Planned parameters to arrays, without ever holding more on the host than the result and a slice of one tensor."""

from __future__ import annotations

import math
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
            built[leaf.path] = jax.device_put(_filled(leaf, tuple(slice(0, n) for n in leaf.shape), kind))
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
            shards[key] = _filled(leaf, tuple(slice(*bounds) for bounds in key), dtype)
        return shards[key]

    return jax.make_array_from_callback(leaf.shape, sharding, shard)


def _filled(leaf: Leaf, index: Index, dtype: np.dtype) -> np.ndarray:
    """A part of a parameter in memory that jax takes over without a copy on a CPU; a stack is read layer by layer."""
    if not leaf.stacked:
        part = leaf.read(index)
        whole = _aligned(part.shape, dtype)
        _copy(part, whole)
        return whole
    first, *rest = index
    whole = _aligned(tuple(part.stop - part.start for part in index), dtype)
    for layer in range(first.start, first.stop):
        _copy(leaf.read((slice(layer, layer + 1), *rest))[0], whole[layer - first.start])
    return whole


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """target[...] = source, five times as fast where that is a transposition (2048 x 5632 in float16): in strips of the
    last axis, whose cells share cache lines in the source.
    """
    if source.ndim < 2 or source.strides[-1] == source.itemsize:
        target[...] = source
        return
    for start in range(0, source.shape[-1], 16):
        target[..., start : start + 16] = source[..., start : start + 16]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts on a multiple of 64 bytes, as XLA's own buffers do."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 63, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
