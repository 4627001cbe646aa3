"""The decoder. Every family (Llama, Mistral, Qwen, Phi, Gemma, OPT) is values of `LLMConfig`, not branches.

The decoder knows nothing of causality or packing: it is given each token's position and the interval of keys that it
sees, so training rows, left-padded prompts and single decoding steps are the same call. It limits the interval itself
in the layers that have a sliding window.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxvlm.config import ConfigError, LLMConfig
from jaxvlm.kernels import intervals
from jaxvlm.models.layers import (
    Projection,
    RMSNorm,
    activation,
    constrain,
    layer_norm,
    lookup,
    normal_init,
    sharded_attention,
    sharded_decode_attention,
    stack,
)
from jaxvlm.models.rotary import rotary_angles, rotate

# {'k', 'v': [L, B, K, length, h]}, and once it holds something 'index', int32 scalar, the next free slot; with longrope also
# 'stretched', bool [B].
Cache = dict[str, jax.Array]


def init_cache(config: LLMConfig, batch: int, length: int, dtype: jnp.dtype) -> Cache:
    """An empty cache with room for `length` tokens in each of `batch` rows."""
    shape = (config.depth, batch, config.num_kv_heads, length, config.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def norm(c: LLMConfig, dtype: jnp.dtype, name: str | None = None, axis: str = "embed") -> nn.Module:
    """The family's norm over the last dimension, which the logical `axis` names."""
    if c.norm == "layer":
        return layer_norm(c.norm_eps, dtype, axis, name)
    if c.norm not in ("rms", "rms_plus_one"):
        raise ConfigError(f"llm.norm must be rms, rms_plus_one or layer, not '{c.norm}'.")
    return RMSNorm(c.norm_eps, dtype, axis, c.norm == "rms_plus_one", name=name)


class Attention(nn.Module):
    config: LLMConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, rotary, k_start, k_end, cache, layer):
        """x [B, S, D] -> [B, S, D]. With a cache, writes this layer's keys and values to it; attends over what it held too."""
        c = self.config

        def project(name, heads, axis):
            shape, axes = (heads, c.head_dim), (axis, "head_dim")
            to_heads = Projection((c.width,), shape, ("embed",), axes, self.dtype, c.qkv_bias, c.lora, name=name)
            return constrain(to_heads(x), ("batch", "length", axis, "head_dim"))

        q = project("q", c.num_heads, "heads")  # [B, S, H, h]
        k, v = (project(name, c.num_kv_heads, "kv_heads") for name in ("k", "v"))  # [B, S, K, h]
        if c.qk_norm:
            q, k = (norm(c, self.dtype, f"{name}_norm", "head_dim")(x) for name, x in (("q", q), ("k", k)))
        if rotary is not None:
            q, k = (rotate(x, *rotary) for x in (q, k))
        if cache is not None:
            at = (layer, 0, 0, cache.get("index", 0), 0)
            # Updated where it lies and then read: the loop over layers carries one cache and copies none of it.
            written = {name: x.swapaxes(1, 2)[None].astype(cache[name].dtype) for name, x in (("k", k), ("v", v))}
            cache = cache | {name: jax.lax.dynamic_update_slice(cache[name], x, at) for name, x in written.items()}
        own = dict(k_start=k_start, k_end=k_end, scale=c.attn_scale, softcap=c.attn_softcap)
        if cache is None or "index" not in cache:  # nothing comes before these tokens
            # Padding is a token like others until attention: it holds finite numbers.
            out = sharded_attention(q, k, v, axes=("batch", "length", "heads"), finite=True, **own)
        else:
            out = sharded_decode_attention(q, cache["k"], cache["v"], layer, **own)
        shape, axes = (c.num_heads, c.head_dim), ("heads", "head_dim")
        to_width = Projection(shape, (c.width,), axes, ("embed",), self.dtype, c.out_bias, c.lora, name="o")
        return to_width(out), cache


class MLP(nn.Module):
    """act(gate) * up (Shazeer 2020), or act(up) alone, and down."""

    config: LLMConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        c = self.config

        def project(name, size_in, size_out, axes):
            return Projection((size_in,), (size_out,), axes[:1], axes[1:], self.dtype, c.mlp_bias, c.lora, name=name)

        act, inner_axes = activation(c.activation), ("embed", "mlp")
        up = project("up", c.width, c.mlp_dim, inner_axes)(x)
        inner = act(project("gate", c.width, c.mlp_dim, inner_axes)(x)) * up if c.gated else act(up)
        inner = constrain(inner, ("batch", "length", "mlp"))  # [B, S, F]
        return project("down", c.mlp_dim, c.width, ("mlp", "embed"))(inner)


