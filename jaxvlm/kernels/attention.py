"""Interval-mask attention: one signature, and an ordered list of implementations for each backend (see `dispatch`).

`xla` is the reference every other one is tested against, and the last resort on every backend.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxvlm.kernels import cpu_attention, intervals, tpu_attention
from jaxvlm.kernels.dispatch import Implementation, Implementations, choose, device_kind, preferred

# Above this many query-key pairs the XLA reference goes through the queries in blocks, so that its memory grows with
# the length and not with its square; below it, one block is faster.
DENSE_PAIRS = 1024 * 1024


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    k_start: jax.Array | None = None,
    k_end: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    finite: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention in which query i sees the keys `k_start[i] <= j < k_end[i]`.

    Grouped queries are native: query head n reads key head `n // (H // K)`. The softmax is float32. A query with an
    empty interval gives zeros and receives and passes on zero gradients; a key that no query sees may hold anything,
    NaN included. For rematerialisation policies the output carries the checkpoint name 'attention_out' and the scores'
    log-sum-exp 'attention_lse': with both kept nothing of the forward pass is computed again, but the scores in blocks.

    Args:
        q: [B, S, H, h].
        k, v: [B, T, K, h] with K dividing H.
        k_start, k_end: int32 [B, S]; see `jaxvlm.kernels.intervals`. What is outside 0 to T counts as cut off.
            None for both where every query sees every key.
        scale: multiplies the scores; h**-0.5 when None.
        softcap: bounds the scaled scores smoothly, softcap * tanh(score / softcap) (Gemma 2, Riviere et al. 2024, §2).
        finite: promises that keys that nobody sees and queries that see nothing hold finite numbers, which spares a pass
            over the inputs and their gradients to remove others.
        implementation: forces one by name; None takes the first that supports the call.

    Returns:
        [B, S, H, h] in q's dtype.

    Raises:
        ValueError: shapes that do not fit together, or a forced implementation that cannot serve the call.
    """
    _check_shapes(q, k, v, k_start, k_end)
    if k_start is None:
        k_start, k_end = intervals.full(q.shape[0], q.shape[1], k.shape[1])
    else:
        k_start, k_end = jnp.maximum(k_start, 0), jnp.minimum(k_end, k.shape[1])
        if not finite:
            q, k, v = intervals.cleaned(q, k, v, k_start, k_end)
    chosen = choose("attention", IMPLEMENTATIONS, jax.typeof(q), jax.typeof(k), implementation)
    return chosen.run(q, k, v, k_start, k_end, q.shape[-1] ** -0.5 if scale is None else scale, softcap)


@contextmanager
def preferring(name: str) -> Iterator[None]:
    """While this is open, calls that do not force one take this implementation where it is there and supports them.

    '' prefers none. Where it is not taken, the log says why.

    Raises:
        ValueError: no backend has an implementation of that name.
    """
    known = sorted({each.name for those in IMPLEMENTATIONS.values() for each in those})
    if name and name not in known:
        raise ValueError(f"model.attention: no implementation '{name}'; there are: {', '.join(known)}.")
    token = preferred.set(name or None)
    try:
        yield
    finally:
        preferred.reset(token)


def _check_shapes(q, k, v, k_start, k_end):
    batch, length, heads, head_dim = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f"attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit together.")
    if heads % k.shape[2]:
        raise ValueError(f"attention: {heads} query heads cannot share {k.shape[2]} key heads; K must divide H.")
    if k_start is None and k_end is None:
        return
    if k_start is None or k_end is None:
        raise ValueError("attention: k_start and k_end are both given or both None.")
    if k_start.shape != (batch, length) or k_end.shape != (batch, length):
        raise ValueError(f"attention: k_start {k_start.shape} and k_end {k_end.shape} must be {(batch, length)}.")


# -------------------------------------------------------------------------------------------------- the XLA reference


def _xla(q, k, v, k_start, k_end, scale, softcap):
    """The reference: dense for short sequences, over blocks of queries for long ones."""
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)  # [B, S, K, G, h]
    return _softmax_product(grouped, k, v, k_start, k_end, scale, softcap).reshape(q.shape)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _softmax_product(q, k, v, k_start, k_end, scale, softcap):
    """[B, S, K, G, h] queries against [B, T, K, h] keys and values -> [B, S, K, G, h]."""
    return _forward(q, k, v, k_start, k_end, scale, softcap)[0]


