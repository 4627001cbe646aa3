"""Qwen-VL's resampler (Bai et al. 2023, §2.1): learned queries attend once to the image.

Both sides carry fixed 2-D sine-cosine positions. What Qwen-VL's tower applies to the queries afterwards, a norm and a
matrix, belongs to the connector here: a tower's output are features of the image's cells.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxvlm.config import ConfigError, ModelConfig
from jaxvlm.models import resize
from jaxvlm.models.connectors.row_end import row_end
from jaxvlm.models.layers import Projection, constrain, layer_norm, normal_init, sharded_attention

NORM_EPS = 1e-6


def side_of(tokens: int, what: str) -> int:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ConfigError(f"The resampler needs a square grid, and {what} = {tokens} is none.")
    return side


def positions(side: int, width: int) -> np.ndarray:
    """float32 [side * side, width]: half of the channels tell the column, half the row, each as sines then cosines."""
    if width % 4:
        raise ConfigError(f"The resampler's sine-cosine positions need an llm.width divisible by 4, not {width}.")
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    angles = np.arange(side)[:, None] * frequencies  # [side, width / 4]
    one = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [side, width / 2]
    columns, rows = np.tile(one, (side, 1)), np.repeat(one, side, axis=0)
    return np.concatenate([columns, rows], axis=1).astype(np.float32)


class Attention(nn.Module):
    """q [Q, D], the same for every tile, over k and v [B, N, D] -> [B, Q, D]: torch's multi-head attention."""

    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, q, k, v):
        width = (q.shape[-1],)
        shape, axes = (self.num_heads, q.shape[-1] // self.num_heads), ("heads", "head_dim")

        def project(name, x):
            return Projection(width, shape, ("embed",), axes, self.dtype, bias=True, name=name)(x)

        q = project("q", q)  # [Q, H, h]
        q = jnp.broadcast_to(q, (len(k), *q.shape))
        k, v = (constrain(project(n, x), ("tiles", "visual_length", *axes)) for n, x in (("k", k), ("v", v)))
        out = sharded_attention(q, k, v, axes=("tiles", "visual_length", "heads"))  # [B, Q, H, h]
        return Projection(shape, width, axes, ("embed",), self.dtype, bias=True, name="o")(out)


class Resampler(nn.Module):
    """features [B, T, N, Dv] -> visual tokens [B, T, num_queries, D]; both grids are square."""

    config: ModelConfig
    dtype: jnp.dtype

    def setup(self):
        self.newline = row_end(self, self.config)

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        c, width = self.config.connector.resampler, self.config.llm.width
        batch, tiles, tokens, _ = features.shape
        side, wanted = side_of(tokens, "its input"), side_of(c.num_queries, "resampler.num_queries")
        table = positions(wanted, width)
        x = features.astype(self.dtype).reshape(batch * tiles, tokens, -1)
        if x.shape[-1] != width:
            to_width = (x.shape[-1],), (width,), (None,), ("embed",)
            x = Projection(*to_width, self.dtype, name="kv_proj")(x)
        x = self._norm("kv_norm", x)
        init = nn.with_logical_partitioning(normal_init, (None, "embed"))
        query = self.param("query", init, (c.num_queries, width))
        q = self._norm("q_norm", query.astype(self.dtype)) + table.astype(self.dtype)
        taps = resize.matrix(wanted, side, "bicubic")
        # The image's cells have the queries' table, resized.
        grid = np.einsum("ia,jb,abd->ijd", taps, taps, table.reshape(wanted, wanted, width)).reshape(tokens, width)
        out = Attention(c.num_heads, self.dtype, name="attn")(q, x + grid.astype(self.dtype), x)
        out = self._norm("post_norm", out)
        out = Projection((width,), (width,), (None,), ("embed",), self.dtype, name="linear_1")(out)
        return out.reshape(batch, tiles, *out.shape[1:])

    def _norm(self, name, x):
        return layer_norm(NORM_EPS, self.dtype, "embed", name)(x)
