"""Checkpoints of a stage in progress, written by orbax while the training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxvlm.train.state import TrainState, nbytes
from jaxvlm.weights.saved import CheckpointError, explain_full_disk


class StageCheckpointer:
    """Saves and restores one stage: its trainable leaves, optimiser state and step.

    The frozen leaves are not saved again and again: they follow from the stages before and the imported weights. The
    data position is the step itself, since the order of rows is a pure function of (seed, position); `data` holds the
    loader's fingerprint, so that a resumed run cannot quietly read other data.
    """

    def __init__(self, directory: Path, keep: int):
        self.directory = Path(directory).absolute()
        policies = ocp.training.preservation_policies
        self._orbax = ocp.training.Checkpointer(self.directory, preservation_policy=policies.LatestN(keep))

    def latest_step(self) -> int | None:
        latest = self._orbax.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, data: dict, *, wait: bool = False) -> None:
        """Starts writing; the training loop goes on meanwhile. Raises `CheckpointError` when the disk is full."""
        step = int(state.step)
        if self.latest_step() == step:
            return
        tree = {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}
        with explain_full_disk(self.directory, nbytes(tree)):
            self._orbax.wait()  # a failed earlier write surfaces here, where it can be explained
            self._orbax.save_checkpointables_async(step, {"state": tree, "data": data}, force=True)
            if wait:
                self._orbax.wait()

    def restore(self, state: TrainState, data: dict) -> TrainState:
        """The newest checkpoint, in the shardings of `state`. Raises `CheckpointError` if it belongs to other data."""
        abstract = {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}
        with explain_full_disk(self.directory, 0):
            loaded = self._orbax.load_checkpointables(None, {"state": abstract_of(abstract), "data": data})
        if loaded["data"] != data:
            raise CheckpointError(
                f"The checkpoint in {self.directory} was made on other training data (a source file, the tokenizer or "
                "a data setting changed since). Put the old files back, or start again with a new --workdir."
            )
        tree = loaded["state"]
        return TrainState(tree["step"], tree["trainable"], state.frozen, tree["opt_state"])

    def close(self) -> None:
        """Waits for what is being written."""
        with explain_full_disk(self.directory, 0):
            self._orbax.close()


def abstract_of(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
