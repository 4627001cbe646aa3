"""The towers against transformers and torch."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from hf_copy import random_params, randomise
from hf_copy import vit as copy_vit
from parity_log import record_parity

from jaxvlm.config import ConfigError, LLMConfig, ModelConfig, VisionConfig
from jaxvlm.models import vit
from jaxvlm.models.convnet import STAGES
from jaxvlm.models.vit import num_layers
from jaxvlm.models.vlm import VLM, abstract_params

LLM = LLMConfig(vocab_size=8, width=8, depth=1, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8)
CLIP = VisionConfig(image_size=12, patch_size=4, width=16, depth=3, num_heads=2, mlp_dim=24)
SIGLIP = replace(
    CLIP,
    activation="gelu_tanh",
    norm_eps=1e-6,
    class_token=False,
    patch_bias=True,
    pre_norm=False,
    feature_layers=(-1,),
)
DINOV2 = replace(
    SIGLIP,
    activation="gelu_erf",
    class_token=True,
    layer_scale=True,
    feature_norm=True,
    mlp_dim=32,
    image_size=13,
)


@partial(jax.jit, static_argnums=0)
def encode(config: VisionConfig, params, pixels):
    """uint8 [B, H, W, 3] -> [B, N, D], as one row of B tiles."""
    model = ModelConfig(vision=config, llm=LLM, dtype="float32", remat="none")
    return VLM(model).apply({"params": {"vision": params}}, pixels[None], method="encode")[0]


def images(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (2, size, size, 3)).astype(np.uint8)


def close(found, expected, tolerance=2e-5):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


FAMILIES = {
    "CLIPVision": (CLIP, {}),
    "SiglipVision": (SIGLIP, {}),
    "Dinov2": (DINOV2, {"mlp_ratio": 2}),
    "Dinov2WithRegisters": (replace(DINOV2, num_registers=3), {"mlp_ratio": 2, "num_register_tokens": 3}),
}


@pytest.mark.parametrize("platform", ["cpu", "gpu"])  # where tokens are padded to eights
@pytest.mark.parametrize("family", FAMILIES)
def test_features_equal_transformers(family, platform, monkeypatch):
    monkeypatch.setattr(vit, "backend", lambda: platform)
    encode.clear_cache()
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ours, extra = FAMILIES[family]
    config = getattr(transformers, family + "Config")(
        hidden_size=ours.width,
        intermediate_size=ours.mlp_dim,
        num_hidden_layers=ours.depth,
        num_attention_heads=ours.num_heads,
        image_size=ours.image_size // ours.patch_size * ours.patch_size,
        patch_size=ours.patch_size,
        layer_norm_eps=ours.norm_eps,
        attn_implementation="eager",
        **extra,
    )
    theirs = getattr(transformers, family + "Model")(config).eval()
    state = randomise(theirs)
    pixels = images(ours.image_size)
    normalised = ((pixels / 255 - ours.mean) / ours.std).astype(np.float32).transpose(0, 3, 1, 2)
    side = config.image_size
    with torch.no_grad():
        expected = theirs(torch.from_numpy(normalised[:, :, :side, :side]), output_hidden_states=True)
    prefix = ours.class_token + ours.num_registers

    def state_of(c):
        return expected.last_hidden_state if c.feature_norm else expected.hidden_states[c.feature_layers[0]]

    for c in (ours, replace(ours, feature_norm=False, feature_layers=(-2,))):
        close(encode(c, copy_vit(state, c), pixels), state_of(c)[:, prefix:].numpy())
    if family == "CLIPVision":
        c = replace(ours, feature_tokens="cls_patch")
        close(encode(c, copy_vit(state, c), pixels), expected.hidden_states[-2].numpy())


def vision_params(config, seed=0):
    return random_params(ModelConfig(vision=config, llm=LLM, dtype="float32"), seed)["vision"]


def test_only_the_needed_layers_are_built():
    assert [num_layers(replace(CLIP, feature_layers=(i,))) for i in (-1, -2, 1, 3)] == [3, 2, 1, 3]
    tree = abstract_params(ModelConfig(vision=CLIP, llm=LLM))["vision"]
    assert tree["layers"]["mlp"]["up"]["kernel"].shape[0] == 2 and "post_norm" not in tree
    with pytest.raises(ConfigError, match="-4 names no layer"):
        num_layers(replace(CLIP, feature_layers=(-4,)))


def test_pooling_averages_cells_and_keeps_the_class_token():
    config = replace(CLIP, image_size=16, feature_tokens="cls_patch")
    params, pixels = vision_params(config), images(16)
    whole, pooled = encode(config, params, pixels), encode(replace(config, pool=2), params, pixels)
    grid = np.asarray(whole)[:, 1:].reshape(2, 2, 2, 2, 2, 16).mean((2, 4)).reshape(2, 4, 16)
    close(pooled, np.concatenate([whole[:, :1], grid], axis=1), 1e-6)
    assert pooled.shape[1] == replace(config, pool=2).num_tokens
    with pytest.raises(ConfigError, match="pool = 3 must divide"):
        encode(replace(config, pool=3), params, pixels)


def test_a_mismatch_of_sizes_is_explained():
    params = vision_params(CLIP)
    with pytest.raises(ValueError, match="holds 10 positions.*image_size = 16.*needs 17.*not resampled"):
        encode(replace(CLIP, image_size=16), params, images(16))
    with pytest.raises(ValueError, match=r"are not \[B, T, 12, 12, 3\]"):
        encode(CLIP, params, images(16))
    with pytest.raises(ConfigError, match="needs a tower with a class token"):
        encode(replace(SIGLIP, feature_tokens="cls_patch"), params, images(12))


EFFICIENTNET = VisionConfig(kind="efficientnet_lite", image_size=64, patch_size=32, width=1280)


def torch_efficientnet(params, x):
    """EfficientNet-Lite0 by torch's own convolutions, with TensorFlow's SAME padding written out. x [B, 3, H, W]."""
    import torch
    from torch.nn import functional

    def conv(x, layer, stride=1, groups=1):
        kernel = torch.from_numpy(layer["kernel"].transpose(3, 2, 0, 1).copy())
        need = [max((-(-n // stride) - 1) * stride + kernel.shape[-1] - n, 0) for n in x.shape[-2:]]
        x = functional.pad(x, (need[1] // 2, need[1] - need[1] // 2, need[0] // 2, need[0] - need[0] // 2))
        return functional.conv2d(x, kernel, torch.from_numpy(layer["bias"]), stride, groups=groups)

    x = functional.relu6(conv(x, params["stem"], 2))
    index = 0
    for count, _, stride, expansion, _ in STAGES:
        for i in range(count):
            block, y = params[f"blocks_{index}"], x
            if expansion > 1:
                y = functional.relu6(conv(y, block["expand"]))
            y = functional.relu6(conv(y, block["depthwise"], 1 if i else stride, groups=y.shape[1]))
            y = conv(y, block["project"])
            x, index = (x + y if i else y), index + 1
    return functional.relu6(conv(x, params["head"]))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_efficientnet_equals_torch(backend, monkeypatch):
    """Both forms of the depthwise convolution, at an odd size of the inner grids too."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    params, pixels = vision_params(EFFICIENTNET), images(64)
    rng = np.random.default_rng(0)
    for block in params.values():  # variance-preserving, so that ReLU6 neither dies nor saturates
        for layer in block.values() if "kernel" not in block else [block]:
            layer["kernel"] = rng.normal(size=layer["kernel"].shape).astype(np.float32)
            layer["kernel"] *= np.sqrt(1.5 / np.prod(layer["kernel"].shape[:3]))
    c = EFFICIENTNET
    normalised = ((pixels / 255 - c.mean) / c.std).astype(np.float32).transpose(0, 3, 1, 2)
    expected = torch_efficientnet(params, torch.from_numpy(normalised)).flatten(2).transpose(1, 2).numpy()
    assert 0.2 < (expected > 0).mean() and (expected < 6).mean() > 0.2
    jax.clear_caches()  # a fresh trace for each backend
    found = np.asarray(encode(c, params, pixels))
    record_parity("efficientnet_lite", "vision", np.abs(found - expected).max() / np.abs(expected).max())
    close(found, expected)


def test_efficientnet_says_what_it_can_be():
    with pytest.raises(ConfigError, match="divisible by 32, not 1280, 32, 'patch', 80"):
        abstract_params(ModelConfig(vision=replace(EFFICIENTNET, image_size=80), llm=LLM))
