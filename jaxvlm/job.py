"""The main job: every stage of a config trained in order, the model saved, evaluated and reported."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import resource
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
from etils import epath
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

import jaxvlm
from jaxvlm.config import (
    ConfigError,
    MeshConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    build,
    differences,
    to_dict,
)
from jaxvlm.data.assets import resolve_assets
from jaxvlm.data.loader import Loader
from jaxvlm.data.mixture import mixture_table
from jaxvlm.evals import question_file, report, runner
from jaxvlm.evals.slim import slim_scores
from jaxvlm.infer.engine import Engine
from jaxvlm.models.lora import merge_all, without_lora
from jaxvlm.models.vlm import abstract_params, logical_axes
from jaxvlm.parallel.mesh import make_mesh
from jaxvlm.parallel.processes import barrier, describe_mesh, first_then_others, whole
from jaxvlm.parallel.rules import param_shardings
from jaxvlm.progress import StatusLine, duration
from jaxvlm.train import bucket
from jaxvlm.train.features import FeatureTable, cached_features
from jaxvlm.train.flops import peak_flops
from jaxvlm.train.loop import train_stage
from jaxvlm.train.metrics import StageResult, read_events, read_metrics
from jaxvlm.train.ridge import ridge_start
from jaxvlm.train.state import count, describe, flat, nbytes, split
from jaxvlm.train.watch import Ask, check_watch
from jaxvlm.weights import import_model, import_part
from jaxvlm.weights.exporter import keep_adapters
from jaxvlm.weights.importer import with_initial
from jaxvlm.weights.saved import CheckpointError, existing_parent, is_address, save_model, write_json

EVALUATION_SECONDS = 7 * 24 * 3600.0  # what the others wait for process 0 at most
PARTS = ("vision", "connector", "llm")
# Settings that may change between a run and its continuation without changing what is learnt.
FREE = re.compile(r"config\.((log|checkpoint|mesh|eval|stages\.\d+\.watch)\b|name|description|expected)")


def run(config: RunConfig, workdir: str | Path) -> dict[str, Any]:
    """Trains, evaluates and reports; picks up wherever an earlier call on the same `workdir` stopped.

    Returns the content of report.json. Raises `ConfigError`, `DataError`, `WeightsError`, `AssetError` or
    `CheckpointError`, each with the fix in its message, and `Interrupted` after a signal, with everything saved.
    """
    with bucket.opened(workdir) as (folder, store):
        return run_in(folder, store, config)


def run_in(workdir: Path, store: Path | epath.Path, config: RunConfig) -> dict[str, Any]:
    """`run` with its files in `workdir`, and checkpoints and model in `store`."""
    started, alone = time.perf_counter(), jax.process_index() == 0
    if alone:
        claim_workdir(config, store)
    barrier("workdir")
    print(opening(config, store), flush=True)
    config = first_then_others("assets", lambda: resolve_assets(config))
    check_watch(config)
    mesh = make_mesh(config.mesh)
    print(describe_mesh(mesh), flush=True)
    asks = [questions_of(stage, config, mesh) for stage in config.stages]
    with jax.set_mesh(mesh):
        params = initial_params(config, mesh)
        print(f"Model: {', '.join(describe(params))} parameters, computing in {config.model.dtype}.")
        check_disk(params, config, store)
        results = []
        for number, stage in enumerate(config.stages):
            params, result = run_stage(number, stage, config, params, mesh, workdir, store, asks[number])
            results.append(result)  # None in all processes but the first
        if config.model.llm.lora.rank:
            lora = {path: whole(leaf) if "lora_" in path else leaf for path, leaf in flat(params).items()}
            if alone:
                keep_adapters(unflatten_dict(lora, sep="/"), config.model, workdir / "adapters")
        model, params = without_adapters(config.model, params)
        save_model(store / "model", params, model, config.prompt, model_notes(config, results) if alone else {})
        print(f"\nModel saved to {store / 'model'}.\n")
        engine_mesh = mesh
        if config.eval.task and jax.process_count() > 1:
            engine_mesh, params = local_copy(model, params)
    scores = None
    if config.eval.task and alone:
        scores = evaluate(Engine(model, config.prompt, params, mesh=engine_mesh), config, workdir / "eval")
    made = finish(config, workdir, store, results, scores, started) if alone else {}
    barrier("end", EVALUATION_SECONDS)  # nobody leaves before process 0, which holds the coordination service
    return made


def questions_of(stage: StageConfig, config: RunConfig, mesh: Mesh) -> Ask | None:
    """What `stage.watch` asks of the model in training; None where it asks nothing."""
    if not (stage.watch.every_steps and stage.watch.questions):
        return None
    if jax.process_count() > 1:  # an engine cannot read parameters that are spread over processes
        print(f"  Stage '{stage.name}': watch.questions are not asked in a job of several processes.", flush=True)
        return None
    return slim_scores(config, stage.watch, mesh)


def local_copy(model: ModelConfig, params: dict) -> tuple[Mesh, dict]:
    """A mesh of process 0's own devices and the parameters on it: process 0 evaluates while the others wait.

    The model must fit those devices; where it does not, set config.eval.task = "" and run `jaxvlm eval` where it does.
    All processes must call, to hand over their parts; the others keep nothing.
    """
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    shardings = flat(param_shardings(logical_axes(model), abstract_params(model), mesh))
    kept = {}
    for path, leaf in flat(params).items():
        value = whole(leaf)
        if jax.process_index() == 0:
            kept[path] = jax.device_put(value, shardings[path])
    return mesh, unflatten_dict(kept, sep="/")


def claim_workdir(config: RunConfig, workdir: Path | epath.Path) -> None:
    """Makes the work directory this run's own, or checks that it already is. Raises `ConfigError` otherwise."""
    path, wanted = workdir / "config.json", json.loads(json.dumps(to_dict(config)))
    if path.is_file():
        before = json.loads(path.read_text())
        with contextlib.suppress(
            ConfigError
        ):  # an older version's; one that had settings which are gone stays as it is
            before = json.loads(json.dumps(to_dict(build(RunConfig, before))))  # new settings have their defaults
        changed = [d for d in differences(before, wanted) if not FREE.match(d)]
        if changed:
            lines = "\n  ".join(changed[:8] + (["..."] if len(changed) > 8 else []))
            raise ConfigError(
                f"{workdir} holds a run with other settings:\n  {lines}\nGive a new --workdir, or the old settings."
            )
    elif workdir.is_dir() and any(workdir.iterdir()):
        raise ConfigError(f"{workdir} is not empty and holds no jaxvlm run. Give a new --workdir.")
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)
    write_json(workdir / "environment.json", environment())