def _forward(q, k, v, k_start, k_end, scale, softcap):
    """The result and what the backward pass needs, which computes the weights again (Dao et al. 2022, algorithm 4)."""

    def block(_, given):
        q, k_start, k_end = given
        scores, visible = _scores(q, k, k_start, k_end, scale, softcap)
        highest = jnp.max(scores, axis=-1, keepdims=True, where=visible, initial=-1e30)
        weights = jnp.where(visible, jnp.exp(jnp.minimum(scores - highest, 0.0)), 0.0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        total = jnp.where(total == 0.0, 1.0, total)
        out = jnp.einsum("bkgst,btkh->bkgsh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        out = (out / total).astype(q.dtype).transpose(0, 3, 1, 2, 4)
        return None, (out, (highest + jnp.log(total))[..., 0].transpose(0, 3, 1, 2))  # [B, S, K, G]

    _, found = _over_blocks(block, None, (q, k_start, k_end), k.shape[1])
    out, lse = map(checkpoint_name, found, ("attention_out", "attention_lse"))
    return out, (q, k, v, k_start, k_end, out, lse)


def _backward(scale, softcap, saved, d_out):
    q, k, v, k_start, k_end, out, lse = saved
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)  # [B, S, K, G]

    def block(sums, given):
        q, k_start, k_end, d_out, lse, delta = given
        lse, delta = (x.transpose(0, 2, 3, 1)[..., None] for x in (lse, delta))  # [B, K, G, S, 1]
        scores, visible = _scores(q, k, k_start, k_end, scale, softcap)
        weights = jnp.where(visible, jnp.exp(jnp.minimum(scores - lse, 0.0)), 0.0)
        d_weights = jnp.einsum("bskgh,btkh->bkgst", d_out, v, preferred_element_type=jnp.float32)
        d_scores = weights * (d_weights - delta) * scale
        if softcap is not None:
            d_scores *= 1.0 - jnp.square(scores / softcap)
        d_scores, weights = d_scores.astype(k.dtype), weights.astype(v.dtype)
        # Keys last: what is transposed for the product is then q and d_out, and not the larger scores.
        d_k = jnp.einsum("bskgh,bkgst->bkht", q, d_scores, preferred_element_type=jnp.float32)
        d_v = jnp.einsum("bskgh,bkgst->bkht", d_out, weights, preferred_element_type=jnp.float32)
        return (sums[0] + d_k, sums[1] + d_v), jnp.einsum("bkgst,btkh->bskgh", d_scores, k).astype(q.dtype)

    zeros = jnp.zeros_like(k, jnp.float32).transpose(0, 2, 3, 1)
    sums, d_q = _over_blocks(block, (zeros, zeros), (q, k_start, k_end, d_out, lse, delta), k.shape[1])
    d_k, d_v = (x.transpose(0, 3, 1, 2).astype(k.dtype) for x in sums)
    return d_q, d_k, d_v, None, None


_softmax_product.defvjp(_forward, _backward)


def _scores(q, k, k_start, k_end, scale, softcap):
    """float32 [B, K, G, S, T], and which of them count, bool [B, 1, 1, S, T]."""
    scores = jnp.einsum("bskgh,btkh->bkgst", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    index = jnp.arange(k.shape[1])
    return scores, ((k_start[..., None] <= index) & (index < k_end[..., None]))[:, None, None]


def _over_blocks(block, carry, given, keys: int):
    """`jax.lax.scan` of `block` over blocks of queries: axis 1 of what is given and of what it returns."""
    length = given[0].shape[1]
    blocks = _num_blocks(length, keys)
    if blocks == 1:
        return block(carry, given)
    size = math.ceil(length / blocks)

    def split(x):  # [B, S, ...] -> [blocks, B, size, ...]; the rows added at the end have empty intervals
        x = jnp.pad(x, [(0, 0), (0, blocks * size - length)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(len(x), blocks, size, *x.shape[2:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(x.shape[1], blocks * size, *x.shape[3:])[:, :length]

    carry, found = jax.lax.scan(block, carry, jax.tree.map(split, given))
    return carry, jax.tree.map(join, found)


def _num_blocks(length: int, keys: int) -> int:
    pairs = length * keys
    return 1 if pairs <= DENSE_PAIRS else min(length, math.ceil(2 * pairs / DENSE_PAIRS))


# ---------------------------------------------------------------------------------------------------------- GPU kernels


def hopper_supports(q, k) -> str | None:
    """None, or why the Hopper kernels cannot serve arrays of these types and head dimension (the last)."""
    return _mosaic_supports(q, k, "Hopper", r"\bG?H\d{2,3}\b", 256)


def _ampere_supports(q, k) -> str | None:
    """As `hopper_supports`. Hopper GPUs run these kernels too."""
    return _mosaic_supports(q, k, "Ampere", r"\b(A|G?H)\d{2,3}\b", 128)


def _mosaic_supports(q, k, family: str, kinds: str, widest: int) -> str | None:
    if jax.__version_info__ < (0, 11, 2):
        return f"needs jax 0.11.2, which needs Python 3.12; this is {jax.__version__}"
    if not re.search(kinds, device_kind()):
        return f"written for {family} GPUs, not {device_kind()}"
    if {q.dtype, k.dtype} != {jnp.dtype(jnp.bfloat16)}:
        return f"no kernel for {q.dtype}"
    if q.shape[-1] > widest:
        return f"head dimension {q.shape[-1]} is above {widest}"
    return None


def _hopper(*arguments) -> jax.Array:
    from jaxvlm.kernels import hopper_attention  # takes a second to import and needs a new jax

    return hopper_attention.attention(*arguments)


def _ampere(*arguments) -> jax.Array:
    from jaxvlm.kernels import ampere_attention

    return ampere_attention.attention(*arguments)


XLA = Implementation("xla", lambda q, k: None, _xla)
XLA_TILES = Implementation("xla_tiles", cpu_attention.supports, cpu_attention.attention)
PALLAS_TPU = Implementation("pallas_tpu", tpu_attention.supports, tpu_attention.attention)
PALLAS_HOPPER = Implementation("pallas_hopper", hopper_supports, _hopper)
PALLAS_AMPERE = Implementation("pallas_ampere", _ampere_supports, _ampere)

# In order of preference. A kernel joins by a line in its backend's list.
IMPLEMENTATIONS: Implementations = {
    "cpu": (XLA_TILES, XLA),
    "gpu": (PALLAS_HOPPER, PALLAS_AMPERE, XLA),
    "tpu": (PALLAS_TPU, XLA),
}
