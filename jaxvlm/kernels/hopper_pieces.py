"""What the attention kernels on Hopper are made of: memory, registers, products, masks.

A kernel here has three warpgroups: two that compute, 64 rows each, and one that fetches blocks into a ring.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of a warpgroup that computes, which is those of one wgmma
TILE = 2 * ROWS  # of the two
STAGES = 2  # blocks in a ring
MULTIPROCESSORS = 132  # of an H100 or H200
LOG2E = math.log2(math.e)
LOWEST = -(2.0**100)  # a power of two: times a factor it has no rounding error, which exp2 would blow up


class Settings(NamedTuple):
    """What a kernel is specialised to. `interpret` is an InterpretGPUParams or None."""

    scale: float
    softcap: float | None
    interpret: Any


def kernel(body, settings: Settings, **options):
    return plgpu.kernel(
        body,
        num_threads=3,
        thread_name="warpgroups",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=settings.interpret,
        **options,
    )


# ------------------------------------------------------------------------------------------------ memory and registers


def matrix(rows: int, columns: int, dtype, *leading: int, block: int = ROWS) -> plgpu.SMEM:
    """Shared memory [*leading, rows, columns] in the form that TMA writes and wgmma reads.

    All matrices of a product have the same swizzle, and of its right side it takes so many rows at a time; so `block` is the
    smallest number of rows in a kernel.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = min(plgpu.find_swizzle(columns * size * 8), block * size)
    tiling = plgpu.TilingTransform((8, swizzle // size))
    return plgpu.SMEM((*leading, rows, columns), dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def through(columns: int, dtype, settings: Settings) -> plgpu.SMEM | None:
    """Where `add_product` puts its left side in the interpreter, which wants both sides in shared memory."""
    return matrix(ROWS, columns, dtype, 2) if settings.interpret else None


def full(shape: tuple[int, ...], value: float) -> jax.Array:
    """float32 in the registers of a warpgroup: a matrix, or a number for each of its rows."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def vector(source, axis: int) -> jax.Array:
    """From memory to registers: a number for each row (axis 0) or each column (axis 1) of a matrix."""
    return plgpu.load(source, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


def along(axis: int, x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """`x` has a number for each row (axis 0) or each column (axis 1)."""
    return jax.lax.broadcast_in_dim(x, shape, [axis])


def slot_of(step):
    return jax.lax.rem(step, jnp.int32(STAGES))


# ------------------------------------------------------------------------------------------------------------ products


def products(*pairs, shape: tuple[int, int], meanwhile=lambda: None) -> list[jax.Array]:
    """a @ b for pairs of matrices in shared memory; `meanwhile` runs while the tensor cores do."""

    def run(*sums):
        for total, (a, b) in zip(sums, pairs, strict=True):
            plgpu.wgmma(total, a, b)
        meanwhile()
        return [total[...] for total in sums]

    return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32)] * len(pairs))


def add_product(sums: jax.Array, a: jax.Array, b, memory, meanwhile=lambda: None) -> jax.Array:
    """sums + a @ b for `a` in registers and `b` in shared memory; `memory` is what `through` gave for this warpgroup."""
    if memory is not None:
        memory[...] = a
        plgpu.commit_smem()
        return sums + products((memory, b), shape=sums.shape, meanwhile=meanwhile)[0]

    def run(total):
        plgpu.wgmma(total, a, b)
        meanwhile()

    return pl.run_state(run)(plgpu.ACC.init(sums))


# -------------------------------------------------------------------------------------------------------------- scores


def bend(scores: jax.Array, settings: Settings) -> tuple[jax.Array, float]:
    """What is left to multiply by to have scores in powers of two, and the factor. With a soft cap it is a tanh."""
    if settings.softcap is None:
        return scores, settings.scale * LOG2E
    return jnp.tanh(scores * (settings.scale / settings.softcap)), settings.softcap * LOG2E


def visible(
    start: jax.Array, end: jax.Array, first_key, shape: tuple[int, int], key_axis: int, layout=plgpu.Layout.WGMMA
) -> jax.Array:
    """bool of `shape`: queries with intervals `start` to `end` along one axis, keys from `first_key` along the other."""
    key = first_key + plgpu.broadcasted_iota(jnp.int32, shape, key_axis, layout=layout)
    return (key >= along(1 - key_axis, start, shape)) & (key < along(1 - key_axis, end, shape))


def block_of(step, first, whole_first, whole_count):
    """The key block of a step: first those that need no mask, then those before them, then those after them."""
    rest = step - whole_count
    masked = first + rest + jnp.where(rest < whole_first - first, 0, whole_count)
    return jnp.where(step < whole_count, whole_first + step, masked)


def heads_of_a_block(heads: int, tiles: int, head_dim: int) -> int:
    """How many heads a block of threads answers one after the other, so that one's first copies are made while another's last
    products are; `tiles` are those of all heads. Wide heads leave no memory for it, and too few blocks keep no GPU busy."""
    fitting = [n for n in (4, 2) if heads % n == 0 and tiles // n >= 4 * MULTIPROCESSORS]
    return fitting[0] if fitting and head_dim <= 128 else 1


def fetch_keys(k, v, k_s, v_s, k_here, v_here, k_read, v_read, count, block, b, first_head, heads, group):
    """The fetching warpgroup's work where queries visit keys: `count` blocks, `block(step)`, of k and of v into their rings,
    for each of `heads` heads, of which `group` in a row share keys."""
    block_k = k_s.shape[1]

    @pl.loop(0, count * heads)
    def _(step):
        slot, number = slot_of(step), jax.lax.div(step, count)
        keys = pl.ds(block(step - number * count) * block_k, block_k)
        kv_head = jax.lax.div(first_head + number, jnp.int32(group))
        for source, ring, here, read in ((k, k_s, k_here, k_read), (v, v_s, v_here, v_read)):
            await_read(read, step)
            plgpu.copy_gmem_to_smem(source.at[b, keys, kv_head], ring.at[slot], here.at[slot])

    drain((k_read, v_read), count * heads)


def await_read(read, step):
    """Until what lay in this step's slot has been read."""

    @pl.when(step >= STAGES)
    def _():
        plgpu.barrier_wait(read.at[slot_of(step)])


def drain(barriers, count):
    """Every arrival is to be awaited: those of the last blocks as well."""

    @pl.loop(jnp.maximum(count - STAGES, 0), count)
    def _(step):
        for read in barriers:
            plgpu.barrier_wait(read.at[slot_of(step)])
