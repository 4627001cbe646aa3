"""Every mesh computes what one device does, and its devices exchange what they should and nothing else."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hf_copy import random_params
from test_train_step import assert_trees_close, batches, run_steps

from jaxvlm.config import ConnectorConfig, MeshConfig, SVAConfig, VisionConfig
from jaxvlm.data.assets import toy
from jaxvlm.models.vlm import VLM
from jaxvlm.parallel.mesh import make_mesh
from jaxvlm.parallel.rules import put_batch
from jaxvlm.parallel.traffic import traffic
from jaxvlm.train.loop import state_shardings
from jaxvlm.train.state import TrainState, flat, split
from jaxvlm.train.step import make_step

SVA = SVAConfig(width=32, num_heads=4, depth=1, grid=2, llm_layers=(0,))
TRAINABLE = {
    "stage 1": ("connector/.*",),
    "stage 2": ("connector/.*", "llm/.*"),
    "adapters": ("connector/.*", "llm/.*lora_.*"),
    "everything": (".*",),
}
MESHES = [
    dict(data=8, fsdp=1),
    dict(fsdp=8),
    dict(tensor=4, fsdp=2),
    dict(data=2, fsdp=4),
    dict(data=2, fsdp=2, tensor=2),
    dict(context=8, fsdp=1),
    dict(context=4, fsdp=2),
    dict(context=2, tensor=2, data=2, fsdp=1),
    dict(context=2, tensor=2, fsdp=2),
    dict(context=2, tensor=4, fsdp=1),
]
QUICK = [("stage 1", MESHES[8]), ("stage 2", MESHES[6]), ("adapters", MESHES[7]), ("everything", MESHES[8])]
EVERY = [(kind, mesh) for kind in TRAINABLE for mesh in MESHES if (kind, mesh) not in QUICK]


def named(pairs: list, mark=()) -> list:
    return [
        pytest.param(*pair, marks=mark, id=" ".join(f"{k}={v}" for k, v in pair[1].items()) + f", {pair[0]}")
        for pair in pairs
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return tiny.run_config(toy.write_dataset(folder / "data"), toy.write_tokenizer(folder / "tok"))


@pytest.fixture(scope="module")
def alone():
    """What one device computes, by what is trained."""
    return {}


@pytest.mark.parametrize(("kind", "axes"), named(QUICK) + named(EVERY, pytest.mark.slow))
def test_a_mesh_computes_what_one_device_does(world, alone, kind, axes):
    """Two steps on packed rows with several images, float32."""
    world = dataclasses.replace(world, model=tiny.model_config(lora=2 if kind == "adapters" else 0))
    batch = next(batches(world, True, 8))
    if kind not in alone:
        alone[kind] = run_steps(world, batch, trainable=TRAINABLE[kind])
    same(run_steps(world, batch, trainable=TRAINABLE[kind], mesh=make_mesh(MeshConfig(**axes))), alone[kind])


def same(found, expected, rtol=1e-5):
    (params, metrics), (others, at_one) = found, expected
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], at_one[name], rtol=1e-5)
    assert_trees_close(params, others, rtol)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [dict(fsdp=8), dict(context=2, tensor=2, fsdp=2)], ids=str)
@pytest.mark.parametrize("connector", ["fused_mlp", "qformer", "sva"])
def test_so_do_fused_towers_and_other_connectors(world, connector, axes):
    vision, model = world.model.vision, world.model
    if connector != "qformer":
        vision = VisionConfig(kind="fused", towers=(vision, vision))
    model = dataclasses.replace(model, vision=vision, connector=ConnectorConfig(connector, sva=SVA))
    world = dataclasses.replace(world, model=model)
    batch = next(batches(world, True, 8))
    alone = run_steps(world, batch, trainable=(".*",))
    # After two steps; a Q-Former's normalised queries amplify rounding (1.3e-5 at most in 24,576 numbers).
    rtol = 5e-5 if connector == "qformer" else 1e-5
    same(run_steps(world, batch, trainable=(".*",), mesh=make_mesh(MeshConfig(**axes))), alone, rtol)


# ---------------------------------------------------------------------------------------------------- what is exchanged


def exchanged(world, axes):
    """The collectives of the compiled step that trains connector and decoder, and the batch's rows and length."""
    batch, mesh = next(batches(world, True, 8)), make_mesh(MeshConfig(**axes))
    with jax.set_mesh(mesh):
        moving, frozen = split(random_params(world.model), TRAINABLE["stage 2"])
        optimizer = optax.sgd(0.1)
        state = TrainState(jnp.int32(0), moving, frozen, optimizer.init(moving))
        shardings = state_shardings(state, world.model, mesh)
        step = jax.jit(make_step(VLM(world.model), optimizer, 1), out_shardings=(shardings, None))
        lowered = step.lower(jax.device_put(state, shardings), put_batch(batch, mesh))
        return traffic(lowered.compile().as_text(), mesh)


def sizes(one) -> list[int]:
    return [int(size) for size in re.search(r"\[([\d,]*)\]", one.shape)[1].split(",") if size]


def test_data_parallel_devices_only_add_up_gradients(world):
    assert {(one.kind, one.axes) for one in exchanged(world, dict(data=8, fsdp=1))} == {("all-reduce", ("data",))}


def test_fsdp_gathers_a_layer_at_a_time(world):
    """No stack of layers is ever gathered, no activation moved, and of gradients each device gets its own part.

    A decoder layer's weights come twice, forward and backward, though nothing else is recomputed in this model.
    """
    found = exchanged(world, dict(fsdp=8))
    assert {one.kind for one in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    leaves = {path: leaf.shape for path, leaf in flat(random_params(world.model)).items()}
    stacks = {shape for path, shape in leaves.items() if "/layers/" in path}
    layer = sorted(math.prod(shape[1:]) for path, shape in leaves.items() if path.startswith("llm/layers/"))
    gathered = [one for one in found if one.kind == "all-gather"]
    assert not stacks & {tuple(sizes(one)) for one in gathered}
    in_decoder = [one for one in gathered if "/llm/while/" in one.op_name]
    assert {one.times for one in in_decoder} == {world.model.llm.depth}
    assert sorted(math.prod(sizes(one)) for one in in_decoder) == sorted(layer * 2)
    added = [math.prod(sizes(one)) for one in found if one.kind == "all-reduce"]
    assert max(added) <= world.model.llm.width  # of gradients only those of vectors


def test_tensor_parallel_devices_add_up_activations_and_gather_no_weights(world):
    found = [one for one in exchanged(world, dict(tensor=4, data=2, fsdp=1)) if "tensor" in one.axes]
    assert {one.kind for one in found} == {"all-reduce"}
    in_layers = [one for one in found if one.times == world.model.llm.depth and sizes(one)[-1] == world.model.llm.width]
    # After attention and MLP, forward; before q, k, v, gate and up, backward. Recomputation is none in this model.
    assert len(in_layers) == 2 + 5


def test_context_parallel_devices_exchange_keys_and_values(world):
    llm = world.model.llm
    found = [one for one in exchanged(world, dict(context=4, fsdp=2)) if one.axes == ("context",)]
    assert {one.kind for one in found} == {"all-gather", "all-reduce", "reduce-scatter"}
    heads = [one for one in found if sizes(one)[-2:] == [llm.num_kv_heads, llm.head_dim]]
    assert sorted((one.kind, one.times) for one in heads) == [
        *[("all-gather", llm.depth)] * 2,
        *[("reduce-scatter", llm.depth)] * 2,
    ]
