"""A Llama-shaped decoder. Llama, Vicuna, Mistral, Qwen2 and SmolLM2 are values of `LLMConfig`, not branches.

The decoder knows nothing of causality or packing: it is given each token's position and the interval of keys that it
sees, so training rows, left-padded prompts and single decoding steps are the same call.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvlm.config import LLMConfig
from jaxvlm.kernels.attention import attention
from jaxvlm.models.layers import Projection, constrain, normal_init, rms_norm, rotary_angles, rotate, stack

Cache = dict[str, jax.Array]  # {'k', 'v': [L, B, length, K, h], 'index': int32 scalar, the next free slot}


def init_cache(config: LLMConfig, batch: int, length: int, dtype: jnp.dtype) -> Cache:
    """An empty cache with room for `length` tokens in each of `batch` rows."""
    shape = (config.depth, batch, length, config.num_kv_heads, config.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype), "index": jnp.zeros((), jnp.int32)}


class Attention(nn.Module):
    config: LLMConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, rotary, k_start, k_end, cache, layer):
        """x [B, S, D] -> [B, S, D]. With a cache, writes this layer's keys and values to it and attends over it."""
        c, (cos, sin) = self.config, rotary

        def project(name, heads, axis):
            shape, axes = (heads, c.head_dim), (axis, "head_dim")
            to_heads = Projection((c.width,), shape, ("embed",), axes, self.dtype, c.qkv_bias, c.lora, name=name)
            return constrain(to_heads(x), ("batch", "length", axis, "head_dim"))

        q = rotate(project("q", c.num_heads, "heads"), cos, sin)  # [B, S, H, h]
        k = rotate(project("k", c.num_kv_heads, "kv_heads"), cos, sin)  # [B, S, K, h]
        v = project("v", c.num_kv_heads, "kv_heads")
        if cache is not None:
            at = (layer, 0, cache["index"], 0, 0)
            # Updated where it lies and then read: the loop over layers carries one cache and copies none of it.
            cache = cache | {
                "k": jax.lax.dynamic_update_slice(cache["k"], k[None].astype(cache["k"].dtype), at),
                "v": jax.lax.dynamic_update_slice(cache["v"], v[None].astype(cache["v"].dtype), at),
            }
            k, v = (
                cache["k"][layer].astype(self.dtype),
                cache["v"][layer].astype(self.dtype),
            )  # [B, length, K, h]
        out = attention(q, k, v, k_start=k_start, k_end=k_end)  # [B, S, H, h]
        shape, axes = (c.num_heads, c.head_dim), ("heads", "head_dim")
        return Projection(shape, (c.width,), axes, ("embed",), self.dtype, lora=c.lora, name="o")(out), cache


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    config: LLMConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate = Projection((c.width,), (c.mlp_dim,), ("embed",), ("mlp",), self.dtype, lora=c.lora, name="gate")(x)
        up = Projection((c.width,), (c.mlp_dim,), ("embed",), ("mlp",), self.dtype, lora=c.lora, name="up")(x)
        inner = constrain(jax.nn.silu(gate) * up, ("batch", "length", "mlp"))  # [B, S, F]
        return Projection((c.mlp_dim,), (c.width,), ("mlp",), ("embed",), self.dtype, lora=c.lora, name="down")(inner)


class Layer(nn.Module):
    config: LLMConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, carry, layer, rotary, k_start, k_end):
        x, cache = carry
        c = self.config
        normed = rms_norm(c.norm_eps, self.dtype, "attn_norm")(x)
        attended, cache = Attention(c, self.dtype, name="attn")(normed, rotary, k_start, k_end, cache, layer)
        x = x + attended
        x = x + MLP(c, self.dtype, name="mlp")(rms_norm(c.norm_eps, self.dtype, "mlp_norm")(x))
        return (constrain(x, ("batch", "length", None)), cache), None


class LLM(nn.Module):
    config: LLMConfig
    dtype: jnp.dtype
    remat: str

    def setup(self):
        c = self.config
        self.embed = Embedding(c.vocab_size, c.width, self.dtype)
        axes = (0, nn.broadcast, nn.broadcast, nn.broadcast)
        self.layers = stack(Layer, c.depth, self.remat, axes)(c, self.dtype)
        self.final_norm = rms_norm(c.norm_eps, self.dtype)
        if not c.tie_embeddings:
            self.head = Projection((c.width,), (c.vocab_size,), ("embed",), ("vocab",), self.dtype)

    def __call__(self, x, positions, k_start, k_end, cache: Cache | None = None):
        """Embeddings x [B, S, D] -> (hidden [B, S, D] after the final norm, cache).

        Args:
            positions: int32 [B, S], for the rotary embedding.
            k_start, k_end: int32 [B, S], the keys each token sees: indices into the row, or slots of the cache.
            cache: what earlier calls left; this call's tokens are written from `cache['index']` on.
        """
        rotary = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        layers = jnp.arange(self.config.depth)
        (x, cache), _ = self.layers((x, cache), layers, rotary, k_start, k_end)
        if cache is not None:
            cache = cache | {"index": cache["index"] + positions.shape[1]}
        return self.final_norm(x), cache

    def logits(self, hidden):
        """hidden [..., D] -> float32 [..., V]."""
        product = self.embed.attend(hidden) if self.config.tie_embeddings else self.head(hidden)
        return product.astype(jnp.float32)


class Embedding(nn.Module):
    vocab_size: int
    width: int
    dtype: jnp.dtype

    def setup(self):
        init = nn.with_logical_partitioning(normal_init, ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (self.vocab_size, self.width))

    def __call__(self, tokens):
        """tokens int32 [B, S] -> [B, S, D]. A token outside the vocabulary becomes NaN, so that it cannot hide."""
        return constrain(jnp.take(self.embedding, tokens, axis=0).astype(self.dtype), ("batch", "length", None))

    def attend(self, hidden):
        """hidden [..., D] -> [..., V], against the tied embedding."""
        return jnp.einsum("...d,vd->...v", hidden, self.embedding.astype(self.dtype))
