"""Optimisers against torch, optax's own recipes and the papers' formulas; their groups, average, sharding and offload."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import torch
import transformers
from hf_copy import random_params
from jax.sharding import NamedSharding, PartitionSpec
from transformers.trainer_pt_utils import get_parameter_names

from jaxvlm.config import CheckpointConfig, ConfigError, MeshConfig, OptimizerConfig
from jaxvlm.data.assets import toy
from jaxvlm.data.loader import Loader
from jaxvlm.parallel.mesh import make_mesh
from jaxvlm.train import optimizer as module
from jaxvlm.train.checkpoint import StageCheckpointer
from jaxvlm.train.loop import train_stage
from jaxvlm.train.optimizer import averaged, make_optimizer, moment_spec, opt_state_shardings, schedule
from jaxvlm.train.state import TrainState, flat
from jaxvlm.weights import import_model

STEPS = 12
SHAPES = {"connector": {"kernel": (3, 5), "bias": (5,)}, "llm": {"kernel": (4, 6), "norm": {"scale": (6,)}}}
GROUPS = dict(learning_rate_scales=(("connector/.*", 0.1),), weight_decay_scales=(("llm/.*", 0.5),))


def draw(shapes: dict, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def train(config: OptimizerConfig, shapes=SHAPES, steps=STEPS):
    """(parameters after each step, final state), on gradients that are the same for everyone."""
    params = jax.tree.map(jnp.asarray, draw(shapes, 0))
    optimizer = make_optimizer(config, STEPS, params)
    state, update, seen = optimizer.init(params), jax.jit(optimizer.update), []
    for step in range(steps):
        updates, state = update(draw(shapes, step + 1), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(flat(jax.device_get(params)))
    return seen, state


def torch_parameters():
    return {path: torch.nn.Parameter(torch.tensor(value)) for path, value in flat(draw(SHAPES, 0)).items()}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_groups_decay_and_clipping_equal_torch(name):
    config = OptimizerConfig(
        name, 0.02, clip_norm=1.5, weight_decay=0.3 * (name == "adamw"), warmup_ratio=0.2, **GROUPS
    )
    seen, _ = train(config)
    params = torch_parameters()
    groups = [
        {
            "params": [parameter],
            "lr": 0.02 * (0.1 if "connector" in path else 1.0),
            "weight_decay": config.weight_decay * path.endswith("kernel") * (0.5 if "llm" in path else 1.0),
        }
        for path, parameter in params.items()
    ]
    oracle = torch.optim.AdamW(groups) if name == "adamw" else torch.optim.SGD(groups, momentum=0.9)
    rates = transformers.get_cosine_schedule_with_warmup(oracle, 3, STEPS)
    for step in range(STEPS):
        for path, grad in flat(draw(SHAPES, step + 1)).items():
            params[path].grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_(list(params.values()), 1.5)
        oracle.step()
        rates.step()
        for path, parameter in params.items():
            np.testing.assert_allclose(seen[step][path], parameter.detach(), rtol=1e-5, atol=1e-6, err_msg=path)


def test_lion_is_the_papers():
    """Chen et al. 2023 (arXiv 2302.06675), algorithm 2, with decoupled decay."""
    config = OptimizerConfig("lion", 0.01, betas=(0.9, 0.99), weight_decay=0.2, warmup_ratio=0.0, schedule="linear")
    seen, _ = train(config)
    params = flat(draw(SHAPES, 0))
    momentum = {path: np.zeros_like(value) for path, value in params.items()}
    for step in range(STEPS):
        rate = 0.01 * (1 - step / STEPS)
        for path, grad in flat(draw(SHAPES, step + 1)).items():
            decay = 0.2 if path.endswith("kernel") else 0.0
            direction = np.sign(0.9 * momentum[path] + 0.1 * grad)
            params[path] = params[path] - rate * (direction + decay * params[path])
            momentum[path] = 0.99 * momentum[path] + 0.01 * grad
            np.testing.assert_allclose(seen[step][path], params[path], rtol=1e-5, atol=1e-6, err_msg=path)


WIDE = {"connector": {"kernel": (160, 130), "bias": (130,)}, "llm": {"kernel": (2, 256, 4, 128)}}


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adafactor_is_optaxs(beta1):
    config = OptimizerConfig("adafactor", 0.02, betas=(beta1, 0.999), schedule="constant", warmup_ratio=0.0)
    seen, state = train(config, WIDE, steps=4)
    params = draw(WIDE, 0)
    oracle = optax.adafactor(0.02, multiply_by_parameter_scale=False, momentum=beta1 or None)
    theirs = oracle.init(params)
    for step in range(4):
        updates, theirs = oracle.update(draw(WIDE, step + 1), theirs, params)
        params = optax.apply_updates(params, updates)
        for path, value in flat(params).items():
            np.testing.assert_allclose(seen[step][path], value, rtol=1e-5, atol=1e-6, err_msg=path)
    second = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.shape[-1] in (4, 256)]
    assert (2, 4, 128) in second or (2, 256, 4) in second  # the large kernel's second moment is factored


def test_adafactors_decay_is_capped():
    """Zhai et al. 2021: with beta2 = 0 the second moment is the last gradient's, so that a constant one gives its sign."""
    config = OptimizerConfig("adafactor", 0.5, betas=(0.0, 0.0), schedule="constant", warmup_ratio=0.0)
    seen, _ = train(config, {"w": {"kernel": (4, 4)}}, steps=2)
    before, after = seen[0]["w/kernel"], seen[1]["w/kernel"]
    np.testing.assert_allclose(after, before - 0.5 * np.sign(draw({"k": (4, 4)}, 2)["k"]), rtol=1e-5)


