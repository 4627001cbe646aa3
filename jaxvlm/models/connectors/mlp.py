"""`linear` and LLaVA-1.5's `mlp{N}x_gelu`: N linear layers with an activation between them (recipes §1.1 A2)."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvlm.config import ConfigError, ConnectorConfig
from jaxvlm.models.layers import Projection, activation, layer_norm, uniform_fan_in


def num_layers(config: ConnectorConfig) -> int:
    """1 for 'linear', N for 'mlp{N}x_gelu'."""
    match = re.fullmatch(r"linear|mlp([1-9]\d*)x_gelu", config.kind)
    if not match:
        raise ConfigError(f"No connector '{config.kind}'; there are: linear, mlp2x_gelu (or mlp3x_gelu, ...).")
    return int(match[1] or 1)


class MLP(nn.Module):
    """features [B, N, Dv] -> [B, N, width], initialised as torch initialises linear layers."""

    config: ConnectorConfig
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        x, last = features.astype(self.dtype), num_layers(self.config)
        if self.config.input_norm:
            x = layer_norm(1e-5, self.dtype, "vision_embed", "norm")(x)
        for i in range(1, last + 1):
            axis_in = "vision_embed" if i == 1 else "mlp"
            axis_out = "embed" if i == last else "mlp"
            init = uniform_fan_in(x.shape[-1])
            x = Projection(
                shape_in=(x.shape[-1],),
                shape_out=(self.width,),
                # A dimension's name may stand only once in a kernel.
                axes_in=(axis_in if axis_in != axis_out else None,),
                axes_out=(axis_out,),
                dtype=self.dtype,
                bias=True,
                kernel_init=init,
                bias_init=init,
                name=f"linear_{i}",
            )(x)
            if i < last:
                x = activation(self.config.activation)(x)
        return x
