"""Training a stage, straight through: data, state, compiled step, loop, checkpoint."""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxvlm.config import CheckpointConfig, LogConfig, ModelConfig, StageConfig, UserError, to_dict
from jaxvlm.data.loader import Loader
from jaxvlm.models.vlm import VLM, logical_axes
from jaxvlm.parallel.mesh import require_rows_divide
from jaxvlm.parallel.processes import StopRequest, Watchdog, any_process, leaving_peers
from jaxvlm.parallel.rules import param_shardings, put_batch
from jaxvlm.train.checkpoint import StageCheckpointer, content_hash
from jaxvlm.train.metrics import Meter, StageResult
from jaxvlm.train.optimizer import averaged, make_optimizer, opt_state_shardings
from jaxvlm.train.state import TrainState, cast, flat, merge, split
from jaxvlm.train.step import make_step, step_options
from jaxvlm.train.watch import Ask, due, measures
from jaxvlm.weights.saved import explain_full_disk


class Interrupted(UserError):
    """Training stopped at a signal, with everything saved. `step` of `total` steps are done."""

    def __init__(self, stage: str, step: int, total: int, signum: int):
        super().__init__(f"Stopped in stage '{stage}' after step {step} of {total}; everything is saved.")
        self.signum = signum


def train_stage(
    stage: StageConfig,
    model_config: ModelConfig,
    params: dict,
    loader: Loader,
    mesh: Mesh,
    workdir: Path,
    directory: Path | epath.Path,
    checkpoints: CheckpointConfig,
    log: LogConfig | None = None,
    origin: dict[str, Any] | None = None,
    held_out: Loader | None = None,
    ask: Ask | None = None,
) -> tuple[dict, StageResult | None]:
    """Trains `stage` from `params`, or from its newest checkpoint in `directory`; returns the new parameters.

    Metrics and heartbeats go to `workdir`, which is always a folder; `directory` may be in a bucket.

    Runs inside `jax.set_mesh`, in every process of the job, and takes the buffers of `params` over. `origin` says where the
    frozen ones come from, for the checkpoint. `held_out` and `ask` are what `stage.watch` evaluates, in events of
    metrics.jsonl. The result is process 0's to tell, and None in the others.

    Raises `ConfigError` for a batch that does not divide, `DivergedError` when the loss is no number, and `Interrupted`,
    everything saved, when SIGINT or SIGTERM arrives in any process.
    """
    # Model and state ---------------------------------------------------------------------------------------------
    require_rows_divide(stage, mesh)
    model, num_steps = VLM(model_config), loader.num_steps
    trainable, frozen = split(params, stage.trainable)
    frozen = cast(frozen, jnp.dtype(model_config.dtype))  # nothing updates it: no float32 master is needed
    trainable = cast(trainable, jnp.float32)  # masters, also of what an earlier stage left frozen in another dtype
    optimizer = make_optimizer(stage.optimizer, num_steps, trainable)
    state = TrainState(jnp.int32(0), trainable, frozen, jax.eval_shape(optimizer.init, trainable))
    shardings = state_shardings(state, model_config, mesh, stage.optimizer.offload)
    state = state._replace(opt_state=jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trainable))
    state = jax.device_put(state, shardings)
    del params, trainable, frozen

    # Resume ------------------------------------------------------------------------------------------------------
    about = {
        "stage": stage.name,
        "data": loader.fingerprint,
        "seed": loader.seed,
        "steps": num_steps,
        "optimizer": to_dict(stage.optimizer),
        "frozen": content_hash(state.frozen),
        "origin": origin or {},
        "model": to_dict(model_config),
    }
    saver = StageCheckpointer(directory / "checkpoints", checkpoints, about)
    if saver.latest_step() is not None:
        state = saver.restore(state)
        print(f"  resuming from step {int(state.step)}", flush=True)
    start = int(state.step)

    # Compiled step -----------------------------------------------------------------------------------------------
    step_fn = jax.jit(
        make_step(model, optimizer, len(loader.source_names), stage.accumulate, loader.seed),
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=step_options(model_config),
    )
    metrics = workdir / "metrics.jsonl"
    meter = Meter(stage, model_config, state, num_steps, start, metrics, log or LogConfig(), loader.stats())

    # Loop --------------------------------------------------------------------------------------------------------
    stop, watchdog = StopRequest(directory.name), Watchdog(checkpoints.watchdog_seconds, workdir / "heartbeats")
    watched = measures(model, held_out, ask, mesh, lambda: watchdog.beat(meter.step))

    def evaluate(kinds: Iterable[str]) -> None:
        for kind in kinds:
            found = state._replace(trainable=outcome(state, shardings))
            meter.evaluate(kind, meter.step, functools.partial(watched[kind], found))
            watchdog.beat(meter.step)

    with contextlib.closing(watchdog), explain_full_disk(directory), stop.listening():
        with contextlib.closing(saver), contextlib.closing(meter), leaving_peers():
            if due(stage.watch, start, num_steps):  # saved, and then stopped before it was evaluated
                evaluate(kind for kind in watched if not any_process(meter.has(kind, start)))
            for step, batch in meter.batches(loader.batches(start)):
                state, metrics = step_fn(state, put_batch(batch, mesh))
                meter.add(step, batch, metrics)  # waits for the step before: no more than two are in flight
                watchdog.beat(step)
                stopping = stop.agreed(step)
                if step % checkpoints.every_steps == 0 or step == num_steps or stopping:
                    saver.save(state, wait=stopping)
                if stopping and step < num_steps:
                    raise Interrupted(stage.name, step, num_steps, stop.signum)
                if due(stage.watch, step, num_steps) and not stopping:
                    evaluate(watched)
        if any_process(bool(stop.signum)):  # it came too late for a step of this stage, which is saved
            raise Interrupted(stage.name, num_steps, num_steps, stop.signum or signal.SIGTERM)
    result = meter.result() if jax.process_index() == 0 else None
    return merge(outcome(state, shardings), state.frozen), result


def outcome(state: TrainState, shardings: TrainState) -> dict:
    """The trainable parameters that a stage would end with now: their moving average, where the optimiser keeps one."""
    average = averaged(state.opt_state)
    return state.trainable if average is None else jax.device_put(average, shardings.trainable)


def state_shardings(state: TrainState, config: ModelConfig, mesh: Mesh, offload: bool = False) -> TrainState:
    """Shardings of a state, of arrays or shapes: parameters by the rule table, moments by `opt_state_shardings`."""
    axes = flat(logical_axes(config))
    everything = NamedSharding(mesh, PartitionSpec())

    def of(tree: dict) -> dict:
        leaves = flat(tree)
        return unflatten_dict(param_shardings({path: axes[path] for path in leaves}, leaves, mesh), sep="/")

    trainable = of(state.trainable)
    opt_state = opt_state_shardings(state.opt_state, state.trainable, trainable, mesh, offload)
    return TrainState(everything, trainable, of(state.frozen), opt_state)
