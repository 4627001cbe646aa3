"""The step: accumulated equals whole, sharded equals single-device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hf_copy import random_params

from jaxvlm.config import ConfigError, MeshConfig, OptimizerConfig
from jaxvlm.data.assets import toy
from jaxvlm.data.loader import Loader
from jaxvlm.models.layers import REMAT_POLICIES
from jaxvlm.models.vlm import VLM
from jaxvlm.parallel.mesh import make_mesh
from jaxvlm.parallel.rules import partition_spec, put_batch
from jaxvlm.train.loop import state_shardings
from jaxvlm.train.optimizer import make_optimizer, schedule
from jaxvlm.train.state import TrainState, flat, merge, split
from jaxvlm.train.step import loss_sums, make_step


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return tiny.run_config(toy.write_dataset(folder / "data"), toy.write_tokenizer(folder / "tok"))


@pytest.fixture(scope="module")
def one_device():
    """Single-device results by trainable patterns, computed once."""
    return {}


def batches(world, packing: bool, batch_size: int, **changes):
    stage = world.stages[1]
    data = dataclasses.replace(stage.data, packing=packing, **changes)
    return Loader(data, world.prompt, world.model, batch_size=batch_size, epochs=1.0, seed=3).batches(0)


def assert_trees_close(a, b, rtol):
    largest = max(np.abs(np.asarray(leaf)).max() for leaf in jax.tree.leaves(b))
    for path, leaf in flat(a).items():
        other = flat(b)[path]
        scale = max(np.abs(np.asarray(other)).max(), 1e-4 * largest)  # a key bias has no gradient but rounding
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(other), rtol=rtol, atol=rtol * scale, err_msg=path)


def run_steps(world, batch, accumulate=1, mesh=None, trainable=("connector/.*", "llm/.*"), steps=2):
    """Parameters and metrics after `steps` steps on one batch. SGD, which hands differences on as they are."""
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        moving, frozen = split(random_params(world.model), trainable)
        optimizer = optax.sgd(0.1, momentum=0.9)
        state = TrainState(jnp.int32(0), moving, frozen, optimizer.init(moving))
        shardings = state_shardings(state, world.model, mesh)
        state = jax.device_put(state, shardings)
        step = jax.jit(make_step(VLM(world.model), optimizer, 1, accumulate), out_shardings=(shardings, None))
        for _ in range(steps):
            state, metrics = step(state, put_batch(batch, mesh))
        return jax.device_get(merge(state.trainable, state.frozen)), jax.device_get(metrics)


def test_accumulation_equals_the_whole_batch(world):
    batch = next(batches(world, True, 4))
    batch["loss_weights"][0] = 0.0  # micro-batches with different numbers of supervised tokens
    whole, metrics = run_steps(world, batch)
    for parts in (2, 4):
        params, parted = run_steps(world, batch, accumulate=parts)
        np.testing.assert_allclose(parted["loss"], metrics["loss"], rtol=1e-5)
        assert_trees_close(params, whole, 1e-5)


@pytest.mark.parametrize(
    "trainable", [("connector/.*",), ("connector/.*", "llm/.*"), ("connector/.*", "llm/.*lora_.*")]
)
@pytest.mark.parametrize("axes", [dict(fsdp=8), dict(fsdp=2, tensor=4), dict(data=2, fsdp=2, tensor=2)])
def test_eight_devices_equal_one(world, one_device, trainable, axes):
    world = dataclasses.replace(world, model=tiny.model_config(lora=2 if "lora" in trainable[-1] else 0))
    batch = next(batches(world, True, 8))
    if trainable not in one_device:
        one_device[trainable] = run_steps(world, batch, trainable=trainable)
    single, metrics = one_device[trainable]
    sharded, others = run_steps(world, batch, trainable=trainable, mesh=make_mesh(MeshConfig(**axes)))
    np.testing.assert_allclose(others["loss"], metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(others["grad_norm"], metrics["grad_norm"], rtol=1e-5)
    assert_trees_close(sharded, single, 1e-5)


@pytest.fixture(scope="module")
def without_remat(world):
    return run_remat(world, "none")


def run_remat(world, name):
    """Loss, gradients of everything (both towers have a policy), and how many bytes are kept for them."""
    model = VLM(dataclasses.replace(world.model, remat=name))
    batch, params = next(batches(world, True, 2)), random_params(world.model)

    def loss(params):
        return loss_sums(model, params, batch, batch["loss_weights"], 1)[0]

    kept = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params))
    return *jax.device_get(jax.jit(jax.value_and_grad(loss))(params)), sum(x.size * x.dtype.itemsize for x in kept)


@pytest.mark.parametrize("name", sorted(REMAT_POLICIES.keys() - {"none"}))
def test_remat_policies_change_no_gradient(world, without_remat, name):
    loss, grads, kept = run_remat(world, name)
    expected, expected_grads, everything = without_remat
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert_trees_close(grads, expected_grads, 1e-5)
    assert kept < everything


def test_an_unknown_remat_policy_is_named(world):
    with pytest.raises(
        ConfigError, match="model.remat must be one of full, attention, offload, dots, none, not 'most'"
    ):
        run_remat(world, "most")


def test_frozen_parameters_cost_no_optimiser_state(world):
    moving, frozen = split(random_params(world.model), ("connector/.*",))
    state = make_optimizer(OptimizerConfig(), 10, moving).init(moving)
    sizes = {leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert sizes == {leaf.shape for leaf in jax.tree.leaves(moving)}
    assert flat(merge(moving, frozen)).keys() == flat(random_params(world.model)).keys()


def test_per_source_losses(world):
    batch = next(batches(world, True, 2))
    batch["source_ids"] = (np.arange(batch["tokens"].size).reshape(batch["tokens"].shape) % 3).astype(np.int32)
    params = random_params(world.model)
    total = batch["loss_weights"].sum()
    loss, metrics = loss_sums(VLM(world.model), params, batch, batch["loss_weights"] / total, 3)
    np.testing.assert_allclose(metrics["source_loss"].sum() / total, loss, rtol=1e-5)
    assert metrics["source_tokens"].sum() == total


def test_a_misspelt_pattern_names_the_nearest(world):
    with pytest.raises(ConfigError, match="Did you mean 'connector/"):
        split(random_params(world.model), ("conector/.*",))


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_schedules_equal_transformers(name):
    import torch
    import transformers

    builders = {
        "cosine": transformers.get_cosine_schedule_with_warmup,
        "linear": transformers.get_linear_schedule_with_warmup,
    }
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-5)
    if name == "constant":
        reference = transformers.get_constant_schedule_with_warmup(optimizer, 4)
    else:
        reference = builders[name](optimizer, 4, 100)  # ceil(0.03 * 100) = 3, ceil(0.031 * 100) = 4
    rate = schedule(OptimizerConfig(learning_rate=2e-5, schedule=name, warmup_ratio=0.031), 100)
    for step in range(100):
        np.testing.assert_allclose(float(rate(step)), optimizer.param_groups[0]["lr"], rtol=2e-5, atol=1e-12)
        optimizer.step()
        reference.step()


def test_learning_rate_groups_and_decay():
    params = {"connector": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}, "llm": {"kernel": jnp.ones(3)}}
    grads = jax.tree.map(jnp.ones_like, params)
    config = OptimizerConfig(
        learning_rate=0.1,
        schedule="constant",
        warmup_ratio=0.0,
        weight_decay=0.5,
        learning_rate_scales=(("connector/.*", 0.1),),
    )
    optimizer = make_optimizer(config, 10, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["llm"]["kernel"], 1 - 0.1 * 1.5, rtol=1e-6)
    np.testing.assert_allclose(new["connector"]["kernel"], 1 - 0.01 * 1.5, rtol=1e-6)
    np.testing.assert_allclose(new["connector"]["bias"], 1 - 0.01, rtol=1e-6)


def test_an_indivisible_dimension_names_the_axis():
    mesh = make_mesh(MeshConfig(tensor=8, fsdp=1))
    with pytest.raises(ConfigError, match="'llm/x': axis 'heads' of size 9 does not divide over the mesh axis tensor"):
        partition_spec(("embed", "heads"), mesh, (16, 9), "llm/x")


def test_lora_dropout_is_drawn_anew_each_step_and_only_in_training(world):
    model = tiny.model_config(lora=2)
    lora = dataclasses.replace(model.llm.lora, dropout=0.3)
    dropping = dataclasses.replace(model, llm=dataclasses.replace(model.llm, lora=lora))
    batch, params = next(batches(world, True, 2)), random_params(model)

    @jax.jit
    def loss(key):
        return loss_sums(VLM(dropping), params, batch, batch["loss_weights"], 1, key)[0]

    keys = [jax.random.fold_in(jax.random.key(0), step) for step in (0, 1, 0)]
    first, second, again = (float(loss(key)) for key in keys)
    assert first == again != second
    expected, _ = loss_sums(VLM(model), params, batch, batch["loss_weights"], 1)
    np.testing.assert_allclose(loss(None), expected, rtol=1e-6)
    assert first != pytest.approx(float(expected), rel=1e-6)
