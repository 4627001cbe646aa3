"""Forward pass of attention on Hopper: see `hopper_attention`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxvlm.kernels.block_ranges import Ranges
from jaxvlm.kernels.hopper_pieces import (
    LOG2E,
    LOWEST,
    ROWS,
    STAGES,
    TILE,
    Settings,
    add_product,
    along,
    bend,
    block_of,
    fetch_keys,
    full,
    heads_of_a_block,
    kernel,
    matrix,
    products,
    slot_of,
    through,
    vector,
    visible,
)


def _forward_kernel(
    q, k, v, k_start, k_end, ranges, out, lse, *,
    q_s, k_s, v_s, out_s, lse_s, weights_s, q_here, k_here, v_here, k_read, v_read, turn, settings: Settings,
    heads: int,
):  # fmt: skip
    b, first_head, i = (jax.lax.axis_index(name) for name in ("batch", "heads", "tiles"))
    warpgroup = jax.lax.axis_index("warpgroups")
    block_k, head_dim = k_s.shape[1:]
    i, first_head = k_start.shape[1] // TILE - 1 - i, first_head * heads  # under a causal mask the longest tiles first
    first, count, whole_first, whole_count, row = (ranges[b, i, n] for n in range(5))
    block = functools.partial(block_of, first=first, whole_first=whole_first, whole_count=whole_count)

    def take_turn():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(warpgroup < 2)
    def _answer():
        plgpu.set_max_registers(240, action="increase")
        queries = pl.ds(i * TILE + warpgroup * ROWS, ROWS)
        mine = q_s.at[warpgroup]
        result = mine if out_s is None else out_s.at[warpgroup]
        start, end = (vector(x.at[b, queries], axis=0) for x in (k_start, k_end))
        shape = (ROWS, block_k)

        def fetch(number):
            plgpu.copy_gmem_to_smem(q.at[b, queries, first_head + number], mine, q_here.at[warpgroup])

        def visit(step, carry, number, whole: bool):
            sums, highest, total = carry
            slot, following = slot_of(number * count + step), slot_of(number * count + step + 1)
            (scores,) = products((mine, k_s.at[slot].T), shape=shape, meanwhile=take_turn)
            plgpu.barrier_arrive(k_read.at[slot])

            if heads > 1:
                pl.when((step == count - 1) & (number < heads - 1))(lambda: fetch(number + 1))

            scores, to_log2 = bend(scores, settings)
            if not whole:
                scores = jnp.where(visible(start, end, block(step) * block_k, shape, key_axis=1), scores, LOWEST)
            new = jnp.maximum(highest, scores.max(axis=1) * to_log2)
            shrink = jnp.exp2(highest - new)
            # Before a query has seen a key, these are ones; the first key that it sees shrinks them to nothing.
            weights = jnp.exp2(scores * to_log2 - along(0, new, shape))
            sums *= along(0, shrink, sums.shape)
            total *= shrink
            rounded = weights.astype(v_s.dtype)
            if head_dim <= 128:  # jax's example has found that this order matters
                total += weights.sum(axis=1)
                sums, total, new, rounded = jax.lax.optimization_barrier((sums, total, new, rounded))
            plgpu.barrier_arrive(turn)  # the softmax is done
            plgpu.barrier_wait(v_here.at[slot])
            plgpu.barrier_wait(turn)  # the tensor cores are free
            if head_dim > 128:
                total += weights.sum(axis=1)

            def await_next():
                @pl.when(number * count + step + 1 < heads * count)
                def _():
                    plgpu.barrier_wait(k_here.at[following])

            memory = None if weights_s is None else weights_s.at[warpgroup]
            sums = add_product(sums, rounded, v_s.at[slot], memory, await_next)
            plgpu.barrier_arrive(v_read.at[slot])
            return sums, new, total

        def answer(number):
            plgpu.barrier_wait(q_here.at[warpgroup])
            step = functools.partial(visit, number=number)
            carry = full((ROWS, head_dim), 0.0), full((ROWS,), LOWEST), full((ROWS,), 0.0)
            carry = jax.lax.fori_loop(0, whole_count, functools.partial(step, whole=True), carry)
            sums, highest, total = jax.lax.fori_loop(whole_count, count, functools.partial(step, whole=False), carry)
            if heads > 1:
                pl.when((count == 0) & (number < heads - 1))(lambda: fetch(number + 1))

            some = start < end
            total = jnp.where(some, total, 1.0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the head before
            result[...] = (sums * along(0, jnp.where(some, 1.0 / total, 0.0), sums.shape)).astype(out.dtype)
            lse_s[warpgroup] = jnp.where(some, highest + jnp.log(total) * LOG2E, 0.0)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(result, out.at[b, queries, first_head + number])
            plgpu.copy_smem_to_gmem(lse_s.at[warpgroup], lse.at[b, first_head + number, queries])

        fetch(0)

        @pl.when(count > 0)
        def _():
            plgpu.barrier_wait(k_here.at[0])

        pl.when(warpgroup == 1)(take_turn)
        if heads == 1:
            answer(0)
        else:
            pl.loop(0, heads)(answer)
        pl.when(warpgroup == 0)(take_turn)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def _fetch():
        plgpu.set_max_registers(24, action="decrease")
        group = q.shape[2] // k.shape[2]
        fetch_keys(k, v, k_s, v_s, k_here, v_here, k_read, v_read, count, block, row, first_head, heads, group)


def forward(
    q, k, v, k_start, k_end, settings: Settings, ranges: list[Ranges], block_k: int, k_rows: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """out [B, S, H, h], and the scores' log2-sum-exp2 [B, H, S'] of the padded length.

    `ranges` are the `key_ranges` and `whole_key_ranges` of each tile, in blocks of `block_k` keys. With `k_rows`, int32 [B],
    row b of the queries reads that row of k and v, which may have any number of them.
    """
    batch, _, heads, head_dim = q.shape
    padded = k_start.shape[1]
    several = heads_of_a_block(heads, heads * batch * padded // TILE, head_dim)
    k_rows = jnp.arange(batch, dtype=jnp.int32) if k_rows is None else k_rows
    k_rows = jnp.broadcast_to(k_rows[:, None], (batch, padded // TILE))
    run = kernel(
        functools.partial(_forward_kernel, settings=settings, heads=several),
        settings,
        kernel_name="interval_attention",
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32),
        ),
        grid=(heads // several, padded // TILE, batch),
        grid_names=("heads", "tiles", "batch"),
        scratch_types=dict(
            q_s=matrix(ROWS, head_dim, q.dtype, 2),
            k_s=matrix(block_k, head_dim, q.dtype, STAGES),
            v_s=matrix(block_k, head_dim, q.dtype, STAGES),
            out_s=matrix(ROWS, head_dim, q.dtype, 2) if several > 1 else None,
            lse_s=plgpu.SMEM((2, ROWS), jnp.float32),
            weights_s=through(block_k, q.dtype, settings),
            q_here=plgpu.Barrier(num_barriers=2),
            k_here=plgpu.Barrier(num_barriers=STAGES),
            v_here=plgpu.Barrier(num_barriers=STAGES),
            k_read=plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
            v_read=plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
            turn=plgpu.Barrier(num_arrivals=2),
        ),
    )
    return run(q, k, v, k_start, k_end, jnp.stack([*ranges[0], *ranges[1], k_rows], axis=-1))
