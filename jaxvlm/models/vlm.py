"""The vision-language model: a tower, a connector and a decoder, joined by the splice.

The module holds no state: `VLM(config).apply({"params": params}, batch)` is a pure function, and `params` a plain
nested dict with the parts 'vision', 'connector' and 'llm'. Any part may be missing that the called method does not use.
"""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvlm.config import ModelConfig
from jaxvlm.kernels import intervals
from jaxvlm.kernels.attention import preferring
from jaxvlm.kernels.cross_entropy import Split
from jaxvlm.kernels.dispatch import backend
from jaxvlm.models.connectors import connector
from jaxvlm.models.layers import constrain
from jaxvlm.models.llm import LLM, Cache, init_cache
from jaxvlm.models.towers import join, look, tower
from jaxvlm.parallel.rules import active_spec

__all__ = [
    "VLM",
    "abstract_params",
    "head_bias",
    "head_kernel",
    "head_split",
    "init_cache",
    "init_params",
    "logical_axes",
]

ROW_END = -2  # in a batch's visual_index: the connector's learned row end
PROJECT_ALSO = ("qformer_tokens", "qformer_mask", "tile_regions")  # of a batch, for the connectors that read them


class VLM(nn.Module):
    """B rows, S tokens a row, T tiles a row, N visual tokens a tile; see `data` for the fields of a batch."""

    config: ModelConfig

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        self.vision = tower(c.vision, dtype, c.remat, bool(c.unroll))
        self.connector = connector(c, dtype)
        self.llm = LLM(c.llm, dtype, c.remat, bool(c.unroll))

    def __call__(self, batch: dict[str, jax.Array], cache: Cache | None = None):
        """hidden [B, S, D] of a batch; with an empty cache, a prefill: (hidden, cache).

        Reads 'tokens', 'visual_index', 'positions' and 'segment_ids', int32 [B, S], and 'pixels' (uint8
        [B, T, s, s, 3]; see `encode`), or 'features' ([B, T, N, Dv], a frozen tower's, kept from before), or neither; where
        each of several towers has its own, 'pixels_1', 'features_1' and so on too; for a Q-Former that reads text
        'qformer_tokens' and 'qformer_mask', for an SVA 'tile_regions' (see `project`). A token sees what precedes it in its
        own segment, in some layers only within a sliding window.
        """
        visual, more = None, {name: batch[name] for name in PROJECT_ALSO if name in batch}
        features, pixels = (_by_tower(self.config, batch, what) for what in ("features", "pixels"))
        if features:
            visual = self.project(features if self.config.connector.kind == "sva" else features[0], **more)
        elif pixels:
            visual = self.project(self.encode(*pixels), **more)
        blend = (batch["visual_corners"], batch["visual_shares"]) if "visual_corners" in batch else None
        tokens, visual_index, positions = (
            constrain(batch[name], ("batch", "length")) for name in ("tokens", "visual_index", "positions")
        )
        x = self.embed(tokens, visual_index, visual, blend)
        # Running sums along a row, which each device has whole, and then its own part of them.
        k_start, k_end = (
            constrain(x, ("batch", None)) for x in intervals.causal(constrain(batch["segment_ids"], ("batch", None)))
        )
        k_start, k_end = (constrain(x, ("batch", "length")) for x in (k_start, k_end))
        after = self._in_llm(visual_index, visual)
        with preferring(self.config.attention):
            hidden, cache = self.llm(x, positions, k_start, k_end, cache, after)
        return hidden if cache is None else (hidden, cache)

    def encode(self, *pixels: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
        """uint8 [B, T, s, s, 3] -> features [B, T, N, Dv]: normalised, of the chosen layers and tokens, on one grid.

        `pixels` is one array, or one for each of several towers. Their features are concatenated by channel; a
        connector that takes each tower by itself (SVA) gets a tuple of them.
        """
        c = self.config
        with preferring(c.attention):
            features = look(self.vision, c.vision, pixels)
        return features if c.connector.kind == "sva" else join(features, c.vision)

    def project(
        self,
        features: jax.Array | tuple[jax.Array, ...],
        qformer_tokens: jax.Array | None = None,
        qformer_mask: jax.Array | None = None,
        tile_regions: jax.Array | None = None,
    ) -> jax.Array:
        """features [B, T, N, Dv] (of an SVA: one array for each tower) -> visual tokens [B, T * P, D].

        An instruction-aware Q-Former also reads `qformer_tokens` and `qformer_mask`, [B, T, L] (see `QFormer`), an SVA
        `tile_regions`, int32 [B, T, towers, 4] (see `SVA`). An SVA with layers inside the decoder appends to each token the
        channels that these read.
        """
        also = {"qformer": (qformer_tokens, qformer_mask), "sva": (tile_regions,)}
        with preferring(self.config.attention):
            visual = self.connector(features, *also.get(self.config.connector.kind, ()))  # [B, T, P, D]
        return visual.reshape(len(visual), -1, visual.shape[-1])

    def embed(
        self,
        tokens: jax.Array,
        visual_index: jax.Array | None,
        visual: jax.Array | None,
        blend: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """The splice: the embedding of `tokens` [B, S]; where `visual_index` is >= 0, that visual token of the row; where
        it is -2, the connector's row end.

        With `blend`, int32 and float32 [B, S, 4], a visual token is the mean of four with these shares.
        """
        x = self.llm.embed(tokens)
        if visual is None:
            return x
        visual = constrain(visual[..., : x.shape[-1]], ("batch", None, None))  # any place may need any of the row's

        def at(index: jax.Array) -> jax.Array:
            return jnp.take_along_axis(visual, jnp.maximum(index, 0)[..., None], axis=1)  # [B, S, D]

        if blend is None:
            placed = at(visual_index)
        else:
            corners, shares = blend
            placed = sum(at(corners[..., i]) * shares[..., i, None] for i in range(4)).astype(x.dtype)
        x = jnp.where(visual_index[..., None] >= 0, placed, x)
        if self.config.connector.row_end:
            x = jnp.where(visual_index[..., None] == ROW_END, self.connector.newline.astype(x.dtype), x)
        return constrain(x, ("batch", "length", None))

    def decode(
        self,
        tokens: jax.Array,
        visual_index: jax.Array | None,
        visual: jax.Array | None,
        positions: jax.Array,
        k_start: jax.Array,
        k_end: jax.Array,
        cache: Cache | None,
        blend: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Prefill or one step of generation: hidden [B, S, D] of `tokens` [B, S], and the cache with them in it.

        The tokens go into the slots from `cache['index']` on, and each sees the slots k_start <= j < k_end
        (int32 [B, S]) - of those, the last ones in layers with a sliding window. `positions` count a row's own tokens,
        so a left-padded prompt starts at 0 in its first real slot.
        """
        x, after = self.embed(tokens, visual_index, visual, blend), self._in_llm(visual_index, visual)
        with preferring(self.config.attention):
            return self.llm(x, positions, k_start, k_end, cache, after)

    def _in_llm(self, visual_index, visual):
        """What an SVA does inside the decoder, or None."""
        if visual is None or self.config.connector.kind != "sva":
            return None
        return self.connector.in_llm(visual, visual_index)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> float32 [..., V]. Training uses `kernels.cross_entropy`, which never holds all of them."""
        return self.llm.logits(hidden)


def _tower_names(config: ModelConfig, what: str) -> list[str]:
    """The entries of a batch with each tower's pixels or features; a batch may have the first alone, for all of them."""
    return [f"{what}_{i}" if i else what for i in range(len(config.vision.parts))]


def _by_tower(config: ModelConfig, batch: dict[str, jax.Array], what: str) -> tuple[jax.Array, ...]:
    return tuple(batch[name] for name in _tower_names(config, what) if name in batch)


def settled(config: ModelConfig) -> ModelConfig:
    """`config` with `unroll` decided, where it is not, for a program that runs often on the mesh of `jax.set_mesh` (or without)."""
    if config.unroll is not None:
        return config
    # Among several devices the loop is what keeps the compiler from gathering many layers' parameters at once.
    return dataclasses.replace(config, unroll=backend() == "gpu" and jax.sharding.get_abstract_mesh().size <= 1)


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


def head_kernel(params: dict) -> tuple[jax.Array, bool]:
    """The kernel [D, V] of the decoder's head and False; or the embedding [V, D], where they are tied, and True."""
    llm = params["llm"]
    return (llm["head"]["kernel"], False) if "head" in llm else (llm["embed"]["embedding"], True)


def head_bias(params: dict) -> jax.Array | None:
    """The bias [V] of the decoder's head, if it has one."""
    return params["llm"].get("head", {}).get("bias")


def head_split(hidden: jax.Array, vocab_size: int) -> Split | None:
    """How `hidden` [B, S, D] and the head's kernel lie on the active mesh; None where there is none."""
    tokens = active_spec(("batch", "length"), hidden.shape[:2], "hidden")
    if tokens is None:
        return None
    specs = *tokens, *active_spec(("embed", "vocab"), (hidden.shape[2], vocab_size), "llm/head/kernel")
    return Split(*((axes,) if isinstance(axes, str) else axes or () for axes in specs))


def _init(config: ModelConfig, rng: jax.Array) -> dict:
    """The boxed parameters, by tracing the smallest batch that touches them all; jit drops its forward pass."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    batch = {name: tokens for name in ("tokens", "visual_index", "positions", "segment_ids")}
    for name, part in zip(_tower_names(config, "pixels"), config.vision.parts, strict=True):
        batch[name] = jnp.zeros((1, 1, part.input_size, part.input_size, 3), jnp.uint8)
    if config.connector.reads_text:
        batch["qformer_tokens"] = tokens[None]
    return VLM(config).init(rng, batch, method=lambda model, batch: model.logits(model(batch)))["params"]
