"""Towers side by side, images at several scales, grids resized, and what it all costs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_log import record_parity
from vision_helpers import LLM, SIZES, encode, error, images, normalised, states, tiny

from jaxvlm.config import ConfigError, ConnectorConfig, ModelConfig, SVAConfig, VisionConfig
from jaxvlm.models.resize import matrix
from jaxvlm.models.vlm import VLM, abstract_params
from jaxvlm.train.flops import vision_flops
from jaxvlm.weights import WeightsError, config_from, import_part
from jaxvlm.weights.families.timm import timm_config

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from torch.nn import functional  # noqa: E402

CLIP = ("CLIPVision", {"intermediate_size": 28})
SIGLIP = ("SiglipVision", {"intermediate_size": 28})
DINOV2 = ("Dinov2", {"mlp_ratio": 2})


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "bicubic_antialias"])
@pytest.mark.parametrize(("old", "new"), [(4, 6), (7, 5), (37, 16), (37, 24), (256, 96), (1, 3), (24, 9)])
def test_resizing_equals_torch(method, old, new):
    name, _, antialias = method.partition("_")
    grid = torch.randn(1, 2, old, old, generator=torch.Generator().manual_seed(0))
    expected = functional.interpolate(grid, (new, new), mode=name, antialias=bool(antialias), align_corners=False)
    weights = matrix(old, new, method)
    assert error(np.einsum("ia,jb,zcab->zcij", weights, weights, grid.numpy(), optimize=True), expected) <= 2e-6


def test_s2_equals_torch(tmp_path):
    """s2wrapper's rule, as LLaVA's CLIPVisionTowerS2 calls it; with a class token, which it can keep too."""
    theirs = tiny(CLIP[0], **SIZES, **CLIP[1])
    theirs.save_pretrained(tmp_path)
    config = replace(config_from(tmp_path)[1], scales=(1, 2), feature_tokens="cls_patch", feature_layers=(-2, -1))
    assert (config.input_size, config.num_tokens, config.feature_width) == (56, 17, 2 * 2 * 24)
    pixels = images(56)
    image, grids, tokens = normalised(pixels, config), [], []
    for scale in (1, 2):
        resized = functional.interpolate(image, (28 * scale, 28 * scale), mode="bicubic")
        tiles = [x for row in resized.chunk(scale, 2) for x in row.chunk(scale, 3)]
        seen = [torch.cat([states(theirs, x)[layer] for layer in (-2, -1)], -1) for x in tiles]
        tokens.append(torch.stack([x[:, :1] for x in seen]).mean(0))
        maps = [x[:, 1:].transpose(1, 2).reshape(2, 48, 4, 4) for x in seen]
        whole = torch.cat([torch.cat(maps[i : i + scale], 3) for i in range(0, scale**2, scale)], 2)
        grids.append(functional.interpolate(whole, (4, 4), mode="area").flatten(2).transpose(1, 2))
    expected = torch.cat([torch.cat(tokens, -1), torch.cat(grids, -1)], 1)
    worst = error(encode(config, import_part(tmp_path, "vision", config), pixels), expected)
    record_parity("s2", "vision", worst)
    assert worst <= 2e-5


def test_fused_towers_equal_torch(tmp_path):
    """Prismatic's DINOv2 and SigLIP, each with pixels of its own size and mean; one grid resized to the other's."""
    models = [tiny(kind, **SIZES, **settings) for kind, settings in (DINOV2, SIGLIP)]
    folders = [tmp_path / "dino", tmp_path / "siglip"]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
    dino, siglip = (config_from(folder)[1] for folder in folders)
    dino = replace(dino, image_size=42, resized_grid=4)  # a grid of 6 x 6
    fused = VisionConfig(kind="fused", towers=(dino, siglip))
    paths = f"{folders[0]}, {folders[1]}"
    params = import_part(paths, "vision", fused)
    pixels = images(42), images(28)
    hidden = states(models[0], normalised(pixels[0], dino))[-2][:, 1:].transpose(1, 2).reshape(2, 24, 6, 6)
    first = functional.interpolate(hidden, (4, 4), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    expected = torch.cat([first, states(models[1], normalised(pixels[1], siglip))[-2]], -1)
    worst = error(encode(fused, params, *pixels), expected)
    record_parity("fused", "vision", worst)
    assert worst <= 2e-5

    wanted = abstract_params(ModelConfig(vision=fused, llm=LLM))["vision"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, wanted)
    with pytest.raises(WeightsError, match="gives 3 towers, and the model has 2"):
        import_part(f"{paths},{folders[0]}", "vision", fused)
    with pytest.raises(ConfigError, match=r"one grid, not towers\[0\] 6 x 6, towers\[1\] 4 x 4"):
        encode(replace(fused, towers=(replace(dino, resized_grid=0), siglip)), params, *pixels)
    with pytest.raises(ValueError, match="3 arrays of pixels for 2 towers"):
        encode(fused, params, *pixels, pixels[0])
    with pytest.raises(ValueError, match=r"are not \[B, T, 28, 28, 3\]"):
        encode(fused, params, pixels[0])  # one array for towers of two sizes


SMALL = VisionConfig(image_size=8, patch_size=4, width=8, depth=2, num_heads=2, mlp_dim=16)


def features(model, *sizes):
    """The shapes that `encode` gives for one tile of pixels of each size."""
    pixels = [jnp.zeros((1, 1, size, size, 3), jnp.uint8) for size in sizes]
    found = jax.eval_shape(lambda p: VLM(model).apply({"params": p}, *pixels, method="encode"), abstract_params(model))
    return jax.tree.map(jnp.shape, found)


def test_an_aggregator_gets_each_tower_by_itself():
    towers = (SMALL, replace(SMALL, image_size=16, width=12))
    connector = ConnectorConfig("sva", sva=SVAConfig(width=8, num_heads=2, depth=1, grid=2))
    model = ModelConfig(vision=VisionConfig(kind="fused", towers=towers), connector=connector, llm=LLM)
    assert features(model, 8, 16) == ((1, 1, 4, 8), (1, 1, 16, 12))


def test_towers_of_one_size_share_the_pixels():
    vision = VisionConfig(kind="fused", towers=(SMALL, SMALL))
    assert features(ModelConfig(vision=vision, llm=LLM), 8) == (1, 1, 4, 16)


def test_a_convnext_at_two_scales_has_the_promised_shape():
    stages = {"stage_depths": (1, 1), "stage_widths": (4, 6), "feature_layers": (0, 1)}
    vision = VisionConfig(kind="convnext", image_size=16, patch_size=8, pool=2, scales=(1, 2), **stages)
    assert features(ModelConfig(vision=vision, llm=LLM), 32) == (1, 1, vision.num_tokens, vision.feature_width)
    assert (vision.num_tokens, vision.feature_width) == (1, 20)


@pytest.mark.parametrize(
    ("vision", "says"),
    [
        (replace(SMALL, kind="resnet"), "No vision tower 'resnet'; there are: vit, convnext"),
        (VisionConfig(kind="fused"), "needs vision.towers"),
        (replace(SMALL, pool=2, resized_grid=3), "both choose the grid"),
        (replace(SMALL, scales=(1, 0)), "vision.scales"),
        (replace(SMALL, mlp="moe"), "plain or swiglu, not 'moe'"),
        (replace(SMALL, feature_layers=()), "feature_layers is empty"),
        (VisionConfig(kind="convnext", stage_depths=(1,), stage_widths=(4,)), "-2 names no stage of a convnext of 1"),
        (VisionConfig(kind="convnext", stage_depths=(1,)), "1 entries and vision.stage_widths 0"),
        (
            VisionConfig(kind="convnext", stage_depths=(1,), stage_widths=(4,), feature_layers=(0,), feature_norm=True),
            "no norm over its grid",
        ),
    ],
)
def test_impossible_towers_are_explained(vision, says):
    with pytest.raises(ConfigError, match=says):
        abstract_params(ModelConfig(vision=vision, llm=LLM))


def test_cost_of_a_tile():
    """What towers, scales and feature layers do to it; the figures themselves are in test_flops."""
    clip, siglip = timm_config("vit_large_patch14_clip_336"), timm_config("vit_so400m_patch14_siglip_384")
    assert vision_flops(replace(clip, scales=(1, 2, 3))) == 14 * vision_flops(clip)
    fused = VisionConfig(kind="fused", towers=(clip, siglip))
    assert vision_flops(fused) == vision_flops(clip) + vision_flops(siglip)
    assert vision_flops(replace(clip, feature_layers=(-2, 1))) == vision_flops(clip)
