"""Checkpoints of a stage in progress, written by orbax while the training goes on, with checksums of their files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

import jaxvlm
from jaxvlm.config import CheckpointConfig
from jaxvlm.parallel.processes import any_process, barrier
from jaxvlm.train.state import TrainState, flat, nbytes
from jaxvlm.weights.saved import CheckpointError, explain_full_disk, is_address, place, write_json

CHUNK = 1 << 22


class StageCheckpointer:
    """Saves and restores one stage: its trainable leaves, optimiser state and step.

    The frozen leaves are not saved again and again: `about` says where they come from and holds their hash, so that a
    resumed run cannot quietly go on with others. It also holds the loader's fingerprint, the seed and the schedule; the data
    position is the step itself, since the order of rows is a pure function of (seed, position). orbax makes a checkpoint
    appear whole or not at all, but does not notice a bit that the disk lost: each process adds the CRC-32 of its share of
    the files, in `manifests/` beside the checkpoints, and checks its share again before a restore. (Not in a bucket, which
    checks what it keeps.)
    """

    def __init__(self, directory: Path | epath.Path, policy: CheckpointConfig, about: dict[str, Any]):
        self.directory, self.about = place(directory), about
        self.checked = not is_address(directory)  # buckets keep checksums of their own
        self.manifests = self.directory.parent / "manifests"
        with explain_full_disk(self.directory):
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                self.manifests.mkdir(exist_ok=True)
        barrier(f"{self.directory}: folders")
        if self.checked:
            self._set_damaged_aside()
        barrier(f"{self.directory}: checked")
        kept = ocp.training.preservation_policies
        policies = [kept.LatestN(policy.keep), *([kept.EveryNSteps(policy.keep_every)] if policy.keep_every else [])]
        self._orbax = ocp.training.Checkpointer(
            self.directory, preservation_policy=kept.AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )
        self._summing: threading.Thread | None = None
        self._failure: list[BaseException] = []

    def latest_step(self) -> int | None:
        latest = self._orbax.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Starts writing; the training loop goes on meanwhile. Raises `CheckpointError` when the disk is full."""
        step = int(state.step)
        if self.latest_step() == step:
            return
        tree = {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}
        with explain_full_disk(self.directory, nbytes(tree)):
            self._finish()  # a failed earlier write surfaces here, where it can be explained
            written = self._orbax.save_checkpointables_async(step, {"state": tree, "about": self.about}, force=True)
            self._summing = threading.Thread(target=self._sum, args=(written, step))
            self._summing.start()
            if wait:
                self._finish()

    def restore(self, state: TrainState) -> TrainState:
        """The newest checkpoint, in the shardings of `state`, whatever mesh and number of processes wrote it.

        Raises `CheckpointError` if it belongs to other data or to other frozen weights.
        """
        wanted = {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}
        with explain_full_disk(self.directory):
            loaded = self._orbax.load_checkpointables(None, {"state": abstract_of(wanted), "about": self.about})
        found, tree = loaded["about"], loaded["state"]
        if found["data"] != self.about["data"]:
            raise CheckpointError(
                f"The checkpoint in {self.directory} was made on other training data (a source file, the tokenizer or "
                "a data setting changed since). Put the old files back, or start again with a new --workdir."
            )
        if found["frozen"] != self.about["frozen"]:
            raise CheckpointError(
                f"The checkpoint in {self.directory} was trained beside other frozen weights ({found['frozen']}) than those "
                f"loaded now ({self.about['frozen']}). Put the old files back, or start again with a new --workdir."
            )
        return TrainState(tree["step"], tree["trainable"], state.frozen, tree["opt_state"])

    def close(self) -> None:
        """Waits for what is being written."""
        with explain_full_disk(self.directory):
            self._finish()
            self._orbax.close()

    def _finish(self) -> None:
        self._orbax.wait()
        if self._summing:
            self._summing.join()
        if self._failure:
            raise self._failure.pop()

    def _sum(self, written: Any, step: int) -> None:
        """In a thread: waits for the checkpoint and writes down what this process's share of its files must hold."""
        try:
            written.result()
            if not self.checked:
                return
            files = {name: checksum(self.directory / str(step) / name) for name in share_of(self.directory / str(step))}
            for old in self.manifests.glob("*.json"):
                if jax.process_index() == 0 and not (self.directory / old.name.split(".")[0]).is_dir():
                    old.unlink(missing_ok=True)
            write_json(
                self.manifests / f"{step}.{jax.process_index()}.json", {"jaxvlm": jaxvlm.__version__, "files": files}
            )
        except BaseException as error:  # `_finish` raises it where somebody can read it
            self._failure.append(error)

    def _set_damaged_aside(self) -> None:
        """Moves checkpoints whose files are not as they were written out of orbax's sight, newest first, and says so."""
        for name in sorted(p.name for p in self.directory.iterdir() if "tmp" in p.name and jax.process_index() == 0):
            print(
                f"  WARNING: {self.directory / name} is half-written (the run was stopped meanwhile) and is not used."
            )
        steps = sorted((int(p.name) for p in self.directory.iterdir() if p.name.isdigit()), reverse=True)
        for step in steps:
            started = time.perf_counter()
            bad = damaged(self.directory / str(step), self.manifests)
            if not any_process(bool(bad)):
                took = time.perf_counter() - started
                print(f"  checkpoint {step}: files verified against their checksums in {took:.1f} s")
                return
            if bad:
                print(
                    f"WARNING: checkpoint {self.directory / str(step)} is damaged: {'; '.join(bad[:3])}. The one before it "
                    "is used, if there is one, and the steps since are trained again.",
                    flush=True,
                )
            if jax.process_index() == 0:
                aside = self.directory.parent / "damaged"
                aside.mkdir(exist_ok=True)
                (self.directory / str(step)).rename(aside / f"{step}-{time.time_ns()}")
            barrier(f"{self.directory}: {step} set aside")


