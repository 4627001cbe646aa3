"""The vision-language model: a tower, a connector and a decoder, joined by the splice.

The module holds no state: `VLM(config).apply({"params": params}, batch)` is a pure function, and `params` a plain
nested dict with the parts 'vision', 'connector' and 'llm'. Any part may be missing that the called method does not use.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvlm.config import ConfigError, ModelConfig, VisionConfig
from jaxvlm.kernels import intervals
from jaxvlm.models.connectors.mlp import MLP
from jaxvlm.models.convnet import EfficientNetLite
from jaxvlm.models.layers import constrain
from jaxvlm.models.llm import LLM, Cache, init_cache
from jaxvlm.models.vit import ViT

__all__ = ["VLM", "abstract_params", "head_kernel", "init_cache", "init_params", "logical_axes"]


class VLM(nn.Module):
    """B rows, S tokens a row, T tiles a row, N visual tokens a tile; see `data` for the fields of a batch."""

    config: ModelConfig

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        if c.vision.kind not in ("vit", "efficientnet_lite"):
            raise ConfigError(f"No vision tower '{c.vision.kind}'; there are: vit, efficientnet_lite.")
        is_vit = c.vision.kind == "vit"
        self.vision = ViT(c.vision, dtype, c.remat) if is_vit else EfficientNetLite(c.vision, dtype)
        self.connector = MLP(c.connector, c.llm.width, dtype)
        self.llm = LLM(c.llm, dtype, c.remat)

    def __call__(self, batch: dict[str, jax.Array], cache: Cache | None = None):
        """hidden [B, S, D] of a batch; with an empty cache, a prefill: (hidden, cache).

        Reads 'tokens', 'visual_index', 'positions' and 'segment_ids', int32 [B, S], and 'pixels' (uint8
        [B, T, H, W, 3]), or 'features' ([B, T, N, Dv], a frozen tower's, kept from before), or neither. A token sees
        what precedes it in its own segment, within the decoder's sliding window.
        """
        visual = None
        if "features" in batch:
            visual = self.project(batch["features"])
        elif "pixels" in batch:
            visual = self.project(self.encode(batch["pixels"]))
        x = self.embed(batch["tokens"], batch["visual_index"], visual)
        k_start, k_end = intervals.causal(batch["segment_ids"], self.config.llm.sliding_window)
        hidden, cache = self.llm(x, batch["positions"], k_start, k_end, cache)
        return hidden if cache is None else (hidden, cache)

    def encode(self, pixels: jax.Array) -> jax.Array:
        """uint8 [B, T, H, W, 3] -> features [B, T, N, Dv]: normalised, of the chosen layer and tokens, pooled."""
        c = self.config.vision
        if pixels.shape[2:] != (c.image_size, c.image_size, 3):
            raise ValueError(f"pixels {pixels.shape} are not [B, T, {c.image_size}, {c.image_size}, 3].")
        batch, tiles = pixels.shape[:2]
        pixels = constrain(pixels.reshape(batch * tiles, *pixels.shape[2:]), ("batch", None, None, None))
        pixels = (pixels.astype(jnp.float32) / 255 - jnp.array(c.mean)) / jnp.array(c.std)
        features = _pool(self.vision(pixels), c)
        return features.reshape(batch, tiles, *features.shape[1:])

    def project(self, features: jax.Array) -> jax.Array:
        """features [B, T, N, Dv] -> visual tokens [B, T * N, D]."""
        batch, tiles, tokens, width = features.shape
        return self.connector(features.reshape(batch, tiles * tokens, width))

    def embed(self, tokens: jax.Array, visual_index: jax.Array | None, visual: jax.Array | None) -> jax.Array:
        """The splice: the embedding of `tokens` [B, S], or visual token `visual_index` of the row where that is >= 0."""
        x = self.llm.embed(tokens)
        if visual is None:
            return x
        index = jnp.maximum(visual_index, 0)[..., None]
        placed = jnp.take_along_axis(visual, index, axis=1)  # [B, S, D]
        return constrain(jnp.where(visual_index[..., None] >= 0, placed, x), ("batch", "length", None))

    def decode(
        self,
        tokens: jax.Array,
        visual_index: jax.Array | None,
        visual: jax.Array | None,
        positions: jax.Array,
        k_start: jax.Array,
        k_end: jax.Array,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """Prefill or one step of generation: hidden [B, S, D] of `tokens` [B, S], and the cache with them in it.

        The tokens go into the slots from `cache['index']` on, and each sees the slots k_start <= j < k_end
        (int32 [B, S]) - of those, the last ones within the decoder's sliding window. `positions` count a row's own
        tokens, so a left-padded prompt starts at 0 in its first real slot.
        """
        k_start = intervals.limit(k_start, k_end, self.config.llm.sliding_window)
        return self.llm(self.embed(tokens, visual_index, visual), positions, k_start, k_end, cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> float32 [..., V]. Training uses `kernels.cross_entropy`, which never holds all of them."""
        return self.llm.logits(hidden)


def _pool(features: jax.Array, config: VisionConfig) -> jax.Array:
    """Averages the grid over pool x pool cells: [B, (1 +) n * n, Dv] -> [B, num_tokens, Dv]; a class token stays."""
    side, pool = config.image_size // config.patch_size, config.pool
    if pool == 1:
        return features
    if side % pool:
        raise ConfigError(f"vision.pool = {pool} must divide the tower's grid of {side} x {side}.")
    batch, length, width = features.shape
    extra = length - side * side
    grid = features[:, extra:].reshape(batch, side // pool, pool, side // pool, pool, width)
    pooled = grid.mean((2, 4)).reshape(batch, -1, width)
    return jnp.concatenate([features[:, :extra], pooled], axis=1)


# ---------------------------------------------------------------------------------------------------------- parameters


@partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, rng: jax.Array) -> dict:
    """Random float32 parameters, a plain nested dict. Jit it again with `out_shardings` to make them where they go."""
    return nn.meta.unbox(_init(config, rng))


def abstract_params(config: ModelConfig) -> dict:
    """The tree of `init_params` as ShapeDtypeStructs; computes nothing."""
    return jax.eval_shape(lambda rng: nn.meta.unbox(_init(config, rng)), jax.random.key(0))


def logical_axes(config: ModelConfig) -> dict:
    """The tree of `init_params` with, for each leaf, the tuple of its dimensions' logical axis names (or None)."""
    boxed = jax.eval_shape(lambda rng: _init(config, rng), jax.random.key(0))
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


def head_kernel(params: dict) -> jax.Array:
    """The kernel [D, V] of the decoder's head: its own, or the transposed embedding when they are tied."""
    llm = params["llm"]
    return llm["head"]["kernel"] if "head" in llm else llm["embed"]["embedding"].T


def _init(config: ModelConfig, rng: jax.Array) -> dict:
    """The boxed parameters, by tracing the smallest batch that touches them all; jit drops its forward pass."""
    size = config.vision.image_size
    tokens = jnp.zeros((1, 1), jnp.int32)
    batch = {name: tokens for name in ("tokens", "visual_index", "positions", "segment_ids")}
    batch["pixels"] = jnp.zeros((1, 1, size, size, 3), jnp.uint8)
    return VLM(config).init(rng, batch, method=lambda model, batch: model.logits(model(batch)))["params"]
