"""The end of a run: report.json, the table in the terminal, and the self-contained page report.html."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxvlm.evals.page import render

PACKAGES = (
    "jaxvlm",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "tokenizers",
    "pillow",
)


def write_report(
    workdir: str | Path,
    *,
    results: dict | None,
    stages: Sequence[dict],
    metrics: Sequence[dict],
    watched: Sequence[dict] = (),
    wall_seconds: float,
    peak_memory_bytes: int,
    config: dict,
    devices: Sequence[str] = (),
    facts: dict[str, str] | None = None,
) -> dict:
    """Writes `workdir/report.json` and `workdir/report.html` and returns the report.

    Args:
        results: what `evals.runner.run` returned, or None when nothing was evaluated.
        stages: per stage, in order, at least name, steps, first_loss, final_loss and tokens_per_second.
        metrics: the lines of metrics.jsonl: stage, step, loss, and what else is known of a step.
        watched: the events 'held_out' and 'slim' of metrics.jsonl: what the stages evaluated while they trained.
        config: the run's resolved config as plain values (`config.to_dict`); its name and description head the page.
        devices: what the run ran on, in words.
        facts: more lines for the page's summary, e.g. {"Parameters": "135.1 M"}.
    """
    results = results or {"scores": {}, "samples": [], "info": {}}
    report = {
        "name": config.get("name", ""),
        "description": config.get("description", ""),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "eval": results["scores"],
        "eval_info": results["info"],
        "samples": results["samples"],
        "stages": list(stages),
        "wall_seconds": wall_seconds,
        "peak_memory_bytes": peak_memory_bytes,
        "devices": list(devices),
        "facts": facts or {},
        "versions": versions(),
    }
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    _replace(workdir / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    _replace(workdir / "report.html", render(report, metrics, config, watched))
    return report


def _replace(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old one or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def terminal_table(report: dict) -> str:
    """Accuracies by category with 95 % intervals, as plain text."""
    if not report["eval"]:
        return "Nothing was evaluated."
    rows = [("", "n", "sighted", "95 % interval", "blind", "majority", "chance")]
    for name, entry in report["eval"].items():
        low, high = entry["sighted_interval"]
        rows.append(
            (
                name,
                str(entry["n"]),
                percent(entry["sighted"]),
                f"{percent(low)} to {percent(high)}",
                percent(entry["blind"]),
                percent(entry["majority"]),
                percent(entry["chance"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)])
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def sample_blocks(samples: Sequence[dict]) -> str:
    """Question, answer, truth and verdict of each sample, as plain text."""
    blocks = []
    for sample in samples:
        verdict = "right" if sample["right"] else "wrong"
        blocks.append(
            f"  image   {sample['image'] or 'none'}\n"
            f"  Q       {one_line(sample['question'])}\n"
            f"  model   {one_line(sample['prediction']) or '(nothing)'}\n"
            f"  truth   {one_line(sample['answer'])}  ({verdict})"
        )
    return "\n\n".join(blocks)


def one_line(text: Any) -> str:
    """The text on one line, shortened to what a terminal row holds."""
    text = " ".join(str(text).split())
    return text if len(text) <= 90 else text[:87] + "..."


def percent(value: float | None) -> str:
    """0.785 as '78.5 %'; None as a dash."""
    return "-" if value is None else f"{100 * value:.1f} %"
