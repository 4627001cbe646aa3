"""The GPU kernels in the interpreter, against the XLA reference; and compiled for an H100 and an A100, with none at hand.

They need jax 0.11.2, hence Python 3.12, and the compiler of the CUDA plugin: `make test-kernels`.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor

import decode_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.interpreters import mlir
from jax.sharding import PartitionSpec

from jaxvlm.kernels import block_ranges, decode_attention, dispatch, intervals
from jaxvlm.kernels.attention import attention
from jaxvlm.parallel import plan_targets

pytestmark = [
    pytest.mark.mosaic_gpu,
    pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="needs jax 0.11.2 or newer (make test-kernels)"),
]
if jax.__version_info__ >= (0, 11, 2):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jaxvlm.kernels import ampere_attention, hopper_attention, hopper_pieces

    MODULES = {"hopper": hopper_attention, "ampere": ampere_attention}

# queries, keys, key heads, queries' heads for each, head dimension, soft cap: ragged, several tiles and blocks.
SHAPES = [(200, 200, 1, 2, 64, None), (130, 300, 2, 1, 72, 5.0)]


@pytest.fixture
def interpreted(monkeypatch):
    from jax._src.pallas.mosaic_gpu import primitives
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    gpu_callbacks.reset_gpu_interpret_mode_state()
    parameters = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    for module in MODULES.values():
        monkeypatch.setattr(module, "INTERPRET", parameters)
    # The interpreter knows Hopper's products alone; this is Ampere's.
    product = mlir.lower_fun(lambda sums, a, b: sums + jnp.dot(a, b, preferred_element_type=jnp.float32), False)
    mlir.register_lowering(primitives.mma_p, product, platform="cpu")
    yield
    assert not gpu_callbacks.get_races().races_found


@pytest.fixture
def several_heads_of_a_block(monkeypatch):
    """As of large inputs."""
    monkeypatch.setattr(hopper_pieces, "MULTIPROCESSORS", 0)
    with_gradients.cache_clear()
    yield
    with_gradients.cache_clear()


def drawn(seed: int, shape: tuple) -> list[jax.Array]:
    """q, k, v and a cotangent, two rows of each."""
    length, keys, kv_heads, group, head_dim, _ = shape
    rng = np.random.default_rng(seed)
    queries, others = (2, length, kv_heads * group, head_dim), (2, keys, kv_heads, head_dim)
    return [jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in (queries, others, others, queries)]


def packed(seed: int, length: int, keys: int, kind: str) -> tuple[jax.Array, jax.Array]:
    """Intervals [2, length] of rows with segments, some of one token, some padding; or any intervals at all."""
    rng = np.random.default_rng(seed)
    if kind == "any" or keys != length:
        start, size = rng.integers(0, keys, (2, length)), rng.integers(-20, keys, (2, length))
        return jnp.asarray(start, jnp.int32), jnp.asarray(np.minimum(start + size, keys), jnp.int32)
    cuts = np.sort(rng.integers(0, length, (2, 6)), axis=1)
    if kind == "long":  # most of a row is one segment: blocks before, within and after what is seen whole
        cuts = np.array([[12, length - 8] + [length] * 4] * 2)
    ids = jnp.asarray(
        (1 + (np.arange(length)[None, :, None] >= cuts[:, None, :]).sum(-1)) % (3 if kind == "long" else 6)
    )
    start, end = (intervals.bidirectional if kind == "bidirectional" else intervals.causal)(ids)
    if kind == "image":  # 40 tokens that see each other, in whatever segment they begin
        block = (jnp.arange(length) >= 30) & (jnp.arange(length) < 70) & (ids == ids[:, 30:31]) & (ids > 0)
        end = jnp.where(block, jnp.max(jnp.where(block, end, 0), axis=1, keepdims=True), end)
    return intervals.limit(start, end, 17 if kind == "window" else None), end


@functools.cache
def with_gradients(kernel: str, softcap: float | None):
    """(out, dq, dk, dv) of (q, k, v, d_out, k_start, k_end)."""

    def run(q, k, v, d_out, k_start, k_end):
        def forward(q, k, v):
            if kernel != "xla":
                q, k, v = intervals.cleaned(q, k, v, k_start, k_end)
                return MODULES[kernel].attention(q, k, v, k_start, k_end, q.shape[-1] ** -0.5, softcap)
            return attention(q, k, v, k_start=k_start, k_end=k_end, softcap=softcap, implementation="xla")

        out, pull = jax.vjp(forward, q, k, v)
        return out, *pull(d_out.astype(out.dtype))

    return jax.jit(run)


def compare(kernel, shape, inputs, span):
    """Errors at most twice those of the XLA reference in the same precision; both against float32."""
    with jax.default_matmul_precision("highest"):  # a GPU's products of float32 are otherwise less than that
        truth = with_gradients("xla", shape[5])(*(x.astype(jnp.float32) for x in inputs), *span)
    reference = with_gradients("xla", shape[5])(*inputs, *span)
    found = with_gradients(kernel, shape[5])(*inputs, *span)
    for name, ours, xla, true in zip(("out", "dq", "dk", "dv"), found, reference, truth, strict=True):
        error, allowed = (float(jnp.abs(x.astype(jnp.float32) - true).max()) for x in (ours, xla))
        rounding = float(jnp.abs(true).max()) * 2**-9  # of bfloat16, where the reference is exact by chance
        assert ours.dtype == jnp.bfloat16 and error <= 2 * allowed + rounding, (name, error, allowed)
    return found


def compare_poisoned(kernel, shape, seed, kind):
    """As `compare`, with NaN in all keys that no query sees and all queries that see none; these receive zeros."""
    q, k, v, d_out = drawn(seed, shape)
    start, end = packed(seed, *shape[:2], kind)
    empty, seen = start >= end, intervals.seen(start, end, shape[1])
    q = jnp.where(empty[..., None, None], jnp.nan, q)
    k, v = (jnp.where(seen[..., None, None], x, jnp.nan) for x in (k, v))
    found = compare(kernel, shape, (q, k, v, d_out), (start, end))
    assert not found[0][empty].any() and not found[1][empty].any() and not found[2][~seen].any()


@settings(max_examples=10)
@given(
    st.sampled_from(["hopper", "ampere"]),
    st.sampled_from(SHAPES),
    st.integers(0, 10**6),
    st.sampled_from(["causal", "bidirectional", "window", "image", "any"]),
)
def _values_and_gradients(kernel, shape, seed, kind):
    compare_poisoned(kernel, shape, seed, kind)


def test_values_and_gradients_equal_the_reference(interpreted):
    """Whatever unseen keys and queries without keys hold; without races."""
    _values_and_gradients()


@pytest.mark.parametrize(
    ("kernel", "shape", "kind"),
    [
        ("hopper", (420, 420, 1, 2, 128, None), "long"),
        ("hopper", (140, 260, 1, 3, 96, None), "any"),
        ("hopper", (200, 200, 1, 1, 256, None), "causal"),
        ("ampere", (200, 200, 1, 2, 128, None), "long"),
        ("ampere", (100, 140, 1, 3, 96, None), "any"),
    ],
    ids=str,
)
def test_more_blocks_than_the_ring_holds_and_wide_heads(kernel, shape, kind, interpreted):
    compare(kernel, shape, drawn(1, shape), packed(1, *shape[:2], kind))


@pytest.mark.parametrize(
    ("shape", "kind"), [((200, 200, 2, 2, 64, None), "causal"), ((140, 300, 1, 2, 128, 5.0), "any")], ids=str
)
def test_several_heads_one_after_the_other(shape, kind, interpreted, several_heads_of_a_block):
    compare_poisoned("hopper", shape, 3, kind)


def test_blocks_that_need_no_mask():
    """A segment from 12 to 412 of 420, causal: for the third of four tiles of 128 the second of its three blocks."""
    start, end = (jnp.pad(x[:1], ((0, 0), (0, 92)), mode="edge") for x in packed(0, 420, 420, "long"))
    np.testing.assert_array_equal(block_ranges.key_ranges(start, end, 128, 128).count, [[1, 2, 3, 4]])
    whole = block_ranges.whole_key_ranges(start, end, 128, 128)
    np.testing.assert_array_equal(whole.count, [[0, 0, 1, 0]])
    np.testing.assert_array_equal(whole.first, [[0, 0, 1, 0]])


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(["causal", "bidirectional", "window", "image", "long", "any"]))
def test_blocks_that_are_said_to_be_whole_are(seed, kind):
    """Of all pairs in them, however the intervals lie; and they lie within the blocks that are visited."""
    length, block, tile = 256, 16, 32
    start, end = packed(seed, length, length, kind)
    pairs = (start[..., None] <= jnp.arange(length)) & (jnp.arange(length) < end[..., None])  # [2, queries, keys]
    touched = block_ranges.query_ranges(start, end, block, tile, length // tile)
    whole = block_ranges.whole_query_ranges(start, end, block, tile, length // tile, length)
    for row, number in np.ndindex(2, length // tile):
        first, count = int(whole.first[row, number]), int(whole.count[row, number])
        keys = pairs[row, :, number * tile : (number + 1) * tile]
        assert keys[first * block : (first + count) * block].all()
        assert count or first == touched.first[row, number]
        assert touched.first[row, number] <= first and first + count <= (touched.first + touched.count)[row, number]


@pytest.mark.parametrize("kernel", ["hopper", "ampere"])
def test_the_gradients_are_the_same_every_time(kernel, interpreted):
    shape = SHAPES[0]
    inputs, span = drawn(2, shape), packed(2, *shape[:2], "causal")
    first, second = (with_gradients(kernel, None)(*inputs, *span) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize(
    ("slots", "head_dim", "reason"), [(304, 64, None), (300, 64, "300 slots"), (304, 72, "72 is no")]
)
def test_caches_that_the_copies_cannot_address_are_left_to_xla(slots, head_dim, reason, h100):
    """Found on an H100: the interpreter copies whatever it is told to."""
    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 4, head_dim), (1, 2, 2, slots, head_dim)))
    with jax.set_mesh(jax.sharding.Mesh(np.array(h100[:1]), ("x",))):
        found = decode_attention.PALLAS_HOPPER.supports(q, k)
    assert found is None if reason is None else reason in found


# Those with slots in eights, which the kernel's copies want.
DECODING = [(*shape[:3], shape[3] + -shape[3] % 8, *shape[4:]) for shape in decode_cases.SHAPES if shape[4] >= 64]


@pytest.mark.parametrize("shape", DECODING, ids=str)
def test_decoding_equals_the_reference(shape, interpreted):
    compare_decoding(shape)


def compare_decoding(shape):
    """As `compare`."""
    inputs = decode_cases.drawn(3, shape, jnp.bfloat16)
    with jax.default_matmul_precision("highest"):
        truth = decode_cases.run("xla", *(x.astype(jnp.float32) for x in inputs[:3]), *inputs[3:], shape[5])
    reference = decode_cases.run("xla", *inputs, shape[5])
    found = jax.jit(functools.partial(decoded, softcap=shape[5]))(*inputs).reshape(truth.shape)
    error, allowed = (float(jnp.abs(x.astype(jnp.float32) - truth).max()) for x in (found, reference))
    assert found.dtype == jnp.bfloat16 and error <= 2 * allowed + float(jnp.abs(truth).max()) * 2**-9


def decoded(q, k, v, layer, start, end, softcap):
    """What the kernel gives, for intervals within the cache."""
    grouped = q.reshape(len(q), k.shape[2], -1, q.shape[2])
    end = jnp.minimum(end, k.shape[3])
    return hopper_attention.decode_attention(grouped, k, v, layer, start, end, q.shape[2] ** -0.5, softcap)


# ----------------------------------------------------------------------------------- compiled, with no GPU at hand


@pytest.fixture(scope="module")
def h100():
    """The devices of a host with eight of them."""
    pytest.importorskip("jax_cuda13_plugin", reason="the CUDA plugin compiles (make test-kernels)")
    return plan_targets.topology_devices(plan_targets.parse_target("h100-8"))


@pytest.fixture(scope="module")
def elsewhere():
    """A process of its own: the compiler keeps the architecture that it compiled for first."""
    pytest.importorskip("jax_cuda13_plugin", reason="the CUDA plugin compiles (make test-kernels)")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def dump(monkeypatch, tmp_path):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    return tmp_path


def compiled(kernel, sharding, policy, shape):
    length, keys, kv_heads, group, head_dim, softcap = shape

    def loss(q, k, v, ids):
        span = intervals.causal(ids) if keys == length else intervals.full(len(q), length, keys)
        run = jax.checkpoint(lambda *x: kernel.attention(*x, *span, head_dim**-0.5, softcap), policy=policy)
        return jnp.square(run(q, k, v).astype(jnp.float32)).sum()

    sizes = (2, length, kv_heads * group, head_dim), *2 * [(2, keys, kv_heads, head_dim)]
    arguments = [jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=sharding) for size in sizes]
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=sharding)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arguments, ids)
    return traced.lower(lowering_platforms=("cuda",)).compile(compiler_options={"xla_gpu_autotune_level": 0})


def spilled(folder, architecture="sm_90a") -> dict[str, int]:
    """Bytes of spill stores of each kernel, from the assembler's report."""
    reports = {path.name.rsplit("_", 1)[0]: path.read_text() for path in folder.glob("*.ptxas")}
    assert all(f"'{architecture}'" in text for text in reports.values())
    return {name: int(re.search(r"(\d+) bytes spill stores", text)[1]) for name, text in reports.items()}


