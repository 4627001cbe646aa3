"""Interval attention on Ampere GPUs (Pallas Mosaic GPU): flash kernels that skip the blocks outside the intervals.

One warpgroup answers a tile of queries (or, backward, differentiates a tile of keys): blocks of the other side come through
shared memory while those before are in use (cp.async), and products are mma.sync with their sums in registers (Dao 2023,
FlashAttention-2, algorithms 1 and 2). What a product has made becomes the left side of the next one by way of shared memory,
since a warp holds the two in another order. Three kernels, each of which owns what it writes, so that the result is the
same every time: the output; the gradients of queries; those of keys and values, over all heads of a group. cp.async
checks no bounds and copies whole rows: so heads come before the length, and lengths are padded to tiles. Needs jax 0.11.2 or
newer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxvlm.kernels.block_ranges import key_ranges, query_ranges
from jaxvlm.kernels.flash import differentiable
from jaxvlm.kernels.hopper_pieces import LOG2E, LOWEST, Settings, along, bend, visible

INTERPRET: Any = None  # tests put an InterpretGPUParams here
STAGES = 2  # blocks under way or in use
CHUNK = 32  # rows of the right side of a product that registers hold at once
ACC, LEFT, RIGHT = plgpu.Layout.MMA_ACC, plgpu.Layout.MMA_LHS, plgpu.Layout.MMA_RHS


def attention(q, k, v, k_start, k_end, scale: float, softcap: float | None) -> jax.Array:
    """As `jaxvlm.kernels.attention.attention`, for intervals within the keys and finite numbers."""
    length, head_dim = q.shape[1], q.shape[3]
    tile, block = sizes(head_dim)
    whole = max(tile, block)

    def prepared(x):  # [B, S, H, h] to [B, H, S', h']
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % whole), (0, -head_dim % 16)))

    rows = (jnp.pad(x, ((0, 0), (0, -length % whole))) for x in (k_start, k_end))
    out = _flash(*map(prepared, (q, k, v)), *rows, Settings(scale, softcap, INTERPRET))
    return out[:, :, :length, :head_dim].swapaxes(1, 2)


def sizes(head_dim: int) -> tuple[int, int]:
    """Rows of a tile, whose sums registers hold, and of a block of the other side: the largest that spill nothing forward."""
    return (128 if head_dim <= 96 else 64), 32


# ------------------------------------------------------------------------------------------------------------- pieces


def _transforms(columns: int, dtype) -> tuple:
    """The form of shared memory that ldmatrix reads without conflicts."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * size * 8)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def _matrix(rows: int, columns: int, dtype) -> plgpu.SMEM:
    return plgpu.SMEM((rows, columns), dtype, transforms=_transforms(columns, dtype))


def _blocks(rows: int, columns: int, dtype, index) -> plgpu.BlockSpec:
    """Blocks of a [B, H, S, h]; `index` of the step gives (row, head, block)."""

    def place(*step):
        return *index(*step), 0

    transforms, inside = _transforms(columns, dtype), plgpu.OOBFillMode.PROMISE_IN_BOUNDS
    return plgpu.BlockSpec((None, None, rows, columns), place, transforms=transforms, oob_fill_mode=inside)


def _full(shape: tuple[int, ...], value: float, dtype) -> jax.Array:
    """float32 in registers: a matrix, or a number for each of its rows."""
    layout = ACC(dtype) if len(shape) == 2 else ACC(dtype).reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _vector(source, axis: int, dtype) -> jax.Array:
    """From memory to registers: a number for each row (axis 0) or each column (axis 1) of a matrix."""
    return plgpu.load(source, layout=ACC(dtype).reduce(1 - axis), optimized=False)


def _product(a, b) -> jax.Array:
    """a @ b.T of [m, h] and [n, h] in shared memory."""
    (rows, head_dim), dtype = a.shape, a.dtype
    tile = _transforms(head_dim, dtype)[0].tiling[1]
    total = _full((rows, b.shape[0]), 0.0, dtype)
    for at in range(0, head_dim, tile):
        part = pl.ds(at, tile)
        left = plgpu.load(a.at[:, part], layout=LEFT(dtype))
        right = plgpu.load(b.at[:, part].T, layout=RIGHT(dtype))
        total = plgpu.mma(total, left, right)
    return total


def _add_product(sums: jax.Array, a: jax.Array, b, through) -> jax.Array:
    """sums + a @ b for `a` [m, n] in registers and `b` [n, h] in shared memory; `through` is shared memory for `a`."""
    dtype = b.dtype
    through[...] = a.astype(dtype)
    for at in range(0, b.shape[0], CHUNK):
        part = pl.ds(at, CHUNK)
        left = plgpu.load(through.at[:, part], layout=LEFT(dtype))
        sums = plgpu.mma(sums, left, plgpu.load(b.at[part], layout=RIGHT(dtype)))
    return sums