@pytest.mark.parametrize(("name", "limit"), [("adamw", 0.02), ("sgd", 0.02), ("adafactor", 0.02), ("lion", 0.4)])
def test_a_bfloat16_moment_changes_little(name, limit):
    """On average, for a sign may flip where Lion's momentum is nearly zero."""
    config = OptimizerConfig(name, 0.02, betas=(0.9, 0.99))
    whole, _ = train(config)
    half, state = train(dataclasses.replace(config, moment_dtype="bfloat16"))
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert dtypes.count(jnp.bfloat16) == 4  # one first moment for each parameter
    assert half[-1]["llm/kernel"].dtype == np.float32
    start = flat(draw(SHAPES, 0))
    for path, value in whole[-1].items():
        assert np.abs(half[-1][path] - value).mean() <= limit * np.abs(value - start[path]).mean(), path


def test_the_average_equals_torchs():
    config = OptimizerConfig(learning_rate=0.02, ema_decay=0.7, warmup_ratio=0.0)
    seen, state = train(config)
    model = torch.nn.ParameterDict({path.replace("/", "_"): value for path, value in torch_parameters().items()})
    oracle = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.7))
    oracle.update_parameters(model)  # the first call copies: the parameters before the first step
    for params in seen:
        with torch.no_grad():
            for path, value in params.items():
                model[path.replace("/", "_")].copy_(torch.tensor(value))
        oracle.update_parameters(model)
    for path, value in flat(averaged(state)).items():
        np.testing.assert_allclose(value, oracle.module[path.replace("/", "_")].detach(), rtol=1e-5, atol=1e-6)
    plain, state = train(dataclasses.replace(config, ema_decay=0.0))
    assert averaged(state) is None
    for path, value in plain[-1].items():
        np.testing.assert_array_equal(seen[-1][path], value)  # the average only looks on


def test_what_is_decayed_is_what_the_trainer_decays(tmp_path):
    """A LLaVA of transformers whose decayed parameters are all ones and whose others are zeros, imported."""
    c = tiny.model_config()
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28)
    vision |= dict(patch_size=14, model_type="clip_vision_model")
    text = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
    text |= dict(model_type="qwen2", num_key_value_heads=2)
    oracle = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=511)
    )
    forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]  # as Trainer calls it
    decayed = set(get_parameter_names(oracle, [torch.nn.LayerNorm], forbidden))
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            parameter.fill_(float(name in decayed))
    oracle.save_pretrained(tmp_path)
    marked = flat(import_model(tmp_path)[1])
    assert c.llm.width == 64 and {float(np.min(value)) for value in marked.values()} == {0.0, 1.0}
    for path, value in marked.items():
        assert bool(module.NOT_DECAYED.search(path)) == (float(np.max(value)) == 0.0), path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(name="adamw_8bit"), "8-bit moments.*available: adamw, adafactor, lion, sgd"),
        (dict(name="muon"), "'muon' is not known; available"),
        (dict(moment_dtype="int8"), "moment_dtype must be float32 or bfloat16, not 'int8'"),
        (dict(learning_rate_scales=(("vision/.*", 0.1),)), "'vision/.*' of optimizer.learning_rate_scales matches no"),
        (
            dict(weight_decay=0.1, weight_decay_scales=(("vision/.*", 0.1),)),
            "'vision/.*' of optimizer.weight_decay_scales matches no trainable",
        ),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(OptimizerConfig(**changes), 10, draw(SHAPES, 0))


