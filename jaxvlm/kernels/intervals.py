"""Attention masks as intervals: query i sees exactly the keys `k_start[i] <= j < k_end[i]`.

Causal, bidirectional, packed, padded and sliding-window attention are all of this form, so no [S, T] mask is ever
built outside a kernel, and a kernel can skip every block that lies outside the intervals of its queries.
`segment_ids` number the conversations of a packed row 1, 2, ... in contiguous runs; 0 is padding and sees nothing.
"""

import jax
import jax.numpy as jnp


def causal(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each token sees itself and what precedes it in its own segment.

    `segment_ids` int32 [B, S] -> k_start, k_end int32 [B, S].
    """
    start, _ = bidirectional(segment_ids)
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    end = jnp.where(segment_ids == 0, 0, index + 1)
    return start, end


def bidirectional(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each token sees its whole segment. `segment_ids` int32 [B, S] -> k_start, k_end int32 [B, S]."""
    length = segment_ids.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]  # [B, S - 1]
    edge = jnp.ones_like(segment_ids[:, :1], dtype=bool)
    first = jnp.concatenate([edge, changes], axis=1)
    last = jnp.concatenate([changes, edge], axis=1)
    start = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    end = jax.lax.cummin(jnp.where(last, index + 1, length), axis=1, reverse=True)
    padding = segment_ids == 0
    return jnp.where(padding, 0, start), jnp.where(padding, 0, end)


def full(batch: int, q_length: int, k_length: int) -> tuple[jax.Array, jax.Array]:
    """Every query sees every key: k_start, k_end int32 [batch, q_length]."""
    shape = (batch, q_length)
    return jnp.zeros(shape, jnp.int32), jnp.full(shape, k_length, jnp.int32)


def limit(k_start: jax.Array, k_end: jax.Array, window: int | None) -> jax.Array:
    """The start of each interval after keeping only its last `window` keys (all of them when `window` is None).

    Of a causal interval that is a sliding window as Mistral counts it, the token itself included.
    """
    return k_start if window is None else jnp.maximum(k_start, k_end - window)


def without_blind(q: jax.Array, k_start: jax.Array, k_end: jax.Array) -> jax.Array:
    """Queries [B, S, ...] that see nothing made zero, whatever they held."""
    return jnp.where((k_start < k_end)[..., None, None], q, 0)


def without_unseen(k: jax.Array, k_start: jax.Array, k_end: jax.Array) -> jax.Array:
    """Keys or values [B, T, ...] that no query sees made zero, whatever they held.

    0 * NaN is NaN, in the backward pass too: such entries have to be zero before they meet a product.
    """
    return jnp.where(seen(k_start, k_end, k.shape[1])[..., None, None], k, 0)


def cleaned(
    q: jax.Array, k: jax.Array, v: jax.Array, k_start: jax.Array, k_end: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The inputs of attention with all that is not used made zero."""
    k, v = (without_unseen(x, k_start, k_end) for x in (k, v))
    return without_blind(q, k_start, k_end), k, v


def seen(k_start: jax.Array, k_end: jax.Array, keys: int) -> jax.Array:
    """bool [B, T]: the keys that lie in any query's interval, by counting the intervals that open and close."""
    start, end = jnp.clip(k_start, 0, keys), jnp.clip(k_end, 0, keys)
    opens = (start < end).astype(jnp.int32)
    row = jnp.arange(start.shape[0])[:, None]
    edges = jnp.zeros((start.shape[0], keys + 1), jnp.int32).at[row, start].add(opens).at[row, end].add(-opens)
    return jnp.cumsum(edges, axis=1)[:, :keys] > 0