def share_of(folder: Path) -> list[str]:
    """The files of a checkpoint that this process sums up: every n-th, by size, so that the large ones are spread."""
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: (-p.stat().st_size, str(p)))
    return [str(p.relative_to(folder)) for p in files[jax.process_index() :: jax.process_count()]]


def checksum(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file."""
    value, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value, size = zlib.crc32(chunk, value), size + len(chunk)
    return [size, value]


def damaged(folder: Path, manifests: Path) -> list[str]:
    """What is wrong with this process's share of a checkpoint's files; nothing if no checksums are known yet."""
    expected: dict[str, list[int]] = {}
    for path in sorted(manifests.glob(f"{folder.name}.*.json")):
        with contextlib.suppress(ValueError):
            expected |= json.loads(path.read_text())["files"]
    if not expected and jax.process_index() == 0:
        print(f"  checkpoint {folder.name} has no checksums (the run was stopped before they were written)")
    problems = []
    for name in sorted(expected)[jax.process_index() :: jax.process_count()]:
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif (found := checksum(path)) != expected[name]:
            problems.append(
                f"{name} has {found[0]} bytes and CRC {found[1]:08x}, not {expected[name][0]} and {expected[name][1]:08x}"
            )
    return problems


def content_hash(tree: dict) -> str:
    """A hash of every bit of a tree of arrays, by integer sums on the devices: the same on every mesh.

    Each word is weighted by an odd number that depends on its place, so that exchanged values show.
    """

    def of(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(
            jnp.uint32
        )
        weight = jnp.ones(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            weight = weight * jnp.uint32(2654435761) + 2 * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(bits * weight)

    leaves = flat(tree)
    sums = jax.device_get(jax.jit(lambda values: [of(x) for x in values])(list(leaves.values())))
    text = json.dumps(
        [(path, x.shape, str(x.dtype), int(s)) for (path, x), s in zip(leaves.items(), sums, strict=True)]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def abstract_of(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
