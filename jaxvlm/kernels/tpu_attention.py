"""Interval attention on TPU: a flash kernel that skips the blocks outside the intervals, forward and backward.

Scores are computed transposed, keys by queries, so that all that belongs to a query (interval, maximum, sum) is a row
[1, block] and reductions go along sublanes. A tile of queries visits the range of key blocks that its intervals touch; the range
is known only at run time, so it is prefetched as scalars, and the longest range bounds the grid. The backward pass is one
kernel with five products: it goes through the keys' blocks and, for each, the queries' blocks that see any of them, and sums the
queries' gradients of a head in fast memory (Dao 2023, FlashAttention-2, algorithms 1 and 2, with the loops of the backward
pass as there).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxvlm.kernels.block_ranges import key_ranges, query_ranges
from jaxvlm.kernels.flash import differentiable

LANES = 128
BLOCK = 512  # queries and keys of a block, where there are more
ONE_BLOCK = 1024  # a length up to which it is one block
LOG2E = math.log2(math.e)
LOWEST = -1e30
QUERY_GRADIENT_BYTES = 16 * 2**20  # of one head, float32: what fast memory holds beside the blocks
VMEM_BYTES = 64 * 2**20


class Settings(NamedTuple):
    """What a kernel is specialised to."""

    scale: float
    softcap: float | None
    block_q: int
    block_k: int


def supports(q, k) -> str | None:
    """None, or why the kernel cannot serve queries [B, S, H, h] and keys [B, T, K, h]."""
    length, head_dim = q.shape[1], q.shape[3]
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"no kernel for {q.dtype}"
    if head_dim > 256:
        return f"head dimension {head_dim} is above 256"
    if length * max(head_dim, LANES) * 4 > QUERY_GRADIENT_BYTES:
        return f"{length} queries of a head do not fit the fast memory"
    return None


def attention(q, k, v, k_start, k_end, scale: float, softcap: float | None) -> jax.Array:
    """As `jaxvlm.kernels.attention.attention`, for intervals within the keys and finite numbers."""
    length, keys = q.shape[1], k.shape[1]
    settings = Settings(scale, softcap, block_size(length), block_size(keys))
    q = _heads_first(q, settings.block_q)
    k, v = (_heads_first(x, settings.block_k) for x in (k, v))
    rows = [jnp.pad(x, ((0, 0), (0, q.shape[2] - length)))[:, None] for x in (k_start, k_end)]  # [B, 1, S]
    out = _flash(q, k, v, *rows, settings)
    return out[:, :, :length].swapaxes(1, 2)


def block_size(length: int) -> int:
    return BLOCK if length > ONE_BLOCK else math.ceil(length / LANES) * LANES


def _heads_first(x: jax.Array, block: int) -> jax.Array:
    """[B, S, H, h] to [B, H, S', h] with S' a multiple of the block."""
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, 0)))


# ------------------------------------------------------------------------------------------------------------ scores


def _visible(k_start, k_end, key_block, settings: Settings) -> jax.Array:
    """bool [block_k, block_q]"""
    shape = (settings.block_k, settings.block_q)
    key = key_block * settings.block_k + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (key >= k_start) & (key < k_end)


def product(a, b, contract: tuple[int, int]) -> jax.Array:
    """float32 product of two matrices over one dimension of each."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _scores(q, k, settings: Settings) -> tuple[jax.Array, jax.Array | None]:
    """Scores in powers of two [block_k, block_q], and for a soft cap the tanh that it took."""
    scores = product(k, q, (1, 1))
    if settings.softcap is None:
        return scores * (settings.scale * LOG2E), None
    bent = jnp.tanh(scores * (settings.scale / settings.softcap))
    return bent * (settings.softcap * LOG2E), bent


# ------------------------------------------------------------------------------------------------------------ forward


def _forward_kernel(first, count, q, k, v, k_start, k_end, out, lse, highest, total, sums, *, settings: Settings):
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def _start():
        highest[...] = jnp.full_like(highest, LOWEST)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(step < count[b, i])
    def _block():
        scores, _ = _scores(q[...], k[...], settings)
        scores = jnp.where(_visible(k_start[...], k_end[...], first[b, i] + step, settings), scores, LOWEST)
        new = jnp.maximum(highest[...], scores.max(axis=0, keepdims=True))  # [1, block_q]
        shrink = jnp.exp2(highest[...] - new)
        # Before a query has seen a key, these are ones; the first key that it sees shrinks them to nothing.
        weights = jnp.exp2(scores - new)  # [block_k, block_q]
        highest[...] = new
        total[...] = total[...] * shrink + weights.sum(axis=0, keepdims=True)
        sums[...] = sums[...] * shrink + product(v[...], weights.astype(v.dtype), (0, 0))  # [h, block_q]

    @pl.when(step == pl.num_programs(3) - 1)
    def _end():
        some = k_start[...] < k_end[...]
        safe = jnp.where(some, total[...], 1.0)
        out[...] = jnp.where(some, sums[...] / safe, 0.0).T.astype(out.dtype)
        lse[...] = jnp.where(some, highest[...] + jnp.log2(safe), 0.0)


def _forward(q, k, v, k_start, k_end, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """out [B, H, S, h], and the scores' log2-sum-exp2 [B, H, 1, S]."""
    batch, heads, length, head_dim = q.shape
    ranges = key_ranges(k_start[:, 0], k_end[:, 0], settings.block_q, settings.block_k)
    group = heads // k.shape[1]
    of_queries = pl.BlockSpec((None, None, settings.block_q, head_dim), lambda b, h, i, step, *_: (b, h, i, 0))
    of_row = pl.BlockSpec((None, 1, settings.block_q), lambda b, h, i, step, *_: (b, 0, i))

    def key_block(
        b, h, i, step, first, count
    ):  # past the end of the range the last block again, which is not fetched anew
        return b, jax.lax.div(h, jnp.int32(group)), first[b, i] + jnp.maximum(jnp.minimum(step, count[b, i] - 1), 0), 0

    of_keys = pl.BlockSpec((None, None, settings.block_k, head_dim), key_block)
    row = (1, settings.block_q)
    return pl.pallas_call(
        functools.partial(_forward_kernel, settings=settings),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, length // settings.block_q, jnp.maximum(ranges.count.max(), 1)),
            in_specs=[of_queries, of_keys, of_keys, of_row, of_row],
            out_specs=[
                of_queries,
                pl.BlockSpec((None, None, *row), lambda b, h, i, step, *_: (b, h, 0, i)),
            ],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in (row, row, (head_dim, settings.block_q))],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        compiler_params=_compiler_params(),
        cost_estimate=_cost(q, k, products=2),
        name="interval_attention",
    )(*ranges, q, k, v, k_start, k_end)


# ----------------------------------------------------------------------------------------------------------- backward


def _backward_kernel(
    first, count, q, k, v, d_out, lse, delta, k_start, k_end, dq, dk, dv, dk_sum, dv_sum, *, settings: Settings
):
    b, j, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when((j == 0) & (step == 0))
    def _start_head():
        dq[...] = jnp.zeros_like(dq)

    @pl.when(step == 0)
    def _start():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when(step < count[b, j])
    def _block():
        scores, bent = _scores(q[...], k[...], settings)
        visible = _visible(k_start[...], k_end[...], j, settings)
        weights = jnp.where(visible, jnp.exp2(scores - lse[...]), 0.0)  # [block_k, block_q]
        dv_sum[...] += product(weights.astype(d_out.dtype), d_out[...], (1, 0))
        d_weights = product(v[...], d_out[...], (1, 1))
        d_scores = weights * (d_weights - delta[...]) * settings.scale
        if bent is not None:
            d_scores *= 1.0 - bent * bent
        d_scores = d_scores.astype(q.dtype)
        dk_sum[...] += product(d_scores, q[...], (1, 0))
        queries = pl.ds(pl.multiple_of((first[b, j] + step) * settings.block_q, settings.block_q), settings.block_q)
        dq[queries, :] += product(d_scores, k[...], (0, 0))

    @pl.when(step == pl.num_programs(3) - 1)
    def _end():
        dk[...] = dk_sum[...].astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)