# ------------------------------------------------------------------------------------------------- where the state lies


def test_moment_specs():
    spec = PartitionSpec(None, "fsdp", "tensor")
    assert moment_spec(spec, (2, 256, 384), (2, 256, 384)) == spec
    assert moment_spec(spec, (2, 256, 384), (2, 256)) == PartitionSpec(None, "fsdp")
    assert moment_spec(spec, (2, 256, 384), (2, 384)) == PartitionSpec(None, "tensor")
    assert moment_spec(spec, (2, 256, 256), (2, 256)) == PartitionSpec(None, "fsdp")
    assert moment_spec(spec, (2, 256, 384), (1,)) == PartitionSpec()
    assert moment_spec(PartitionSpec("fsdp"), (8, 4), (4,)) == PartitionSpec(None)


OPTIMISERS = [dict(name="adamw"), dict(name="adafactor", moment_dtype="bfloat16"), dict(name="lion"), dict(name="sgd")]
SHARDED = {"connector": {"kernel": (160, 256), "bias": (256,)}, "llm": {"kernel": (2, 256, 4, 128)}}
SPECS = {"connector": {"kernel": (None, "fsdp"), "bias": ("fsdp",)}, "llm": {"kernel": (None, "fsdp", "tensor")}}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("changes", OPTIMISERS, ids=lambda changes: changes["name"])
def test_sharded_and_offloaded_states_equal_whole_ones(changes, offload):
    """Eight devices, moments where their parameters are, or in the host's memory; the same parameters as on one device."""
    exact = changes | dict(moment_dtype="float32")  # other sums would round to other bfloat16
    config = OptimizerConfig(
        learning_rate=0.02, ema_decay=0.9, weight_decay=0.1, clip_norm=1.0, offload=offload, **exact
    )
    expected, _ = train(dataclasses.replace(config, offload=False), SHARDED, steps=3)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    shardings = jax.tree.map(
        lambda axes: NamedSharding(mesh, PartitionSpec(*axes)), SPECS, is_leaf=lambda x: isinstance(x, tuple)
    )
    with jax.set_mesh(mesh):
        params = jax.device_put(draw(SHARDED, 0), shardings)
        optimizer = make_optimizer(config, STEPS, params)
        shapes = jax.eval_shape(optimizer.init, params)
        placed = opt_state_shardings(shapes, params, shardings, mesh, offload)
        state = jax.jit(optimizer.init, out_shardings=placed)(params)

        def one(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        one = jax.jit(one, donate_argnums=(0, 1), out_shardings=(shardings, placed))
        for step in range(3):
            params, state = one(params, state, draw(SHARDED, step + 1))
    for path, value in flat(jax.device_get(params)).items():
        np.testing.assert_allclose(value, expected[-1][path], rtol=1e-4, atol=1e-5, err_msg=path)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert {leaf.sharding.memory_kind for leaf in moments} == {"pinned_host" if offload else "device"}
    kernels = [leaf for leaf in moments if leaf.shape == (2, 256, 4, 128)]
    assert kernels and all(leaf.addressable_shards[0].data.shape == (2, 128, 1, 128) for leaf in kernels)
    if config.name == "adafactor":
        rows = [leaf for leaf in moments if leaf.shape == (2, 256, 4)]
        assert rows and rows[0].addressable_shards[0].data.shape == (2, 128, 1)


def test_a_backend_without_host_memory_is_named(monkeypatch):
    monkeypatch.setattr(module, "OFFLOAD_KIND", "pinned_elsewhere")
    with pytest.raises(
        ConfigError, match="optimizer.offload needs a backend with pinned_elsewhere memory, and cpu has"
    ):
        opt_state_shardings({}, {}, {}, make_mesh(MeshConfig()), offload=True)


# -------------------------------------------------------------------------------------------------------- in a training


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return tiny.run_config(toy.write_dataset(folder / "data", 12), toy.write_tokenizer(folder / "tok"))


def run_stage(world, config: OptimizerConfig, directory, model=None, params=None):
    model = model or world.model
    stage = dataclasses.replace(world.stages[1], optimizer=config, batch_size=2, steps=6)
    loader = Loader(stage.data, world.prompt, model, batch_size=2, steps=6, seed=0)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = jax.tree.map(jnp.asarray, random_params(model) if params is None else params)
        trained, _ = train_stage(
            stage,
            model,
            params,
            loader,
            mesh,
            directory,
            directory / "stages" / "0",
            CheckpointConfig(every_steps=2, keep=9),
        )
        return flat(jax.device_get(trained))


@pytest.mark.parametrize("changes", OPTIMISERS, ids=lambda changes: changes["name"])
def test_a_restored_state_goes_on_in_the_same_bits(tmp_path, changes):
    config = OptimizerConfig(learning_rate=0.02, weight_decay=0.1, ema_decay=0.8, clip_norm=1.0, **changes)
    params = jax.tree.map(jnp.asarray, draw(WIDE, 0))
    optimizer = make_optimizer(config, STEPS, params)

    @jax.jit
    def one(state, grads):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        return TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), {}, opt_state)

    state = one(TrainState(jnp.int32(0), params, {}, optimizer.init(params)), draw(WIDE, 1))
    with contextlib.closing(
        StageCheckpointer(tmp_path / "checkpoints", CheckpointConfig(), {"data": "one", "frozen": ""})
    ) as saver:
        saver.save(state, wait=True)
        empty = jax.tree.map(lambda x: jax.device_put(jnp.zeros_like(x), x.sharding), state)
        restored = saver.restore(empty)
    for step in (2, 3):
        state, restored = (one(each, draw(WIDE, step)) for each in (state, restored))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert int(restored.step) == 3


