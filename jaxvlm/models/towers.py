"""What looks at an image: one tower, or several side by side (Prismatic, Cambrian; recipes §1.1 A6).

Each tower normalises pixels its own way, may see them at several scales, and gives its features on a square grid.
"""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvlm.config import ConfigError, VisionConfig
from jaxvlm.models.convnet import EfficientNetLite
from jaxvlm.models.convnext import ConvNeXt
from jaxvlm.models.layers import constrain
from jaxvlm.models.resize import resize
from jaxvlm.models.vit import ViT, patches


class Fused(nn.Module):
    """Several towers; `look` runs each."""

    config: VisionConfig
    dtype: jnp.dtype
    remat: str
    unroll: bool = False

    def setup(self):
        self.towers = [tower(part, self.dtype, self.remat, self.unroll) for part in self.config.towers]


def tower(config: VisionConfig, dtype: jnp.dtype, remat: str, unroll: bool = False) -> nn.Module:
    """The module that the configuration names. Raises `ConfigError` naming the kinds there are."""
    kinds = {
        "vit": partial(ViT, remat=remat, unroll=unroll),
        "convnext": partial(ConvNeXt, remat=remat, unroll=unroll),
        "efficientnet_lite": EfficientNetLite,
        "fused": partial(Fused, remat=remat, unroll=unroll),
    }
    if config.kind not in kinds:
        raise ConfigError(f"No vision tower '{config.kind}'; there are: {', '.join(kinds)}.")
    if config.kind == "fused" and not config.towers:
        raise ConfigError("vision.kind = 'fused' needs vision.towers, one configuration for each.")
    if config.lora.rank and config.kind != "vit":
        hint = (
            "set it in vision.towers" if config.kind == "fused" else "leave it at 0, or train the tower's own weights"
        )
        raise ConfigError(
            f"vision.lora.rank = {config.lora.rank}, but a tower of kind '{config.kind}' has no adapters; {hint}."
        )
    return kinds[config.kind](config, dtype)


def look(vision: nn.Module, config: VisionConfig, pixels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Every part's features, [B, T, num_tokens, feature_width] each, of uint8 pixels [B, T, s, s, 3].

    `pixels` is one array that all parts see, or one for each; s is the part's `input_size`. Raises `ValueError` for
    arrays of another number or size.
    """
    parts = config.parts
    if len(pixels) not in (1, len(parts)):
        raise ValueError(f"{len(pixels)} arrays of pixels for {len(parts)} towers; give one for all, or one for each.")
    eyes = vision.towers if config.kind == "fused" else (vision,)
    views = pixels * len(parts) if len(pixels) == 1 else pixels
    return tuple(_features(eye, part, view) for eye, part, view in zip(eyes, parts, views, strict=True))


def join(features: tuple[jax.Array, ...], config: VisionConfig) -> jax.Array:
    """The parts' features concatenated by channel, in the order of `towers`. Raises `ConfigError` if grids differ."""
    if len({part.num_tokens for part in config.parts}) > 1:
        grids = ", ".join(
            f"towers[{i}] {part.grid} x {part.grid}" + " and a class token" * (part.feature_tokens == "cls_patch")
            for i, part in enumerate(config.parts)
        )
        raise ConfigError(
            f"Fused towers must have one grid, not {grids}. Change their image_size or pool, set resized_grid, or use "
            "connector 'sva', which takes each by itself."
        )
    return features[0] if len(features) == 1 else jnp.concatenate(features, axis=-1)


def _features(tower: nn.Module, c: VisionConfig, pixels: jax.Array) -> jax.Array:
    """uint8 [B, T, s, s, 3] -> [B, T, num_tokens, feature_width]: normalised, seen at every scale, on the final grid."""
    size = c.input_size
    if pixels.shape[2:] != (size, size, 3):
        raise ValueError(f"pixels {pixels.shape} are not [B, T, {size}, {size}, 3].")
    batch, tiles = pixels.shape[:2]
    pixels = constrain(pixels.reshape(batch * tiles, size, size, 3), ("tiles", None, None, None))
    pixels = (pixels.astype(jnp.float32) / 255 - jnp.array(c.mean)) / jnp.array(c.std)
    features = _regrid(tower(pixels) if c.scales == (1,) else _multi_scale(tower, c, pixels), c)
    return features.reshape(batch, tiles, *features.shape[1:])


def _multi_scale(tower: nn.Module, c: VisionConfig, pixels: jax.Array) -> jax.Array:
    """S2 (Shi et al. 2024, §2; LLaVA's CLIPVisionTowerS2): [B, s, s, 3] -> [B, (1 +) n * n, width * scales].

    At scale k the image is k x k tiles of `image_size`; their grids are put together and averaged down to one tile's. A
    class token is the mean of the tiles'. All tiles of all scales are one batch of the tower.
    """
    if any(scale < 1 for scale in c.scales):
        raise ConfigError(f"vision.scales are whole multiples of image_size, 1 or more, not {c.scales}.")
    batch, size = len(pixels), c.image_size
    tiles = [patches(resize(pixels, size * scale, "bicubic"), size) for scale in c.scales]  # [B, k, k, size, size, 3]
    tiles = jnp.concatenate([x.reshape(batch, -1, size, size, 3) for x in tiles], axis=1)
    features = tower(tiles.reshape(-1, size, size, 3))  # [B * sum of k * k, (1 +) n * n, D]
    features = features.reshape(batch, -1, *features.shape[1:])
    prefix = int(c.feature_tokens == "cls_patch")
    side, result, start = math.isqrt(features.shape[2] - prefix), [], 0
    for k in c.scales:
        seen, start = features[:, start : start + k * k], start + k * k
        grid = seen[:, :, prefix:].reshape(batch, k, k, side, side, -1).swapaxes(2, 3)  # [B, k, n, k, n, D]
        grid = _average(grid.reshape(batch, k * side, k * side, -1), k).reshape(batch, side * side, -1)
        result.append(jnp.concatenate([seen[:, :, :prefix].mean(1), grid], axis=1))
    return jnp.concatenate(result, axis=-1)


def _regrid(features: jax.Array, c: VisionConfig) -> jax.Array:
    """[B, (1 +) n * n, Dv] -> [B, num_tokens, Dv]: the grid averaged over `pool`, or resized; a class token stays."""
    if c.pool == 1 and not c.resized_grid:
        return features
    if c.pool > 1 and c.resized_grid:
        raise ConfigError("vision.pool and vision.resized_grid both choose the grid; leave one of them out.")
    batch, length, width = features.shape
    prefix = int(c.feature_tokens == "cls_patch")
    side = math.isqrt(length - prefix)
    if side % c.pool:
        raise ConfigError(f"vision.pool = {c.pool} must divide the tower's grid of {side} x {side}.")
    grid = features[:, prefix:].reshape(batch, side, side, width)
    grid = resize(grid, c.resized_grid, "bilinear") if c.resized_grid else _average(grid, c.pool)
    return jnp.concatenate([features[:, :prefix], grid.reshape(batch, -1, width)], axis=1)


def _average(grid: jax.Array, by: int) -> jax.Array:
    """[B, n, n, C] -> [B, n / by, n / by, C], the means of by x by cells."""
    batch, side, _, width = grid.shape
    return grid.reshape(batch, side // by, by, side // by, by, width).mean((2, 4))
