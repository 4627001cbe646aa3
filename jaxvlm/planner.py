"""`jaxvlm plan`: what a run will need and cost on devices that need not be there; `--dry_run` for those that are.

The command line starts a process of its own for each target, as XLA's compilers read their environment once, at start.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxvlm.config import ConfigError, RunConfig, build, to_dict
from jaxvlm.job import peak_memory_bytes
from jaxvlm.parallel.mesh import make_mesh
from jaxvlm.parallel.plan_targets import (
    GIB,
    Chip,
    Target,
    chip_of,
    environment,
    link_seconds,
    parse_target,
    require_compiler,
    topology_devices,
)
from jaxvlm.train import plan
from jaxvlm.train.flops import peak_flops

MOST_ROWS = 64  # rows a device that the search tries
REMATS = ("none", "dots", "full")  # from the one that recomputes least

USAGE = """jaxvlm plan CONFIG --target TARGET [--config.KEY=VALUE ...]

Compiles the train step of every stage for devices that need not be there, and says whether it fits and what it costs:
  jaxvlm plan configs/llava15.py:llm=vicuna-7b --target v5e-256
  jaxvlm plan configs/llava15.py --target h100-8 --stage instruct --config.stages[1].batch_size=64 --search
Neither weights nor data are read. Targets: v5e-256, v5p-64, v6e-16, 2xv5e-16 (two slices), a100-8, h100-64, ...
"""


# ------------------------------------------------------------------------------------------------------------- the verb


def main(load_config: Callable[[str, Sequence[str]], RunConfig], argv: Sequence[str]) -> int:
    """The verb. Returns 0 if every stage fits, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="jaxvlm plan", usage=USAGE, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--target", required=True, help="KIND-CHIPS, as in v5e-256")
    parser.add_argument("--stage", action="append", default=[], metavar="NAME", help="this stage alone (repeatable)")
    parser.add_argument(
        "--search", action="store_true", help="also the largest batch of each remat policy (more compiles)"
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak to reckon hours with (default 0.4)")
    parser.add_argument(
        "--samples", type=int, default=0, help="samples of an epoch, where the file's name does not say"
    )
    parser.add_argument("--tokens_per_sample", type=int, default=900, help="where rows are packed (default 900)")
    parser.add_argument(
        "--tiles_per_row", type=int, default=0, help="tile slots, where the config leaves them to the data"
    )
    parser.add_argument("--out", metavar="FILE", help="write everything as JSON")
    options, overrides = parser.parse_known_args(argv)
    if strange := [arg for arg in overrides if not arg.startswith("--config.")]:
        raise ConfigError(f"Unknown argument '{strange[0]}'. `jaxvlm plan --help` lists what there is.")
    assumed = plan.Assumptions(options.mfu, options.tokens_per_sample, options.tiles_per_row, options.samples)
    config = load_config(options.config, overrides)
    report = plan_elsewhere(config, options.target, assumed, options.stage, options.search)
    print(text(report))
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nWritten to {options.out}.")
    return 0 if all(stage["fits"] for stage in report["stages"]) else 1


def plan_elsewhere(
    config: RunConfig, target: str, assumed: plan.Assumptions, stages: Sequence[str] = (), search: bool = False
) -> dict[str, Any]:
    """The report for a target, made in a process of its own.

    Raises `ConfigError` for an unknown target or stage, a compiler that is not installed, or a mesh that does not divide.
    """
    parsed = parse_target(target)
    chosen_stages(config, stages)
    require_compiler(parsed)
    request = {"config": to_dict(config), "target": target, "assumed": assumed, "stages": stages, "search": search}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "request.json", Path(folder) / "report.json"]
        paths[0].write_text(json.dumps(request))
        command = [sys.executable, "-m", "jaxvlm.planner", *map(str, paths)]
        # The compilers write to stderr what they would like a machine with devices to know.
        done = subprocess.run(
            command, env=environment(parsed, dict(os.environ)), stderr=subprocess.PIPE, text=True, check=False
        )
        if not paths[1].is_file():
            raise RuntimeError(f"The compiler's process ended with code {done.returncode}:\n{done.stderr[-4000:]}")
        report = json.loads(paths[1].read_text())
    if "error" in report:
        raise ConfigError(report["error"])
    return report


def child(request_path: str, report_path: str) -> None:
    """What the process of a target does: reads the request, writes the report."""
    request = json.loads(Path(request_path).read_text())
    config, target = build(RunConfig, request["config"]), parse_target(request["target"])
    try:
        devices = topology_devices(target)
        assumed = plan.Assumptions(*request["assumed"])
        report = plan_run(config, target, devices, assumed, request["stages"], request["search"])
    except ConfigError as error:
        report = {"error": str(error)}
    Path(report_path).write_text(json.dumps(report))


