"""Interval attention on a CPU, of XLA's operations: tiles of queries visit the blocks of keys that their intervals touch.

A flash kernel (Dao 2023, FlashAttention-2, algorithms 1 and 2) in two loops, of which the inner one ends where a tile's range of
blocks does, known only at run time; rows of a batch share the range. Beside the reference, which computes all scores of a row,
it leaves out half of a causal row and most of a packed one, and a block's scores stay in the processor's cache.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxvlm.kernels.block_ranges import key_ranges
from jaxvlm.kernels.flash import differentiable

LARGEST = 128  # queries of a tile, keys of a block
FEWEST_PAIRS = 48 * 1024  # of queries and keys: below it, the reference's one product is as fast
LOWEST = -1e30


class Settings(NamedTuple):
    scale: float
    softcap: float | None
    group: int  # query heads of a key head
    tile: int  # queries
    block: int  # keys


def supports(q, k) -> str | None:
    """None, or why queries [B, S, H, h] and keys [B, T, K, h] are left to the reference."""
    pairs = q.shape[1] * k.shape[1]
    return None if pairs > FEWEST_PAIRS else f"{q.shape[1]} x {k.shape[1]} is one block"


def attention(q, k, v, k_start, k_end, scale: float, softcap: float | None) -> jax.Array:
    """As `jaxvlm.kernels.attention.attention`, for intervals within the keys and finite numbers."""
    batch, length, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    tile, block = even(length), even(keys)

    def padded(x, size):
        return jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))

    q = padded(q, tile).reshape(batch, -1, tile, kv_heads, heads // kv_heads, head_dim)
    q = q.transpose(1, 0, 3, 4, 2, 5).reshape(
        -1, batch, kv_heads, heads // kv_heads * tile, head_dim
    )  # [tiles, B, K, G * tile, h]
    k, v = (padded(x, block).reshape(batch, -1, block, kv_heads, head_dim).transpose(1, 0, 3, 2, 4) for x in (k, v))
    rows = (padded(x, tile) for x in (k_start, k_end))  # keys and values are [blocks, B, K, block, h]
    out = _flash(q, k, v, *rows, Settings(scale, softcap, heads // kv_heads, tile, block))
    out = out.reshape(-1, batch, kv_heads, heads // kv_heads, tile, head_dim).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(batch, -1, heads, head_dim)[:, :length]


def even(length: int) -> int:
    """The size of the fewest equal parts that are no larger than `LARGEST`, so that little is padded."""
    return math.ceil(length / math.ceil(length / LARGEST))


def _tiles(k_start, k_end, settings: Settings):
    """What belongs to each tile: intervals [tiles, B, 1, G * tile, 1], and the first block and the number of blocks, [tiles]."""
    ranges = key_ranges(k_start, k_end, settings.tile, settings.block)
    some = ranges.count > 0
    first = jnp.where(some, ranges.first, jnp.iinfo(jnp.int32).max).min(axis=0)
    last = jnp.where(some, ranges.first + ranges.count, 0).max(axis=0)
    rows = (
        jnp.tile(x.reshape(len(x), -1, 1, settings.tile), settings.group).swapaxes(0, 1)[..., None]
        for x in (k_start, k_end)
    )
    return *rows, first, jnp.maximum(last - first, 0)


def _scores(q, k, start, end, block, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """float32 [B, K, G * tile, block], and which of them count."""
    scores = jnp.einsum("bkrh,bkth->bkrt", q, k, preferred_element_type=jnp.float32) * settings.scale
    if settings.softcap is not None:
        scores = settings.softcap * jnp.tanh(scores / settings.softcap)
    key = block * settings.block + jnp.arange(settings.block)
    return scores, (start <= key) & (key < end)


def _forward(q, k, v, k_start, k_end, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """out, of q's shape, and the scores' log-sum-exp [tiles, B, K, G * tile]."""

    def tile(_, given):
        q, start, end, first, count = given

        def visit(step, carry):
            sums, highest, total = carry
            scores, visible = _scores(q, k[first + step], start, end, first + step, settings)
            new = jnp.maximum(highest, jnp.max(scores, axis=-1, keepdims=True, where=visible, initial=LOWEST))
            weights = jnp.where(visible, jnp.exp(jnp.minimum(scores - new, 0.0)), 0.0)
            shrink = jnp.exp(highest - new)
            here = v[first + step]
            more = jnp.einsum("bkrt,bkth->bkrh", weights.astype(v.dtype), here, preferred_element_type=jnp.float32)
            return sums * shrink + more, new, total * shrink + weights.sum(axis=-1, keepdims=True)

        one = jnp.zeros((*q.shape[:3], 1), jnp.float32)
        sums, highest, total = jax.lax.fori_loop(0, count, visit, (jnp.zeros(q.shape, jnp.float32), one + LOWEST, one))
        total = jnp.where(total == 0.0, 1.0, total)
        return None, ((sums / total).astype(q.dtype), (highest + jnp.log(total))[..., 0])

    return jax.lax.scan(tile, None, (q, *_tiles(k_start, k_end, settings)))[1]


def _backward(q, k, v, out, lse, d_out, k_start, k_end, settings: Settings) -> tuple[jax.Array, jax.Array, jax.Array]:
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)

    def tile(sums, given):
        q, d_out, lse, delta, start, end, first, count = given
        lse, delta = lse[..., None], delta[..., None]

        def visit(step, carry):
            d_q, d_k, d_v = carry
            block = first + step
            scores, visible = _scores(q, k[block], start, end, block, settings)
            weights = jnp.where(visible, jnp.exp(jnp.minimum(scores - lse, 0.0)), 0.0)
            d_weights = jnp.einsum("bkrh,bkth->bkrt", d_out, v[block], preferred_element_type=jnp.float32)
            d_scores = weights * (d_weights - delta) * settings.scale
            if settings.softcap is not None:
                d_scores *= 1.0 - jnp.square(scores / settings.softcap)
            d_scores, weights = d_scores.astype(k.dtype), weights.astype(v.dtype)
            product = dict(preferred_element_type=jnp.float32)
            d_k = d_k.at[block].add(jnp.einsum("bkrt,bkrh->bkth", d_scores, q, **product))
            d_v = d_v.at[block].add(jnp.einsum("bkrt,bkrh->bkth", weights, d_out, **product))
            return d_q + jnp.einsum("bkrt,bkth->bkrh", d_scores, k[block], **product), d_k, d_v

        d_q, *sums = jax.lax.fori_loop(0, count, visit, (jnp.zeros(q.shape, jnp.float32), *sums))
        return tuple(sums), d_q.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    given = (q, d_out, lse, delta, *_tiles(k_start, k_end, settings))
    (d_k, d_v), d_q = jax.lax.scan(tile, (zeros, zeros), given)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)


_flash = differentiable(_forward, _backward)