@pytest.mark.parametrize(
    "shape",
    [
        (4096, 4096, 4, 4, 128, None),
        (577, 577, 16, 1, 64, None),
        (729, 729, 16, 1, 72, None),
        (144, 2880, 8, 1, 96, None),
        (2048, 2048, 4, 2, 256, None),
        (2048, 2048, 4, 2, 256, 50.0),
    ],
    ids=str,
)
def test_the_kernels_compile(shape, h100, dump):
    """Nothing is spilled, but for dq of the widest heads, a few bytes (docs/performance.md)."""
    sharding = jax.sharding.SingleDeviceSharding(h100[0])
    compiled(hopper_attention, sharding, jax.checkpoint_policies.everything_saveable, shape)
    spills = spilled(dump)
    assert spills.pop("interval_attention") == 0 and spills
    assert max(spills.values()) <= (0 if shape[4] < 256 else 100)


@pytest.mark.parametrize(
    "shape",
    [
        (4096, 4096, 4, 4, 128, None),
        (577, 577, 16, 1, 64, None),
        (729, 729, 16, 1, 72, None),
        (144, 2880, 8, 1, 96, 50.0),
        (2048, 2048, 8, 4, 80, None),
    ],
    ids=str,
)
def test_the_kernels_compile_for_ampere(shape, elsewhere, tmp_path):
    """Nothing is spilled."""
    spills = elsewhere.submit(compiled_for_ampere, shape, tmp_path).result()
    assert spills == dict.fromkeys(("interval_attention", "interval_attention_dq", "interval_attention_dk_dv"), 0)
    assert all("mma.sync.aligned.m16n8k16" in path.read_text() for path in tmp_path.glob("*.ptx"))