def dry_run(config: RunConfig) -> dict[str, Any]:
    """The report for the devices of this machine, compiled with their own compiler; nothing is loaded or trained."""
    devices = jax.devices()
    chip = chip_of(devices[0])
    if chip is None:  # a CPU: its devices share the machine's memory
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
        unknown = float("inf")
        chip = Chip(devices[0].device_kind, peak_flops()[0], memory, unknown, unknown, unknown, 0.9, peak_flops()[1])
    return plan_run(config, Target("this machine", chip, len(devices)), devices, plan.Assumptions())


# ----------------------------------------------------------------------------------------------------------- the report


def chosen_stages(config: RunConfig, names: Sequence[str]) -> list[int]:
    """The numbers of the named stages, or of all. Raises `ConfigError` for a name that the config has not."""
    known = [stage.name for stage in config.stages]
    if missing := [name for name in names if name not in known]:
        raise ConfigError(f"The config has no stage '{missing[0]}'; it has: {', '.join(known)}.")
    return [number for number, name in enumerate(known) if not names or name in names]


def plan_run(
    config: RunConfig,
    target: Target,
    devices: list[Any],
    assumed: plan.Assumptions,
    stages: Sequence[str] = (),
    search: bool = False,
) -> dict[str, Any]:
    """Compiles the chosen stages for `devices` and says what they need: a JSON-able report."""
    made = []
    for number in chosen_stages(config, stages):
        sizes = plan.fitted_mesh(config.mesh, config.stages[number], target.devices, target.slices)
        mesh = make_mesh(sizes, devices)
        entry = plan_stage(config, number, target, mesh, assumed)
        if search:
            entry["search"] = largest_batches(config, number, target, mesh, assumed)
        made.append(entry)
    chip = target.chip._asdict()
    return {"config": config.name, "target": target.name, "devices": target.devices, "chip": chip, "stages": made} | {
        "assumptions": assumed._asdict(),
        "jax": jax.__version__,
        "host_memory": peak_memory_bytes(),
    }


def plan_stage(config: RunConfig, number: int, target: Target, mesh: Mesh, assumed: plan.Assumptions) -> dict[str, Any]:
    """One stage's entry of the report."""
    stage = config.stages[number]
    tiles, tiles_from = plan.tile_slots(config, stage, assumed)
    entry: dict[str, Any] = {
        "stage": stage.name,
        "mesh": dict(mesh.shape),
        "rows": stage.batch_size,
        "rows_per_device": stage.batch_size / target.devices,
        "accumulate": stage.accumulate,
        "length": plan.stage_prompt(config, stage).length,
        "remat": config.model.remat,
        "tiles_per_row": tiles,
        "tiles_from": tiles_from,
        "limit": int(target.chip.memory * target.chip.usable),
    }
    start = time.perf_counter()
    try:
        compiled, state, hlo = plan.compile_step(config, stage, mesh, tiles, devices_platform(target))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return entry | {"fits": False, "refused": str(error).splitlines()[0][:300]}
    entry["bytes"] = plan.memory(compiled, state, plan.activations(config, stage, state, mesh, tiles))
    entry["fits"] = entry["bytes"]["peak"] <= entry["limit"]
    entry["compile_seconds"] = round(time.perf_counter() - start, 1)
    entry["parameters"] = plan.parameters(state)
    entry["flops"] = plan.step_flops(config, stage, state, tiles, assumed.tokens_per_sample)
    tokens = stage.batch_size // stage.accumulate * entry["length"]
    entry["sent"], exchanged = {}, plan.exchanged(hlo, mesh, tokens)
    for each in exchanged:
        kinds = entry["sent"].setdefault("+".join(each.axes), {})
        kinds[each.kind] = kinds.get(each.kind, 0) + each.times * each.wire_bytes
    return entry | times(entry, config, number, target, assumed, link_seconds(target, mesh, exchanged))


def devices_platform(target: Target) -> str:
    """The platform to lower for: the topology's, or that of this machine."""
    return jax.default_backend() if target.name == "this machine" else target.platform


def times(entry: dict, config: RunConfig, number: int, target: Target, assumed: plan.Assumptions, links: dict) -> dict:
    """Lower bounds of a step's seconds, and hours at the assumed MFU."""
    chip, found = target.chip, entry["bytes"]
    flops = sum(entry["flops"].values())
    bounds = {
        "compute": flops / target.devices / chip.flops,
        "memory": (found["arguments"] + found["outputs"]) / chip.bandwidth,
    }
    bounds |= {f"links over {axes}": seconds for axes, seconds in links.items()}
    steps, samples, samples_from = plan.stage_steps(config, config.stages[number], assumed)
    step = max(bounds["compute"] / assumed.mfu, *bounds.values())
    hours = steps * step / 3600
    made = {"bounds": bounds, "step_seconds": step, "steps": steps, "samples": samples, "samples_from": samples_from}
    return made | {
        "samples_per_second": samples / steps / step if steps else 0.0,
        "hours": hours,
        "chip_hours": hours * target.devices,
    }


