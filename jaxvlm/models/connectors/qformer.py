"""BLIP-2's querying transformer (Li et al. 2023, §3.1) and InstructBLIP's, which also reads the instruction (Dai et al.
2023, §2.3): a BERT whose learned queries cross-attend to the image in every few layers (recipes §1.1 A9).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvlm.config import ConfigError, ModelConfig
from jaxvlm.models.connectors.row_end import row_end
from jaxvlm.models.layers import Projection, activation, constrain, layer_norm, normal_init, sharded_attention, stack


class Attention(nn.Module):
    """x [B, S, W] attends to `source` [B, N, Ds]: the keys k_start <= j < k_end (int32 [B, S]), or all of them."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, source, k_start=None, k_end=None):
        c = self.config.connector.qformer
        shape, axes = (c.num_heads, c.width // c.num_heads), ("vision_heads", "head_dim")

        def project(name, of):
            width = (of.shape[-1],)
            to_heads = Projection(width, shape, ("vision_embed",), axes, self.dtype, bias=True, name=name)
            return constrain(to_heads(of), ("tiles", "visual_length", *axes))

        q, k, v = project("q", x), project("k", source), project("v", source)
        own = ("tiles", "visual_length", "vision_heads")
        out = sharded_attention(q, k, v, k_start=k_start, k_end=k_end, axes=own)  # [B, S, H, h]
        return Projection(shape, (c.width,), axes, ("vision_embed",), self.dtype, bias=True, name="o")(out)


class MLP(nn.Module):
    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        c, outer, inner = self.config.connector.qformer, ("vision_embed",), ("vision_mlp",)
        x = Projection((c.width,), (c.mlp_dim,), outer, inner, self.dtype, bias=True, name="up")(x)
        x = activation(self.config.connector.activation)(x)
        return Projection((c.mlp_dim,), (c.width,), inner, outer, self.dtype, bias=True, name="down")(x)


class Layer(nn.Module):
    """The queries and the text attend to each other; then the queries to the image. Norms follow their residual."""

    config: ModelConfig
    dtype: jnp.dtype
    cross: bool

    @nn.compact
    def __call__(self, x, features, k_end):
        c, queries = self.config.connector.qformer, self.config.connector.qformer.num_queries
        x = self._norm("attn_norm", x + self._part(Attention, "attn")(x, x, jnp.zeros_like(k_end), k_end))
        x, text = x[:, :queries], x[:, queries:]
        if self.cross:
            x = self._norm("cross_norm", x + self._part(Attention, "cross")(x, features))
        x = self._norm("mlp_norm", x + self._part(MLP, "mlp")(x))
        if c.text_vocab_size and text.shape[1]:
            text = self._norm("text_mlp_norm", text + self._part(MLP, "text_mlp")(text))
            x = jnp.concatenate([x, text], axis=1)
        return constrain(x, ("tiles", "visual_length", None))

    def _part(self, module, name):
        return module(self.config, self.dtype, name=name)

    def _norm(self, name, x):
        return layer_norm(self.config.connector.qformer.norm_eps, self.dtype, "vision_embed", name)(x)


class Group(nn.Module):
    """A layer with cross-attention and those without that follow it, so that all steps of the scan are alike."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, features, k_end):
        for i in range(self.config.connector.qformer.cross_every):
            x = Layer(self.config, self.dtype, cross=i == 0, name=f"layer_{i}")(x, features, k_end)
        return x, None


class QFormer(nn.Module):
    config: ModelConfig
    dtype: jnp.dtype

    def setup(self):
        self.newline = row_end(self, self.config)

    @nn.compact
    def __call__(
        self, features: jax.Array, tokens: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """features [B, T, N, Dv] -> visual tokens [B, T, num_queries, D].

        Args:
            tokens: int32 [B, T, L], the instruction of each tile in the Q-Former's own vocabulary. Without it the
                queries see the image alone, as in BLIP-2; InstructBLIP was trained with it.
            mask: [B, T, L], nonzero at the tokens of the text, which come before the padding; None: all of them.
        """
        c = self.config.connector.qformer
        if c.depth % c.cross_every:
            raise ConfigError(f"qformer.cross_every = {c.cross_every} must divide qformer.depth = {c.depth}.")
        batch, tiles, *image = features.shape
        features = features.astype(self.dtype).reshape(batch * tiles, *image)
        x = jnp.broadcast_to(self._table("query", c.num_queries), (batch * tiles, c.num_queries, c.width))
        lengths = jnp.zeros(batch * tiles, jnp.int32)
        if tokens is not None:
            text, lengths = self._embed(tokens, mask)
            x = jnp.concatenate([x, text], axis=1)
        x = layer_norm(c.norm_eps, self.dtype, "vision_embed", "norm")(x)
        k_end = jnp.broadcast_to((c.num_queries + lengths)[:, None], x.shape[:2])
        how = self.config.remat, (nn.broadcast, nn.broadcast), bool(self.config.unroll)
        groups = stack(Group, c.depth // c.cross_every, *how)
        x, _ = groups(self.config, self.dtype, name="layers")(x, features, k_end)
        width, bias = (self.config.llm.width,), self.config.connector.bias
        x = Projection((c.width,), width, (None,), ("embed",), self.dtype, bias=bias, name="linear_1")(
            x[:, : c.num_queries]
        )
        return x.reshape(batch, tiles, *x.shape[1:])

    def _embed(self, tokens, mask):
        """The text [B * T, L, W] and how many of its tokens are real, int32 [B * T]."""
        c, length = self.config.connector.qformer, tokens.shape[-1]
        if not c.text_vocab_size:
            raise ConfigError("'qformer_tokens' were given, but this Q-Former reads no text (text_vocab_size = 0).")
        if length > c.text_positions:
            raise ConfigError(f"qformer_tokens are {length} long, but the Q-Former has {c.text_positions} positions.")
        tokens = tokens.reshape(-1, length)
        lengths = jnp.full(len(tokens), length) if mask is None else (mask.reshape(-1, length) > 0).sum(-1)
        words = self._table("word_embed", c.text_vocab_size)[tokens]
        positions = self._table("word_positions", c.text_positions)[:length]
        return words + positions, lengths.astype(jnp.int32)

    def _table(self, name, rows):
        init = nn.with_logical_partitioning(normal_init, (None, "vision_embed"))
        return self.param(name, init, (rows, self.config.connector.qformer.width)).astype(self.dtype)
