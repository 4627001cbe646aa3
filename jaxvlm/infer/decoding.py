"""The compiled side of generation: prefill, the decode loop, and one step of it.

Prompts are left-padded to a common length P, so every row's next token goes into the same slot of the cache: row i's
prompt lies in the slots P - n_i <= j < P and its answer in the slots from P on. All functions are pure and jitted with
the model's config as a static argument, so two engines of the same config share their compiled code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxvlm.config import ModelConfig
from jaxvlm.infer.sampler import sample, step_keys
from jaxvlm.kernels import intervals
from jaxvlm.models.vlm import VLM, init_cache, settled
from jaxvlm.parallel.compiling import jit


class Sampling(NamedTuple):
    """How rows choose tokens and when they end; all arrays, so no value of it compiles anew."""

    keys: jax.Array  # PRNG keys [B]
    temperature: jax.Array  # float32 scalar
    top_p: jax.Array  # float32 scalar
    end_ids: jax.Array  # int32 [E], tokens that end an answer
    limits: jax.Array  # int32 [B], how many tokens a row may write; 0 for the rows that only fill the batch


@partial(jit, static_argnums=0)
def encode_images(
    config: ModelConfig, params: dict, pixels: Sequence[jax.Array], regions: jax.Array | None = None
) -> jax.Array:
    """Tiles to visual tokens [U, P, D]; `pixels` are uint8 [U, s, s, 3], one array for each view of them, and `regions`
    int32 [U, towers, 4] (see `SVA`).

    Where the connector reads the instruction too, to the tower's features [U, N, Dv], which do not depend on it; the
    visual tokens are then `read_images`'s.
    """

    def run(model: VLM) -> jax.Array:
        features = model.encode(*(view[:, None] for view in pixels))
        if config.connector.reads_text:
            return features[:, 0]
        return model.project(features, tile_regions=None if regions is None else regions[:, None])

    return VLM(config).apply({"params": params}, method=run)


@partial(jit, static_argnums=0)
def read_images(config: ModelConfig, params: dict, features: jax.Array, tokens: jax.Array, mask: jax.Array):
    """Visual tokens [B, T * P, D] of features [B, T, N, Dv] under an instruction for each tile, [B, T, L] and its mask."""
    return VLM(config).apply({"params": params}, features, tokens, mask, method="project")


@partial(jit, static_argnums=(0, 1))
def prefill(
    config: ModelConfig,
    slots: int,
    params: dict,
    tokens: jax.Array,
    visual_index: jax.Array | None,
    visual: jax.Array | None,
    blend: tuple[jax.Array, jax.Array] | None,
    lengths: jax.Array,
) -> tuple[jax.Array, dict]:
    """Runs left-padded prompts through the decoder.

    Args:
        slots: static; room in the cache, for the prompts and the answers.
        tokens, visual_index: int32 [B, P].
        visual: [B, T * P, D], or None (then `visual_index` is not read).
        blend: as in `VLM.embed`.
        lengths: int32 [B], tokens of each prompt.

    Returns:
        float32 logits [B, V] after each prompt's last token, and the cache.
    """
    model = VLM(config)
    batch, length = tokens.shape
    pad = (length - lengths)[:, None]  # [B, 1]
    slot = jnp.arange(length, dtype=jnp.int32)[None]
    real = slot >= pad
    positions = jnp.maximum(slot - pad, 0)
    k_start, k_end = jnp.where(real, pad, 0), jnp.where(real, slot + 1, 0)

    def run(model: VLM) -> tuple[jax.Array, dict]:
        cache = init_cache(config.llm, batch, slots, jnp.dtype(config.dtype))
        hidden, cache = model.decode(tokens, visual_index, visual, positions, k_start, k_end, cache, blend)
        return model.logits(hidden[:, -1]), cache

    return model.apply({"params": params}, method=run)


def _step(config: ModelConfig, params: dict, cache: dict, token: jax.Array, lengths: jax.Array, prompt: jax.Array, at):
    """Feeds the `at`-th token of the answers, int32 [B], and returns (logits [B, V], cache)."""
    pad = (prompt - lengths)[:, None]
    k_end = jnp.full_like(pad, prompt + at + 1)

    def run(model: VLM) -> tuple[jax.Array, dict]:
        hidden, after = model.decode(token[:, None], None, None, (lengths + at)[:, None], pad, k_end, cache)
        return model.logits(hidden[:, -1]), after

    return VLM(config).apply({"params": params}, method=run)


@partial(jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode(
    config: ModelConfig,
    capacity: int,
    greedy: bool,
    params: dict,
    cache: dict,
    logits: jax.Array,
    lengths: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, dict]:
    """Writes answers until every row has ended: int32 [B, capacity], -1 after a row's end; and the used cache.

    A row ends with a token of `end_ids` (which is part of the result) or at its limit, of at most `capacity`.
    The cache is returned only so that the donated one can be updated where it lies.
    """
    prompt, config = cache["index"], settled(config)  # the padded length P

    def choose(logits, at, done, out):
        token = sample(logits, step_keys(sampling.keys, at), sampling.temperature, sampling.top_p, greedy)
        out = jax.lax.dynamic_update_index_in_dim(out, jnp.where(done, -1, token), at, axis=1)
        done = done | jnp.isin(token, sampling.end_ids) | (at + 1 >= sampling.limits)
        return token, done, out

    def body(state):
        at, token, done, out, cache = state
        logits, cache = _step(config, params, cache, token, lengths, prompt, at)
        token, done, out = choose(logits, at + 1, done, out)
        return at + 1, token, done, out, cache

    out = jnp.full((len(logits), capacity), -1, jnp.int32)
    token, done, out = choose(logits, 0, sampling.limits <= 0, out)
    state = (jnp.int32(0), token, done, out, cache)
    *_, out, cache = jax.lax.while_loop(lambda state: ~state[2].all(), body, state)
    return out, cache


@partial(jit, static_argnums=0)
def first_token(greedy: bool, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The tokens after a prefill, int32 [B]; for streaming."""
    return sample(logits, step_keys(sampling.keys, 0), sampling.temperature, sampling.top_p, greedy)


