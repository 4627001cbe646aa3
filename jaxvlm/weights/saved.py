"""The finished model of a run as a folder: parameters (orbax), tokenizer, and the manifest that says how to use them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

import jaxvlm
from jaxvlm.config import ConfigError, ModelConfig, PromptConfig, UserError, build, to_dict
from jaxvlm.templates import TRANSFORM_VERSIONS
from jaxvlm.weights.build import Dtype, dtype_of
from jaxvlm.weights.hf_config import read_json

MANIFEST = "manifest.json"
# What says that a permission is lost: Linux, tensorstore, Google's clients.
FORBIDDEN = ("permission denied", "read-only file system", "permission_denied", "forbidden")


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read; the message names the file and the fix."""


def is_address(path: str | os.PathLike) -> bool:
    """Whether a place is in a bucket (gs://...) and not a folder."""
    return "://" in os.fspath(path)


def place(path: str | os.PathLike) -> Path | epath.Path:
    """A folder or an address, absolute, with pathlib's methods."""
    return epath.Path(path) if is_address(path) else Path(path).absolute()


def run_folder(path: Path) -> Path | None:
    """The folder of a saved model, given itself or the run that holds it; None if there is none."""
    return next((folder for folder in (path, path / "model") if (folder / MANIFEST).is_file()), None)


def save_model(
    directory: Path | epath.Path, params: dict, model: ModelConfig, prompt: PromptConfig, extra: dict
) -> None:
    """Writes a finished model: parameters, tokenizers and the manifest that says how to use them."""
    directory = place(directory)
    directory.mkdir(parents=True, exist_ok=True)
    context = ocp.Context()
    context.array.saving.use_compression = False  # compressed chunks would all be held: nearly a second model in memory
    with context, explain_full_disk(directory, sum(leaf.nbytes for leaf in jax.tree.leaves(params))):
        ocp.save(directory / "params", params, overwrite=True)  # together, if there are several processes
    if jax.process_index():
        return
    for name in _tokenizers(prompt):
        (directory / name).mkdir(exist_ok=True)
        for file in Path(getattr(prompt, name)).iterdir():
            if file.suffix in (".json", ".jinja", ".model", ".txt") and "safetensors" not in file.name:
                (directory / name / file.name).write_bytes(file.read_bytes())
    manifest = {
        "kind": "jaxvlm-model",
        "format": 1,
        "jaxvlm": jaxvlm.__version__,
        "model": to_dict(model),
        "prompt": {**to_dict(prompt), **{name: name for name in _tokenizers(prompt)}},
        "transform_version": TRANSFORM_VERSIONS.get(prompt.transform),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        **extra,
    }
    write_json(directory / MANIFEST, manifest)


def load_model(
    directory: Path,
    shardings: Callable[[ModelConfig], dict] | None = None,
    dtype: Dtype | None = None,
    part: str = "",
) -> tuple[dict, ModelConfig, PromptConfig, dict]:
    """Reads what `save_model` wrote: (params, model, prompt, manifest).

    `directory` may be the model folder or the run that holds it. `shardings` gives a tree of shardings for the model's
    configuration; without it everything goes to the first device, wherever it was saved from. `dtype` is one dtype, a
    function of the parameter's path, or None for the stored ones. Of a `part`, only the parameters of that are read.
    Raises `CheckpointError` when there is no model, or not one that this version can read.
    """
    directory = run_folder(Path(directory)) or Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        state = "has not finished training" if (directory / "config.json").is_file() else "holds no jaxvlm model"
        raise CheckpointError(f"'{directory}' {state} (no {MANIFEST}). Give the --workdir of a finished run.")
    manifest = read_json(path)
    if manifest.get("kind") != "jaxvlm-model" or manifest.get("format") != 1:
        raise CheckpointError(f"{path} is not a jaxvlm model of format 1; it was written by {manifest.get('jaxvlm')}.")
    try:
        model = build(ModelConfig, manifest["model"], "model")
        prompt = build(PromptConfig, manifest["prompt"], "prompt")
        prompt = replace(prompt, **{name: str(directory / name) for name in _tokenizers(prompt)})
    except ConfigError as error:
        raise CheckpointError(f"{path} does not fit this version of jaxvlm ({jaxvlm.__version__}): {error}") from error
    made, now = manifest.get("transform_version", 1), TRANSFORM_VERSIONS.get(prompt.transform)
    if made != now:
        raise CheckpointError(
            f"The model in {directory} was trained on images as version {made} of the transform '{prompt.transform}' makes "
            f"them, and jaxvlm {jaxvlm.__version__} has version {now}. Use jaxvlm {manifest.get('jaxvlm')}."
        )
    return _load_params(directory / "params", shardings and shardings(model), dtype, part), model, prompt, manifest


def _tokenizers(prompt: PromptConfig) -> tuple[str, ...]:
    """The settings that name a tokenizer's folder, and the names of their copies in a saved model."""
    return ("tokenizer", "qformer_tokenizer") if prompt.qformer_tokenizer else ("tokenizer",)


def _load_params(folder: Path, shardings: dict | None, dtype: Dtype | None, part: str) -> dict:
    folder = folder.absolute()
    stored = ocp.metadata(folder).metadata
    if part:
        stored = {part: stored[part]}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda _: here, stored) if shardings is None else {key: shardings[key] for key in stored}

    def abstract(path, leaf, sharding) -> jax.ShapeDtypeStruct:
        kind = leaf.dtype if dtype is None else dtype_of(dtype, "/".join(key.key for key in path))
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=sharding)

    wanted = jax.tree_util.tree_map_with_path(abstract, stored, placed)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    # As many parameters at a time as the largest: each is held two or three times until it is in its place.
    context.memory.read_concurrent_bytes = 1 + max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(wanted))
    with context:
        return ocp.load(folder, wanted)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` when all has gone well; after a failure there is nothing.

    Raises `CheckpointError` if `out` is a file or holds anything.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is not empty. Give another folder.")
    above = existing_parent(out.absolute())
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield work
        work.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        for folder in (out.parent, *out.parent.parents):  # those made above
            if folder.absolute() == above or not folder.is_dir() or any(folder.iterdir()):
                break
            folder.rmdir()
        raise


def write_json(path: Path | epath.Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


@contextlib.contextmanager
def explain_full_disk(directory: Path | epath.Path, size: int = 0) -> Iterator[None]:
    """Turns a full disk or a lost permission, however deep it was noticed, into one sentence.

    `size` is what was to be written, in bytes.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        words = ("no space left", "resource_exhausted", "disk quota", "enospc")
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        forbidden = getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS)
        if forbidden or any(word in str(error).lower() for word in FORBIDDEN):
            raise CheckpointError(
                f"Writing under {directory} is not permitted any more ({str(error).splitlines()[0][:200]}). Earlier checkpoints "
                "are intact. Make it writable again and run the same command again: it resumes."
            ) from error
        if is_address(directory) or (not full and not any(word in str(error).lower() for word in words)):
            raise
        free = shutil.disk_usage(existing_parent(directory)).free
        need = f" This takes about {size / 1e6:.0f} MB." if size else ""
        raise CheckpointError(
            f"The disk is full: writing under {directory} failed with {free / 1e6:.0f} MB free.{need} Earlier checkpoints "
            "are intact. Free some space and run the same command again: it resumes."
        ) from error


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return path
