"""Evaluation while a stage trains: what is measured, when, and what is written of it. Nothing of it changes the training."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxvlm.config import ConfigError, RunConfig, WatchConfig
from jaxvlm.data.loader import Loader
from jaxvlm.models.vlm import VLM
from jaxvlm.parallel.rules import put_batch
from jaxvlm.train.state import TrainState, merge
from jaxvlm.train.step import make_evaluate

# (step, parameters) -> {"scores": {category: accuracy, ..., "all": ...}, "n": questions, "seconds": ...}
Ask = Callable[[int, dict], dict]
Measures = dict[str, Callable[[TrainState], dict]]  # what a kind of event in metrics.jsonl says of a state


def check_watch(config: RunConfig) -> None:
    """Raises `ConfigError` for stages that watch nothing, and for records that one stage holds out and another trains on."""
    held: dict[str, tuple[int, str]] = {}
    for stage in config.stages:
        watch = stage.watch
        if watch.every_steps < 0:
            raise ConfigError(f"watch.every_steps of stage '{stage.name}' is {watch.every_steps}; 0 is never.")
        if watch.every_steps and not watch.questions and not any(source.held_out for source in stage.data.sources):
            raise ConfigError(
                f"Stage '{stage.name}' has watch.every_steps = {watch.every_steps} and nothing to evaluate: set `held_out` of a "
                "source, or watch.questions."
            )
        if watch.every_steps and watch.questions and not config.eval.task:
            raise ConfigError(
                f"watch.questions of stage '{stage.name}' are of the run's evaluation, and eval.task is empty: set "
                "config.eval, or watch.questions = ()."
            )
        for source in stage.data.sources:
            if source.held_out and source.name == "all":
                raise ConfigError(f"A source of stage '{stage.name}' is called 'all', which is the name of the total.")
            before, name = held.setdefault(source.path, (source.held_out, stage.name))
            if before != source.held_out:
                raise ConfigError(
                    f"{source.path} has held_out = {before} in stage '{name}' and {source.held_out} in stage '{stage.name}', "
                    "which would train on what the other holds out. Give both the same number."
                )


def due(watch: WatchConfig, step: int, num_steps: int) -> bool:
    """Whether to evaluate after `step`."""
    return bool(watch.every_steps and step and (step % watch.every_steps == 0 or step == num_steps))


def measures(model: VLM, held_out: Loader | None, ask: Ask | None, mesh: Mesh, beat: Callable[[], None]) -> Measures:
    """What a stage measures of its state, by the event's name. `beat` is called as the work goes on."""
    found: Measures = {}
    if held_out is not None:
        everywhere = NamedSharding(mesh, PartitionSpec())
        evaluate = jax.jit(make_evaluate(model, len(held_out.source_names)), out_shardings=everywhere)
        found["held_out"] = lambda state: held_out_loss(evaluate, state, held_out, mesh, beat)
    if ask is not None:
        found["slim"] = lambda state: ask(int(state.step), merge(state.trainable, state.frozen))
    return found


def held_out_loss(evaluate: Callable, state: TrainState, loader: Loader, mesh: Mesh, beat: Callable[[], None]) -> dict:
    """{"loss": mean next-token loss of each source's held-out records and of 'all', "tokens": supervised ones, "seconds"}.

    One batch at a time is on the devices, so that simulated ones cannot deadlock. All processes must call.
    """
    started, sums = time.perf_counter(), np.zeros((2, len(loader.source_names)))
    for batch in loader.batches():
        found = jax.device_get(evaluate(state.trainable, state.frozen, put_batch(batch, mesh)))
        sums += np.stack([found["source_loss"], found["source_tokens"]])  # float64
        beat()
    named = dict(zip(loader.source_names, sums.T.tolist(), strict=True)) | {"all": sums.sum(1).tolist()}
    return {
        "loss": {name: loss / tokens for name, (loss, tokens) in named.items() if tokens},
        "tokens": {name: int(tokens) for name, (_, tokens) in named.items()},
        "seconds": round(time.perf_counter() - started, 2),
    }
