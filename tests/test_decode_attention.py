"""Decode attention against the attention of rows of one query, which has an oracle of its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import SHAPES, drawn, run
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvlm.config import MeshConfig
from jaxvlm.kernels.attention import attention
from jaxvlm.models.layers import sharded_decode_attention
from jaxvlm.parallel.mesh import make_mesh
from jaxvlm.parallel.rules import INFERENCE, logical_rules


@settings(max_examples=20)
@given(st.sampled_from(SHAPES), st.integers(0, 10**6))
def test_one_query_a_row(shape, seed):
    """Whatever the other layer and the unseen slots hold, so far as it is finite."""
    q, k, v, layer, start, end = drawn(seed, shape)
    slot = np.arange(shape[3])
    seen = jnp.asarray((slot >= start[:, None]) & (slot < end[:, None]))[:, None, :, None]
    k, v = (jnp.where(seen, x, 1e30).at[0].set(jnp.nan) for x in (k, v))
    found = run("xla", q, k, v, layer, start, end, shape[5])
    rows = (x[layer].swapaxes(1, 2) for x in (k, v))
    span = {"k_start": start[:, None], "k_end": end[:, None]}
    expected = attention(q[:, None], *rows, **span, softcap=shape[5], implementation="xla")[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not found[0].any() and found[1].any()


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["a key head each", "two devices to a key head"])
def test_on_a_mesh(kv_heads):
    q, k, v, layer, start, end = drawn(0, (4, kv_heads, 8 // kv_heads, 32, 16, None))
    expected = run("xla", q, k, v, layer, start, end, None)
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules(INFERENCE)):
        span = {"k_start": start[:, None], "k_end": end[:, None]}
        found = jax.jit(sharded_decode_attention)(q[:, None], k, v, jnp.int32(layer), **span)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5, atol=1e-6)
    assert found.sharding.shard_shape(found.shape) == (2, 1, 2, 16)


def test_what_does_not_fit_is_refused():
    q, k, v, layer, start, end = drawn(0, SHAPES[0])
    with pytest.raises(ValueError, match=r"k \(2, 4, 2, 300, 64\) and v \(1, 4, 2, 300, 64\) do not fit together"):
        run("xla", q, k, v[:1], layer, start, end, None)
    with pytest.raises(ValueError, match=r"k_start \(3,\) and k_end \(4,\) must be \(4,\)"):
        run("xla", q, k, v, layer, start[1:], end, None)
    with pytest.raises(ValueError, match="decode attention: no implementation 'pallas_tpu' for cpu; it has: xla"):
        run("pallas_tpu", q, k, v, layer, start, end, None)
    with pytest.raises(ValueError, match="followed by one token a row, not by 2"):
        sharded_decode_attention(jnp.zeros((4, 2, 6, 64)), k, v, jnp.int32(0), k_start=start, k_end=end)
