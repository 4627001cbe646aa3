"""The TPU kernel in the interpreter, against the XLA reference; compiled for TPUs by `make test-plan`."""

from __future__ import annotations

import functools
import os

import decode_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from jaxvlm.kernels import block_ranges, intervals, tpu_attention, tpu_decode
from jaxvlm.kernels.attention import attention

# queries, keys, key heads, queries' heads for each, head dimension, soft cap: ragged, several blocks on either side.
SHAPES = [(200, 200, 1, 2, 64, None), (130, 300, 2, 1, 72, 5.0)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tpu_attention, "BLOCK", 128)
    monkeypatch.setattr(tpu_attention, "ONE_BLOCK", 128)


def interpreted(detect_races: bool = False):
    return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=detect_races, uninitialized_memory="nan"))


def drawn(seed: int, shape: tuple, dtype=jnp.float32) -> list[jax.Array]:
    length, keys, kv_heads, group, head_dim, _ = shape
    rng = np.random.default_rng(seed)
    queries, others = (2, length, kv_heads * group, head_dim), (2, keys, kv_heads, head_dim)
    return [jnp.asarray(rng.normal(size=size), dtype) for size in (queries, others, others, queries)]


@functools.cache
def with_gradients(kernel: str, softcap: float | None):
    """(out, dq, dk, dv) of (q, k, v, d_out, k_start, k_end)."""

    def run(q, k, v, d_out, k_start, k_end):
        def forward(q, k, v):
            if kernel == "tpu":
                q, k, v = intervals.cleaned(q, k, v, k_start, k_end)
                return tpu_attention.attention(q, k, v, k_start, k_end, q.shape[-1] ** -0.5, softcap)
            return attention(q, k, v, k_start=k_start, k_end=k_end, softcap=softcap, implementation="xla")

        out, pull = jax.vjp(forward, q, k, v)
        return out, *pull(d_out)

    return jax.jit(run)


