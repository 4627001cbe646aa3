"""Connectors: from a vision tower's features to the language model's embeddings (recipes §1.1 A2, A7, A9).

Each is a module of (ModelConfig, dtype) that takes features [B, T, N, Dv] (`sva` takes one such array for each tower)
and gives the visual tokens [B, T, P, D] of every tile, P = `ModelConfig.tile_tokens`.
"""

import re

import flax.linen as nn
import jax.numpy as jnp

from jaxvlm.config import ConfigError, ModelConfig
from jaxvlm.models.connectors.mlp import MLP
from jaxvlm.models.connectors.qformer import QFormer
from jaxvlm.models.connectors.resampler import Resampler
from jaxvlm.models.connectors.sva import SVA

CONNECTORS: dict[str, type[nn.Module]] = {
    "linear": MLP,
    "mlp{N}x_gelu": MLP,
    "fused_mlp": MLP,
    "pixel_shuffle": MLP,
    "qformer": QFormer,
    "resampler": Resampler,
    "sva": SVA,
}


def connector(config: ModelConfig, dtype: jnp.dtype) -> nn.Module:
    """The connector that the configuration names. Raises `ConfigError` naming the kinds there are."""
    kind = config.connector.kind
    name = re.sub(r"^mlp[1-9]\d*x_gelu$", "mlp{N}x_gelu", kind)
    if name not in CONNECTORS:
        raise ConfigError(f"No connector '{kind}'; there are: {', '.join(CONNECTORS)}.")
    return CONNECTORS[name](config, dtype)