def test_a_resumed_stage_ends_in_the_same_bits(world, tmp_path):
    """With moments and an average in the host's memory; the average is what the stage gives."""
    config = OptimizerConfig("adafactor", 1e-3, moment_dtype="bfloat16", ema_decay=0.8, offload=True)
    whole = run_stage(world, config, tmp_path)
    steps = tmp_path / "stages" / "0" / "checkpoints"
    for later in ("4", "6"):
        shutil.rmtree(steps / later)
    resumed = run_stage(world, config, tmp_path)
    for path, value in whole.items():
        np.testing.assert_array_equal(resumed[path], value, err_msg=path)
    name = "llm/layers/mlp/up/kernel"
    start, raw = flat(random_params(world.model))[name], load_trainable(steps / "6", name)
    assert 0 < np.abs(whole[name] - start).max() < np.abs(raw - start).max()  # the average trails behind


def load_trainable(checkpoint, name):
    from orbax.checkpoint import v1 as ocp

    return np.asarray(flat(ocp.load_checkpointables(checkpoint)["state"]["trainable"])[name])


def test_masters_are_float32_whatever_computes(world, tmp_path):
    """Steps too small for bfloat16 add up, also of parameters that an earlier stage left frozen, and so in bfloat16."""
    model = dataclasses.replace(world.model, dtype="bfloat16")
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_params(model))
    config = OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup_ratio=0.0)
    before = flat(jax.device_get(params))
    trained = run_stage(world, config, tmp_path, model, params)
    name = "llm/layers/mlp/up/kernel"
    moved = trained[name] - before[name].astype(np.float32)
    assert trained[name].dtype == np.float32 and trained["vision/patch_embed/kernel"].dtype == jnp.bfloat16
    assert (
        1e-5 < np.abs(moved).max() <= 6.1e-5
    )  # six steps of about the learning rate; 0.1 in bfloat16 has steps of 5e-4
    assert np.mean(moved != 0) > 0.9


def test_the_rate_of_a_step_is_the_schedules():
    config = OptimizerConfig("sgd", 0.5, betas=(0.0, 0.0), warmup_ratio=0.25)
    seen, _ = train(config)
    rate, path = schedule(config, STEPS), "llm/kernel"
    for step in range(1, STEPS):
        grad = flat(draw(SHAPES, step + 1))[path]
        np.testing.assert_allclose(
            seen[step][path], seen[step - 1][path] - float(rate(step)) * grad, rtol=1e-4, atol=1e-6
        )
