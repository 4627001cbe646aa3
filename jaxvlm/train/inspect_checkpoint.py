"""What a checkpoint of a stage in progress holds, for a person."""

from __future__ import annotations

import math
from pathlib import Path

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from jaxvlm.train.bucket import require
from jaxvlm.train.checkpoint import damaged
from jaxvlm.weights.saved import CheckpointError, is_address, place


def describe_checkpoint(path: str | Path) -> str:
    """The table of `jaxvlm inspect`. Raises `CheckpointError` where there is no checkpoint, naming what was looked for."""
    if is_address(path):
        require(path)
    folder = newest(place(path))
    manifests = folder.parent.parent / "manifests"
    if not is_address(path) and (problems := damaged(folder, manifests)):
        return f"{folder}\ndamaged, not to be read: {'; '.join(problems)}"
    about = ocp.load_checkpointables(folder, {"about": None})["about"]
    stored = ocp.metadata(folder, checkpointable_name="state").metadata
    rows = [
        ("/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys), leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(stored, is_leaf=lambda x: hasattr(x, "shape"))
        if hasattr(leaf, "shape")
    ]
    sizes = [leaf.dtype.itemsize * math.prod(leaf.shape) for _, leaf in rows]
    known = any(manifests.glob(f"{folder.name}.*.json"))
    lines = [
        f"{folder}",
        f"stage '{about['stage']}', step {folder.name} of {about['steps']}, seed {about['seed']}",
        f"data {about['data']}, frozen weights {about['frozen']} from {about['origin']}",
        f"optimizer {about['optimizer']}",
        "files: " + ("as their checksums say" if known else "no checksums were written"),
        f"{len(rows)} arrays, {sum(sizes):,} bytes",
    ]
    lines += [
        f"  {name:60} {leaf.dtype!s:10} {size:>14,} B  {list(leaf.shape)}"
        for (name, leaf), size in zip(rows, sizes, strict=True)
    ]
    return "\n".join(lines)


def newest(path: Path | epath.Path) -> Path | epath.Path:
    """The step's folder at `path`, or the newest one in a stage's folder or in a run's last stage."""
    if path.name.isdigit() and path.parent.name == "checkpoints" and path.is_dir():
        return path
    for stage in (path, *sorted(path.glob("stages/*"), key=lambda p: -int(p.name.split("_")[0]))):
        for folder in (stage, stage / "checkpoints"):
            steps = (
                [p for p in folder.glob("*") if p.name.isdigit() and p.is_dir()] if folder.name == "checkpoints" else []
            )
            if steps:
                return max(steps, key=lambda p: int(p.name))
    raise CheckpointError(
        f"{path} holds no checkpoint. Give a run's --workdir, stages/N_NAME in it, or checkpoints/STEP in that."
    )
