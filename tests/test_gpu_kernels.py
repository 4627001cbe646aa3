"""The GPU kernels on a GPU, against the XLA reference. Run by `make test-gpu`, on a machine that has one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gpu_attention import (
    DECODING,
    SHAPES,
    compare_decoding,
    compare_poisoned,
    drawn,
    packed,
    several_heads_of_a_block,  # noqa: F401
    with_gradients,
)

from jaxvlm.kernels import attention as kernels

pytestmark = pytest.mark.gpu

# queries, keys, key heads, queries' heads for each, head dimension, soft cap
MORE = [
    ((420, 420, 1, 2, 128, None), "long"),
    ((140, 260, 1, 3, 96, None), "any"),
    ((577, 577, 16, 1, 64, None), "bidirectional"),
    ((729, 729, 16, 1, 72, None), "bidirectional"),
    ((2048, 2048, 2, 4, 128, None), "causal"),
    ((1000, 1000, 2, 2, 80, 30.0), "image"),
]
WIDE = [((200, 200, 1, 1, 256, None), "causal"), ((600, 600, 2, 2, 256, 50.0), "window")]
CASES = [(shape, kind) for shape in SHAPES for kind in ("causal", "bidirectional", "window", "image", "any")] + MORE


def skip_unless_served(kernel: str, head_dim: int) -> None:
    q = jax.ShapeDtypeStruct((1, 128, 1, head_dim), jnp.bfloat16)
    implementation = {"hopper": kernels.PALLAS_HOPPER, "ampere": kernels.PALLAS_AMPERE}[kernel]
    if reason := implementation.supports(q, q):
        pytest.skip(reason)


@pytest.mark.parametrize("kernel", ["hopper", "ampere"])
@pytest.mark.parametrize(("shape", "kind"), CASES + WIDE, ids=str)
def test_values_and_gradients_equal_the_reference(kernel, shape, kind):
    """Whatever unseen keys and queries without keys hold, and the same every time."""
    skip_unless_served(kernel, shape[4])
    compare_poisoned(kernel, shape, 7, kind)
    inputs, span = drawn(8, shape), packed(8, *shape[:2], kind)
    run = with_gradients(kernel, shape[5])
    for one, other in zip(run(*inputs, *span), run(*inputs, *span), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.usefixtures("several_heads_of_a_block")
def test_several_heads_one_after_the_other():
    skip_unless_served("hopper", 128)
    for shape, kind in [
        ((577, 577, 4, 1, 64, None), "bidirectional"),
        ((900, 900, 2, 4, 128, None), "causal"),
        MORE[1],
    ]:
        compare_poisoned("hopper", shape, 3, kind)


@pytest.mark.parametrize("shape", DECODING, ids=str)
def test_decoding_equals_the_reference(shape):
    skip_unless_served("hopper", shape[4])
    compare_decoding(shape)