def environment() -> dict[str, Any]:
    """Versions, devices and code revision: what a result depends on beside its config."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    known = shutil.which("git") and subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    devices = [device.device_kind for device in jax.devices()]
    return {**report.versions(), "revision": known or None, "devices": devices}


def opening(config: RunConfig, workdir: Path | epath.Path) -> str:
    """What is about to happen, in a few lines."""
    lines = [f"jaxvlm {jaxvlm.__version__}: {config.name}", *(config.description.strip().splitlines())]
    if config.expected:
        lines.append(f"Expect {config.expected}.")
    lines.append(f"Everything goes to {workdir}; run the same command again to continue after an interruption.")
    lines.append(
        f"Compiled programs are kept in {jax.config.jax_compilation_cache_dir}, so that the next start is quicker."
    )
    return "\n".join(lines)


def initial_params(config: RunConfig, mesh: Mesh) -> dict:
    """Parameters from the paths of `config.init`, the rest initialised from the seed, all in their final sharding."""
    shardings = param_shardings(logical_axes(config.model), abstract_params(config.model), mesh)
    loaded: dict[str, Any] = {}
    if config.init.model:

        def placed_for(found: ModelConfig) -> dict:
            require_same_model(found, config.model, config.init.model)
            return shardings

        named = {"vision": config.init.vision, "llm": config.init.llm}  # parts that a checkpoint may only name
        loaded = flat(import_model(config.init.model, shardings=placed_for, **named)[1])
    for part in PARTS:
        if path := getattr(config.init, part):
            subtree = import_part(path, part, config.model, shardings=shardings[part])
            loaded |= {f"{part}/{name}": leaf for name, leaf in flat(subtree).items()}
    return with_initial(config.model, unflatten_dict(loaded, sep="/"), config.seed, shardings)


def require_same_model(found: ModelConfig, wanted: ModelConfig, path: str) -> None:
    """Raises `ConfigError` when a checkpoint's shape is not the config's (precision and adapters apart)."""
    changed = [
        line
        for line in differences(to_dict(without_lora(found)), to_dict(without_lora(wanted)), "config.model")
        if not line.startswith(("config.model.dtype", "config.model.remat"))
    ]
    if changed:
        raise ConfigError(f"The model in {path} is not the config's:\n  " + "\n  ".join(changed))


def check_disk(params: dict, config: RunConfig, workdir: Path | epath.Path) -> None:
    """Fails before the first step, not after the last, when the disk cannot hold what will be written."""
    if is_address(workdir):
        return
    need = nbytes(params)
    for stage in config.stages:
        copies = 3 + bool(stage.optimizer.ema_decay)  # parameters, two moments, an average
        need += config.checkpoint.keep * copies * nbytes(split(params, stage.trainable)[0])
    free = shutil.disk_usage(existing_parent(workdir)).free
    if free < need:
        raise CheckpointError(
            f"{workdir} needs about {need / 1e9:.1f} GB for checkpoints and the model, but {free / 1e9:.1f} GB are "
            "free. Free some space, give another --workdir, or lower --config.checkpoint.keep."
        )


def run_stage(
    number: int,
    stage: StageConfig,
    config: RunConfig,
    params: dict,
    mesh: Mesh,
    workdir: Path,
    store: Path | epath.Path,
    ask: Ask | None = None,
) -> tuple[dict, StageResult | None]:
    """Reads the stage's data, caches frozen features if it asks for that, and trains."""
    trainable, _ = split(params, stage.trainable)
    print(
        f"\nStage {number + 1} of {len(config.stages)}: {stage.name} - trains {count(trainable) / 1e6:.2f} M of "
        f"{count(params) / 1e6:.1f} M parameters"
    )

    skipped = workdir / f"skipped_{stage.name}.jsonl"
    data = first_then_others(f"data of stage {number}", lambda: stage_loader(number, config, skipped=skipped))
    stats = data.stats()
    slots = f", {stats['tile_fill']:.0%} of {stats['tiles_per_row']} tile slots" if stats["images"] else ""
    print(
        f"  {stats['records']:,} records, {stats['samples']:,} samples in {stats['rows']:,} rows ({stats['fill']:.0%} full"
        f"{slots}), {data.num_steps:,} steps of {stage.batch_size} rows"
    )
    print(textwrap.indent(mixture_table(stats), "  "))
    if data.skipped_path:
        print(f"  {stats['skipped']:,} records skipped, listed in {data.skipped_path}")
    features = held_out = None
    if stage.cache_features:
        if "vision" in trainable:
            raise ConfigError(f"Stage '{stage.name}' trains the vision tower, so cache_features must be False.")
        features = stage_features(number, config, params["vision"], workdir)
        data = stage_loader(number, config, features)
    if watches_held_out(stage):
        held = {"features": features, "skipped": workdir / f"skipped_{stage.name}_held_out.jsonl", "held_out": True}
        held_out = first_then_others(f"held-out data of stage {number}", lambda: stage_loader(number, config, **held))
        counts = ", ".join(f"{name} {one['records']:,}" for name, one in held_out.stats()["sources"].items())
        print(f"  held out, with a loss every {stage.watch.every_steps:,} steps: {counts}")
    if number == 0 and config.init.connector_start == "ridge":
        rows = stage_loader(number, config, features, process=(0, 1)) if stage.cache_features else data
        params = ridge_start(config.model, params, rows)
    directory = store / "stages" / f"{number}_{stage.name}"
    origin = {"init": to_dict(config.init), "stages before": [before.name for before in config.stages[:number]]}
    more = (config.checkpoint, config.log, origin)
    return train_stage(stage, config.model, params, data, mesh, workdir, directory, *more, held_out, ask)


