"""Interval attention on Hopper GPUs (Pallas Mosaic GPU): a flash kernel that skips the blocks outside the intervals.

The forward kernel follows Shah et al. 2024 (FlashAttention-3, §3) in the form of jax's own example of it: one warpgroup
fetches blocks of keys and values (TMA) into a ring, two others answer 64 queries each (wgmma), and take turns with the
tensor cores, so that one's softmax runs beside the other's products. New here are the intervals: a tile of 128 queries
visits the range of key blocks that its intervals touch, known only at run time, those that all queries see whole first and
without a mask. Copies past the end of a sequence read zeros and write nothing, so a length is padded to eights only.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxvlm.kernels import intervals
from jaxvlm.kernels.block_ranges import Ranges, key_ranges, whole_key_ranges

ROWS = 64  # queries (keys, for their gradients) of a warpgroup: the rows of one wgmma
TILE = 2 * ROWS  # of the two warpgroups that compute
STAGES = 2  # blocks of keys and of values in the ring
LOG2E = math.log2(math.e)
LOWEST = -(2.0**100)  # a power of two: its product with the scale has no rounding error, which exp2 would blow up
# In tests an InterpretGPUParams. The interpreter has no wgmma with its left side in registers, which then goes through shared
# memory, and no sums that start from a value, which are then added outside.
INTERPRET: Any = None


class Settings(NamedTuple):
    """What a kernel is specialised to."""

    scale: float
    softcap: float | None
    interpret: Any


def attention(q, k, v, k_start, k_end, scale: float, softcap: float | None) -> jax.Array:
    """As `jaxvlm.kernels.attention.attention`, for intervals within the keys and a positive scale."""
    if scale <= 0:
        raise ValueError(f"attention: the Hopper kernel needs a positive scale, not {scale}.")
    length, head_dim = q.shape[1], q.shape[3]
    q, k, v = intervals.without_unseen(q, k, v, k_start, k_end)
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, -head_dim % 16))) for x in (q, k, v))
    # The queries past the end see what the last one sees, so that they never keep a block from being whole.
    rows = (jnp.pad(x, ((0, 0), (0, -length % TILE)), mode="edge") for x in (k_start, k_end))
    return _flash(q, k, v, *rows, Settings(scale, softcap, INTERPRET))[:, :length, :, :head_dim]


# ------------------------------------------------------------------------------------------------------------- pieces


def _matrix(rows: int, columns: int, dtype, *leading: int) -> plgpu.SMEM:
    """Shared memory [*leading, rows, columns] in the form that TMA writes and wgmma reads."""
    swizzle = plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM((*leading, rows, columns), dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def _full(shape: tuple[int, ...], value: float) -> jax.Array:
    """float32 in the registers of a warpgroup: a product, or one number for each of its rows."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _by_row(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return jax.lax.broadcast_in_dim(x, shape, [0])


