"""Whole steps compiled for an H100, none at hand: what XLA makes of the loop over layers, and of layers one by one."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxvlm.config import LLMConfig, MeshConfig, ModelConfig, VisionConfig
from jaxvlm.infer import decoding
from jaxvlm.models.vlm import VLM, abstract_params, init_cache
from jaxvlm.parallel import compiling, plan_targets
from jaxvlm.parallel.mesh import make_mesh
from jaxvlm.train.state import TrainState, split
from jaxvlm.train.step import make_step, step_options

pytestmark = [
    pytest.mark.mosaic_gpu,
    pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="needs jax 0.11.2 or newer (make test-kernels)"),
]

DEPTH = 3
LLM = LLMConfig(vocab_size=512, width=256, depth=DEPTH, num_heads=4, num_kv_heads=4, head_dim=64, mlp_dim=640)
VISION = VisionConfig(image_size=56, patch_size=14, width=64, depth=3, num_heads=1, mlp_dim=128)
MODEL = ModelConfig(vision=VISION, llm=LLM, remat="dots")
SLICE = re.compile(r"= bf16\[1?,?(256,4,64|4,64,256|256,640|640,256)\]\S* (dynamic-)?slice\(")  # of a stack of kernels


@pytest.fixture(scope="module")
def h100():
    pytest.importorskip("jax_cuda13_plugin", reason="the CUDA plugin compiles (make test-kernels)")
    return plan_targets.topology_devices(plan_targets.parse_target("h100-8"))[0]


def computations(text: str) -> dict[str, str]:
    """Of a module's text, by name."""
    return {name: body for name, body in re.findall(r"^(?:ENTRY )?%([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S)}


def products(text: str, where: str) -> int:
    """Calls of cuBLAS in the decoder's layers."""
    calls = re.findall(r'custom_call_target="__cublas\$lt\$matmul".*?op_name="([^"]*)"', text)
    return sum(where in name and "/layers/" in name and "/llm/" in name for name in calls)


def copied(text: str) -> list[str]:
    """The computations that cut a kernel out of its stack, and are no product."""
    return [name for name, body in computations(text).items() if SLICE.search(body) and "slice-fusion" not in name]


def step_text(device, options: dict, unroll: bool | None) -> str:
    mesh, model = make_mesh(MeshConfig(fsdp=1), [device]), replace(MODEL, unroll=unroll)
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shape, tiles = (2, 256), (2, 3)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "visual_index", "positions", "segment_ids", "source_ids"), tokens)
    batch |= {
        "loss_weights": jax.ShapeDtypeStruct(shape, jnp.float32),
        "pixels": jax.ShapeDtypeStruct((*tiles, 56, 56, 3), jnp.uint8),
        "tile_mask": jax.ShapeDtypeStruct(tiles, bool),
    }
    trainable, frozen = split(abstract_params(model), ("connector/.*",))
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), frozen)
    optimizer = optax.sgd(0.1)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), trainable, frozen, jax.eval_shape(optimizer.init, trainable)
    )
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), (state, batch))
    with jax.set_mesh(mesh):
        step = jax.jit(make_step(VLM(model), optimizer, 1), donate_argnums=0, out_shardings=(there, None))
        lowered = step.trace(*given).lower(lowering_platforms=("cuda",))
        options = options | step_options(model) | {"xla_gpu_autotune_level": 0}
    return lowered.compile(compiler_options=options).as_text()


def test_a_loop_computes_each_product_and_attention_once(h100):
    """Where results are kept, XLA's pass for slices would compute them a second time, into where they are kept."""
    text = step_text(h100, compiling.IN_PLACE, unroll=False)  # without Triton, as the launchers have it
    assert products(text, "/jvp(VLM)/llm/while/") == 7 and products(text, "/transpose(jvp(VLM))/") == 7
    attention = re.findall(r'custom_call_target="mosaic_gpu_v2".*?op_name="([^"]*)"', text)
    assert sum("/jvp(VLM)/llm/" in name for name in attention) == 1


def test_one_gpu_has_no_loop_and_copies_no_parameters(h100):
    text = step_text(h100, {}, unroll=None)
    assert products(text, "/jvp(VLM)/llm/") == products(text, "/transpose(jvp(VLM))/") == 7 * DEPTH
    assert text.count(" while(") <= 1  # over the loss's chunks
    in_place = [SLICE.search(body) is not None for body in computations(text).values()]
    assert sum(in_place) >= 7 * DEPTH and not copied(text)


def test_decoding_reads_parameters_in_place(h100):
    config = replace(MODEL, remat="none", unroll=True)
    there = jax.sharding.SingleDeviceSharding(h100)

    def placed(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), tree)

    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), abstract_params(config))
    cache = jax.eval_shape(lambda: init_cache(LLM, 4, 512, jnp.bfloat16)) | {
        "index": jax.ShapeDtypeStruct((), jnp.int32)
    }
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))
    numbers, one = jax.ShapeDtypeStruct((4,), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    sampling = decoding.Sampling(keys, one, one, jax.ShapeDtypeStruct((1,), jnp.int32), numbers)
    logits = jax.ShapeDtypeStruct((4, LLM.vocab_size), jnp.float32)
    traced = decoding.decode.trace(config, 16, True, *map(placed, (params, cache, logits, numbers, sampling)))
    options = compiling.compiler_options("gpu") | {"xla_gpu_autotune_level": 0}
    text = traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=options).as_text()
    assert products(text, "/while/body/") == 7 * DEPTH and not copied(text)