def watches_held_out(stage: StageConfig) -> bool:
    """Whether the loss on held-out records is taken in this stage."""
    return bool(stage.watch.every_steps) and any(source.held_out for source in stage.data.sources)


def stage_loader(
    number: int,
    config: RunConfig,
    features: FeatureTable | None = None,
    skipped: Path | None = None,
    process: tuple[int, int] | None = None,
    held_out: bool = False,
) -> Loader:
    """The batches of stage `number`: this process's rows of them, or those of the `process` (index, count); with `held_out`
    those of the records that it does not train on.
    """
    stage = config.stages[number]
    index, count = process or (jax.process_index(), jax.process_count())
    return Loader(
        stage.data,
        config.prompt,
        config.model,
        batch_size=stage.batch_size,
        steps=stage.steps,
        epochs=stage.epochs,
        seed=config.seed + number,
        process_index=index,
        process_count=count,
        features=features,
        skipped_path=skipped,
        log=lambda message: print(f"  {message}", flush=True),
        held_out=held_out,
    )


def stage_features(number: int, config: RunConfig, vision_params: dict, workdir: Path) -> FeatureTable:
    """The frozen tower's features of this stage's images, and of every later stage that sees them the same way."""

    def transform(i: int) -> str:
        return config.stages[i].data.transform or config.prompt.transform

    alike = [i for i, stage in enumerate(config.stages) if stage.cache_features and transform(i) == transform(number)]
    loaders = [stage_loader(i, config) for i in alike]
    loaders += [stage_loader(i, config, held_out=True) for i in alike if watches_held_out(config.stages[i])]
    images = sorted(set().union(*(loader.image_paths() for loader in loaders)))
    line = StatusLine()

    def table() -> FeatureTable:
        return cached_features(
            config.model,
            vision_params,
            images,
            dataclasses.replace(config.prompt, transform=transform(number)),
            workdir / "features",
            on_progress=lambda done, total: line.show(f"  vision features {done:,}/{total:,} images"),
        )

    if jax.process_count() == 1:
        found = table()
    else:  # process 0 computes them on its own devices, with a tower of its own; the others read its files
        vision_params = jax.tree.map(whole, vision_params)
        with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices())):
            found = first_then_others(f"features of stage {number}", table)
    line.end()
    return found