def _product(a, b, shape: tuple[int, int], meanwhile=lambda: None) -> jax.Array:
    """a @ b of matrices in shared memory; `meanwhile` runs while the tensor cores do."""

    def run(sums):
        plgpu.wgmma(sums, a, b)
        meanwhile()
        return sums[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def _add_product(sums: jax.Array, a: jax.Array, b, through, meanwhile=lambda: None) -> jax.Array:
    """sums + a @ b for `a` in registers; `through` is shared memory for it, or None."""
    if through is not None:
        through[...] = a
        plgpu.commit_smem()
        return sums + _product(through, b, sums.shape, meanwhile)

    def run(total):
        plgpu.wgmma(total, a, b)
        meanwhile()

    return pl.run_state(run)(plgpu.ACC.init(sums))


# ------------------------------------------------------------------------------------------------------------ forward


def forward_block_k(head_dim: int) -> int:
    return 128 if head_dim <= 128 else 64


def _block_of(step, first, whole_first, whole_count):
    """The key block that a tile visits in this step: first those seen whole, then those before them, then those after."""
    rest = step - whole_count
    before = whole_first - first
    cut = first + rest + jnp.where(rest < before, 0, whole_count)
    return jnp.where(step < whole_count, whole_first + step, cut)


def _forward_kernel(
    q, k, v, k_start, k_end, ranges, out, lse, *, q_s, k_s, v_s, lse_s, weights_s, q_here, k_here, v_here, k_read, v_read, turn,
    settings: Settings,
):  # fmt: skip
    b, h, i = (jax.lax.axis_index(name) for name in ("batch", "heads", "tiles"))
    warpgroup = jax.lax.axis_index("warpgroups")
    block_k, head_dim = k_s.shape[1:]
    first, count, whole_first, whole_count = (ranges[b, i, n] for n in range(4))
    block_of = functools.partial(_block_of, first=first, whole_first=whole_first, whole_count=whole_count)

    def slot_of(step):
        return jax.lax.rem(step, jnp.int32(STAGES))

    def take_turn():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(warpgroup < 2)
    def _answer():
        plgpu.set_max_registers(240, action="increase")
        queries = pl.ds(i * TILE + warpgroup * ROWS, ROWS)
        mine = q_s.at[warpgroup]
        plgpu.copy_gmem_to_smem(q.at[b, queries, h], mine, q_here.at[warpgroup])
        start, end = (
            plgpu.load(x.at[b, queries], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False) for x in (k_start, k_end)
        )
        shape = (ROWS, block_k)

        def visit(step, carry, whole: bool):
            sums, highest, total = carry
            slot = slot_of(step)
            scores = _product(mine, k_s.at[slot].T, shape, take_turn)
            plgpu.barrier_arrive(k_read.at[slot])
            if settings.softcap is None:
                to_log2 = settings.scale * LOG2E
            else:
                scores, to_log2 = jnp.tanh(scores * (settings.scale / settings.softcap)), settings.softcap * LOG2E
            if not whole:
                key = block_of(step) * block_k + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
                visible = (key >= _by_row(start, shape)) & (key < _by_row(end, shape))
                scores = jnp.where(visible, scores, LOWEST)
            new = jnp.maximum(highest, scores.max(axis=1) * to_log2)
            shrink = jnp.exp2(highest - new)
            # Before a query has seen a key, these are ones; the first key that it sees shrinks them to nothing.
            weights = jnp.exp2(scores * to_log2 - _by_row(new, shape))
            sums *= _by_row(shrink, sums.shape)
            total *= shrink
            rounded = weights.astype(v_s.dtype)
            if head_dim <= 128:  # the order of jax's example, which says that it matters
                total += weights.sum(axis=1)
                sums, total, new, rounded = jax.lax.optimization_barrier((sums, total, new, rounded))
            plgpu.barrier_arrive(turn)  # with the softmax
            plgpu.barrier_wait(v_here.at[slot])
            plgpu.barrier_wait(turn)  # for the tensor cores
            if head_dim > 128:
                total += weights.sum(axis=1)

            def await_next():
                @pl.when(step + 1 < count)
                def _():
                    plgpu.barrier_wait(k_here.at[slot_of(step + 1)])

            through = None if weights_s is None else weights_s.at[warpgroup]
            sums = _add_product(sums, rounded, v_s.at[slot], through, await_next)
            plgpu.barrier_arrive(v_read.at[slot])
            return sums, new, total

        plgpu.barrier_wait(q_here.at[warpgroup])

        @pl.when(count > 0)
        def _():
            plgpu.barrier_wait(k_here.at[0])

        pl.when(warpgroup == 1)(take_turn)
        carry = _full((ROWS, head_dim), 0.0), _full((ROWS,), LOWEST), _full((ROWS,), 0.0)
        carry = jax.lax.fori_loop(0, whole_count, functools.partial(visit, whole=True), carry)
        sums, highest, total = jax.lax.fori_loop(whole_count, count, functools.partial(visit, whole=False), carry)
        pl.when(warpgroup == 0)(take_turn)

        some = start < end
        safe = jnp.where(some, total, 1.0)
        inverse = jnp.where(some, 1.0 / safe, 0.0)
        mine[...] = (sums * _by_row(inverse, sums.shape)).astype(out.dtype)
        lse_s[warpgroup] = jnp.where(some, highest + jnp.log(safe) * LOG2E, 0.0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, out.at[b, queries, h])
        plgpu.copy_smem_to_gmem(lse_s.at[warpgroup], lse.at[b, h, queries])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def _fetch():
        plgpu.set_max_registers(24, action="decrease")
        group = q.shape[2] // k.shape[2]
        kv_head = jax.lax.div(h, jnp.int32(group))

        @pl.loop(0, count)
        def _(step):
            slot, keys = slot_of(step), pl.ds(block_of(step) * block_k, block_k)
            for source, ring, here, read in ((k, k_s, k_here, k_read), (v, v_s, v_here, v_read)):
                pl.when(step >= STAGES)(lambda read=read: plgpu.barrier_wait(read.at[slot]))
                plgpu.copy_gmem_to_smem(source.at[b, keys, kv_head], ring.at[slot], here.at[slot])

        @pl.loop(jnp.maximum(count - STAGES, 0), count)  # every arrival has to be awaited
        def _(step):
            plgpu.barrier_wait(k_read.at[slot_of(step)])
            plgpu.barrier_wait(v_read.at[slot_of(step)])


def _forward(q, k, v, k_start, k_end, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """out [B, S, H, h], and the scores' log2-sum-exp2 [B, H, S'] of the padded length."""
    batch, length, heads, head_dim = q.shape
    block_k = forward_block_k(head_dim)
    padded = k_start.shape[1]
    ranges = jnp.stack(
        [*key_ranges(k_start, k_end, TILE, block_k), *whole_key_ranges(k_start, k_end, TILE, block_k)], axis=-1
    )
    dtype = q.dtype
    scratch = dict(
        q_s=_matrix(ROWS, head_dim, dtype, 2),
        k_s=_matrix(block_k, head_dim, dtype, STAGES),
        v_s=_matrix(block_k, head_dim, dtype, STAGES),
        lse_s=plgpu.SMEM((2, ROWS), jnp.float32),
        weights_s=_matrix(ROWS, block_k, dtype, 2) if settings.interpret else None,
        q_here=plgpu.Barrier(num_barriers=2),
        k_here=plgpu.Barrier(num_barriers=STAGES),
        v_here=plgpu.Barrier(num_barriers=STAGES),
        k_read=plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
        v_read=plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
        turn=plgpu.Barrier(num_arrivals=2),
    )
    run = _kernel(
        functools.partial(_forward_kernel, settings=settings),
        settings,
        kernel_name="interval_attention",
        out_type=(
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32),
        ),
        grid=(heads, padded // TILE, batch),
        grid_names=("heads", "tiles", "batch"),
        scratch_types=scratch,
    )
    return run(q, k, v, k_start, k_end, ranges)


def _kernel(body, settings: Settings, **options):
    return plgpu.kernel(
        body,
        num_threads=3,
        thread_name="warpgroups",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": settings.interpret} if settings.interpret else {}),
        **options,
    )


def _flash(q, k, v, k_start, k_end, settings):
    return _forward(q, k, v, k_start, k_end, settings)[0]