class Layer(nn.Module):
    config: LLMConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, carry, layer, views, k_end, after):
        """`layer` is its number and whether it sees everything; `views` what (rotary, k_start) such layers have and
        what the others have, so that one scanned body serves both. `after` as in `LLM`."""
        x, cache = carry
        c, (number, full) = self.config, layer
        rotary, k_start = jax.tree.map(partial(jnp.where, full), *views)

        normed = norm(c, self.dtype, "attn_norm")(x)
        attended, cache = Attention(c, self.dtype, name="attn")(normed, rotary, k_start, k_end, cache, number)
        if c.post_norms:
            attended = norm(c, self.dtype, "attn_post_norm")(attended)
        x = x + attended
        if not c.parallel:
            normed = norm(c, self.dtype, "mlp_norm")(x)
        changed = MLP(c, self.dtype, name="mlp")(normed)
        if c.post_norms:
            changed = norm(c, self.dtype, "mlp_post_norm")(changed)
        x = constrain(x + changed, ("batch", "length", None))
        return (x if after is None else after(x, number), cache), None


class LLM(nn.Module):
    config: LLMConfig
    dtype: jnp.dtype
    remat: str
    unroll: bool = False  # layers one by one and not in a loop

    def setup(self):
        c = self.config
        self.embed = Embedding(c.vocab_size, c.width, c.embed_scale, self.dtype)
        if c.learned_positions:
            init = nn.with_logical_partitioning(normal_init, (None, "embed"))
            self.pos_embed = self.param("pos_embed", init, (c.max_positions, c.width))
        self.layers = stack(Layer, c.depth, self.remat, (0, *(nn.broadcast,) * 3), self.unroll)(c, self.dtype)
        self.final_norm = norm(c, self.dtype)
        if c.tie_embeddings and c.head_bias:
            raise ConfigError("llm.head_bias needs a head of its own: set llm.tie_embeddings = False.")
        if not c.tie_embeddings:
            self.head = Projection((c.width,), (c.vocab_size,), ("embed",), ("vocab",), self.dtype, c.head_bias)

    def __call__(self, x, positions, k_start, k_end, cache: Cache | None = None, after: Partial | None = None):
        """Embeddings x [B, S, D] -> (hidden [B, S, D] after the final norm, cache).

        Args:
            positions: int32 [B, S], for the rotary angles or the position table (beyond whose end lies NaN).
            k_start, k_end: int32 [B, S], the keys each token may see: indices into the row, or slots of the cache.
                Layers with a sliding window keep the last of them.
            cache: an empty one, or what earlier calls left, which is followed by one token a row. This call's tokens are
                written from `cache['index']` on, from 0 if it is empty.
            after: a function of (x [B, S, D], a layer's number) -> x, applied after every layer.
        """
        c = self.config
        if c.learned_positions:
            x = x + lookup(self.pos_embed.astype(self.dtype), positions, (None, "embed"))
        stretched = None
        if c.rope_scaling.kind == "longrope":
            # As transformers chooses, but row by row, and once: a row keeps the choice of its prompt, since the keys in
            # the cache are already turned (transformers recomputes them all when an answer crosses the length).
            last = jnp.max(jnp.where(k_start < k_end, positions, 0), axis=1)  # [B], padding apart
            stretched = last >= c.rope_scaling.original_max_positions
            if cache is not None:
                stretched = cache.get("stretched", stretched)
        layers = jnp.arange(c.depth)
        full = jnp.isin(layers, jnp.array(c.full_layers, int))
        (x, cache), _ = self.layers(
            (x, cache), (layers, full), _views(c, positions, k_start, k_end, stretched), k_end, after
        )
        if cache is not None:
            cache = cache | {"index": jnp.int32(cache.get("index", 0) + positions.shape[1])}
            cache |= {} if stretched is None else {"stretched": stretched}
        return self.final_norm(x), cache

    def logits(self, hidden):
        """hidden [..., D] -> float32 [..., V]."""
        product = self.embed.attend(hidden) if self.config.tie_embeddings else self.head(hidden)
        product, cap = product.astype(jnp.float32), self.config.logit_softcap
        return product if cap is None else cap * jnp.tanh(product / cap)


def _views(c: LLMConfig, positions, k_start, k_end, stretched):
    """(rotary, k_start) of the layers that see everything, and of those with the sliding window (if there is one)."""
    rotary = local = None
    if not c.learned_positions:
        dim = int(c.head_dim * c.rope_fraction)
        rotary = local = rotary_angles(positions, dim, c.rope_theta, c.rope_scaling, stretched)
        if c.rope_local_theta is not None:
            local = rotary_angles(positions, dim, c.rope_local_theta)
    return (rotary, k_start), (local, intervals.limit(k_start, k_end, c.sliding_window))


class Embedding(nn.Module):
    vocab_size: int
    width: int
    scale: float
    dtype: jnp.dtype

    def setup(self):
        init = nn.with_logical_partitioning(normal_init, ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (self.vocab_size, self.width))

    def __call__(self, tokens):
        """tokens int32 [B, S] -> [B, S, D]. A token outside the vocabulary becomes NaN, so that it cannot hide."""
        x = lookup(self.embedding.astype(self.dtype), tokens, ("vocab", "embed"))
        return constrain(x * jnp.asarray(self.scale, self.dtype), ("batch", "length", None))

    def attend(self, hidden):
        """hidden [..., D] -> [..., V], against the tied embedding."""
        return jnp.einsum("...d,vd->...v", hidden, self.embedding.astype(self.dtype))
