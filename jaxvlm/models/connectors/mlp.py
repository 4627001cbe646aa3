"""Connectors that are linear layers with an activation between them.

`linear` and LLaVA-1.5's `mlp{N}x_gelu` (recipes §1.1 A2), Prismatic's `fused_mlp`, which widens fourfold first, and
`pixel_shuffle` (Idefics 3, SmolVLM, nanoVLM): n x n neighbouring cells become the channels of one.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvlm.config import ConfigError, ModelConfig
from jaxvlm.models.connectors.row_end import row_end
from jaxvlm.models.layers import Projection, activation, layer_norm, uniform_fan_in


def widths(config: ModelConfig) -> tuple[int, ...]:
    """The channels that the first layer reads, and those that each layer gives."""
    kind, first, last = config.connector.kind, config.vision.feature_width, config.llm.width
    if kind == "fused_mlp":
        return (first, 4 * first, last, last)
    if kind == "pixel_shuffle":
        return (first * config.connector.shuffle**2, last)
    layers = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    return (first, *[last] * (int(layers[1]) if layers else 1))


def pixel_shuffle(features: jax.Array, shuffle: int) -> jax.Array:
    """[..., n * n, Dv] -> [..., (n / s)^2, s * s * Dv], a cell's channels in the order row, column, Dv."""
    *lead, tokens, width = features.shape
    side = round(tokens**0.5)
    if side * side != tokens or side % shuffle:
        raise ConfigError(
            f"connector.shuffle = {shuffle} must divide the side of a square grid of features, and {tokens} tokens are "
            "no such grid. Choose vision.feature_tokens = 'patch' and an image size whose grid it divides."
        )
    cells = side // shuffle
    grid = features.reshape(*lead, cells, shuffle, cells, shuffle, width).swapaxes(-4, -3)
    return grid.reshape(*lead, cells * cells, shuffle * shuffle * width)


class MLP(nn.Module):
    """features [B, T, N, Dv] -> [B, T, P, D], initialised as torch initialises linear layers."""

    config: ModelConfig
    dtype: jnp.dtype

    def setup(self):
        self.newline = row_end(self, self.config)

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        c, sizes, x = self.config.connector, widths(self.config), features.astype(self.dtype)
        if c.input_norm:
            x = layer_norm(1e-5, self.dtype, "vision_embed", "norm")(x)
        if c.kind == "pixel_shuffle":
            x = pixel_shuffle(x, c.shuffle)
        last = len(sizes) - 1
        for i in range(1, last + 1):
            # A name may stand only once in a kernel, and of 'vision_embed' and 'embed', which share a mesh axis, one.
            axis_in = "mlp" if i == last > 1 else "vision_embed" if i == 1 < last else None
            axis_out = "embed" if i == last else "mlp"
            init = uniform_fan_in(sizes[i - 1])
            x = Projection(
                shape_in=(sizes[i - 1],),
                shape_out=(sizes[i],),
                axes_in=(axis_in,),
                axes_out=(axis_out,),
                dtype=self.dtype,
                bias=c.bias,
                kernel_init=init,
                bias_init=init,
                name=f"linear_{i}",
            )(x)
            if i < last:
                x = activation(c.activation)(x)
        return x
