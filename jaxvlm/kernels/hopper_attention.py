"""Interval attention on Hopper GPUs (Pallas Mosaic GPU): flash kernels that skip the blocks outside the intervals.

The forward kernel follows Shah et al. 2024 (FlashAttention-3, §3) in the form of jax's own example of it: one warpgroup
fetches blocks of keys and values (TMA) into a ring, two others answer 64 queries each (wgmma), and take turns with the
tensor cores, so that one's softmax runs beside the other's products. New here are the intervals: a tile of 128 queries
visits the range of key blocks that its intervals touch, known only at run time, those that all queries see whole first and
without a mask. Copies past the end of a sequence read zeros and write nothing, so a length is padded to eights only.
Needs jax 0.11.2 or newer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxvlm.kernels.block_ranges import Ranges, key_ranges, whole_key_ranges
from jaxvlm.kernels.flash import differentiable
from jaxvlm.kernels.hopper_backward import key_gradients, query_gradients
from jaxvlm.kernels.hopper_forward import forward
from jaxvlm.kernels.hopper_pieces import MULTIPROCESSORS, TILE, Settings

INTERPRET: Any = None  # tests put an InterpretGPUParams here
DECODE_BLOCK = 64  # slots, of which a row's last block reads too many


def attention(q, k, v, k_start, k_end, scale: float, softcap: float | None) -> jax.Array:
    """As `jaxvlm.kernels.attention.attention`, for intervals within the keys, a positive scale and finite numbers."""
    if scale <= 0:
        raise ValueError(f"attention: the Hopper kernel needs a positive scale, not {scale}.")
    length, head_dim = q.shape[1], q.shape[3]
    settings = Settings(scale, softcap, INTERPRET)
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, -head_dim % 16))) for x in (q, k, v))
    # The queries past the end see what the last one sees, so that they never keep a block from being whole.
    rows = (jnp.pad(x, ((0, 0), (0, -length % TILE)), mode="edge") for x in (k_start, k_end))
    return _flash(q, k, v, *rows, settings)[:, :length, :, :head_dim]


def decode_attention(q, k, v, layer, k_start, k_end, scale: float, softcap: float | None) -> jax.Array:
    """As `jaxvlm.kernels.decode_attention`, of queries [B, K, G, h], for intervals within the cache.

    The forward kernel with a group's heads as its queries. Where there are fewer rows and key heads than multiprocessors, a
    row's slots are shared out and the parts put together (Dao et al. 2023, Flash-Decoding).
    """
    if scale <= 0:
        raise ValueError(f"decode attention: the Hopper kernel needs a positive scale, not {scale}.")
    batch, kv_heads, group, head_dim = q.shape
    slots, rows = k.shape[3], batch * kv_heads
    parts = _parts(rows, slots)
    size = -(-slots // parts)
    part = jnp.arange(parts, dtype=jnp.int32) * size

    def shared(x):  # [B] -> [B * K * parts]
        x = jnp.clip(x[:, None], part, part + size)
        return jnp.broadcast_to(x[:, None], (batch, kv_heads, parts)).reshape(-1)

    start, end = shared(k_start)[:, None], shared(k_end)[:, None]
    k_rows = jnp.repeat(layer * rows + jnp.arange(rows, dtype=jnp.int32), parts)
    queries = jnp.broadcast_to(q.reshape(rows, 1, group, 1, head_dim), (rows, parts, group, 1, head_dim))
    queries = jnp.pad(queries.reshape(-1, group, 1, head_dim), ((0, 0), (0, -group % 8), (0, 0), (0, 0)))
    k, v = (x.reshape(-1, slots, 1, head_dim) for x in (k, v))
    ranges = _ranges(start, end, 1, DECODE_BLOCK)  # all of a tile's queries see the same
    start, end = (jnp.broadcast_to(x, (len(x), TILE)) for x in (start, end))
    out, lse = forward(queries, k, v, start, end, Settings(scale, softcap, INTERPRET), ranges, DECODE_BLOCK, k_rows)
    out = out[:, :group, 0]
    if parts == 1:
        return out.reshape(q.shape)
    out = out.reshape(rows, parts, group, head_dim).astype(jnp.float32)
    some = (start < end)[:, :1].reshape(rows, parts, 1)
    lse = jnp.where(some, lse[:, 0, :group].reshape(rows, parts, group), -jnp.inf)
    highest = jnp.maximum(lse.max(axis=1, keepdims=True), -1e30)  # a row may see nothing
    shares = jnp.exp2(lse - highest)
    total = shares.sum(axis=1, keepdims=True)
    shares = shares / jnp.where(total == 0.0, 1.0, total)
    return (out * shares[..., None]).sum(axis=1).astype(q.dtype).reshape(q.shape)


def _parts(rows: int, slots: int) -> int:
    """Into how many parts a row's slots are shared out, each of them a block of threads, of which a multiprocessor runs one
    at a time: the number that takes the least time, the start of a block of threads counted as 256 slots."""

    def time(parts: int) -> int:
        return -(-rows * parts // MULTIPROCESSORS) * (-(-slots // parts // DECODE_BLOCK) * DECODE_BLOCK + 256)

    return min(range(1, -(-slots // 128) + 1), key=time)


def _forward(q, k, v, k_start, k_end, settings: Settings) -> tuple[jax.Array, jax.Array]:
    block_k = 128 if q.shape[3] <= 128 else 64
    return forward(q, k, v, k_start, k_end, settings, _ranges(k_start, k_end, TILE, block_k), block_k)


def _ranges(k_start, k_end, block_q: int, block_k: int) -> list[Ranges]:
    return [of(k_start, k_end, block_q, block_k) for of in (key_ranges, whole_key_ranges)]


def _backward(q, k, v, out, lse, d_out, k_start, k_end, settings: Settings) -> tuple[jax.Array, jax.Array, jax.Array]:
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).swapaxes(1, 2)  # [B, H, S]
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, lse.shape[2] - delta.shape[2])))
    given = (q, k, v, d_out, lse, delta, k_start, k_end, settings)
    dq = query_gradients(*given)
    if q.shape[3] <= 128:
        dk, dv = key_gradients(*given, wanted=("dk", "dv"))
    else:  # the registers hold the sums of one of them
        (dk,), (dv,) = (key_gradients(*given, wanted=(name,)) for name in ("dk", "dv"))
    return dq, dk, dv


_flash = differentiable(_forward, _backward)
