"""The whole model: parameter tree, splice, connectors, sharding constraints."""

from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_copy import random_params

from jaxvlm.config import ConfigError, ConnectorConfig, LLMConfig, LoRAConfig, MeshConfig, ModelConfig, VisionConfig
from jaxvlm.models.vlm import VLM, abstract_params, init_params, logical_axes
from jaxvlm.parallel.mesh import make_mesh
from jaxvlm.parallel.rules import logical_rules

CONFIG = ModelConfig(
    vision=VisionConfig(image_size=8, patch_size=4, width=8, depth=2, num_heads=2, mlp_dim=16),
    llm=LLMConfig(
        vocab_size=32,
        width=16,
        depth=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=24,
        lora=LoRAConfig(rank=2, alpha=2.0, targets=("o", "down")),
    ),
    dtype="float32",
    remat="full",
)


@partial(jax.jit, static_argnums=(0,), static_argnames=("method",))
def apply(config, params, *args, method=None):
    return VLM(config).apply({"params": params}, *args, method=method)


def batch():
    """Two rows of 10 with two tiles of 4 visual tokens: image in the middle, text only."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (2, 10)).astype(np.int32)
    visual_index = np.full((2, 10), -1, np.int32)
    visual_index[0, 2:6] = [4, 5, 6, 7]  # the second tile; the first is not used
    return {
        "tokens": tokens,
        "visual_index": visual_index,
        "positions": np.broadcast_to(np.arange(10, dtype=np.int32), (2, 10)),
        "segment_ids": np.ones((2, 10), np.int32),
        "pixels": rng.integers(0, 256, (2, 2, 8, 8, 3)).astype(np.uint8),
    }


def test_parameter_tree_and_initial_values():
    params = init_params(CONFIG, jax.random.key(0, impl="unsafe_rbg"))  # half of threefry's compile time
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(CONFIG))
    axes = logical_axes(CONFIG)
    assert jax.tree.structure(params) == jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, tuple))
    jax.tree.map(lambda x, names: np.testing.assert_equal(x.ndim, len(names)), params, axes)
    layers = params["llm"]["layers"]
    assert axes["llm"]["layers"]["attn"]["q"]["kernel"] == ("layers", "embed", "heads", "head_dim")
    assert layers["attn"]["o"]["lora_a"].shape == (2, 2, 8, 2) and layers["attn"]["o"]["lora_b"].shape == (
        2,
        2,
        16,
    )
    # scanned layers must differ, adapters must start as the identity, connectors as torch's linear layers
    kernel = np.asarray(layers["attn"]["q"]["kernel"])
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-3 and 0.015 < kernel.std() < 0.025
    assert np.all(layers["mlp"]["down"]["lora_b"] == 0)
    assert 0.9 / np.sqrt(24) < np.abs(layers["mlp"]["down"]["lora_a"]).max() <= 1 / np.sqrt(24)
    linear = params["connector"]["linear_1"]
    for values in (linear["kernel"], linear["bias"]):
        assert 0.7 / np.sqrt(8) < np.abs(values).max() <= 1 / np.sqrt(8)


def test_splice_places_each_visual_token_where_its_index_stands():
    params, b = random_params(CONFIG), batch()
    visual = np.random.default_rng(0).normal(size=(2, 8, 16)).astype(np.float32)
    x = np.array(apply(CONFIG, params, b["tokens"], b["visual_index"], visual, method="embed"))
    text = np.asarray(params["llm"]["embed"]["embedding"])[b["tokens"]]
    np.testing.assert_array_equal(x[0, 2:6], visual[0, 4:8])
    x[0, 2:6] = text[0, 2:6]
    np.testing.assert_array_equal(x, text)


def test_kept_features_stand_in_for_pixels_and_unused_parts_may_be_missing():
    params, b = random_params(CONFIG), batch()
    hidden = apply(CONFIG, params, b)
    features = apply(CONFIG, {"vision": params["vision"]}, b["pixels"], method="encode")
    assert features.shape == (2, 2, 4, 8)
    kept = {k: v for k, v in b.items() if k != "pixels"} | {"features": features}
    without_tower = {k: v for k, v in params.items() if k != "vision"}
    np.testing.assert_allclose(apply(CONFIG, without_tower, kept), hidden, rtol=1e-5, atol=1e-6)
    text = {k: v[1:] for k, v in kept.items() if k != "features"}
    np.testing.assert_allclose(apply(CONFIG, {"llm": params["llm"]}, text), hidden[1:], rtol=1e-5, atol=1e-6)

    # computed in bfloat16 from the same float32 parameters
    low = apply(replace(CONFIG, dtype="bfloat16"), without_tower, kept)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(low, np.float32), hidden, atol=0.1 * np.abs(hidden).max())
    assert apply(replace(CONFIG, dtype="bfloat16"), params, low, method="logits").dtype == jnp.float32


@pytest.mark.parametrize("kind, count", [("linear", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)])
def test_connectors(kind, count):
    config = replace(CONFIG, connector=ConnectorConfig(kind, input_norm=True))
    params = random_params(config)["connector"]
    x = features = np.random.default_rng(0).normal(size=(1, 2, 4, 8)).astype(np.float32)
    found = apply(config, {"connector": params}, features, method="project")
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * params["norm"]["scale"] + params["norm"]["bias"]
    assert len(params) == count + 1
    for i in range(1, count + 1):
        x = x @ params[f"linear_{i}"]["kernel"] + params[f"linear_{i}"]["bias"]
        x = jax.nn.gelu(x, approximate=False) if i < count else x
    np.testing.assert_allclose(found, x.reshape(1, 8, 16), rtol=1e-5, atol=1e-5)


def test_unknown_choices_name_the_known_ones():
    for config, message in (
        (
            replace(CONFIG, connector=ConnectorConfig("perceiver")),
            "No connector 'perceiver'; there are: linear, mlp.N.x_gelu, fused_mlp, pixel",
        ),
        (
            replace(CONFIG, vision=replace(CONFIG.vision, kind="swin")),
            "No vision tower 'swin'; there are: vit, conv",
        ),
        (
            replace(CONFIG, vision=replace(CONFIG.vision, activation="tanh")),
            "No activation 'tanh'; there are: quick",
        ),
        (replace(CONFIG, remat="some"), "must be one of full, attention, offload, dots, none, not 'some'"),
    ):
        with pytest.raises(ConfigError, match=message):
            abstract_params(config)


def test_constraints_reach_the_compiler_under_set_mesh():
    """`with mesh:` would drop every one of them without a word."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    params = abstract_params(CONFIG)

    def lowered():
        function = jax.jit(lambda params, batch: VLM(CONFIG).apply({"params": params}, batch))
        return function.lower(params, batch()).as_text()

    assert "sharding_constraint" not in lowered()
    with jax.set_mesh(mesh), nn.logical_axis_rules(logical_rules()):
        text = lowered()
    constraints = [line for line in text.splitlines() if "sharding_constraint" in line]
    assert any('"tensor"' in line and '"data"' in line for line in constraints)
    assert len(constraints) >= 8