def compiled_for_ampere(shape, folder) -> dict[str, int]:
    from jax.experimental.mosaic.gpu import utils

    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
    utils._infer_arch = lambda: (8, 0)  # with no GPU at hand it takes Hopper
    (device, *_) = plan_targets.topology_devices(plan_targets.parse_target("a100-8"))
    everything = jax.checkpoint_policies.everything_saveable
    compiled(ampere_attention, jax.sharding.SingleDeviceSharding(device), everything, shape)
    return spilled(folder, "sm_80")


@pytest.mark.parametrize("shape", [(32, 8, 4, 4096, 128, None), (1, 32, 1, 1152, 64, None)], ids=str)
def test_decoding_compiles_and_copies_no_layer(shape, h100, dump):
    rows, kv_heads, group, slots, head_dim, softcap = shape
    sharding = jax.sharding.SingleDeviceSharding(h100[0])
    sizes = (rows, kv_heads * group, head_dim), *2 * [(4, rows, kv_heads, slots, head_dim)]
    arguments = [jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=sharding) for size in sizes]
    arguments += [jax.ShapeDtypeStruct(size, jnp.int32, sharding=sharding) for size in ((), (rows,), (rows,))]
    traced = jax.jit(functools.partial(decoded, softcap=softcap)).trace(*arguments)
    options = {"xla_gpu_autotune_level": 0}
    memory = traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=options).memory_analysis()
    assert memory.temp_size_in_bytes < rows * kv_heads * slots * head_dim * 2  # a layer's keys
    assert spilled(dump) == {"interval_attention": 0}


