"""Backward pass of attention on Hopper: see `hopper_attention`.

Two kernels, each of which owns what it writes, so the sums are taken in one order and the result is the same every time
(Dao 2023, FlashAttention-2, algorithm 2, divided in two). Both compute the weights anew: seven products in all.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxvlm.kernels.block_ranges import key_ranges, query_ranges, whole_key_ranges, whole_query_ranges
from jaxvlm.kernels.hopper_pieces import (
    ROWS,
    STAGES,
    TILE,
    Settings,
    add_product,
    along,
    await_read,
    bend,
    block_of,
    drain,
    fetch_keys,
    full,
    kernel,
    matrix,
    products,
    slot_of,
    through,
    vector,
    visible,
)

# ------------------------------------------------------------------------------------------------- gradients of queries


def _query_kernel(
    q, k, v, d_out, lse, delta, k_start, k_end, ranges, dq, *,
    q_s, d_out_s, k_s, v_s, d_scores_s, q_here, k_here, v_here, k_read, v_read, settings: Settings,
):  # fmt: skip
    b, h, i = (jax.lax.axis_index(name) for name in ("batch", "heads", "tiles"))
    i = k_start.shape[1] // TILE - 1 - i  # under a causal mask the longest first
    warpgroup = jax.lax.axis_index("warpgroups")
    block_k, head_dim = k_s.shape[1:]
    first, count, whole_first, whole_count = (ranges[b, i, n] for n in range(4))
    block = functools.partial(block_of, first=first, whole_first=whole_first, whole_count=whole_count)

    @pl.when(warpgroup < 2)
    def _differentiate():
        plgpu.set_max_registers(240, action="increase")
        queries = pl.ds(i * TILE + warpgroup * ROWS, ROWS)
        mine, d_mine = q_s.at[warpgroup], d_out_s.at[warpgroup]
        for source, target in ((q, mine), (d_out, d_mine)):
            plgpu.copy_gmem_to_smem(source.at[b, queries, h], target, q_here.at[warpgroup])
        start, end = (vector(x.at[b, queries], axis=0) for x in (k_start, k_end))
        my_lse, my_delta = (vector(x.at[b, h, queries], axis=0) for x in (lse, delta))
        shape = (ROWS, block_k)
        plgpu.barrier_wait(q_here.at[warpgroup])

        def visit(step, sums, whole: bool):
            slot = slot_of(step)
            plgpu.barrier_wait(k_here.at[slot])
            plgpu.barrier_wait(v_here.at[slot])
            scores, d_weights = products((mine, k_s.at[slot].T), (d_mine, v_s.at[slot].T), shape=shape)
            plgpu.barrier_arrive(v_read.at[slot])
            bent, to_log2 = bend(scores, settings)
            d_scores = jnp.exp2(bent * to_log2 - along(0, my_lse, shape)) * (d_weights - along(0, my_delta, shape))
            if settings.softcap is not None:
                d_scores *= 1.0 - bent * bent
            if not whole:
                d_scores = jnp.where(visible(start, end, block(step) * block_k, shape, key_axis=1), d_scores, 0.0)
            memory = None if d_scores_s is None else d_scores_s.at[warpgroup]
            sums = add_product(sums, d_scores.astype(k_s.dtype), k_s.at[slot], memory)
            plgpu.barrier_arrive(k_read.at[slot])
            return sums

        sums = full((ROWS, head_dim), 0.0)
        sums = jax.lax.fori_loop(0, whole_count, functools.partial(visit, whole=True), sums)
        sums = jax.lax.fori_loop(whole_count, count, functools.partial(visit, whole=False), sums)
        mine[...] = (sums * settings.scale).astype(dq.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, dq.at[b, queries, h])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def _fetch():
        plgpu.set_max_registers(24, action="decrease")
        fetch_keys(k, v, k_s, v_s, k_here, v_here, k_read, v_read, count, block, b, h, 1, q.shape[2] // k.shape[2])


def query_gradients(q, k, v, d_out, lse, delta, k_start, k_end, settings: Settings) -> jax.Array:
    """dq [B, S, H, h]; `lse` and `delta` are [B, H, S']."""
    batch, _, heads, head_dim = q.shape
    block_k = 128 if head_dim <= 128 else 32
    ranges = [of(k_start, k_end, TILE, block_k) for of in (key_ranges, whole_key_ranges)]

    def of(rows: int, count: int):
        return matrix(rows, head_dim, q.dtype, count, block=min(block_k, ROWS))

    run = kernel(
        functools.partial(_query_kernel, settings=settings),
        settings,
        kernel_name="interval_attention_dq",
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(heads, k_start.shape[1] // TILE, batch),
        grid_names=("heads", "tiles", "batch"),
        scratch_types=dict(
            **{name: of(ROWS, 2) for name in ("q_s", "d_out_s")},
            **{name: of(block_k, STAGES) for name in ("k_s", "v_s")},
            d_scores_s=through(block_k, q.dtype, settings),
            q_here=plgpu.Barrier(num_barriers=2, num_arrivals=2),
            k_here=plgpu.Barrier(num_barriers=STAGES),
            v_here=plgpu.Barrier(num_barriers=STAGES),
            k_read=plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
            v_read=plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
        ),
    )
    return run(q, k, v, d_out, lse, delta, k_start, k_end, jnp.stack([*ranges[0], *ranges[1]], axis=-1))


# ----------------------------------------------------------------------------------------- gradients of keys and values


def _key_kernel(
    q, k, v, d_out, lse, delta, k_start, k_end, ranges, *outputs_and_scratch,
    k_s, v_s, q_s, d_out_s, start_s, end_s, lse_s, delta_s, through_s, kv_here, q_here, d_out_here, q_read, d_out_read,
    settings: Settings, wanted: tuple[str, ...],
):  # fmt: skip
    gradients = dict(zip(wanted, outputs_and_scratch, strict=True))
    b, kv_head, j = (jax.lax.axis_index(name) for name in ("batch", "kv_heads", "tiles"))
    warpgroup = jax.lax.axis_index("warpgroups")
    block_q, head_dim = q_s.shape[1:]
    group = q.shape[2] // k.shape[2]
    first, count, whole_first, whole_count = (ranges[b, j, n] for n in range(4))
    block = functools.partial(block_of, first=first, whole_first=whole_first, whole_count=whole_count)

    @pl.when(warpgroup < 2)
    def _differentiate():
        plgpu.set_max_registers(240, action="increase")
        first_key = j * TILE + warpgroup * ROWS
        keys = pl.ds(first_key, ROWS)
        my_k, my_v = k_s.at[warpgroup], v_s.at[warpgroup]
        memory = None if through_s is None else through_s.at[warpgroup]
        for source, target in ((k, my_k), (v, my_v)):
            plgpu.copy_gmem_to_smem(source.at[b, keys, kv_head], target, kv_here.at[warpgroup])
        plgpu.barrier_wait(kv_here.at[warpgroup])
        shape = (ROWS, block_q)

        def visit(step, sums, head, whole: bool):
            sums, slot = dict(sums), slot_of(head * count + step)
            plgpu.barrier_wait(q_here.at[slot])
            if "dk" in wanted:
                plgpu.barrier_wait(d_out_here.at[slot])
                scores, d_weights = products((my_k, q_s.at[slot].T), (my_v, d_out_s.at[slot].T), shape=shape)
            else:
                (scores,) = products((my_k, q_s.at[slot].T), shape=shape)
            bent, to_log2 = bend(scores, settings)
            weights = jnp.exp2(bent * to_log2 - along(1, vector(lse_s.at[slot], axis=1), shape))
            if not whole:
                start, end = (vector(x.at[slot], axis=1) for x in (start_s, end_s))
                weights = jnp.where(visible(start, end, first_key, shape, key_axis=0), weights, 0.0)
            if "dk" not in wanted:
                plgpu.barrier_wait(d_out_here.at[slot])
            if "dv" in wanted:
                sums["dv"] = add_product(sums["dv"], weights.astype(q_s.dtype), d_out_s.at[slot], memory)
            if "dk" in wanted:
                d_scores = weights * (d_weights - along(1, vector(delta_s.at[slot], axis=1), shape))
                if settings.softcap is not None:
                    d_scores *= 1.0 - bent * bent
            plgpu.barrier_arrive(d_out_read.at[slot])
            if "dk" in wanted:
                sums["dk"] = add_product(sums["dk"], d_scores.astype(q_s.dtype), q_s.at[slot], memory)
            plgpu.barrier_arrive(q_read.at[slot])
            return sums

        def add_head(head, sums):
            step = functools.partial(visit, head=head)
            sums = jax.lax.fori_loop(0, whole_count, functools.partial(step, whole=True), sums)
            return jax.lax.fori_loop(whole_count, count, functools.partial(step, whole=False), sums)

        sums = jax.lax.fori_loop(0, group, add_head, {name: full((ROWS, head_dim), 0.0) for name in wanted})
        for name, factor, staged in (("dk", settings.scale, my_k), ("dv", 1.0, my_v)):
            if name in wanted:
                staged[...] = (sums[name] * factor).astype(k_s.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staged, gradients[name].at[b, keys, kv_head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def _fetch():
        plgpu.set_max_registers(24, action="decrease")

        @pl.loop(0, count * group)
        def _(step):
            slot, head = slot_of(step), jax.lax.div(step, count)
            h = kv_head * group + head
            queries = pl.ds(block(step - head * count) * block_q, block_q)
            await_read(q_read, step)
            for source, ring in ((q.at[b, queries, h], q_s), (lse.at[b, h, queries], lse_s)):
                plgpu.copy_gmem_to_smem(source, ring.at[slot], q_here.at[slot])
            for source, ring in ((k_start.at[b, queries], start_s), (k_end.at[b, queries], end_s)):
                plgpu.copy_gmem_to_smem(source, ring.at[slot], q_here.at[slot])
            await_read(d_out_read, step)
            for source, ring in ((d_out.at[b, queries, h], d_out_s), (delta.at[b, h, queries], delta_s)):
                plgpu.copy_gmem_to_smem(source, ring.at[slot], d_out_here.at[slot])

        drain((q_read, d_out_read), count * group)


def key_gradients(
    q, k, v, d_out, lse, delta, k_start, k_end, settings: Settings, wanted: tuple[str, ...]
) -> list[jax.Array]:
    """Of "dk" and "dv" [B, T, K, h] those that are wanted; `lse` and `delta` are [B, H, S']."""
    batch, keys, kv_heads, head_dim = k.shape
    block_q = 128 if head_dim <= 64 else 64 if head_dim <= 128 else 32
    tiles = pl.cdiv(keys, TILE)
    ranges = (
        *query_ranges(k_start, k_end, block_q, TILE, tiles),
        *whole_query_ranges(k_start, k_end, block_q, TILE, tiles, keys),
    )

    def of(rows: int, count: int):
        return matrix(rows, head_dim, q.dtype, count, block=min(block_q, ROWS))

    of_queries = {name: plgpu.SMEM((STAGES, block_q), jnp.float32) for name in ("lse_s", "delta_s")}
    of_queries |= {name: plgpu.SMEM((STAGES, block_q), jnp.int32) for name in ("start_s", "end_s")}
    run = kernel(
        functools.partial(_key_kernel, settings=settings, wanted=wanted),
        settings,
        kernel_name="interval_attention_" + "_".join(wanted),
        out_type=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * len(wanted),
        grid=(kv_heads, tiles, batch),
        grid_names=("kv_heads", "tiles", "batch"),
        scratch_types=dict(
            **{name: of(ROWS, 2) for name in ("k_s", "v_s")},
            **{name: of(block_q, STAGES) for name in ("q_s", "d_out_s")},
            **of_queries,
            through_s=through(block_q, q.dtype, settings),
            kv_here=plgpu.Barrier(num_barriers=2, num_arrivals=2),
            q_here=plgpu.Barrier(num_barriers=STAGES, num_arrivals=4),
            d_out_here=plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
            q_read=plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
            d_out_read=plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
        ),
    )
    return run(q, k, v, d_out, lse, delta, k_start, k_end, jnp.stack(ranges, axis=-1))
