"""Which blocks a kernel has to visit: computed from the intervals at run time, a few integers for each block.

Intervals are k_start, k_end int32 [B, S], with S a multiple of the queries' block.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


class Ranges(NamedTuple):
    """Of each block the blocks of the other side that it has to visit: from `first`, `count` of them; int32 [B, blocks]."""

    first: jax.Array
    count: jax.Array


def key_ranges(k_start: jax.Array, k_end: jax.Array, block_q: int, block_k: int) -> Ranges:
    """For each block of queries."""
    start, end = _hulls(k_start, k_end, block_q)
    first = start // block_k
    return Ranges(first, jnp.where(start < end, pl.cdiv(end, block_k) - first, 0))


def whole_key_ranges(k_start: jax.Array, k_end: jax.Array, block_q: int, block_k: int) -> Ranges:
    """For each block of queries the blocks that all of its queries see whole, so that no mask is needed there.

    They lie within `key_ranges`; where there are none, `first` is that of `key_ranges`.
    """
    parts = (k_start.shape[0], -1, block_q)
    first = pl.cdiv(k_start.reshape(parts).max(axis=2), block_k)
    count = jnp.maximum(k_end.reshape(parts).min(axis=2) // block_k - first, 0)
    return Ranges(jnp.where(count > 0, first, key_ranges(k_start, k_end, block_q, block_k).first), count)


def whole_query_ranges(
    k_start: jax.Array, k_end: jax.Array, block_q: int, block_k: int, key_blocks: int, keys: int
) -> Ranges:
    """For each block of keys the blocks of queries that all see all of its keys: the first run of them.

    They lie within `query_ranges`; where there are none, `first` is that of `query_ranges`.
    """
    parts = (k_start.shape[0], 1, -1, block_q)
    start, end = k_start.reshape(parts).max(axis=3), k_end.reshape(parts).min(axis=3)  # [B, 1, query blocks]
    edge = jnp.arange(key_blocks, dtype=jnp.int32)[:, None] * block_k
    whole = (start <= edge) & (end >= jnp.minimum(edge + block_k, keys))  # [B, key blocks, query blocks]
    after = jnp.cumsum(whole, axis=2) > 0
    ended = jnp.cumsum(after & ~whole, axis=2) > 0
    count = jnp.sum(after & ~ended, axis=2).astype(jnp.int32)
    first = jnp.argmax(whole, axis=2).astype(jnp.int32)
    return Ranges(jnp.where(count > 0, first, query_ranges(k_start, k_end, block_q, block_k, key_blocks).first), count)


def query_ranges(k_start: jax.Array, k_end: jax.Array, block_q: int, block_k: int, key_blocks: int) -> Ranges:
    """For each block of keys: from the first to the last block of queries that touches it."""
    start, end = (x[:, None] for x in _hulls(k_start, k_end, block_q))  # [B, 1, query blocks]
    edge = jnp.arange(key_blocks, dtype=jnp.int32)[:, None] * block_k  # [key blocks, 1]
    touches = (start < edge + block_k) & (end > edge)  # [B, key blocks, query blocks]
    first = jnp.argmax(touches, axis=2).astype(jnp.int32)
    last = touches.shape[2] - 1 - jnp.argmax(touches[..., ::-1], axis=2).astype(jnp.int32)
    return Ranges(first, jnp.where(touches.any(axis=2), last + 1 - first, 0))


def _hulls(k_start: jax.Array, k_end: jax.Array, block_q: int) -> tuple[jax.Array, jax.Array]:
    """The hull of the intervals of each block of queries, [B, query blocks]; (0, 0) where all are empty."""
    some = k_start < k_end
    parts = (k_start.shape[0], -1, block_q)
    start = jnp.where(some, k_start, jnp.iinfo(jnp.int32).max).reshape(parts).min(axis=2)
    end = jnp.where(some, k_end, 0).reshape(parts).max(axis=2)
    return jnp.where(end > 0, start, 0), end
