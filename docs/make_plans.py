"""Writes docs/plans.md and the tables of docs/scaling.md from docs/plans.json, making what is missing there (`make plans`).

One report takes half a minute (GPU) to two minutes (TPU); each is kept as soon as it is made. Delete docs/plans.json to
make all anew. Given words, it makes what has one of them in its name: `make plans ARGS='h100-8'`; given none of any, the tables.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

from jaxvlm.main import load_config
from jaxvlm.planner import plan_elsewhere
from jaxvlm.train.plan import Assumptions

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "plans.json"
GIB = 2**30

MODELS = {
    "LLaVA-1.5-7B": "llava15.py:llm=vicuna-7b",
    "LLaVA-1.5-13B": "llava15.py:llm=vicuna-13b",
    "Prism-DINOSigLIP-7B": "prismatic.py:model=prism-dinosiglip+7b",
}
TARGETS = ("a100-40g-8", "a100-8", "a100-64", "h100-8", "h100-64", "v6e-16", "v5p-64", "v5e-256", "2xv5e-16")
# Weak scaling: four rows a device whatever their number; FSDP over all, or inside a domain with data parallel outside it.
ROWS = 4
SCALING = [("h100", n, 1) for n in (8, 16, 64, 256, 1024)] + [("h100", n, n // 8) for n in (16, 64, 256, 1024)]
SCALING += [("v5p", 8, 1), ("v5p", 64, 1), ("v5p", 512, 1)]


def main(argv: list[str]) -> None:
    kept = read()
    jobs = [(f"{name} | {target}", MODELS[name], target, ()) for target in TARGETS for name in MODELS]
    for chip, count, data in SCALING:
        mesh = [f"--config.stages[1].batch_size={ROWS * count}", f"--config.mesh.data={data}"]
        jobs.append((f"scaling | {chip}-{count} | {data}", MODELS["LLaVA-1.5-7B"], f"{chip}-{count}", mesh))
    jobs.sort(key=lambda job: job[2].partition("v")[1])  # GPUs first: their compiler is the quicker one
    for key, spec, target, overrides in jobs:
        if key in kept or (argv and not any(word in key for word in argv)):
            continue
        start = time.perf_counter()
        report = plan_elsewhere(
            load_config(str(ROOT / "configs" / spec), overrides), target, Assumptions(), ("instruct",)
        )
        seconds = round(time.perf_counter() - start, 1)
        kept = read() | {key: report | {"seconds": seconds}}  # another one may be at it too
        print(f"{key}: {seconds} s", flush=True)
        KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    write(ROOT / "docs" / "plans.md", "plans", plans_table(kept))
    write(ROOT / "docs" / "scaling.md", "scaling", scaling_table(kept))


def read() -> dict:
    return json.loads(KEPT.read_text()) if KEPT.is_file() else {}


def write(path: Path, name: str, table: str) -> None:
    """Puts a table between the page's markers."""
    marked = re.compile(rf"(<!-- {name} -->\n).*(\n<!-- end -->)", re.S)
    path.write_text(marked.sub(lambda found: found[1] + table + found[2], path.read_text()))


def plans_table(kept: dict) -> str:
    lines = [
        "| model, stage 2 | target | mesh | rows a device | state | temporaries (activations) | peak, of usable (GiB) | left "
        "| sent a step (GB) | at least (s) | at 40 % (s) | samples/s | hours | chip-hours | compile (s) | compiler uses (GiB) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        for target in TARGETS:
            if (report := kept.get(f"{name} | {target}")) is None:
                continue
            (s,) = report["stages"]
            mesh = " x ".join(f"{axis} {size}" for axis, size in s["mesh"].items() if size > 1)
            if "refused" in s:
                cells = [name, target, mesh, f"{s['rows_per_device']:g}", f"does not fit: {refusal(s['refused'])}"]
                lines.append("| " + " | ".join([*cells, *[""] * 11]) + " |")
                continue
            found = s["bytes"]
            state = sum(found[kind] for kind in ("trainable", "frozen", "optimizer"))
            cells = [
                name,
                target,
                mesh,
                f"{s['rows_per_device']:g}",
                f"{state / GIB:.2f}",
                f"{found['temporaries'] / GIB:.2f} ({found['activations'] / GIB:.2f})",
                f"{found['peak'] / GIB:.1f} of {s['limit'] / GIB:.1f}",
                f"{1 - found['peak'] / s['limit']:.0%}" + ("" if s["fits"] else " (does not fit)"),
                f"{sent(s):.1f}",
                f"{max(s['bounds'].values()):.3f} ({max(s['bounds'], key=s['bounds'].get)})",
                f"{s['step_seconds']:.2f}",
                f"{s['samples_per_second']:.0f}",
                f"{s['hours']:.2f}",
                f"{s['chip_hours']:.0f}",
                f"{s['compile_seconds']:.0f}",
                f"{report['host_memory'] / GIB:.1f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def refusal(said: str) -> str:
    """The sizes in XLA:TPU's sentence, or the sentence."""
    sizes = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", said)
    return f"{sizes[1]} of {sizes[2]} GiB" if sizes else said[:80]


def scaling_table(kept: dict) -> str:
    lines = [
        "| chips | mesh | compute (s) | links (s) | sent a chip (GB) | efficiency, overlapped | not overlapped | peak (GiB) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for chip, count, data in SCALING:
        if (report := kept.get(f"scaling | {chip}-{count} | {data}")) is None:
            continue
        (s,) = report["stages"]
        compute = s["bounds"]["compute"] / report["assumptions"]["mfu"]
        links = sum(seconds for name, seconds in s["bounds"].items() if name.startswith("links"))
        mesh = " x ".join(f"{axis} {size}" for axis, size in s["mesh"].items() if size > 1)
        cells = [f"{chip}-{count}", mesh, f"{compute:.3f}", f"{links:.3f}", f"{sent(s):.1f}"]
        cells += [f"{compute / max(compute, links):.0%}", f"{compute / (compute + links):.0%}"]
        lines.append("| " + " | ".join([*cells, f"{s['bytes']['peak'] / GIB:.1f}"]) + " |")
    return "\n".join(lines)


def sent(stage: dict) -> float:
    """GB that one device sends in a step."""
    return sum(size for kinds in stage["sent"].values() for size in kinds.values()) / 1e9


if __name__ == "__main__":
    main(sys.argv[1:])
