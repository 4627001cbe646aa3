"""Cambrian's Spatial Vision Aggregator (Tong et al. 2024, §3; recipes §1.1 A7).

A grid of learned queries looks at several towers at once: each query at the cells, in every tower, that lie under its
own place, all in one softmax. The same layers can stand inside the decoder, where the hidden states of the visual
tokens are the queries.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxvlm.config import ConfigError, ModelConfig, SVAConfig
from jaxvlm.models.connectors.row_end import row_end
from jaxvlm.models.layers import Projection, activation, constrain, layer_norm, stack

NORM_EPS = 1e-5


def window_sides(config: ModelConfig) -> tuple[int, ...]:
    """How many cells of each tower lie under one query, on one side."""
    grid = config.connector.sva.grid
    for tower in config.vision.parts:
        if tower.grid % grid:
            raise ConfigError(
                f"sva.grid = {grid} must divide the grid of every tower, and one has {tower.grid} x {tower.grid} "
                "cells. Set its resized_grid to a multiple."
            )
    return tuple(tower.grid // grid for tower in config.vision.parts)


def split_windows(features: jax.Array, grid: int) -> jax.Array:
    """[B, n * n, W] -> [B, grid * grid, m * m, W]: the m x m cells under each query."""
    batch, tokens, width = features.shape
    m = round(tokens**0.5) // grid
    cells = features.reshape(batch, grid, m, grid, m, width).swapaxes(2, 3)
    return cells.reshape(batch, grid * grid, m * m, width)


def visible_cells(regions: jax.Array, sides: Sequence[int], grid: int) -> jax.Array:
    """Which cells under each query show the image and not the bars around it, of all towers: bool [B, grid * grid, M].

    `regions`, int32 [B, towers, 4], are the rows and columns (top, bottom, left, right) of each tower's grid that do, and
    `sides` its cells under one query on one side. A window that has none counts as one that has nothing else.
    """
    found = []
    for tower, side in enumerate(sides):
        top, bottom, left, right = (regions[:, tower, i, None] for i in range(4))  # [B, 1]
        at = jnp.arange(side * grid)
        rows, columns = (at >= top) & (at < bottom), (at >= left) & (at < right)  # [B, n]
        cells = (rows[:, :, None] & columns[:, None]).reshape(len(regions), -1, 1)
        window = split_windows(cells, grid)[..., 0]  # [B, grid * grid, m * m]
        found.append(window | ~window.any(-1, keepdims=True))
    return jnp.concatenate(found, axis=-1)


class WindowAttention(nn.Module):
    """Every query [B, P, W] over its own visible cells, for each tower [B, P, m * m, W]; one softmax for all towers.

    `rows` names B: the tiles, or in the decoder the rows of the batch.
    """

    config: SVAConfig
    dtype: jnp.dtype
    rows: str

    @nn.compact
    def __call__(self, queries, windows, visible):
        c = self.config
        shape, axes = (c.num_heads, c.width // c.num_heads), ("vision_heads", "head_dim")

        def project(name, x):
            x = layer_norm(NORM_EPS, self.dtype, "vision_embed", f"{name}_norm")(x)
            return Projection((c.width,), shape, ("vision_embed",), axes, self.dtype, name=name)(x)

        q = project("q", queries)  # [B, P, H, h]
        k, v = (jnp.concatenate([project(f"{n}_{i}", w) for i, w in enumerate(windows)], axis=2) for n in "kv")
        k, v = (constrain(x, (self.rows, "visual_length", None, *axes)) for x in (k, v))  # [B, P, M, H, h]
        scores = jnp.einsum("bphd,bpmhd->bphm", q, k, preferred_element_type=jnp.float32) * shape[1] ** -0.5
        weights = jax.nn.softmax(scores, axis=-1, where=visible[:, :, None]).astype(self.dtype)
        out = jnp.einsum("bphm,bpmhd->bphd", weights, v)
        return Projection(shape, (c.width,), axes, ("vision_embed",), self.dtype, name="o")(out)


class Aggregator(nn.Module):
    """One layer. `width` is that of the queries, the aggregator's own or (in the decoder) the language model's."""

    config: SVAConfig
    act: str
    width: int
    dtype: jnp.dtype
    rows: str = "tiles"

    @nn.compact
    def __call__(self, queries, context, windows, visible):
        """queries [B, P, width], context [B, P, W] (the image as a whole), windows, visible -> (queries, None)."""
        c, axis = self.config, "vision_embed" if self.width == self.config.width else "embed"

        def linear(name, x, width, axes):
            return Projection((x.shape[-1],), (width,), axes[:1], axes[1:], self.dtype, name=name)(x)

        context = linear("context", context, c.width, ("vision_embed", None))
        x = linear("in", jnp.concatenate([queries, context], axis=-1), c.width, (None, "vision_embed"))
        windows = [self._placed(i, window) for i, window in enumerate(windows)]
        x = x + WindowAttention(c, self.dtype, self.rows, name="attn")(x, windows, visible)
        x = layer_norm(NORM_EPS, self.dtype, "vision_embed", "norm")(x)
        x = activation(self.act)(linear("up", x, c.width, ("vision_embed", "vision_mlp")))
        return queries + linear("down", x, self.width, ("vision_mlp", axis)), None

    def _placed(self, tower, window):
        """The cells with learned positions within their window, if there is more than one."""
        cells = window.shape[2]
        if cells == 1:
            return window
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, "vision_embed"))
        return window + self.param(f"pos_embed_{tower}", init, (cells, self.config.width)).astype(self.dtype)


class Towards(nn.Module):
    """One tower's features [B, N, Dv] -> [B, N, W]: two layers and a norm."""

    config: SVAConfig
    act: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        width, hidden = self.config.width, ("vision_mlp",)
        x = Projection((x.shape[-1],), (width,), ("vision_embed",), hidden, self.dtype, bias=True, name="linear_1")(x)
        x = activation(self.act)(x)
        x = Projection((width,), (width,), hidden, ("vision_embed",), self.dtype, bias=True, name="linear_2")(x)
        return layer_norm(NORM_EPS, self.dtype, "vision_embed", "norm")(x)


