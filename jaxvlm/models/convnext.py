"""ConvNeXt (Liu et al. 2022) as a vision tower: OpenCLIP's and the supervised ones, by config alone.

Its features are outputs of stages. Stage i has cells of 4 * 2^i pixels; several stages are brought to one grid by
bilinear resizing and concatenated by channel (Cambrian's multi-stage tower, recipes §1.1 A7).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvlm.config import ConfigError, VisionConfig
from jaxvlm.models.convnet import Conv
from jaxvlm.models.layers import Projection, activation, constrain, layer_norm, stack
from jaxvlm.models.resize import resize
from jaxvlm.models.vit import patches

STEM = 4  # pixels on a side of the first stage's cells; each later stage halves the grid


def feature_stages(config: VisionConfig) -> tuple[int, ...]:
    """`feature_layers` as numbers of stages, from 0."""
    count = len(config.stage_depths)
    if len(config.stage_widths) != count:
        raise ConfigError(
            f"vision.stage_depths has {count} entries and vision.stage_widths {len(config.stage_widths)}; "
            "give both for every stage."
        )
    for stage in config.feature_layers:
        if not -count <= stage < count:
            raise ConfigError(
                f"vision.feature_layers: {stage} names no stage of a convnext of {count}; "
                f"use -1 (the last) to -{count}, or 0 to {count - 1}."
            )
    if not config.feature_layers:
        raise ConfigError("vision.feature_layers is empty; name at least one stage, -1 for the last.")
    return tuple(stage % count for stage in config.feature_layers)


class Block(nn.Module):
    """A depthwise 7 x 7 convolution, a norm and an MLP, added to the input."""

    config: VisionConfig
    dtype: jnp.dtype
    width: int

    @nn.compact
    def __call__(self, x):
        c, outer, inner, wide = self.config, ("vision_embed",), ("vision_mlp",), 4 * self.width
        y = Conv(self.width, 7, self.dtype, depthwise=True, name="depthwise")(x)
        y = layer_norm(c.norm_eps, self.dtype, "vision_embed", "norm")(y)
        y = Projection((self.width,), (wide,), outer, inner, self.dtype, bias=True, name="up")(y)
        y = constrain(activation(c.activation)(y), ("tiles", None, None, "vision_mlp"))  # [B, n, n, 4 C]
        y = Projection((wide,), (self.width,), inner, outer, self.dtype, bias=True, name="down")(y)
        if c.layer_scale:
            init = nn.with_logical_partitioning(nn.initializers.ones, ("vision_embed",))
            y = y * self.param("scale", init, (self.width,)).astype(self.dtype)
        return constrain(x + y, ("tiles", None, None, None)), None


class Stage(nn.Module):
    """A 2 x 2 downsampling, except in the first stage, and the blocks: [B, n, n, C] -> [B, n / 2, n / 2, width]."""

    config: VisionConfig
    dtype: jnp.dtype
    remat: str
    unroll: bool
    number: int

    @nn.compact
    def __call__(self, x):
        c, width = self.config, self.config.stage_widths[self.number]
        if self.number:
            x = layer_norm(c.norm_eps, self.dtype, "vision_embed", "downsample_norm")(x)
            x = _cells(x, 2, width, self.dtype, "downsample")
        x, _ = stack(Block, c.stage_depths[self.number], self.remat, (), self.unroll)(
            c, self.dtype, width, name="blocks"
        )(x)
        return x


class ConvNeXt(nn.Module):
    config: VisionConfig
    dtype: jnp.dtype
    remat: str
    unroll: bool = False

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels [B, image_size, image_size, 3] -> features [B, n * n, channels of the chosen stages].

        n is `resized_grid`, or image_size // patch_size: a stage whose cells are of another size is resized to that.
        """
        c, chosen = self.config, feature_stages(self.config)
        if c.feature_tokens != "patch" or c.feature_norm:
            raise ConfigError(
                "A convnext has no class token and no norm over its grid: use vision.feature_tokens = 'patch' and "
                "vision.feature_norm = False."
            )
        x = _cells(pixels.astype(self.dtype), STEM, c.stage_widths[0], self.dtype, "stem")
        x = layer_norm(c.norm_eps, self.dtype, "vision_embed", "stem_norm")(x)
        outputs = []
        for number in range(max(chosen) + 1):
            x = Stage(c, self.dtype, self.remat, self.unroll, number, name=f"stages_{number}")(x)
            outputs.append(x)
        size = c.resized_grid or c.image_size // c.patch_size
        x = jnp.concatenate([resize(outputs[number], size, "bilinear") for number in chosen], axis=-1)
        return x.reshape(x.shape[0], size * size, -1)


def _cells(x, size, width, dtype, name):
    """A convolution of this width and stride: [B, n, n, C] -> [B, n / size, n / size, width]."""
    shape, axes = (size, size, x.shape[-1]), (None, None, None)
    to_width = Projection(shape, (width,), axes, ("vision_embed",), dtype, bias=True, name=name)
    return constrain(to_width(patches(x, size)), ("tiles", None, None, None))
