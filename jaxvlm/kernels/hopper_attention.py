"""Interval attention on Hopper GPUs (Pallas Mosaic GPU): flash kernels that skip the blocks outside the intervals.

The forward kernel follows Shah et al. 2024 (FlashAttention-3, §3) in the form of jax's own example of it: one warpgroup
fetches blocks of keys and values (TMA) into a ring, two others answer 64 queries each (wgmma), and take turns with the
tensor cores, so that one's softmax runs beside the other's products. New here are the intervals: a tile of 128 queries
visits the range of key blocks that its intervals touch, known only at run time, those that all queries see whole first and
without a mask. Copies past the end of a sequence read zeros and write nothing, so a length is padded to eights only.
Needs jax 0.11.2 or newer.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxvlm.kernels import intervals
from jaxvlm.kernels.hopper_backward import key_gradients, query_gradients
from jaxvlm.kernels.hopper_forward import forward
from jaxvlm.kernels.hopper_pieces import TILE, Settings

INTERPRET: Any = None  # tests put an InterpretGPUParams here


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(q, k, v, k_start, k_end, settings: Settings) -> jax.Array:
    return forward(q, k, v, k_start, k_end, settings)[0]


def _flash_forward(q, k, v, k_start, k_end, settings: Settings):
    # Named, so that a rematerialisation policy can keep them: the kernel is then not run again.
    out, lse = map(checkpoint_name, forward(q, k, v, k_start, k_end, settings), ("attention_out", "attention_lse"))
    return out, (q, k, v, out, lse, k_start, k_end)


def _flash_backward(settings: Settings, saved, d_out):
    q, k, v, out, lse, k_start, k_end = saved
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)  # [B, H, S]
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, lse.shape[2] - delta.shape[2])))
    given = (q, k, v, d_out, lse, delta, k_start, k_end, settings)
    dq = query_gradients(*given)
    if q.shape[3] <= 128:
        dk, dv = key_gradients(*given, wanted=("dk", "dv"))
    else:  # the registers hold the sums of one of them
        (dk,), (dv,) = (key_gradients(*given, wanted=(name,)) for name in ("dk", "dv"))
    return dq, dk, dv, None, None


_flash.defvjp(_flash_forward, _flash_backward)
