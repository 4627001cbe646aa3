"""Attention of one new token a row over the cache of a decoder: what generation spends its memory traffic on."""

import jax
import jax.numpy as jnp

from jaxvlm.kernels import tpu_decode
from jaxvlm.kernels.attention import hopper_supports
from jaxvlm.kernels.dispatch import Implementation, Implementations, choose


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array | int,
    *,
    k_start: jax.Array,
    k_end: jax.Array,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention of one query a row and head over the slots `k_start[b] <= j < k_end[b]` of a layer's cache.

    As `kernels.attention` (grouped queries, scale, softcap, empty intervals, the choice of an implementation), but for one
    thing: a slot outside the interval must hold finite numbers, since nothing goes over the cache to remove others. The
    caches of all layers are given, so that a kernel reads its layer's where it lies.

    Args:
        q: [B, H, h].
        k, v: [L, B, K, T, h] with K dividing H.
        layer: int32 scalar, 0 <= layer < L.
        k_start, k_end: int32 [B]; what is outside 0 to T counts as cut off.

    Returns:
        [B, H, h] in q's dtype.

    Raises:
        ValueError: shapes that do not fit together, or a forced implementation that cannot serve the call.
    """
    batch, heads, head_dim = q.shape
    if k.shape != v.shape or k.shape[1] != batch or k.shape[4] != head_dim or heads % k.shape[2]:
        raise ValueError(f"decode attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit together.")
    if k_start.shape != (batch,) or k_end.shape != (batch,):
        raise ValueError(f"decode attention: k_start {k_start.shape} and k_end {k_end.shape} must be {(batch,)}.")
    k_start, k_end = jnp.maximum(k_start, 0), jnp.minimum(k_end, k.shape[3])
    chosen = choose("decode attention", IMPLEMENTATIONS, jax.typeof(q), jax.typeof(k), implementation)
    grouped = q.reshape(batch, k.shape[2], -1, head_dim)  # [B, K, G, h]
    scale = head_dim**-0.5 if scale is None else scale
    return chosen.run(grouped, k, v, jnp.int32(layer), k_start, k_end, scale, softcap).reshape(q.shape)


def _xla(q, k, v, layer, k_start, k_end, scale, softcap):
    """The reference: [B, K, G, h] of queries [B, K, G, h]."""
    k, v = (x[layer].astype(q.dtype) for x in (k, v))  # [B, K, T, h]
    scores = jnp.einsum("bkgh,bkth->bkgt", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    slot = jnp.arange(k.shape[2])
    visible = ((k_start[:, None] <= slot) & (slot < k_end[:, None]))[:, None, None]  # [B, 1, 1, T]
    highest = jnp.max(scores, axis=-1, keepdims=True, where=visible, initial=-1e30)
    weights = jnp.where(visible, jnp.exp(jnp.minimum(scores - highest, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bkgt,bkth->bkgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / jnp.where(total == 0.0, 1.0, total)).astype(q.dtype)


def _hopper_supports(q, k) -> str | None:
    (*_, slots, head_dim), reason = k.shape, hopper_supports(q, k)
    if reason is None and head_dim % 16:
        reason = f"head dimension {head_dim} is no multiple of 16"
    if reason is None and slots % 8:
        reason = f"{slots} slots are no multiple of 8"
    return reason


def _hopper(*arguments) -> jax.Array:
    from jaxvlm.kernels import hopper_attention  # takes a second to import and needs a new jax

    return hopper_attention.decode_attention(*arguments)


XLA = Implementation("xla", lambda q, k: None, _xla)
PALLAS_TPU = Implementation("pallas_tpu", tpu_decode.supports, tpu_decode.decode_attention)
PALLAS_HOPPER = Implementation("pallas_hopper", _hopper_supports, _hopper)
IMPLEMENTATIONS: Implementations = {"cpu": (XLA,), "gpu": (PALLAS_HOPPER, XLA), "tpu": (PALLAS_TPU, XLA)}
