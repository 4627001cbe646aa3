"""Adapters on the vision tower: what they are added to, that they train alone, and what has none."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hf_copy import random_params

from jaxvlm.config import ConfigError, LoRAConfig, MeshConfig, VisionConfig
from jaxvlm.models.lora import merge_all, without_lora
from jaxvlm.models.vlm import VLM, abstract_params
from jaxvlm.parallel.mesh import make_mesh
from jaxvlm.parallel.rules import put_batch
from jaxvlm.train.loop import state_shardings
from jaxvlm.train.state import TrainState, flat, merge, split
from jaxvlm.train.step import make_step


def model(fused: bool = False, **lora):
    base = tiny.model_config(lora=2)
    tower = replace(base.vision, lora=LoRAConfig(**(dict(rank=3, alpha=6.0) | lora)))
    other = replace(tower, lora=LoRAConfig(rank=2, alpha=8.0, targets=("q", "down")))
    return replace(base, vision=VisionConfig(kind="fused", towers=(tower, other)) if fused else tower)


def batch(rows: int):
    rng, shape = np.random.default_rng(0), (rows, 8)
    tokens = {name: rng.integers(0, 512, shape).astype(np.int32) for name in ("tokens", "targets")}
    visual = np.tile(np.array([-1, 0, 1, 2, 3, -1, -1, -1], np.int32), (rows, 1))
    positions = np.tile(np.arange(8, dtype=np.int32), (rows, 1))
    return tokens | {
        "visual_index": visual,
        "positions": positions,
        "segment_ids": np.ones(shape, np.int32),
        "source_ids": np.zeros(shape, np.int32),
        "loss_weights": np.ones(shape, np.float32),
        "pixels": rng.integers(0, 256, (rows, 1, 28, 28, 3)).astype(np.uint8),
        "tile_mask": np.ones((rows, 1), bool),
    }


@pytest.mark.parametrize("fused", [False, True])
def test_merged_adapters_change_nothing(fused):
    config = model(fused)
    params = random_params(config)
    adapted = {path.split("/")[-2] for path in flat(params["vision"]) if path.endswith("lora_a")}
    assert adapted == {"q", "k", "v", "o", "up", "down"}
    merged, plain = merge_all(params, config), without_lora(config)
    assert jax.tree.structure(merged) == jax.tree.structure(abstract_params(plain))
    apply = jax.jit(lambda config, params, batch: VLM(config).apply({"params": params}, batch), static_argnums=0)
    ours, expected = apply(config, params, batch(2)), apply(plain, merged, batch(2))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))
    without = {
        path: leaf * (not path.startswith("vision")) for path, leaf in flat(params).items() if path.endswith("lora_b")
    }
    silent = merge(without, {path: leaf for path, leaf in flat(params).items() if path not in without})
    assert not np.allclose(apply(config, silent, batch(2)), expected, rtol=1e-3)  # the tower's adapters do something


def test_adapters_train_alone_and_sharded_as_whole():
    config, results = model(), []
    for axes, devices in ((dict(), 1), (dict(fsdp=2, tensor=4), 8)):
        mesh = make_mesh(MeshConfig(**axes), jax.devices()[:devices])
        with jax.set_mesh(mesh):
            moving, frozen = split(random_params(config), ("vision/.*lora_.*",))
            optimizer = optax.sgd(0.5)
            state = TrainState(jnp.int32(0), moving, frozen, optimizer.init(moving))
            shardings = state_shardings(state, config, mesh)
            step = jax.jit(make_step(VLM(config), optimizer, 1), out_shardings=(shardings, None))
            state, metrics = step(jax.device_put(state, shardings), put_batch(batch(8), mesh))
            results.append((flat(jax.device_get(state.trainable)), jax.device_get(metrics)))
    (single, one), (sharded, eight) = results
    before = flat(random_params(config))
    np.testing.assert_allclose(eight["loss"], one["loss"], rtol=1e-5)
    assert set(single) == {path for path in before if path.startswith("vision") and "lora_" in path}
    for path, leaf in single.items():
        change = leaf - before[path]
        assert np.abs(change).max() > 0, path
        np.testing.assert_allclose(sharded[path] - before[path], change, rtol=1e-3, atol=1e-3 * np.abs(change).max())


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (VisionConfig(kind="efficientnet_lite", lora=LoRAConfig(rank=2)), "kind 'efficientnet_lite' has no adapters"),
        (VisionConfig(kind="fused", towers=(VisionConfig(),), lora=LoRAConfig(rank=2)), "set it in vision.towers"),
    ],
)
def test_towers_without_adapters_are_named(vision, message):
    with pytest.raises(ConfigError, match=message):
        abstract_params(replace(tiny.model_config(), vision=vision))
