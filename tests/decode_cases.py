"""Cases for decode attention, which every kernel's tests run beside the XLA reference."""

import jax.numpy as jnp
import numpy as np

from jaxvlm.kernels.decode_attention import decode_attention

# rows, key heads, queries' heads for each, slots, head dimension, soft cap: several blocks, with ragged ends.
SHAPES = [(4, 2, 3, 300, 64, None), (3, 1, 8, 130, 128, 5.0), (3, 3, 1, 64, 16, None)]


def drawn(seed: int, shape: tuple, dtype=jnp.float32) -> tuple:
    """q, the caches of two layers, the second layer's number, and intervals of which one is empty and one beyond the ends."""
    rows, kv_heads, group, slots, head_dim, _ = shape
    rng = np.random.default_rng(seed)
    sizes = (rows, kv_heads * group, head_dim), *2 * [(2, rows, kv_heads, slots, head_dim)]
    q, k, v = (jnp.asarray(rng.normal(size=size), dtype) for size in sizes)
    start, end = np.sort(rng.integers(0, slots + 1, (2, rows)), axis=0)
    start[0], end[0], end[1] = 5, 5, slots + 9
    start[2], end[2] = 0, slots
    return q, k, v, 1, jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32)


def run(implementation, q, k, v, layer, start, end, softcap):
    """The call as the decoder makes it, by the implementation of that name."""
    return decode_attention(q, k, v, layer, k_start=start, k_end=end, softcap=softcap, implementation=implementation)