def _copy_layout(shared) -> plgpu.SomeLayout:
    """Registers in which whole rows go between memory and shared memory."""
    swizzle = plgpu.find_swizzle(shared.shape[1] * jnp.dtype(shared.dtype).itemsize * 8)
    return plgpu.Layout.SMEM_GMEM_COPY(shared.shape, shared.dtype, swizzle=swizzle)


def _fetch(source, target) -> None:
    """From memory to shared memory, at once."""
    target[...] = plgpu.load(source, layout=_copy_layout(target), optimized=False)


def _store(x: jax.Array, target, staged) -> None:
    """From registers to memory, through shared memory so that whole rows are written."""
    staged[...] = x.astype(staged.dtype)
    target[...] = plgpu.layout_cast(staged[...], _copy_layout(staged))


def _over_blocks(visit, steps: tuple, carry, blocks: list, references: tuple, settings: Settings):
    """`visit(step, *blocks, carry)` for all steps, with the blocks of each in shared memory."""

    def body(*arguments):
        carry = visit(*arguments)
        if settings.interpret:  # which has no cp.async, only TMA, before which reads have to be committed
            plgpu.commit_smem()
        return carry

    return plgpu.emit_pipeline(body, grid=steps, in_specs=blocks, max_concurrent_steps=STAGES, init_carry=carry)(
        *references
    )


def _kernel(body, name: str, settings: Settings, grid: tuple[int, int, int], out_type, scratch_types):
    """`body(heads, tiles, batch, *references)` for each of the grid."""

    def run(*references):
        body(*(jax.lax.axis_index(name) for name in ("heads", "tiles", "batch")), *references)

    return plgpu.kernel(
        run,
        kernel_name=name,
        out_type=out_type,
        grid=grid,
        grid_names=("heads", "tiles", "batch"),
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=settings.interpret,
    )


# ------------------------------------------------------------------------------------------------------------ forward