def _aggregate(module: Aggregator, params, numbers, slots, visual_index, seen, x, layer):
    """x [B, S, D] after decoder layer `layer`, with its visual tokens changed if an aggregator stands there."""

    def change(x):
        own = jax.tree.map(lambda leaf: leaf[numbers[layer]], params)
        queries = jnp.take_along_axis(x, slots[..., None], axis=1)  # [B, T * P, D]
        changed, _ = module.apply({"params": own}, queries, *seen)
        placed = jnp.take_along_axis(changed, jnp.maximum(visual_index, 0)[..., None], axis=1)
        return constrain(jnp.where(visual_index[..., None] >= 0, placed, x), ("batch", "length", None))

    return jax.lax.cond(numbers[layer] >= 0, change, lambda x: x, x)


class SVA(nn.Module):
    """A tuple of features [B, T, N_i, Dv_i], one for each tower -> visual tokens [B, T, grid * grid, D (+ E)].

    With layers inside the decoder, each visual token is followed by the E channels that these read: the context, the
    windows under it and which of their cells are visible. So whatever keeps or moves visual tokens keeps what belongs to
    them. `regions`, int32 [B, T, towers, 4], are the parts of the towers' grids that may be seen (`visible_cells`); without
    them it is everything. Cambrian hides the bars of letterboxed images so, in training and in answers.
    """

    config: ModelConfig
    dtype: jnp.dtype

    def setup(self):
        c = self.config.connector.sva
        self.newline = row_end(self, self.config)
        if c.llm_layers:
            if len({*c.llm_layers} & {*range(self.config.llm.depth)}) != len(c.llm_layers):
                raise ConfigError(
                    f"sva.llm_layers = {c.llm_layers} must be different numbers of decoder layers, from 0 to "
                    f"{self.config.llm.depth - 1}."
                )
            self.llm_layers = self.param("llm_layers", self._init_llm_layers)

    @nn.compact
    def __call__(self, features: tuple[jax.Array, ...], regions: jax.Array | None = None) -> jax.Array:
        c, act, width = self.config.connector.sva, self.config.connector.activation, self.config.llm.width
        sides, queries = window_sides(self.config), c.grid**2
        if [x.shape[2] for x in features] != [(side * c.grid) ** 2 for side in sides]:
            raise ConfigError("The towers of an SVA must give patches alone: set their feature_tokens = 'patch'.")
        batch, tiles = features[0].shape[:2]
        towers = [x.astype(self.dtype).reshape(batch * tiles, *x.shape[2:]) for x in features]
        towers = [Towards(c, act, self.dtype, name=f"aux_{i}")(x) for i, x in enumerate(towers)]
        context = jnp.broadcast_to(towers[0].mean(1, keepdims=True), (batch * tiles, queries, c.width))
        windows = [constrain(split_windows(x, c.grid), ("tiles", "visual_length", None, None)) for x in towers]
        if regions is None:
            visible = jnp.ones((batch * tiles, queries, sum(side**2 for side in sides)), bool)
        else:
            visible = visible_cells(regions.reshape(batch * tiles, *regions.shape[2:]), sides, c.grid)

        init = nn.with_logical_partitioning(nn.initializers.normal(width**-0.5), (None, "vision_embed"))
        learned = self.param("query", init, (c.groups, c.width)).astype(self.dtype)
        layers = stack(Aggregator, c.depth, self.config.remat, (nn.broadcast,) * 3, bool(self.config.unroll))
        seen = []
        for group in range(c.groups):
            x = jnp.broadcast_to(learned[group], (batch * tiles, queries, c.width))
            seen.append(layers(c, act, c.width, self.dtype, name=f"group_{group}")(x, context, windows, visible)[0])
        x = jnp.concatenate(seen, axis=-1)  # [B * T, P, G * W]
        x = self._linear("linear_1", x, ("vision_embed", "mlp"))
        x = self._linear("linear_2", activation(act)(x), ("mlp", "embed"))  # [B * T, P, D]
        if c.llm_layers:
            windows = [w.reshape(*w.shape[:2], -1) for w in windows]
            x = jnp.concatenate([x, context, *windows, visible.astype(self.dtype)], axis=-1)
        return x.reshape(batch, tiles, *x.shape[1:])

    def in_llm(self, visual: jax.Array, visual_index: jax.Array) -> Partial | None:
        """What the decoder does to its hidden states after each layer; None without layers inside it.

        Args:
            visual: [B, T * P, D + E], what `__call__` gave.
            visual_index: int32 [B, S], as in a batch.
        """
        c, (batch, count) = self.config.connector.sva, visual.shape[:2]
        if not c.llm_layers:
            return None
        sizes = [self.config.llm.width, c.width, *(side**2 * c.width for side in window_sides(self.config))]
        _, context, *windows, visible = jnp.split(visual, np.cumsum(sizes), axis=-1)
        windows = [window.reshape(batch, count, -1, c.width) for window in windows]
        # Where each visual token stands in its row. One that stands nowhere gets any place: nobody reads its result.
        rows, places = jnp.arange(batch)[:, None], jnp.arange(visual_index.shape[1])
        slots = jnp.where(visual_index >= 0, visual_index, count)
        slots = jnp.zeros((batch, count + 1), jnp.int32).at[rows, slots].set(places)[:, :count]
        numbers = np.full(self.config.llm.depth, -1)
        numbers[list(c.llm_layers)] = np.arange(len(c.llm_layers))
        run = partial(_aggregate, self._in_llm())
        return Partial(run, self.llm_layers, jnp.asarray(numbers), slots, visual_index, (context, windows, visible > 0))

    def _linear(self, name, x, axes):
        width, bias = self.config.llm.width, self.config.connector.bias
        return Projection((x.shape[-1],), (width,), axes[:1], axes[1:], self.dtype, bias, name=name)(x)

    def _in_llm(self) -> Aggregator:
        c = self.config
        return Aggregator(c.connector.sva, c.connector.activation, c.llm.width, self.dtype, "batch", parent=None)

    def _init_llm_layers(self, key):
        c = self.config.connector.sva
        shapes = [(1, 1, self.config.llm.width), (1, 1, c.width)]
        cells = [side**2 for side in window_sides(self.config)]
        seen = [jnp.zeros((1, 1, n, c.width)) for n in cells], jnp.ones((1, 1, sum(cells)), bool)
        init = self._in_llm().init
        keys = jax.random.split(key, len(c.llm_layers))
        with nn.logical_axis_rules(()):  # flax looks at these shapes again whenever the model is applied
            params = jax.vmap(lambda key: init(key, *map(jnp.zeros, shapes), *seen)["params"])(keys)
        return nn.meta.add_axis(params, 0, {nn.PARTITION_NAME: "layers"})