def packed(seed: int, length: int, keys: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Intervals [2, length] of rows with segments, some of one token, some padding; or any intervals at all."""
    rng = np.random.default_rng(seed)
    if kind == "any" or keys != length:
        start, size = rng.integers(0, keys, (2, length)), rng.integers(-20, keys, (2, length))
        return start.astype(np.int32), np.minimum(start + size, keys).astype(np.int32)
    cuts = np.sort(rng.integers(0, length, (2, 6)), axis=1)
    ids = (np.arange(length)[None, :, None] >= cuts[:, None, :]).sum(-1) % 6
    start, end = (intervals.bidirectional if kind == "bidirectional" else intervals.causal)(jnp.asarray(ids))
    return np.asarray(intervals.limit(start, end, 17 if kind == "window" else None)), np.asarray(end)


@settings(max_examples=10)
@given(st.sampled_from(SHAPES), st.integers(0, 10**6), st.sampled_from(["causal", "bidirectional", "window", "any"]))
def test_values_and_gradients_equal_the_reference(shape, seed, kind):
    """Whatever unseen keys and queries without keys hold."""
    q, k, v, d_out = drawn(seed, shape)
    start, end = packed(seed, *shape[:2], kind)
    empty = start >= end
    seen = np.asarray(intervals.seen(jnp.asarray(start), jnp.asarray(end), shape[1]))
    q = jnp.where(empty[..., None, None], jnp.nan, q)
    k, v = (jnp.where(seen[..., None, None], x, jnp.nan) for x in (k, v))
    expected = with_gradients("xla", shape[5])(q, k, v, d_out, start, end)
    with interpreted():
        found = with_gradients("tpu", shape[5])(q, k, v, d_out, start, end)
    for ours, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)
    assert not found[0][empty].any() and not found[1][empty].any() and not found[2][~seen].any()


def test_bfloat16_errs_at_most_twice_as_much_as_the_reference():
    shape = (300, 300, 1, 3, 128, None)
    exact = drawn(0, shape)
    rounded = [x.astype(jnp.bfloat16) for x in exact]
    span = intervals.causal(jnp.asarray(np.repeat([[1, 2]], [140, 160], axis=1).repeat(2, axis=0)))
    truth = with_gradients("xla", None)(*(x.astype(jnp.float32) for x in rounded), *span)
    reference = with_gradients("xla", None)(*rounded, *span)
    with interpreted():
        found = with_gradients("tpu", None)(*rounded, *span)
    for ours, xla, true in zip(found, reference, truth, strict=True):
        error, allowed = (float(jnp.abs(x.astype(jnp.float32) - true).max()) for x in (ours, xla))
        assert ours.dtype == jnp.bfloat16 and error <= 2 * allowed


def test_no_races():
    state = pytest.importorskip("jax._src.pallas.mosaic.interpret.interpret_pallas_call")  # only there is it kept
    shape = (300, 300, 1, 2, 64, None)
    span = intervals.causal(jnp.asarray(np.repeat([[1, 2]], [140, 160], axis=1).repeat(2, axis=0)))
    with interpreted(detect_races=True):
        jax.block_until_ready(with_gradients("tpu", None)(*drawn(0, shape), *span))
    assert state.races is not None and not state.races.races_found


def test_only_blocks_with_something_to_see_are_visited():
    """Four segments of a block each: one step for every block, in both directions."""
    ids = jnp.repeat(jnp.arange(1, 5), 128)[None]
    span = intervals.causal(ids)
    for ranges in (block_ranges.key_ranges(*span, 128, 128), block_ranges.query_ranges(*span, 128, 128, 4)):
        np.testing.assert_array_equal(ranges.first, [[0, 1, 2, 3]])
        np.testing.assert_array_equal(ranges.count, [[1, 1, 1, 1]])


# ----------------------------------------------------------------------------------------------------- one token a row


def decoded(q, k, v, layer, start, end, softcap):
    """What the kernel gives, for intervals within the cache."""
    grouped = q.reshape(len(q), k.shape[2], -1, q.shape[2])
    end = jnp.minimum(end, k.shape[3])
    return tpu_decode.decode_attention(grouped, k, v, jnp.int32(layer), start, end, q.shape[2] ** -0.5, softcap)


@settings(max_examples=6)
@given(st.sampled_from(decode_cases.SHAPES), st.integers(0, 10**6))
def _decodes(shape, seed):
    inputs = decode_cases.drawn(seed, shape)
    expected = decode_cases.run("xla", *inputs, shape[5])
    with interpreted(detect_races=True):
        found = jax.jit(functools.partial(decoded, softcap=shape[5]))(*inputs)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


def test_decoding_equals_the_reference(monkeypatch):
    """In blocks of 128 slots, of which the last ends beyond the cache in NaN; without races."""
    state = pytest.importorskip("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    monkeypatch.setattr(tpu_decode, "BLOCK_BYTES", 1)
    _decodes()
    assert not state.races.races_found


def test_decoding_in_bfloat16_errs_at_most_twice_as_much_as_the_reference():
    shape = (4, 2, 4, 300, 128, None)
    inputs = decode_cases.drawn(0, shape, jnp.bfloat16)
    truth = decode_cases.run("xla", *(x.astype(jnp.float32) for x in inputs[:3]), *inputs[3:], None)
    reference = decode_cases.run("xla", *inputs, None)
    with interpreted():
        found = decoded(*inputs, None).reshape(truth.shape)
    error, allowed = (float(jnp.abs(x.astype(jnp.float32) - truth).max()) for x in (found, reference))
    assert found.dtype == jnp.bfloat16 and error <= 2 * allowed


def test_blocks_of_a_megabyte():
    """Llama 3 8B in bfloat16: 8 heads of 128, so 512 slots; a short cache is one block; a wide model has 128 slots at least."""
    assert tpu_decode.block_size(8, 4096, 128, 2) == 512
    assert tpu_decode.block_size(8, 320, 128, 2) == 384
    assert tpu_decode.block_size(64, 4096, 128, 4) == 128


# ----------------------------------------------------------------------------------------- compiled, with no TPU at hand


@pytest.fixture(scope="module", params=["v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
def chip(request):
    pytest.importorskip("libtpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=request.param).devices
    return jax.sharding.SingleDeviceSharding(devices[0])


def compiled(chip, policy, shape, dtype=jnp.bfloat16):
    length, keys, kv_heads, group, head_dim, softcap = shape

    def loss(q, k, v, ids):
        span = intervals.causal(ids) if keys == length else intervals.full(len(q), length, keys)
        run = jax.checkpoint(lambda *x: tpu_attention.attention(*x, *span, head_dim**-0.5, softcap), policy=policy)
        return jnp.square(run(q, k, v).astype(jnp.float32)).sum()

    sizes = (2, length, kv_heads * group, head_dim), *2 * [(2, keys, kv_heads, head_dim)]
    arguments = [jax.ShapeDtypeStruct(size, dtype, sharding=chip) for size in sizes]
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=chip)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arguments, ids)
    return traced.lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.plan
@pytest.mark.parametrize(
    "shape",
    [
        (4096, 4096, 4, 4, 128, None),
        (577, 577, 16, 1, 64, None),
        (729, 729, 16, 1, 72, None),
        (2048, 2048, 4, 2, 256, 50.0),
    ]
    + [(144, 2880, 8, 1, 96, None), (16384, 16384, 1, 4, 128, None)],
    ids=str,
)
def test_the_kernels_compile(chip, shape):
    compiled(chip, jax.checkpoint_policies.everything_saveable, shape)


@pytest.mark.plan
@pytest.mark.parametrize(
    "shape",
    [(32, 8, 4, 4096, 128, None), (1, 32, 1, 1152, 128, None), (16, 3, 3, 96, 64, None), (8, 4, 2, 8192, 256, 50.0)],
    ids=str,
)
def test_decoding_compiles_and_copies_no_layer(chip, shape):
    rows, kv_heads, group, slots, head_dim, softcap = shape
    sizes = (rows, kv_heads * group, head_dim), *2 * [(4, rows, kv_heads, slots, head_dim)]
    arguments = [jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=chip) for size in sizes]
    arguments += [jax.ShapeDtypeStruct(size, jnp.int32, sharding=chip) for size in ((), (rows,), (rows,))]
    traced = jax.jit(functools.partial(decoded, softcap=softcap)).trace(*arguments)
    memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    if head_dim >= tpu_decode.LANES:  # narrower ones may come packed and be spread to whole lanes: all of them, once
        assert memory.temp_size_in_bytes < rows * kv_heads * slots * head_dim * 2  # a layer's keys


@pytest.mark.plan
@pytest.mark.parametrize("chip", ["v5e:1x1"], indirect=True)  # libtpu 0.0.52 cannot print modules for the others here
def test_a_policy_that_keeps_the_results_runs_each_kernel_once(chip):
    keep = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    shape = (256, 256, 4, 1, 64, None)
    calls = [compiled(chip, policy, shape).as_text().count('target="tpu_custom_call"') for policy in (keep, None)]
    assert calls == [2, 3]