def _forward(q, k, v, k_start, k_end, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """out [B, H, S, h], and the scores' log2-sum-exp2 [B, H, S]."""
    (batch, heads, length, head_dim), dtype = q.shape, q.dtype
    tile, block = sizes(head_dim)
    group = heads // k.shape[1]

    def body(h, i, b, q, k, v, k_start, k_end, first, count, out, lse, q_s, through):
        rows, shape = pl.ds(i * tile, tile), (tile, block)
        _fetch(q.at[b, h, rows], q_s)
        start, end = (_vector(x.at[b, rows], 0, dtype) for x in (k_start, k_end))
        at = first[b, i]

        def visit(step, k, v, carry):
            sums, highest, total = carry
            scores, to_log2 = bend(_product(q_s, k), settings)
            seen = visible(start, end, (at + step[0]) * block, shape, key_axis=1, layout=ACC(dtype))
            scores = jnp.where(seen, scores * to_log2, LOWEST)
            new = jnp.maximum(highest, scores.max(axis=1))
            shrink = jnp.exp2(highest - new)
            # Before a query has seen a key, these are ones; the first key that it sees shrinks them to nothing.
            weights = jnp.exp2(scores - along(0, new, shape))
            total = total * shrink + weights.sum(axis=1)
            return _add_product(sums * along(0, shrink, sums.shape), weights, v, through), new, total

        of_keys = _blocks(block, head_dim, dtype, lambda step: (b, jax.lax.div(h, jnp.int32(group)), at + step))
        carry = _full((tile, head_dim), 0.0, dtype), _full((tile,), LOWEST, dtype), _full((tile,), 0.0, dtype)
        sums, highest, total = _over_blocks(visit, (count[b, i],), carry, [of_keys, of_keys], (k, v), settings)
        some = start < end
        total = jnp.where(some, total, 1.0)
        _store(sums * along(0, jnp.where(some, 1.0 / total, 0.0), sums.shape), out.at[b, h, rows], q_s)
        lse[b, h, rows] = jnp.where(some, highest + jnp.log(total) * LOG2E, 0.0)

    run = _kernel(
        body,
        "interval_attention",
        settings,
        (heads, length // tile, batch),
        (jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)),
        (_matrix(tile, head_dim, dtype), _matrix(tile, block, dtype)),
    )
    return run(q, k, v, k_start, k_end, *key_ranges(k_start, k_end, tile, block))


# ----------------------------------------------------------------------------------------------------------- backward


def _query_gradients(q, k, v, d_out, lse, delta, k_start, k_end, settings: Settings) -> jax.Array:
    """dq [B, H, S, h]; `lse` and `delta` are [B, H, S]."""
    (batch, heads, length, head_dim), dtype = q.shape, q.dtype
    tile, block = sizes(head_dim)
    group = heads // k.shape[1]

    def body(h, i, b, q, k, v, d_out, lse, delta, k_start, k_end, first, count, dq, q_s, d_out_s, through):
        rows, shape = pl.ds(i * tile, tile), (tile, block)
        _fetch(q.at[b, h, rows], q_s)
        _fetch(d_out.at[b, h, rows], d_out_s)
        start, end = (_vector(x.at[b, rows], 0, dtype) for x in (k_start, k_end))
        my_lse, my_delta = (_vector(x.at[b, h, rows], 0, dtype) for x in (lse, delta))
        at = first[b, i]

        def visit(step, k, v, sums):
            bent, to_log2 = bend(_product(q_s, k), settings)
            seen = visible(start, end, (at + step[0]) * block, shape, key_axis=1, layout=ACC(dtype))
            weights = jnp.where(seen, jnp.exp2(bent * to_log2 - along(0, my_lse, shape)), 0.0)
            d_scores = weights * (_product(d_out_s, v) - along(0, my_delta, shape))
            if settings.softcap is not None:
                d_scores *= 1.0 - bent * bent
            return _add_product(sums, d_scores, k, through)

        of_keys = _blocks(block, head_dim, dtype, lambda step: (b, jax.lax.div(h, jnp.int32(group)), at + step))
        sums = _full((tile, head_dim), 0.0, dtype)
        sums = _over_blocks(visit, (count[b, i],), sums, [of_keys, of_keys], (k, v), settings)
        _store(sums * settings.scale, dq.at[b, h, rows], q_s)

    run = _kernel(
        body,
        "interval_attention_dq",
        settings,
        (heads, length // tile, batch),
        jax.ShapeDtypeStruct(q.shape, dtype),
        (*[_matrix(tile, head_dim, dtype)] * 2, _matrix(tile, block, dtype)),
    )
    return run(q, k, v, d_out, lse, delta, k_start, k_end, *key_ranges(k_start, k_end, tile, block))


def _key_gradients(q, k, v, d_out, lse, delta, k_start, k_end, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """dk and dv [B, K, T, h]; `lse` and `delta` are [B, H, S]."""
    (batch, kv_heads, keys, head_dim), dtype = k.shape, k.dtype
    tile, block = 64, 32
    group = q.shape[1] // kv_heads

    def body(kv_head, j, b, q, k, v, d_out, lse, delta, k_start, k_end, first, count, dk, dv, k_s, v_s, through):
        rows, shape, at = pl.ds(j * tile, tile), (tile, block), first[b, j]
        _fetch(k.at[b, kv_head, rows], k_s)
        _fetch(v.at[b, kv_head, rows], v_s)

        def visit(step, q, d_out, sums):
            dk, dv = sums
            h, queries = kv_head * group + step[0], pl.ds((at + step[1]) * block, block)
            start, end = (_vector(x.at[b, queries], 1, dtype) for x in (k_start, k_end))
            my_lse, my_delta = (_vector(x.at[b, h, queries], 1, dtype) for x in (lse, delta))
            bent, to_log2 = bend(_product(k_s, q), settings)
            seen = visible(start, end, j * tile, shape, key_axis=0, layout=ACC(dtype))
            weights = jnp.where(seen, jnp.exp2(bent * to_log2 - along(1, my_lse, shape)), 0.0)
            dv = _add_product(dv, weights, d_out, through)
            d_scores = weights * (_product(v_s, d_out) - along(1, my_delta, shape))
            if settings.softcap is not None:
                d_scores *= 1.0 - bent * bent
            return _add_product(dk, d_scores, q, through), dv

        of_queries = _blocks(block, head_dim, dtype, lambda n, step: (b, kv_head * group + n, at + step))
        sums = _full((tile, head_dim), 0.0, dtype), _full((tile, head_dim), 0.0, dtype)
        steps = group, count[b, j]
        sums = _over_blocks(visit, steps, sums, [of_queries, of_queries], (q, d_out), settings)
        _store(sums[0] * settings.scale, dk.at[b, kv_head, rows], k_s)
        _store(sums[1], dv.at[b, kv_head, rows], v_s)

    run = _kernel(
        body,
        "interval_attention_dk_dv",
        settings,
        (kv_heads, keys // tile, batch),
        (jax.ShapeDtypeStruct(k.shape, dtype),) * 2,
        (*[_matrix(tile, head_dim, dtype)] * 2, _matrix(tile, block, dtype)),
    )
    ranges = query_ranges(k_start, k_end, block, tile, keys // tile)
    return run(q, k, v, d_out, lse, delta, k_start, k_end, *ranges)


def _backward(q, k, v, out, lse, d_out, k_start, k_end, settings: Settings) -> tuple[jax.Array, jax.Array, jax.Array]:
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)  # [B, H, S]
    given = (q, k, v, d_out, lse, delta, k_start, k_end, settings)
    return _query_gradients(*given), *_key_gradients(*given)


_flash = differentiable(_forward, _backward)