def test_a_policy_that_keeps_the_results_runs_each_kernel_once(h100):
    keep = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    sharding = jax.sharding.SingleDeviceSharding(h100[0])
    shape = (256, 256, 4, 1, 64, None)
    texts = [compiled(hopper_attention, sharding, policy, shape).as_text() for policy in (keep, None)]
    assert [text.count('custom_call_target="mosaic_gpu_v2"') for text in texts] == [3, 4]


def test_on_a_mesh(h100, caplog):
    """Rows and heads over devices, as `models.layers.sharded_attention` divides them."""
    mesh = jax.sharding.Mesh(np.reshape(h100, (2, 4)), ("data", "tensor"))
    spec, row = PartitionSpec("data", None, "tensor", None), PartitionSpec("data", None)

    def loss(q, k, v, ids):
        def local(q, k, v, ids):
            span = intervals.causal(ids)
            return attention(q, k, v, k_start=span[0], k_end=span[1])

        run = jax.shard_map(local, in_specs=(spec, spec, spec, row), out_specs=spec, check_vma=False)
        return run(q, k, v, ids).astype(jnp.float32).sum()

    def of(*size, dtype=jnp.bfloat16, spec=spec):
        return jax.ShapeDtypeStruct(size, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    arguments = of(4, 256, 8, 64), *2 * [of(4, 256, 4, 64)], of(4, 256, dtype=jnp.int32, spec=row)
    dispatch._log_choice.cache_clear()
    with jax.set_mesh(mesh), caplog.at_level("INFO"):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arguments)
        text = traced.lower().compile(compiler_options={"xla_gpu_autotune_level": 0}).as_text()
    assert caplog.messages == ["attention on gpu: pallas_hopper"]
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 3
