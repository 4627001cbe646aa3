"""One optimiser step: batch in, new state and metrics out. Every stage of every recipe runs this function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from jaxvlm.config import ModelConfig
from jaxvlm.kernels.cross_entropy import linear_cross_entropy
from jaxvlm.kernels.dispatch import backend
from jaxvlm.models.vlm import VLM, head_bias, head_kernel, head_split, settled
from jaxvlm.parallel.compiling import Options, compiler_options
from jaxvlm.parallel.rules import logical_rules
from jaxvlm.train.state import TrainState, merge

Metrics = dict[str, jax.Array]


def loss_sums(
    model: VLM, params: dict, batch: dict, weights: jax.Array, num_sources: int, dropout: jax.Array | None = None
) -> tuple[jax.Array, Metrics]:
    """Sum of weighted next-token losses of a (micro-)batch, and what to report of it.

    `weights` [B, S] are the loss weights already divided by the global batch's total, so that the sum over devices and
    micro-batches is the token-weighted mean of the whole batch: sum w * CE / sum w. `dropout` is a key, or None.
    """
    hidden = model.apply({"params": params}, batch, rngs=None if dropout is None else {"dropout": dropout})  # [B, S, D]
    kernel, transposed = head_kernel(params)
    loss, nll = linear_cross_entropy(
        hidden,
        kernel,
        batch["targets"],
        weights,
        bias=head_bias(params),
        softcap=model.config.llm.logit_softcap,
        split=head_split(hidden, model.config.llm.vocab_size),
        transposed=transposed,
    )  # scalar, [B, S]
    supervised = batch["loss_weights"] > 0
    sources = jnp.where(supervised, batch["source_ids"], num_sources).reshape(-1)
    return loss, {
        "source_loss": jax.ops.segment_sum(nll.reshape(-1), sources, num_sources + 1)[:-1],
        "source_tokens": jax.ops.segment_sum(supervised.reshape(-1).astype(jnp.float32), sources, num_sources + 1)[:-1],
        "tokens": jnp.sum(batch["segment_ids"] > 0),
        "images": jnp.sum(batch["tile_mask"]) if "tile_mask" in batch else jnp.int32(0),
    }


def make_step(
    model: VLM, optimizer: optax.GradientTransformation, num_sources: int, accumulate: int = 1, seed: int = 0
) -> Callable[[TrainState, dict], tuple[TrainState, Metrics]]:
    """The pure step function of a stage, for `jax.jit` under `jax.set_mesh`.

    With `accumulate` > 1 the rows are taken in that many interleaved micro-batches; the result is the same as for one.
    `seed` and the step's number decide what dropout, if the model has any, leaves out; a resumed run drops the same.
    """
    drops = any(lora.rank and lora.dropout for lora in model.config.lora)

    def gradients(trainable: dict, frozen: dict, batch: dict, weights: jax.Array, key: jax.Array) -> Any:
        def loss(trainable):
            dropout = key if drops else None
            return loss_sums(VLM(settled(model.config)), merge(trainable, frozen), batch, weights, num_sources, dropout)

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        return {"loss": value, **metrics}, grads

    def step(state: TrainState, batch: dict) -> tuple[TrainState, Metrics]:
        with nn.logical_axis_rules(logical_rules()):
            total = jnp.sum(batch["loss_weights"])
            weights = batch["loss_weights"] / jnp.maximum(total, 1e-9)
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            if accumulate == 1:
                metrics, grads = gradients(state.trainable, state.frozen, batch, weights, key)
            else:
                micro = jax.tree.map(lambda x: _interleave(x, accumulate), (batch, weights))
                micro = (*micro, jax.random.split(key, accumulate))

                def accumulate_one(sums, part):
                    return jax.tree.map(jnp.add, sums, gradients(state.trainable, state.frozen, *part)), None

                shapes = jax.eval_shape(gradients, state.trainable, state.frozen, *jax.tree.map(lambda x: x[0], micro))
                zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
                (metrics, grads), _ = jax.lax.scan(accumulate_one, zeros, micro)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["supervised_tokens"] = jnp.sum(metrics["source_tokens"])
        return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics

    return step


def step_options(config: ModelConfig) -> Options:
    """What `make_step`'s function is compiled with for the mesh of `jax.set_mesh`."""
    return compiler_options(backend(), keeping=not settled(config).unroll)


def make_evaluate(model: VLM, num_sources: int) -> Callable[[dict, dict, dict], dict[str, jax.Array]]:
    """The pure function (trainable, frozen, batch) -> sums over the global batch, for `jax.jit` under `jax.set_mesh`.

    `source_loss` are the summed next-token losses of each source's supervised tokens, `source_tokens` how many these are,
    float32 [num_sources] both. Nothing is differentiated, and no dropout applied.
    """

    def evaluate(trainable: dict, frozen: dict, batch: dict) -> dict[str, jax.Array]:
        with nn.logical_axis_rules(logical_rules()):
            _, metrics = loss_sums(model, merge(trainable, frozen), batch, batch["loss_weights"], num_sources)
        return {name: metrics[name] for name in ("source_loss", "source_tokens")}

    return evaluate


def _interleave(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] to [parts, B / parts, ...], every micro-batch taking rows from every data-parallel shard."""
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