def model_notes(config: RunConfig, results: list[StageResult]) -> dict[str, Any]:
    """What the finished model's manifest says of how it was made."""
    return {
        "name": config.name,
        "stages": [dataclasses.asdict(result) for result in results],
        "init": to_dict(config.init),
        "environment": environment(),
    }


def without_adapters(model: ModelConfig, params: dict) -> tuple[ModelConfig, dict]:
    """The model with its LoRA adapters added to the weights they adapt: what is saved, served and exported."""
    if not any(lora.rank for lora in model.lora):
        return model, params
    return without_lora(model), jax.jit(lambda tree: merge_all(tree, model))(params)


def evaluate(engine: Engine, config: RunConfig, directory: Path) -> dict[str, Any]:
    """Answers the test questions, sighted and blind; resumes from the answers already in `directory`."""
    sources = [source.path for source in config.stages[-1].data.sources] if config.stages else []
    return runner.run(
        engine,
        config.eval,
        workdir=directory,
        training=question_file.read_training_answers(sources) if sources else None,
        seed=config.seed,
    )


def finish(
    config: RunConfig,
    workdir: Path,
    store: Path | epath.Path,
    results: list[StageResult],
    scores: dict | None,
    started: float,
) -> dict[str, Any]:
    """Writes report.json and report.html, and shows what a person wants to see first."""
    made = report.write_report(
        workdir,
        results=scores,
        stages=[dataclasses.asdict(result) for result in results],
        metrics=read_metrics(workdir / "metrics.jsonl"),
        watched=watched(workdir),
        wall_seconds=round(time.perf_counter() - started, 1),
        peak_memory_bytes=peak_memory_bytes(),
        config=json.loads((store / "config.json").read_text()),
        devices=[device.device_kind for device in jax.devices()],
        facts=facts(workdir),
    )
    print("\n" + report.terminal_table(made))
    if made["samples"]:
        print("\n" + report.sample_blocks(made["samples"]))
    print(f"\nDone in {duration(made['wall_seconds'])}, peak memory {made['peak_memory_bytes'] / 1e9:.1f} GB.")
    print(f"Open {workdir / 'report.html'} in a browser, or talk to the model:")
    if is_address(store):
        print(f"  gcloud storage cp -r {store / 'model'} . && jaxvlm chat --run model")
    else:
        print(f"  jaxvlm chat --run {workdir}")
    return made


def watched(workdir: Path) -> list[dict[str, Any]]:
    """What the stages' `watch` found."""
    return [event for kind in ("held_out", "slim") for event in read_events(workdir / "metrics.jsonl", kind)]


def facts(workdir: Path) -> dict[str, str]:
    """What the report says beside its tables."""
    entries = read_metrics(workdir / "metrics.jsonl")
    share = (
        f"{entries[-1]['goodput']:.0%} of the time from the first start of training to its last step"
        if entries
        else "-"
    )
    return {"MFU is relative to": peak_flops()[1], "Useful steps took": share}


def run_config(workdir: Path) -> RunConfig:
    """The config of an earlier run. Raises `ConfigError` when `workdir` holds none."""
    path = workdir / "config.json"
    if not path.is_file():
        raise ConfigError(f"{workdir} holds no run (no config.json). Give the --workdir of a training run.")
    return build(RunConfig, json.loads(path.read_text()))


def show_scores(scores: dict[str, Any], path: Path) -> None:
    """Prints an evaluation's table and keeps its figures."""
    write_json(path, scores)
    print("\n" + report.terminal_table({"eval": scores["scores"]}) + f"\n\nWritten to {path}.")


def show_report(workdir: Path) -> None:
    """Prints a finished run's table and renders its page again."""
    path = workdir / "report.json"
    if not path.is_file():
        raise ConfigError(f"{workdir} has no report.json yet; it is written at the end of the run.")
    made = json.loads(path.read_text())
    metrics = read_metrics(workdir / "metrics.jsonl")
    page = report.render(made, metrics, to_dict(run_config(workdir)), watched(workdir))
    (workdir / "report.html").write_text(page)
    print(report.terminal_table(made) + f"\n\nWritten to {workdir / 'report.html'}.")


def peak_memory_bytes() -> int:
    """The process's largest resident size so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
