"""Everything that touches orbax: checkpoints of a stage in progress, and the finished model of a run."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

import jaxvlm
from jaxvlm.config import ConfigError, ModelConfig, PromptConfig, UserError, build, to_dict
from jaxvlm.train.state import TrainState, flat, nbytes

MANIFEST = "manifest.json"


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read; the message names the file and the fix."""


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
        with _clear_errors(self.directory, nbytes(tree)):
            self._orbax.wait()  # a failed earlier write surfaces here, where it can be explained
            self._orbax.save_checkpointables_async(step, {"state": tree, "data": data}, force=True)
            if wait:
                self._orbax.wait()

    def restore(self, state: TrainState, data: dict) -> TrainState:
        """The newest checkpoint, in the shardings of `state`. Raises `CheckpointError` if it belongs to other data."""
        abstract = {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}
        with _clear_errors(self.directory, 0):
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
        with _clear_errors(self.directory, 0):
            self._orbax.close()


class _clear_errors:
    """Turns a full disk, however deep it was noticed, into one sentence."""

    def __init__(self, directory: Path, size: int):
        self.directory, self.size = directory, size

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if error is None or isinstance(error, CheckpointError):
            return
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        words = ("no space left", "resource_exhausted", "disk quota", "enospc")
        if full or any(word in str(error).lower() for word in words):
            free = shutil.disk_usage(existing_parent(self.directory)).free
            need = f" A checkpoint here takes about {self.size / 1e6:.0f} MB." if self.size else ""
            raise CheckpointError(
                f"The disk is full: writing a checkpoint under {self.directory} failed with {free / 1e6:.0f} MB free."
                f"{need} Earlier checkpoints are intact. Free some space and run the same command again: it resumes."
            ) from error


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return path


def abstract_of(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save_tree(path: Path, tree: dict) -> None:
    """Writes a tree of arrays to a folder, all or nothing."""
    with _clear_errors(path, nbytes(tree)):
        ocp.save(Path(path).absolute(), tree, overwrite=True)


def load_tree(path: Path, abstract: dict | None = None) -> dict:
    """Reads a tree of arrays back, in the shardings of `abstract` where given."""
    return ocp.load(Path(path).absolute(), abstract)


def save_model(directory: Path, params: dict, model: ModelConfig, prompt: PromptConfig, extra: dict) -> None:
    """Writes a finished model: parameters, tokenizer and the manifest that says how to use them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_tree(directory / "params", params)
    tokenizer = directory / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    for file in Path(prompt.tokenizer).iterdir():
        if file.suffix in (".json", ".jinja", ".model") and "safetensors" not in file.name:
            shutil.copyfile(file, tokenizer / file.name)
    manifest = {
        "kind": "jaxvlm-model",
        "format": 1,
        "jaxvlm": jaxvlm.__version__,
        "model": to_dict(model),
        "prompt": {**to_dict(prompt), "tokenizer": "tokenizer"},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        **extra,
    }
    write_json(directory / MANIFEST, manifest)


def load_model(directory: Path) -> tuple[dict, ModelConfig, PromptConfig, dict]:
    """Reads what `save_model` wrote: (params, model, prompt, manifest).

    `directory` may be the model folder or the run that holds it. Raises `CheckpointError` when it is neither.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).is_file() and (directory / "model" / MANIFEST).is_file():
        directory = directory / "model"
    path = directory / MANIFEST
    if not path.is_file():
        state = "has not finished training" if (directory / "config.json").is_file() else "holds no jaxvlm model"
        raise CheckpointError(f"'{directory}' {state} (no {MANIFEST}). Give the --workdir of a finished run.")
    manifest = json.loads(path.read_text())
    if manifest.get("kind") != "jaxvlm-model" or manifest.get("format") != 1:
        raise CheckpointError(f"{path} is not a jaxvlm model of format 1; it was written by {manifest.get('jaxvlm')}.")
    try:
        model = build(ModelConfig, manifest["model"], "model")
        prompt = build(PromptConfig, manifest["prompt"] | {"tokenizer": str(directory / "tokenizer")}, "prompt")
    except ConfigError as error:
        raise CheckpointError(f"{path} does not fit this version of jaxvlm ({jaxvlm.__version__}): {error}") from error
    return load_tree(directory / "params"), model, prompt, manifest


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def describe(params: dict) -> list[str]:
    """Parameter counts by top-level part, for the run's opening lines."""
    parts: dict[str, int] = {}
    for path, leaf in flat(params).items():
        parts[path.split("/")[0]] = parts.get(path.split("/")[0], 0) + leaf.size
    return [f"{name} {size / 1e6:.1f} M" for name, size in parts.items()]
