"""One vision transformer: CLIP, SigLIP, DINOv2, EVA-CLIP or a supervised ViT by config alone (recipes §1.1 A1, §3.5).

Its features are those of chosen layers, so the layers behind the last of them are not built: LLaVA reads the
second-to-last layer's output without the final norm, and has neither the last layer's parameters nor that norm's.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvlm.config import ConfigError, VisionConfig
from jaxvlm.kernels import intervals
from jaxvlm.kernels.dispatch import backend
from jaxvlm.models.layers import Projection, activation, constrain, layer_norm, normal_init, sharded_attention, stack


def feature_states(config: VisionConfig) -> tuple[int, ...]:
    """`feature_layers`, which index Hugging Face's `hidden_states`, as counts of layers: the last is `depth`."""
    layers = tuple(layer + (config.depth + 1 if layer < 0 else 0) for layer in config.feature_layers)
    for given, layer in zip(config.feature_layers, layers, strict=True):
        if not 1 <= layer <= config.depth:
            raise ConfigError(
                f"vision.feature_layers: {given} names no layer of a tower of depth {config.depth}; "
                f"use -1 (the last) to -{config.depth}, or 1 to {config.depth}."
            )
    if not layers:
        raise ConfigError("vision.feature_layers is empty; name at least one layer, -2 for LLaVA's.")
    return layers


def num_layers(config: VisionConfig) -> int:
    """How many layers the features need."""
    return max(feature_states(config))


