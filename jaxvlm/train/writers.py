"""TensorBoard and Weights & Biases, beside metrics.jsonl, where a run asks for them (the extra `log`)."""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from jaxvlm.config import ConfigError

Write = Callable[[int, dict[str, Any]], None]  # (step, numbers), the numbers possibly nested by name
Writer = tuple[Write, Callable[[], None]]  # and what closes it


def open_writers(names: tuple[str, ...], workdir: Path, stage: str, start: int) -> list[Writer]:
    """Writers of the numbers of `stage` from step `start` on, in the first process; none in the others.

    Raises `ConfigError` for an unknown name, or a package that is not installed.
    """
    known = {"tensorboard": _tensorboard, "wandb": _wandb}
    for name in names:
        if name not in known:
            raise ConfigError(f"log.to names '{name}'; known: {', '.join(known)} (metrics.jsonl is always written).")
    return [known[name](workdir, stage, start) for name in names] if jax.process_index() == 0 else []


def scalars(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in a record, {'source_loss/vqa': 1.5}; what is no number is left out."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found[prefix + name] = value
    return found


def _tensorboard(workdir: Path, stage: str, start: int) -> Writer:
    """One run of TensorBoard for each stage; what a killed start wrote after its checkpoint is hidden."""
    folder = workdir / "tensorboard" / stage
    writer = _package("tensorboardX").SummaryWriter(str(folder), purge_step=start + 1)

    def write(step: int, values: dict[str, Any]) -> None:
        for name, value in scalars(values).items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def _wandb(workdir: Path, stage: str, start: int) -> Writer:
    """One run of Weights & Biases for the whole work directory, continued by later starts.

    Its own variables say where it goes: WANDB_PROJECT (default 'jaxvlm'), WANDB_MODE=offline for no network.
    """
    kept = workdir / "wandb_id"
    if not kept.is_file():
        kept.write_text(uuid.uuid4().hex)
    wandb = _package("wandb")
    project = os.environ.get("WANDB_PROJECT", "jaxvlm")
    run = wandb.init(project=project, name=workdir.name, id=kept.read_text(), resume="allow", dir=str(workdir))
    run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")  # steps of every stage start at 1

    def write(step: int, values: dict[str, Any]) -> None:
        run.log({f"{stage}/{name}": value for name, value in scalars(values | {"step": step}).items()})

    return write, run.finish


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"log.to needs the package {name}. Install it with: pip install 'jaxvlm[log]'") from error
