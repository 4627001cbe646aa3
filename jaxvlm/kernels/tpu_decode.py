"""Decode attention on TPU: one pass over a row's cache, of all its heads at once, that skips what lies outside its interval.

Reading the cache is the whole cost, so a block is as many slots of all key heads as a copy of about a megabyte holds, and
the layer's part of the stacked cache is read where it lies. The range of blocks that a row's interval touches is known only at
run time: it is prefetched as scalars, and the longest range bounds the grid.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxvlm.kernels.tpu_attention import LANES, LOG2E, LOWEST, VMEM_BYTES, product

BLOCK_BYTES = 2**20  # of keys, and of values
SUBLANE_BYTES = 32  # of the smallest tile


def supports(q, k) -> str | None:
    """None, or why the kernel cannot serve queries [B, H, h] and caches [L, B, K, T, h]."""
    if not {q.dtype, k.dtype} <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        return f"no kernel for {q.dtype} over {k.dtype}"
    if q.shape[2] > 256:
        return f"head dimension {q.shape[2]} is above 256"
    return None


def decode_attention(q, k, v, layer, k_start, k_end, scale: float, softcap: float | None) -> jax.Array:
    """As `jaxvlm.kernels.decode_attention`, of queries [B, K, G, h], for intervals within the cache."""
    batch, kv_heads, group, head_dim = q.shape
    slots = k.shape[3]
    block = block_size(kv_heads, slots, head_dim, k.dtype.itemsize)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -group % (SUBLANE_BYTES // q.dtype.itemsize)), (0, 0)))
    first = k_start // block
    count = jnp.where(k_start < k_end, pl.cdiv(k_end, block) - first, 0)
    of_queries = pl.BlockSpec((None, *q.shape[1:]), lambda b, step, *_: (b, 0, 0, 0))

    def slot_block(
        b, step, layer, first, count, *_
    ):  # past the end of the range the last block again, not fetched anew
        return layer[0], b, 0, first[b] + jnp.maximum(jnp.minimum(step, count[b] - 1), 0), 0

    of_slots = pl.BlockSpec((None, None, kv_heads, block, head_dim), slot_block)
    statistic = pltpu.VMEM((kv_heads, q.shape[2], LANES), jnp.float32)
    out = pl.pallas_call(
        functools.partial(_kernel, scale=scale, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(batch, jnp.maximum(count.max(), 1)),
            in_specs=[of_queries, of_slots, of_slots],
            out_specs=of_queries,
            scratch_shapes=[statistic, statistic, pltpu.VMEM(q.shape[1:], jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        name="decode_attention",
    )(layer[None], first, count, k_start, k_end, q, k, v)
    return out[:, :, :group]


def block_size(kv_heads: int, slots: int, head_dim: int, itemsize: int) -> int:
    """Slots of a block: all, or as many multiples of 128 as `BLOCK_BYTES` hold."""
    fit = BLOCK_BYTES // (kv_heads * max(head_dim, LANES) * itemsize)
    return min(math.ceil(slots / LANES), max(fit // LANES, 1)) * LANES


def _kernel(layer, first, count, k_start, k_end, q, k, v, out, highest, total, sums, *, scale, softcap):
    b, step = pl.program_id(0), pl.program_id(1)
    kv_heads, block, _ = k.shape

    @pl.when(step == 0)
    def _start():
        highest[...] = jnp.full_like(highest, LOWEST)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(step < count[b])
    def _block():
        at = (first[b] + step) * block

        def visible(shape, axis):
            slot = at + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            return (slot >= k_start[b]) & (slot < k_end[b])

        for head in range(kv_heads):
            keys, values = k[head].astype(q.dtype), v[head].astype(q.dtype)
            scores = product(q[head], keys, (1, 1)) * scale  # [G, block]
            if softcap is not None:
                scores = softcap * jnp.tanh(scores / softcap)
            scores = jnp.where(visible(scores.shape, 1), scores * LOG2E, LOWEST)
            before = highest[head]  # [G, 128], the same in all lanes
            new = jnp.maximum(before, scores.max(axis=1, keepdims=True))
            shrink = jnp.exp2(before - new)
            weights = jnp.exp2(scores - new[:, :1])
            highest[head] = new
            total[head] = total[head] * shrink + weights.sum(axis=1, keepdims=True)
            # A block may end beyond the cache, where anything lies.
            values = jnp.where(visible((block, 1), 0), values, 0)
            sums[head] = sums[head] * shrink[:, :1] + product(weights.astype(values.dtype), values, (1, 0))

    @pl.when(step == pl.num_programs(1) - 1)
    def _end():
        some = k_start[b] < k_end[b]
        for head in range(kv_heads):
            safe = jnp.where(some, total[head][:, :1], 1.0)
            out[head] = jnp.where(some, sums[head] / safe, 0.0).astype(out.dtype)