def patches(x: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] -> [B, H // size, W // size, size, size, C]: what a convolution with that width and stride reads.

    Cells beyond the last whole patch are left out, as a VALID convolution does (SigLIP at 384 / 14).
    """
    batch, height, width, channels = x.shape
    rows, columns = height // size, width // size
    x = x[:, : rows * size, : columns * size].reshape(batch, rows, size, columns, size, channels)
    return x.swapaxes(2, 3)


class Attention(nn.Module):
    config: VisionConfig
    dtype: jnp.dtype
    tokens: int  # of [B, N, D]; the rest is padding, which nobody sees

    @nn.compact
    def __call__(self, x):
        c = self.config
        shape, axes = (c.num_heads, c.width // c.num_heads), ("vision_heads", "head_dim")

        def project(name):
            to_heads = Projection((c.width,), shape, ("vision_embed",), axes, self.dtype, True, c.lora, name=name)
            return constrain(to_heads(x), ("tiles", "visual_length", *axes))

        q, k, v = project("q"), project("k"), project("v")  # [B, N, H, h]
        span = {}
        if x.shape[1] > self.tokens:
            k_start, k_end = intervals.full(len(x), x.shape[1], self.tokens)
            span = dict(k_start=k_start, k_end=k_end, finite=True)
        out = sharded_attention(q, k, v, axes=("tiles", "visual_length", "vision_heads"), **span)
        return Projection(shape, (c.width,), axes, ("vision_embed",), self.dtype, True, c.lora, name="o")(out)


class MLP(nn.Module):
    """act(up) and down, or SwiGLU (Shazeer 2020): silu(gate) * up and down."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        c, outer, inner = self.config, ("vision_embed",), ("vision_mlp",)
        if c.mlp not in ("plain", "swiglu"):
            raise ConfigError(f"vision.mlp must be plain or swiglu, not '{c.mlp}'.")

        def widen(name):
            return Projection((c.width,), (c.mlp_dim,), outer, inner, self.dtype, True, c.lora, name=name)(x)

        y = jax.nn.silu(widen("gate")) * widen("up") if c.mlp == "swiglu" else activation(c.activation)(widen("up"))
        y = constrain(y, ("tiles", "visual_length", "vision_mlp"))  # [B, N, F]
        return Projection((c.mlp_dim,), (c.width,), inner, outer, self.dtype, True, c.lora, name="down")(y)


class Layer(nn.Module):
    config: VisionConfig
    dtype: jnp.dtype
    tokens: int  # as in `Attention`
    kept: tuple[int, ...]  # layers whose output is wanted, besides the last one's

    @nn.compact
    def __call__(self, carry, number):
        """carry: x [B, N, D] and an array like it for each of `kept`; `number` counts the layers from 1."""
        c, (x, outputs) = self.config, carry
        x = x + self._scaled("scale1", Attention(c, self.dtype, self.tokens, name="attn")(self._norm("norm1", x)))
        x = x + self._scaled("scale2", MLP(c, self.dtype, name="mlp")(self._norm("norm2", x)))
        x = constrain(x, ("tiles", "visual_length", None))
        outputs = tuple(jnp.where(number == n, x, old) for n, old in zip(self.kept, outputs, strict=True))
        return (x, outputs), None

    def _norm(self, name, x):
        return layer_norm(self.config.norm_eps, self.dtype, "vision_embed", name)(x)

    def _scaled(self, name, x):
        if not self.config.layer_scale:
            return x
        init = nn.with_logical_partitioning(nn.initializers.ones, ("vision_embed",))
        return x * self.param(name, init, (self.config.width,)).astype(self.dtype)


class ViT(nn.Module):
    config: VisionConfig
    dtype: jnp.dtype
    remat: str
    unroll: bool = False

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels [B, image_size, image_size, 3] -> features [B, (1 +) grid * grid, D * feature layers].

        The class token comes first when `feature_tokens` is 'cls_patch' and is dropped otherwise.
        """
        c, states = self.config, feature_states(self.config)
        if c.feature_tokens not in ("patch", "cls_patch"):
            raise ConfigError(f"vision.feature_tokens must be patch or cls_patch, not '{c.feature_tokens}'.")
        if c.feature_tokens == "cls_patch" and not c.class_token:
            raise ConfigError("vision.feature_tokens = 'cls_patch' needs a tower with a class token.")
        x = self._embed(pixels.astype(self.dtype))  # [B, prefix + N, D]
        if c.pre_norm:
            x = layer_norm(c.norm_eps, self.dtype, "vision_embed", "pre_norm")(x)
        length = x.shape[1]
        if backend() == "gpu":
            # cuBLAS and the attention kernels want eights: once here, or before and after each of them.
            x = jnp.pad(x, ((0, 0), (0, -length % 8), (0, 0)))
        *kept, last = sorted(set(states))
        layers = stack(Layer, last, self.remat, (0,), self.unroll)(c, self.dtype, length, tuple(kept), name="layers")
        (x, outputs), _ = layers((x, tuple(jnp.zeros_like(x) for _ in kept)), jnp.arange(1, last + 1))
        found = dict(zip(kept, outputs, strict=True)) | {last: x}
        if c.feature_norm:
            norm = layer_norm(c.norm_eps, self.dtype, "vision_embed", "post_norm")
            found = {number: norm(x) for number, x in found.items()}
        x = jnp.concatenate([found[number] for number in states], axis=-1)[:, :length]
        grid = x[:, c.class_token + c.num_registers :]
        return jnp.concatenate([x[:, :1], grid], axis=1) if c.feature_tokens == "cls_patch" else grid

    def _embed(self, pixels):
        """Patches with positions, after the class and register tokens: [B, H, W, 3] -> [B, prefix + N, D]."""
        c, p, batch = self.config, self.config.patch_size, pixels.shape[0]
        # A convolution whose stride is its width is a product.
        axes_in, axes_out = (None, None, None), ("vision_embed",)
        to_width = Projection((p, p, 3), (c.width,), axes_in, axes_out, self.dtype, c.patch_bias, name="patch_embed")
        x = to_width(patches(pixels, p)).reshape(batch, -1, c.width)  # [B, N, D]
        if c.class_token:
            x = jnp.concatenate([self._token("class_token", batch), x], axis=1)
        x = x + self._positions(x.shape[1])
        if c.num_registers:  # after the positions: registers have none (Darcet et al. 2023)
            registers = self._token("register_tokens", batch, (c.num_registers,))
            x = jnp.concatenate([x[:, :1], registers, x[:, 1:]] if c.class_token else [registers, x], axis=1)
        return constrain(x, ("tiles", "visual_length", None))

    def _token(self, name, batch, shape=()):
        init = nn.with_logical_partitioning(normal_init, (*[None] * len(shape), "vision_embed"))
        token = self.param(name, init, (*shape, self.config.width)).astype(self.dtype)
        return jnp.broadcast_to(token, (batch, *(shape or (1,)), self.config.width))

    def _positions(self, length):
        if self.has_variable("params", "pos_embed"):
            found = nn.meta.unbox(self.get_variable("params", "pos_embed")).shape[0]
            if found != length:
                raise ValueError(
                    f"vision/pos_embed holds {found} positions, but vision.image_size = {self.config.image_size} with "
                    f"patch_size = {self.config.patch_size} needs {length}. Use the image size of the checkpoint; "
                    "position embeddings are not resampled."
                )
        init = nn.with_logical_partitioning(normal_init, (None, "vision_embed"))
        return self.param("pos_embed", init, (length, self.config.width)).astype(self.dtype)
