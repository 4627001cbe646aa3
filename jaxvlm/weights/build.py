"""Planned parameters to arrays, a slice of one tensor at a time: the host never holds a second copy of the result.

On a CPU a parameter is filled where it will stay. On an accelerator a large stack of layers goes there a few at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from jaxvlm.weights.plan import Leaf
from jaxvlm.weights.readers import Index, WeightsError

Dtype = Any  # a dtype, a function from a parameter's path to one, or None for the file's own

BLOCK = 4 * 2**20  # bytes of a file that a thread holds at once, where the file's layout allows it
STAGED = 128 * 2**20  # bytes on their way to an accelerator that the host holds at once, if a layer is not larger
THREADS = 8
TILE = 2**17  # numbers that are transposed at a time


def build(leaves: Sequence[Leaf], dtype: Dtype, shardings: Any = None) -> dict:
    """The tree of the leaves' paths. `shardings` is a tree of at least these paths; without it, the default device.

    Peak memory of the host above the result is a block for each thread; on an accelerator also STAGED bytes, or the
    largest slice of one tensor (of a stack, one layer's).
    """
    placed = None if shardings is None else flatten_dict(shardings, sep="/")
    here = jnp.zeros(()).sharding  # the default device
    built = {}
    # One pool for all: what a thread has allocated and freed stays with it, so new threads would take more.
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for leaf in leaves:
            kind = leaf.dtype if dtype is None else dtype_of(dtype, leaf.path)
            if placed is not None and leaf.path not in placed:
                raise WeightsError(f"No sharding was given for {leaf.path}.")
            built[leaf.path] = _array(leaf, kind, here if placed is None else placed[leaf.path], pool)
    return unflatten_dict(built, sep="/")


def dtype_of(dtype: Dtype, path: str) -> np.dtype:
    is_function = callable(dtype) and not isinstance(dtype, type)
    return jnp.dtype(dtype(path) if is_function else dtype)


def _array(leaf: Leaf, dtype: np.dtype, sharding: Sharding, pool: ThreadPoolExecutor) -> jax.Array:
    large = math.prod(leaf.shape) * dtype.itemsize > STAGED
    if large and leaf.stacked and not _on_host(sharding) and not _spreads_layers(sharding):
        return _by_layers(leaf, dtype, sharding, pool)
    return _sharded(leaf, dtype, sharding, pool)


def _on_host(sharding: Sharding) -> bool:
    return all(device.platform == "cpu" for device in sharding.device_set)


def _spreads_layers(sharding: Sharding) -> bool:
    if isinstance(sharding, NamedSharding):
        return bool(sharding.spec) and sharding.spec[0] is not None
    return not isinstance(sharding, SingleDeviceSharding)


def _by_layers(leaf: Leaf, dtype: np.dtype, sharding: Sharding, pool: ThreadPoolExecutor) -> jax.Array:
    """A stack made where it belongs and filled by groups of layers; the host holds one of them."""
    stack = jnp.zeros(leaf.shape, dtype, device=sharding)
    count = max(1, leaf.shape[0] * STAGED // stack.nbytes)
    for start in range(0, leaf.shape[0], count):
        stop = min(start + count, leaf.shape[0])

        def read(index: Index, start: int = start) -> np.ndarray:
            return leaf.read((slice(index[0].start + start, index[0].stop + start), *index[1:]))

        group = dataclasses.replace(leaf, shape=(stop - start, *leaf.shape[1:]), read=read)
        stack = _put(stack, _sharded(group, dtype, sharding, pool), jnp.int32(start)).block_until_ready()
    return stack


@partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, group: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(stack, group, start, 0)


def _sharded(leaf: Leaf, dtype: np.dtype, sharding: Sharding, pool: ThreadPoolExecutor) -> jax.Array:
    shards: dict[tuple, np.ndarray] = {}  # a shard that several devices hold is read once

    def shard(index: Index | None) -> np.ndarray:
        key = tuple(part.indices(size)[:2] for part, size in zip(index or (), leaf.shape, strict=True))
        if key not in shards:
            shards[key] = _filled(leaf, tuple(slice(*bounds) for bounds in key), dtype, pool)
        return shards[key]

    return jax.make_array_from_callback(leaf.shape, sharding, shard)


# ---------------------------------------------------------------------------------------------------------- on the host


def _filled(leaf: Leaf, index: Index, dtype: np.dtype, pool: ThreadPoolExecutor) -> np.ndarray:
    """A part of a parameter, read block by block into memory that jax takes over without a copy on a CPU."""
    whole = _empty([part.stop - part.start for part in index], dtype)

    def fill(block: Index) -> None:
        place = tuple(slice(b.start - part.start, b.stop - part.start) for b, part in zip(block, index, strict=True))
        out, value = whole[place], leaf.read(block)
        _copy(out[0], value[0]) if leaf.stacked else _copy(out, value)

    blocks = list(_blocks(leaf, index))
    if len(blocks) == 1:
        fill(blocks[0])
    else:
        list(pool.map(fill, blocks))  # reading and copying release the lock
    return whole


def _blocks(leaf: Leaf, index: Index) -> Iterator[Index]:
    """The index in pieces that are quick to read, and of BLOCK bytes or less where the file's layout allows it."""
    layers = range(index[0].start, index[0].stop) if leaf.stacked else (None,)
    for layer in layers:
        one = list(index) if layer is None else [slice(layer, layer + 1), *index[1:]]
        if leaf.rows is None:
            yield tuple(one)
            continue
        rows = one[leaf.rows]
        size = math.prod(part.stop - part.start for part in one) * leaf.dtype.itemsize
        step = max(1, (rows.stop - rows.start) * BLOCK // max(size, 1))
        for start in range(rows.start, rows.stop, step):
            one[leaf.rows] = slice(start, min(start + step, rows.stop))
            yield tuple(one)


def _empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Memory that begins at a page, as jax wants it to take it over without a copy.

    For the size of the pages the system's own choice. numpy asks for huge ones, and in a virtual machine whose host takes
    unused memory back new huge pages cost five times the time of small ones.
    """
    memory = mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize), access=mmap.ACCESS_COPY)  # anonymous and private
    return np.ndarray(shape, dtype, memory)


def _copy(out: np.ndarray, value: np.ndarray) -> None:
    """`out[...] = value`; what that transposes goes in tiles that stay in the cache, three to five times as fast."""
    if out.dtype == value.dtype:  # as plain integers: numpy holds its lock for types that are not its own
        out, value = _bits(out), _bits(value)
    if value.ndim < 2 or value.strides[-1] == value.itemsize:
        _convert(out, value)
        return
    order = sorted(range(value.ndim), key=lambda axis: -value.strides[axis])  # our axes as they lie in the file
    back = np.argsort(order)
    for tile in _tiles(value.shape, order[-1]):
        part = _bits(value[tile]).transpose(order)
        # A line longer than the tile: lines that are a power of two apart would share few places in the cache.
        lines = np.empty((*part.shape[:-1], part.shape[-1] + 2), part.dtype)[..., :-2]
        lines[...] = part
        turned = lines.transpose(back)
        if out.dtype == turned.dtype:
            out[tile] = turned
        else:
            _convert(out[tile], np.ascontiguousarray(turned).view(value.dtype))


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.itemsize}")


def _tiles(shape: Sequence[int], innermost: int) -> Iterator[Index]:
    """A value's parts of TILE numbers or less, long in the last axis and in the one that is innermost in the file."""
    left, steps = TILE, [1] * len(shape)
    for axis in dict.fromkeys((len(shape) - 1, innermost, *range(len(shape)))):
        steps[axis] = max(1, min(shape[axis], left, 512))
        left //= steps[axis]
    starts = [range(0, size, step) for size, step in zip(shape, steps, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(slice(start, start + step) for start, step in zip(corner, steps, strict=True))


def _convert(out: np.ndarray, value: np.ndarray) -> None:
    """`out[...] = value`, and finite float16 to float32 by its bits: numpy converts it number by number."""
    if (value.dtype, out.dtype) != (np.float16, np.float32) or (_bits(value) << 1).max(initial=0) >= 0xF800:
        out[...] = value
        return
    bits = out.view(np.int32)
    bits[...] = value.view(np.int16)
    bits <<= 13  # the fraction has 23 bits where it had 10
    bits &= -0x70002000  # of the copies of the sign the first
    out *= np.float32(2**112)  # the exponent counts from -127 where it counted from -15
