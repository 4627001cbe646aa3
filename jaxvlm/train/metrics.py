"""What a run reports while it trains: the one line a person watches, and metrics.jsonl that everything else reads."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from jaxvlm.config import ModelConfig, StageConfig, UserError
from jaxvlm.data.bad import broken_conversations, check_share
from jaxvlm.train.flops import batch_flops, peak_flops, trainable_shares
from jaxvlm.train.optimizer import schedule
from jaxvlm.train.state import TrainState, flat


class DivergedError(UserError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class StageResult:
    """What a stage did. Losses are token-weighted means: of the first step, and of the last ten steps logged."""

    name: str
    steps: int
    first_loss: float
    final_loss: float
    tokens_per_second: float


class Meter:
    """Times the steps of a stage and writes them down.

    `add` is called when a step has been dispatched and reads the numbers of the step before it, which bounds the steps
    in flight to two: enough to keep a device busy, and never enough for simulated devices to deadlock.
    """

    def __init__(
        self,
        stage: StageConfig,
        model: ModelConfig,
        state: TrainState,
        num_steps: int,
        start: int,
        path: Path,
        log_every: int,
        data: dict[str, Any],
    ):
        self.stage, self.model, self.num_steps = stage, model, num_steps
        self.path, self.log_every = path, log_every
        self.shares = trainable_shares(flat(state.trainable), flat(state.frozen))
        self.peak = peak_flops()[0] * jax.local_device_count()
        self.rate = schedule(stage.optimizer, num_steps)
        self.line = StatusLine()
        self.times: list[float] = []
        self.pending: tuple[int, dict, dict] | None = None
        self.sources, self.broken = data["sources"], dict.fromkeys(data["sources"], 0)
        for entry in read_metrics(path):
            if entry["stage"] == stage.name and entry["step"] <= start:
                self.broken |= entry.get("broken", {})
        self.file = open_metrics(path, stage.name, start, {"event": "data", "stage": stage.name} | data)
        self.clock = time.perf_counter()

    def add(self, step: int, batch: dict, metrics: dict) -> None:
        """Takes the step just dispatched; waits for the one before."""
        previous, self.pending = self.pending, (step, batch, metrics)
        if previous:
            self._record(*previous)

    def close(self) -> None:
        """Waits for the last step and ends the line."""
        if self.pending:
            self._record(*self.pending)
            self.pending = None
        self.file.close()
        self.line.end()

    def _record(self, step: int, batch: dict, metrics: dict) -> None:
        metrics = jax.device_get(metrics)
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        if not math.isfinite(metrics["loss"]):
            raise DivergedError(
                f"The loss of stage '{self.stage.name}' became {metrics['loss']} at step {step}. Lower "
                "optimizer.learning_rate, or set optimizer.clip_norm=1.0, and resume from an earlier checkpoint."
            )
        self.times.append(seconds)
        tokens = int((batch["segment_ids"] > 0).sum())
        images = int(batch["tile_mask"].sum()) if "tile_mask" in batch else 0
        flops = sum(batch_flops(self.model, batch, self.shares).values())
        entry = {
            "stage": self.stage.name,
            "step": step,
            "loss": float(metrics["loss"]),
            "grad_norm": float(metrics["grad_norm"]),
            "learning_rate": float(self.rate(step - 1)),
            "tokens": tokens,
            "supervised_tokens": int(metrics["supervised_tokens"]),
            "images": images,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "images_per_second": round(images / seconds, 2),
            "mfu": round(flops / seconds / self.peak, 6),
        }
        if len(self.sources) > 1:
            sums = zip(self.sources, metrics["source_loss"], metrics["source_tokens"], strict=True)
            entry["source_loss"] = {name: float(loss / count) for name, loss, count in sums if count}
        found = self._find_broken(batch)
        if any(self.broken.values()):
            entry["broken"] = {name: count for name, count in self.broken.items() if count}
        if found or step % self.log_every == 0 or step in (1, self.num_steps):
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()
        self._show(entry)
        if found:
            self._check_broken()

    def _find_broken(self, batch: dict) -> bool:
        """Counts the conversations of a batch that teach nothing because an image of theirs could not be decoded."""
        if self.stage.data.bad_records != "skip":
            return False  # the run has stopped
        counts = broken_conversations(batch, len(self.sources)).tolist()
        self.broken = {name: self.broken[name] + count for name, count in zip(self.sources, counts, strict=True)}
        return any(counts)

    def _check_broken(self) -> None:
        """Stops the run if a source loses too much, what was left out from the start included."""
        for name, one in self.sources.items():
            often = one["samples"] / max(one["records"], 1)  # a record is seen in this run
            before = round(one["lost"] * often)
            why = one["skipped"] | {
                "image that cannot be decoded, listed beside the skipped records": self.broken[name]
            }
            check_share(name, before + self.broken[name], before + one["samples"], self.stage.data, why)

    def _show(self, entry: dict[str, Any]) -> None:
        step = entry["step"]
        if len(self.times) == 1:
            tail = f"first step took {duration(self.times[0])}, compilation included"
        else:
            recent = float(np.median(self.times[1:][-20:]))
            tail = (
                f"{entry['tokens'] / recent:,.0f} tokens/s  {entry['images'] / recent:.1f} images/s  "
                f"MFU {entry['mfu']:.0%}  {duration(recent * (self.num_steps - step))} left"
            )
        self.line.show(f"  {self.stage.name} {step}/{self.num_steps}  loss {entry['loss']:.4f}  {tail}")

    def result(self) -> StageResult:
        """The stage's summary, from the metrics file: a resumed stage counts whole."""
        return stage_result(self.stage.name, read_metrics(self.path))