def _gradients(
    q, k, v, d_out, lse, delta, k_start, k_end, settings: Settings
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """float32 dq [B, H, S, h], and dk and dv [B, H, T, h] of each query head."""
    batch, heads, length, head_dim = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    key_blocks = keys // settings.block_k
    ranges = query_ranges(k_start[:, 0], k_end[:, 0], settings.block_q, settings.block_k, key_blocks)

    def block(b, j, step, first, count):
        return first[b, j] + jnp.maximum(jnp.minimum(step, count[b, j] - 1), 0)

    of_queries = pl.BlockSpec(
        (None, None, settings.block_q, head_dim), lambda b, h, j, step, *s: (b, h, block(b, j, step, *s), 0)
    )
    of_sums = pl.BlockSpec(
        (None, None, 1, settings.block_q), lambda b, h, j, step, *s: (b, h, 0, block(b, j, step, *s))
    )
    of_row = pl.BlockSpec((None, 1, settings.block_q), lambda b, h, j, step, *s: (b, 0, block(b, j, step, *s)))
    shape = (settings.block_k, head_dim)
    of_keys = pl.BlockSpec((None, None, *shape), lambda b, h, j, step, *_: (b, jax.lax.div(h, jnp.int32(group)), j, 0))
    of_key_gradients = pl.BlockSpec((None, None, *shape), lambda b, h, j, step, *_: (b, h, j, 0))
    of_head = pl.BlockSpec((None, None, length, head_dim), lambda b, h, j, step, *_: (b, h, 0, 0))
    kind = jnp.float32 if group > 1 else k.dtype  # those of a group are still to be summed
    of_each = jax.ShapeDtypeStruct((batch, heads, keys, head_dim), kind)
    return pl.pallas_call(
        functools.partial(_backward_kernel, settings=settings),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, key_blocks, jnp.maximum(ranges.count.max(), 1)),
            in_specs=[of_queries, of_keys, of_keys, of_queries, of_sums, of_sums, of_row, of_row],
            out_specs=[of_head, of_key_gradients, of_key_gradients],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32)] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, jnp.float32), of_each, of_each],
        compiler_params=_compiler_params(),
        cost_estimate=_cost(q, k, products=5),
        name="interval_attention_backward",
    )(*ranges, q, k, v, d_out, lse, delta, k_start, k_end)


def _backward(q, k, v, out, lse, d_out, k_start, k_end, settings: Settings) -> tuple[jax.Array, jax.Array, jax.Array]:
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None]  # [B, H, 1, S]
    dq, *pair = _gradients(q, k, v, d_out, lse, delta, k_start, k_end, settings)
    batch, kv_heads, keys, head_dim = k.shape
    dk, dv = (x.reshape(batch, kv_heads, -1, keys, head_dim).sum(axis=2).astype(k.dtype) for x in pair)
    return dq.astype(q.dtype), dk, dv


_flash = differentiable(_forward, _backward)


def _compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    )


def _cost(q: jax.Array, k: jax.Array, products: int) -> pl.CostEstimate:
    """For the compiler's scheduler: as if causal."""
    batch, heads, length, head_dim = q.shape
    pairs = batch * heads * length * k.shape[2] // 2
    moved = products * (q.size + k.size) * q.dtype.itemsize
    return pl.CostEstimate(flops=2 * products * pairs * head_dim, transcendentals=pairs, bytes_accessed=moved)