@partial(jit, static_argnums=(0, 1), donate_argnums=3)
def next_token(
    config: ModelConfig,
    greedy: bool,
    params: dict,
    cache: dict,
    token: jax.Array,
    lengths: jax.Array,
    prompt: jax.Array,
    at: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, dict]:
    """One turn of `decode`'s loop, for streaming: the token after the `at`-th one, and the cache.

    `prompt` and `at` are int32 scalars: the padded length P, and how many tokens of the answer are in the cache.
    """
    logits, cache = _step(config, params, cache, token, lengths, prompt, at)
    keys = step_keys(sampling.keys, at + 1)
    return sample(logits, keys, sampling.temperature, sampling.top_p, greedy), cache


@partial(jit, static_argnums=0)
def all_logits(
    config: ModelConfig,
    params: dict,
    tokens: jax.Array,
    visual_index: jax.Array,
    visual: jax.Array | None,
    blend: tuple[jax.Array, jax.Array] | None,
    lengths: jax.Array,
) -> jax.Array:
    """float32 [B, P, V] of right-padded prompts, int32 [B, P], of which `lengths` [B] tokens are real."""
    slot = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    k_start, k_end = intervals.causal((slot < lengths[:, None]).astype(jnp.int32))

    def run(model: VLM) -> jax.Array:
        hidden, _ = model.decode(tokens, visual_index, visual, slot, k_start, k_end, None, blend)
        return model.logits(hidden)

    return VLM(config).apply({"params": params}, method=run)


@partial(jit, static_argnums=0)
def answer_losses(
    config: ModelConfig,
    params: dict,
    tokens: jax.Array,
    visual_index: jax.Array,
    visual: jax.Array | None,
    blend: tuple[jax.Array, jax.Array] | None,
    lengths: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Of each row Σ w·CE / Σ w, float32 [B], with next tokens `targets` and `weights` [B, P], and whether every token of
    weight is the likeliest, bool [B]; the rest as `all_logits`.
    """
    logits = all_logits(config, params, tokens, visual_index, visual, blend, lengths)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]  # [B, P]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    greedy = ((logits.argmax(-1) == targets) | (weights == 0)).all(1)
    return (losses * weights).sum(1) / jnp.maximum(weights.sum(1), 1), greedy


@jax.jit
def bit_sums(leaves: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    """The bits of each array summed as integers, plainly and weighted by place; exact in any order of summation."""

    def sums(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
        kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
        weights = jnp.uint32(1)
        for axis in range(leaf.ndim):  # no flattening: a sharded leaf stays where it is
            place = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            weights = weights * jnp.uint32(2654435761) + 2 * place
        return bits.sum(dtype=jnp.uint32), (bits * weights).sum(dtype=jnp.uint32)

    return [sums(leaf) for leaf in leaves]