def stage_result(name: str, entries: list[dict]) -> StageResult:
    """Sums up a stage from its lines of metrics.jsonl; throughput leaves out the first step, which compiles."""
    mine = [entry for entry in entries if entry["stage"] == name]
    steady = mine[1:] or mine
    final = [entry["loss"] for entry in mine[-10:]]
    speed = sum(entry["tokens"] for entry in steady) / sum(entry["seconds"] for entry in steady)
    return StageResult(name, mine[-1]["step"], mine[0]["loss"], sum(final) / len(final), round(speed, 1))


class StatusLine:
    """A line that rewrites itself on a terminal, and is printed every ten seconds where there is none."""

    def __init__(self, out: TextIO | None = None, every_seconds: float = 10.0):
        self.out = out or sys.stdout
        self.live = self.out.isatty()
        self.every, self.shown, self.text, self.width = every_seconds, -math.inf, "", 0

    def show(self, text: str) -> None:
        self.text = text
        if self.live:
            self.out.write("\r" + text.ljust(self.width))
            self.width = len(text)
        elif time.monotonic() - self.shown >= self.every:
            self._print()
        self.out.flush()

    def end(self) -> None:
        """Leaves the last text standing."""
        if self.live and self.text:
            self.out.write("\n")
        elif self.text:
            self._print()
        self.out.flush()
        self.text, self.width = "", 0

    def _print(self) -> None:
        self.out.write(self.text + "\n")
        self.text, self.shown = "", time.monotonic()


def duration(seconds: float) -> str:
    """'45 s', '3 min 05 s', '2 h 10 min'."""
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def read_metrics(path: Path) -> list[dict]:
    """The steps in a metrics.jsonl; a last line torn by a kill is left out."""
    return [entry for entry in _lines(path) if "event" not in entry]


def read_events(path: Path) -> list[dict]:
    """What else is in a metrics.jsonl: of each stage `Loader.stats()`, as event 'data'."""
    return [entry for entry in _lines(path) if "event" in entry]


def _lines(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def open_metrics(path: Path, stage: str, resume_step: int, event: dict) -> TextIO:
    """Opens metrics.jsonl for appending, with `event` in place of the stage's earlier ones.

    What a killed run wrote after its last checkpoint is dropped first.
    """
    kept = [e for e in _lines(path) if e["stage"] != stage or ("event" not in e and e["step"] <= resume_step)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in [*kept, event]))
    return path.open("a")
