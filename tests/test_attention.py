"""Interval attention against a dense float64 oracle."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvlm.kernels import attention as kernels
from jaxvlm.kernels import cpu_attention, dispatch, intervals
from jaxvlm.kernels.attention import attention


@pytest.fixture(params=["xla", "xla_tiles"], scope="module", autouse=True)
def implementation(request):
    """What serves these small calls: the reference, or tiles of at most 4 queries by blocks of at most 4 keys."""
    with pytest.MonkeyPatch.context() as patch:
        jax.clear_caches()  # what serves is decided while tracing
        if request.param == "xla_tiles":
            for name, value in (("LARGEST", 4), ("FEWEST_PAIRS", 0)):
                patch.setattr(cpu_attention, name, value)
        yield request.param
    jax.clear_caches()


def oracle(q, k, v, k_start, k_end, scale=None, softcap=None):
    """Loops over rows, heads and queries in float64; reads nothing outside an interval."""
    batch, length, heads, head_dim = q.shape
    group = heads // k.shape[2]
    out = np.zeros(q.shape)
    for b, i, n in np.ndindex(batch, length, heads):
        keys = slice(k_start[b, i], max(k_start[b, i], k_end[b, i]))
        scores = k[b, keys, n // group].astype(float) @ q[b, i, n].astype(float) * (scale or head_dim**-0.5)
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        if scores.size:
            weights = np.exp(scores - scores.max())
            out[b, i, n] = weights / weights.sum() @ v[b, keys, n // group].astype(float)
    return out


def mask(k_start, k_end, keys):
    index = np.arange(keys)
    return (np.asarray(k_start)[..., None] <= index) & (index < np.asarray(k_end)[..., None])


def draw(seed, batch, length, keys, kv_heads, group, head_dim=4):
    rng = np.random.default_rng(seed)
    shapes = (batch, length, kv_heads * group, head_dim), *2 * [(batch, keys, kv_heads, head_dim)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def segments(rng, batch, length):
    """Rows of packed segments with padding at the front, between nothing, and at the end."""
    rows = np.sort(rng.integers(0, 4, (batch, length)), axis=1)
    return np.where(rng.random((batch, 1)) < 0.5, rows, (4 - rows) % 4).astype(np.int32)


# Few distinct shapes: every new one is a compilation.
SIZES = st.sampled_from([(7, 2, 1), (7, 1, 3), (12, 2, 2)])


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(0, 10**6), st.sampled_from([None, 1, 3]), st.booleans())
def test_packed_rows_match_the_oracle(size, seed, window, is_causal):
    length, kv_heads, group = size
    rng = np.random.default_rng(seed)
    ids = segments(rng, 2, length)
    k_start, k_end = intervals.causal(ids) if is_causal else intervals.bidirectional(ids)
    k_start = intervals.limit(k_start, k_end, window if is_causal else None)
    same = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] > 0)
    if is_causal:
        distance = np.arange(length)[:, None] - np.arange(length)
        same &= (distance >= 0) & (distance < (window or length))
    np.testing.assert_array_equal(mask(k_start, k_end, length), same)

    q, k, v = draw(seed, 2, length, length, kv_heads, group)
    poison = rng.choice([np.nan, np.inf, -np.inf])
    for x in (q, k, v):
        x[ids == 0] = poison
    out = run(q, k, v, k_start, k_end)
    np.testing.assert_allclose(out, oracle(q, k, v, np.asarray(k_start), np.asarray(k_end)), rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_arbitrary_intervals_match_the_oracle(seed):
    rng = np.random.default_rng(seed)
    q, k, v = draw(seed, 2, 7, 9, 2, 2)
    k_start, k_end = rng.integers(0, 10, (2, 2, 7)).astype(np.int32)
    out = run(q, k, v, k_start, k_end)
    np.testing.assert_allclose(out, oracle(q, k, v, k_start, k_end), rtol=1e-5, atol=1e-6)
    assert (out[k_start >= k_end] == 0).all()


def test_no_intervals_are_full_ones():
    given = draw(4, 2, 7, 9, 2, 2)
    expected = run(*given, *intervals.full(2, 7, 9))
    np.testing.assert_array_equal(jax.jit(attention)(*given), expected)


@pytest.mark.parametrize("is_causal", [True, False])
def test_what_is_finite_need_not_be_removed(is_causal):
    ids = np.array([[0, 0, 1, 1, 2, 2, 2], [1, 1, 1, 2, 3, 0, 0]], np.int32)
    k_start, k_end = intervals.causal(ids) if is_causal else intervals.bidirectional(ids)
    q, k, v = draw(0, 2, 7, 7, 1, 2)
    for x in (q, k, v):
        x[ids == 0] = 1e4
    cotangent = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    given = (q, k, v, k_start, k_end, cotangent)
    for promised, removed in zip(gradients(*given, finite=True), gradients(*given), strict=True):
        np.testing.assert_allclose(promised, removed, rtol=1e-5, atol=1e-6)
        assert (np.asarray(promised)[ids == 0] == 0).all()
    promised = jax.jit(partial(attention, finite=True))(q, k, v, k_start=k_start, k_end=k_end)
    np.testing.assert_allclose(promised, run(q, k, v, k_start, k_end), rtol=1e-5, atol=1e-6)


run = jax.jit(lambda q, k, v, k_start, k_end: attention(q, k, v, k_start=k_start, k_end=k_end))


@partial(jax.jit, static_argnames=("scale", "softcap", "finite"))
def gradients(q, k, v, k_start, k_end, cotangent, **settings):
    return jax.vjp(lambda q, k, v: attention(q, k, v, k_start=k_start, k_end=k_end, **settings), q, k, v)[1](cotangent)


@partial(jax.jit, static_argnames=("scale", "softcap"))
def dense_gradients(q, k, v, visible, cotangent, scale=None, softcap=None):
    def dense(q, k, v):
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        scores = jnp.einsum("bsnh,btnh->bnst", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -1e9))
        return jnp.einsum("bnst,btnh->bsnh", weights * visible[:, None].any(-1, keepdims=True), v)

    return jax.vjp(dense, q, k, v)[1](cotangent)


@pytest.mark.parametrize("blocks", ["one block", "blocks of queries"])
def test_gradients(blocks, monkeypatch):
    if blocks != "one block":
        monkeypatch.setattr(kernels, "DENSE_PAIRS", 60)
    rng = np.random.default_rng(0)
    ids = np.array([[0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3], [1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0]], np.int32)
    k_start, k_end = intervals.causal(ids)
    clean = draw(0, 2, 11, 11, 2, 2)
    cotangent = rng.normal(size=clean[0].shape).astype(np.float32)
    expected = dense_gradients(*clean, mask(k_start, k_end, 11), cotangent)
    jax.clear_caches()  # the block size is read while tracing
    for poison in (0.0, np.nan, np.inf):
        poisoned = [np.where((ids == 0)[..., None, None], poison, x).astype(np.float32) for x in clean]
        found = gradients(*poisoned, k_start, k_end, cotangent)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
            assert (np.asarray(one)[ids == 0] == 0).all()


def test_tiles_visit_the_blocks_that_they_see():
    """In two rows: of four segments of one block each, and of one segment, whose tiles see all before them."""
    ids = jnp.stack([jnp.repeat(jnp.arange(1, 5), 8), jnp.ones(32, int)])
    settings = cpu_attention.Settings(1.0, None, 1, tile=8, block=8)
    for rows, first, count in ((ids[:1], [0, 1, 2, 3], [1, 1, 1, 1]), (ids, [0, 0, 0, 0], [1, 2, 3, 4])):
        *_, begins, counts = cpu_attention._tiles(*intervals.causal(rows), settings)
        assert (begins.tolist(), counts.tolist()) == (first, count)


def test_parts_are_even(monkeypatch):
    monkeypatch.setattr(cpu_attention, "LARGEST", 128)
    assert [cpu_attention.even(n) for n in (1, 128, 129, 257, 577, 2048)] == [1, 128, 65, 86, 116, 128]


def test_long_rows_on_a_cpu_take_tiles(caplog, implementation):
    q, k, v = (jax.ShapeDtypeStruct((1, 400, heads, 16), jnp.float32) for heads in (2, 1, 1))
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, dispatch.__name__):
        jax.eval_shape(lambda *x: run(*x, *intervals.full(1, 400, 400)), q, k, v)
    assert [r.message for r in caplog.records] == ["attention on cpu: xla_tiles"]


def test_blocks_of_queries_equal_one_block(monkeypatch):
    q, k, v = draw(3, 2, 23, 19, 2, 3)
    k_start, k_end = np.random.default_rng(3).integers(0, 20, (2, 2, 23)).astype(np.int32)
    whole = run(q, k, v, k_start, k_end)
    monkeypatch.setattr(kernels, "DENSE_PAIRS", 100)
    assert kernels._num_blocks(23, 19) == 9
    jax.clear_caches()
    np.testing.assert_allclose(run(q, k, v, k_start, k_end), whole, rtol=1e-5, atol=1e-6)


def test_scale_and_softcap():
    q, k, v = (3 * x for x in draw(4, 2, 7, 9, 2, 2))
    k_start, k_end = np.random.default_rng(4).integers(0, 10, (2, 2, 7)).astype(np.int32)
    settings = {"scale": 0.3, "softcap": 1.5}
    out = attention(q, k, v, k_start=k_start, k_end=k_end, **settings)
    np.testing.assert_allclose(out, oracle(q, k, v, k_start, k_end, **settings), rtol=1e-5, atol=1e-6)
    found = gradients(q, k, v, k_start, k_end, q, **settings)
    expected = dense_gradients(q, k, v, mask(k_start, k_end, 9), q, **settings)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_memory_of_long_sequences_is_linear():
    def temporary(length):
        def loss(q, k, v):
            k_start, k_end = intervals.causal(jnp.ones((1, length), jnp.int32))
            return attention(q, k, v, k_start=k_start, k_end=k_end).sum()

        q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 3 * temporary(4096)


def test_bfloat16_keeps_its_dtype_and_softmax_is_float32():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draw(0, 1, 6, 6, 1, 2))
    k_start, k_end = intervals.full(1, 6, 6)
    out = attention(q, k, v, k_start=k_start, k_end=k_end)
    assert out.dtype == jnp.bfloat16
    exact = oracle(*(np.asarray(x, np.float32) for x in (q, k, v)), np.asarray(k_start), np.asarray(k_end))
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=0.02)


def test_a_policy_keeps_the_output_once():
    """Beside the inputs: the output, and a number for each query and head."""
    q, k, v = draw(0, 1, 5, 7, 2, 3)
    k_start, k_end = intervals.full(1, 5, 7)
    keep = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    span = {"k_start": k_start, "k_end": k_end}
    run = jax.checkpoint(lambda *x: attention(*x, **span, implementation="xla"), policy=keep)
    kept = sorted(leaf.size for leaf in jax.tree.leaves(jax.vjp(run, q, k, v)[1]) if leaf.dtype == jnp.float32)
    assert kept == sorted([q.size, k.size, v.size, q.size, q.size // q.shape[-1]])


def test_dispatcher(monkeypatch, caplog):
    q, k, v = draw(0, 1, 3, 3, 1, 1)
    k_start, k_end = intervals.full(1, 3, 3)
    picky = dispatch.Implementation("picky", lambda q, k: "needs head_dim 128", lambda *args: 1 / 0)
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, "cpu", (picky, kernels.XLA))
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, dispatch.__name__):
        for _ in range(2):
            attention(q, k, v, k_start=k_start, k_end=k_end)
    assert [r.message for r in caplog.records] == ["attention on cpu: xla (picky: needs head_dim 128)"]
    with pytest.raises(ValueError, match="picky: needs head_dim 128"):
        attention(q, k, v, k_start=k_start, k_end=k_end, implementation="picky")
    with pytest.raises(ValueError, match="no implementation 'flash' for cpu; it has: picky, xla"):
        attention(q, k, v, k_start=k_start, k_end=k_end, implementation="flash")
    with pytest.raises(ValueError, match="K must divide H"):
        attention(q, k.repeat(2, 2), v.repeat(2, 2), k_start=k_start, k_end=k_end)
