"""Plans become arrays by slices: what is read at a time, where it goes, and that nothing is held twice."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxvlm.weights import build as module
from jaxvlm.weights.build import build
from jaxvlm.weights.plan import Leaf
from jaxvlm.weights.readers import WeightsError

SHAPE = (4, 6, 8)
VALUES = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def leaf(reads, stacked=True, path="llm/x"):
    def read(index):
        reads.append(tuple(part.stop - part.start for part in index))
        return VALUES[index]

    return Leaf(path, SHAPE, read, stacked)


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize("staged", [None, 1, 2, 3])
@pytest.mark.parametrize("spec", [None, P(), P(None, "a", "b"), P("a", None, "b")])
def test_stacks_are_read_layer_by_layer(monkeypatch, mesh, staged, spec):
    """On the host, and on an accelerator that is sent so many of the four layers at a time."""
    monkeypatch.setattr(module, "_on_host", lambda sharding: staged is None)
    monkeypatch.setattr(module, "STAGED", (staged or 0) * 6 * 8 * 2)  # bytes of bfloat16
    reads = []
    sharding = None if spec is None else {"llm": {"x": NamedSharding(mesh, spec)}}
    tree = build([leaf(reads)], jnp.bfloat16, sharding)
    np.testing.assert_array_equal(np.asarray(tree["llm"]["x"]), VALUES.astype(ml_dtypes.bfloat16))
    assert {read[0] for read in reads} == {1}
    if spec is not None:
        assert tree["llm"]["x"].sharding.is_equivalent_to(sharding["llm"]["x"], 3)
        halves = 2 ** sum(axis is not None for axis in spec[1:])
        assert {np.prod(read[1:]) for read in reads} == {6 * 8 // halves}


def test_a_leaf_is_taken_over_not_copied():
    """jax uses the memory that the leaf was filled in; a copy would double the model while it is loaded."""
    filled = []
    real = module._filled

    def kept(*args):
        filled.append(real(*args))
        return filled[-1]

    module._filled, array = kept, None
    try:
        array = build([leaf([], stacked=False)], jnp.float32)["llm"]["x"]
    finally:
        module._filled = real
    if jax.devices()[0].platform == "cpu":
        assert array.unsafe_buffer_pointer() == filled[0].ctypes.data


def test_dtypes_by_path_or_the_files_own():
    tree = build(
        [leaf([]), leaf([], path="vision/x")], lambda path: jnp.float16 if path.startswith("llm") else jnp.float32
    )
    assert (tree["llm"]["x"].dtype, tree["vision"]["x"].dtype) == (jnp.float16, jnp.float32)
    own = Leaf("x", SHAPE, lambda index: VALUES[index].astype(np.float16), True, np.dtype(np.float16))
    assert build([own], None)["x"].dtype == jnp.float16
    with pytest.raises(WeightsError, match="No sharding was given for llm/x"):
        build([leaf([])], jnp.float32, {"vision": {"x": jax.devices()[0]}})


@given(
    st.tuples(*[st.sampled_from([1, 3, 127, 128, 200])] * 2),
    st.sampled_from([None, 2]),
    st.sampled_from([(np.float16, np.float32), (ml_dtypes.bfloat16,) * 2, (np.float32, ml_dtypes.bfloat16)]),
)
def test_copying_in_blocks_is_copying(shape, heads, dtypes):
    source = np.random.default_rng(0).normal(size=shape[::-1]).astype(dtypes[0])
    value = source.T
    if heads and shape[1] % heads == 0:  # as a projection's heads: [D, H, h]
        value = source.reshape(heads, -1, shape[0]).transpose(2, 0, 1)
    out = module._empty(value.shape, np.dtype(dtypes[1]))
    module._copy(out, value)
    np.testing.assert_array_equal(out, value.astype(dtypes[1]))


@pytest.mark.parametrize("special", [False, True])
def test_every_float16_becomes_its_float32(special):
    """Subnormals and both zeros among them; infinities and NaNs where asked."""
    value = np.arange(2**16, dtype=np.uint16).view(np.float16)
    value = value if special else value[np.isfinite(value)]
    out = np.empty(value.shape, np.float32)
    module._convert(out, value)
    np.testing.assert_array_equal(out.view(np.uint32), value.astype(np.float32).view(np.uint32))