def largest_batches(
    config: RunConfig, number: int, target: Target, mesh: Mesh, assumed: plan.Assumptions
) -> dict[str, int]:
    """For each remat policy the largest number of rows for data x fsdp that fits, in powers of two; 0 where none does."""
    shards, found = mesh.shape["data"] * mesh.shape["fsdp"], {}
    for remat in REMATS:
        rows, found[remat] = 1, 0
        while rows <= MOST_ROWS:
            stage = dataclasses.replace(config.stages[number], batch_size=rows * shards, accumulate=1)
            stages = (*config.stages[:number], stage, *config.stages[number + 1 :])
            changed = dataclasses.replace(config, stages=stages, model=dataclasses.replace(config.model, remat=remat))
            if not plan_stage(changed, number, target, mesh, assumed)["fits"]:
                break
            found[remat], rows = rows, rows * 2
    return found


# ------------------------------------------------------------------------------------------------------------- as text


def text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    chip, assumed = report["chip"], report["assumptions"]
    lines = [
        f"{report['config']} on {report['target']}: {report['devices']} devices, {chip['memory'] / GIB:.1f} GiB each"
    ]
    for stage in report["stages"]:
        lines += ["", *_stage_lines(stage, report)]
    lines += [
        "",
        f"Compiler's word (jax {report['jax']}): bytes of temporaries and peak, and the bytes sent. Exact by shape: parameters, "
        "state. Arithmetic: FLOPs of rows without padding and lower bounds, from data sheets, with all wires of a chip in use "
        f"and everything overlapped. Estimates: MFU {assumed['mfu']:.0%}, samples, activations, and what is marked so. "
        "Attention is the code's present one: on TPUs a kernel that skips what no query sees, elsewhere XLA's, dense over blocks "
        "of queries, whose wasted half of a causal mask is in the MFU.",
    ]
    return "\n".join(lines)


def _stage_lines(stage: dict[str, Any], report: dict[str, Any]) -> list[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in stage["mesh"].items() if size > 1) or "one device"
    lines = [
        f"Stage {stage['stage']}: {stage['rows']} rows of {stage['length']} tokens, {stage['tiles_per_row']} tile(s) a row "
        f"({stage['tiles_from']}), remat {stage['remat']}, mesh {mesh}"
    ]
    limit = stage["limit"]
    if "refused" in stage:
        return [*lines, f"  DOES NOT FIT: {stage['refused']}", *_search_lines(stage)]
    parts, found, flops = stage["parameters"], stage["bytes"], stage["flops"]
    total, moves = (sum(part[key] for part in parts.values()) for key in ("all", "trainable"))
    kinds = ("trainable", "frozen", "optimizer", "batch", "temporaries", "peak")
    sent = {axes: sum(by_kind.values()) for axes, by_kind in stage["sent"].items()}
    named = "; ".join(
        f"{axes} {size / 1e9:.2f} GB ({', '.join(f'{kind} {n / 1e9:.2f}' for kind, n in stage['sent'][axes].items())})"
        for axes, size in sent.items()
    )
    bounds = ", ".join(f"{name} {seconds:.3f}" for name, seconds in stage["bounds"].items())
    lines += [
        f"  parameters  {total / 1e6:,.1f} M, {moves / total:.1%} train ("
        + ", ".join(f"{name} {part['all'] / 1e6:,.1f} M" for name, part in parts.items())
        + ")",
        "  bytes/device "
        + ", ".join(f"{kind} {found[kind] / GIB:.2f}" for kind in kinds)
        + f" GiB; of temporaries about {found['activations'] / GIB:.2f} are activations kept for backward",
        f"  {'fits' if stage['fits'] else 'DOES NOT FIT'}: peak {found['peak'] / GIB:.2f} of {limit / GIB:.2f} GiB usable "
        f"({1 - found['peak'] / limit:.0%} left)",
        f"  model FLOPs {sum(flops.values()):.3g} a step ("
        + ", ".join(f"{name} {value / sum(flops.values()):.1%}" for name, value in flops.items())
        + ")",
        f"  sent/device {named or 'nothing'}",
        f"  step, s     at least {max(stage['bounds'].values()):.3f} ({bounds}); {stage['step_seconds']:.3f} reckoned",
    ]
    if stage["steps"]:
        lines.append(
            f"  run         {stage['samples']:,} samples ({stage['samples_from']}), {stage['steps']:,} steps, "
            f"{stage['samples_per_second']:,.1f} samples/s: {stage['hours']:.2f} h, {stage['chip_hours']:,.1f} chip-hours"
        )
    else:
        lines.append(f"  run         samples {stage['samples_from']}")
    lines.append(f"  compiled in {stage['compile_seconds']} s")
    return lines + _search_lines(stage)


def _search_lines(stage: dict[str, Any]) -> list[str]:
    found = stage.get("search", {})
    lines = [f"  remat {remat}: up to {rows} rows for each of data x fsdp" for remat, rows in found.items()]
    lightest = next((remat for remat in REMATS if found.get(remat)), None)
    return lines + ([f"  lightest remat policy that fits: {lightest or 'none does'}"] if found else [])


if __name__ == "__main__":
    child(*sys.argv[1:])
