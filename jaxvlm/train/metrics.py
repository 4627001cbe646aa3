"""What a run reports while it trains: the one line a person watches, and metrics.jsonl that everything else reads."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from jaxvlm.config import LogConfig, ModelConfig, StageConfig, UserError
from jaxvlm.data.bad import broken_conversations, check_share
from jaxvlm.progress import StatusLine, duration
from jaxvlm.train.flops import batch_flops, peak_flops, trainable_shares
from jaxvlm.train.optimizer import schedule
from jaxvlm.train.state import TrainState, flat
from jaxvlm.train.writers import open_writers


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
        log: LogConfig,
        data: dict[str, Any],
    ):
        self.stage, self.model, self.num_steps = stage, model, num_steps
        self.path, self.log, self.step = path, log, start
        self.shares = trainable_shares(flat(state.trainable), flat(state.frozen))
        self.peak = peak_flops()[0] * jax.local_device_count()
        self.rate = schedule(stage.optimizer, num_steps)
        self.line = StatusLine()
        self.times: list[float] = []
        self.pending: tuple[int, dict, dict] | None = None
        self.sources, self.broken = data["sources"], dict.fromkeys(data["sources"], 0)
        self.file = open_metrics(path, stage.name, start, {"event": "data", "stage": stage.name} | data)
        earlier = read_metrics(path)
        mine = [entry for entry in earlier if entry["stage"] == stage.name]
        for entry in mine:
            self.broken |= entry.get("broken", {})
        others = [[e for e in earlier if e["stage"] == name] for name in {e["stage"] for e in earlier} - {stage.name}]
        self.useful_before = sum(useful_seconds(stage[-1]["step"], stage[-100:]) for stage in others)
        self.recent = deque(mine, maxlen=100)
        self.first_start = next((event["time"] for event in read_events(path, "start")), time.time())
        self.writers = open_writers(log.to, path.parent, stage.name, start)
        self.trace: Path | None = None  # the folder of a trace under way
        self.waited, self.compiled, self.clock = 0.0, compile_seconds(), time.perf_counter()

    def batches(self, batches: Iterable[dict]) -> Iterator[tuple[int, dict]]:
        """(step, batch) of each of `batches`. Measures what the device waits for them, and starts a trace."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            if (batch := next(iterator, None)) is None:
                return
            # While the step before is still at work, waiting costs nothing.
            if self.pending is None or self.pending[2]["loss"].is_ready():
                self.waited += time.perf_counter() - asked
            self.step += 1
            if self.log.profile_steps and self.step == self.log.profile_steps[0]:
                self.trace = self.path.parent / "profile" / self.stage.name
                jax.profiler.start_trace(str(self.trace))
            yield self.step, batch

    def add(self, step: int, batch: dict, metrics: dict) -> None:
        """Takes the step just dispatched; waits for the one before."""
        previous, self.pending = self.pending, (step, batch, metrics)
        if previous:
            self._record(*previous)
        if self.trace and step >= self.log.profile_steps[1]:
            self._finish()

    def evaluate(self, kind: str, step: int, measure: Callable[[], dict]) -> None:
        """Writes down and shows what `measure` finds after `step`, whose time and compilation no step's numbers hold."""
        self._finish_step()
        found = measure()
        self.file.write(json.dumps({"event": kind, "stage": self.stage.name, "step": step} | found) + "\n")
        self.file.flush()
        for write, _ in self.writers:
            write(step, {kind: found})
        self.line.end()
        print(f"  {self.stage.name} {step}/{self.num_steps}  {in_words(kind, found)}", flush=True)
        self.compiled, self.clock = compile_seconds(), time.perf_counter()

    def has(self, kind: str, step: int) -> bool:
        """Whether an event of this kind is written down for `step`; only the first process knows."""
        events = [] if jax.process_index() else read_events(self.path, kind)
        return any((event["stage"], event["step"]) == (self.stage.name, step) for event in events)

    def close(self) -> None:
        """Waits for the last step and ends the line."""
        self._finish()
        for _, close in self.writers:
            close()
        self.file.close()
        self.line.end()

    def _finish(self) -> None:
        """Waits for the step in flight, and ends a trace with it."""
        self._finish_step()
        if self.trace:
            jax.profiler.stop_trace()
            print(
                f"\n  Trace of steps {self.log.profile_steps[0]} to {self.step} written to {self.trace}. To look at it: "
                f"pip install xprof, then: xprof --logdir {self.trace}",
                flush=True,
            )
            self.trace = None

    def _finish_step(self) -> None:
        if self.pending:
            pending, self.pending = self.pending, None
            self._record(*pending)

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
        waited, self.waited = self.waited, 0.0
        compiled, self.compiled = compile_seconds() - self.compiled, compile_seconds()
        tokens, images = int(metrics["tokens"]), int(metrics["images"])
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
            "fill": round(float((batch["segment_ids"] > 0).mean()), 4),
            "data_wait_share": round(min(waited / seconds, 1.0), 4),
            "time": round(time.time(), 2),
        }
        if groups := self.stage.optimizer.learning_rate_scales:
            entry["learning_rates"] = {pattern: entry["learning_rate"] * scale for pattern, scale in groups}
        if compiled:
            entry["compile_seconds"] = round(compiled, 3)
        if peak := peak_memory():
            entry["peak_memory_bytes"] = peak
        self.recent.append(entry)
        useful = self.useful_before + useful_seconds(step, self.recent)
        entry["goodput"] = round(min(useful / max(entry["time"] - self.first_start, 1e-9), 1.0), 4)
        if len(self.sources) > 1:
            sums = zip(self.sources, metrics["source_loss"], metrics["source_tokens"], strict=True)
            entry["source_loss"] = {name: float(loss / count) for name, loss, count in sums if count}
        found = self._find_broken(batch)
        if any(self.broken.values()):
            entry["broken"] = {name: count for name, count in self.broken.items() if count}
        if found or step % self.log.every_steps == 0 or step in (1, self.num_steps):
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()
            for write, _ in self.writers:
                write(step, entry)
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
            recent, share = float(np.median(self.times[1:][-20:])), entry["data_wait_share"]
            waits = f"{share:.0%} waiting for data  " if share > 0.1 else ""
            tail = (
                f"{entry['tokens'] / recent:,.0f} tokens/s  {entry['images'] / recent:.1f} images/s  "
                f"MFU {entry['mfu']:.0%}  {waits}{duration(recent * (self.num_steps - step))} left"
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


def read_metrics(path: Path) -> list[dict]:
    """The steps in a metrics.jsonl; a last line torn by a kill is left out."""
    return [entry for entry in _lines(path) if "event" not in entry]


def read_events(path: Path, kind: str = "data") -> list[dict]:
    """What else is in a metrics.jsonl: 'data', of each stage `Loader.stats()`; 'start', the time of every start; 'held_out' and
    'slim', what `train.watch` found after a step.
    """
    return [entry for entry in _lines(path) if entry.get("event") == kind]


def in_words(kind: str, event: dict) -> str:
    """An event of `train.watch` on one line."""
    if kind == "held_out":
        values = {name: f"{loss:.4f}" for name, loss in event["loss"].items()}
        head, tail = "held-out loss", f"{event['tokens']['all']:,} tokens"
    else:
        values = {name: f"{score:.0%}" for name, score in event["scores"].items()}
        head, tail = "right", f"{event['n']:,} questions"
    everything = values.pop("all")
    parts = f" ({', '.join(f'{name} {value}' for name, value in values.items())})" if len(values) > 1 else ""
    return f"{head} {everything}{parts} on {tail}, in {event['seconds']:.1f} s"


def useful_seconds(steps: int, recent: Iterable[dict]) -> float:
    """What `steps` steps take on a device that does nothing else: as many times the median of `recent` records.

    All steps of a stage are the same work, as shapes are static. What waiting for data and compiling took is left out.
    """
    alone = [e["seconds"] * (1 - e.get("data_wait_share", 0)) - e.get("compile_seconds", 0) for e in recent]
    return steps * max(statistics.median_low(alone), 0.0)


@cache
def _compile_clock() -> list[float]:
    """The seconds that this process spent in XLA's compiler, or in reading its work from the cache, since the first call."""
    total = [0.0]

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            total[0] += seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    return total


def compile_seconds() -> float:
    """Seconds of compilation in this process, from the first call on; a program found in the cache costs little."""
    return _compile_clock()[0]


def peak_memory() -> int | None:
    """The most bytes in use on one local device so far; None where the backend (CPU) does not count them."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max((each["peak_bytes_in_use"] for each in stats if each and "peak_bytes_in_use" in each), default=None)


def _lines(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def open_metrics(path: Path, stage: str, resume_step: int, event: dict) -> TextIO:
    """Opens metrics.jsonl for appending, with `event` in place of the stage's earlier ones, and the time of this start.

    Only the job's first process writes; the others get a file that keeps nothing.
    What a killed run wrote after its last checkpoint is dropped first; the times of earlier starts are kept.
    """
    if jax.process_index():
        return open(os.devnull, "w")

    def holds(entry: dict) -> bool:
        return entry["event"] == "start" if entry.get("event") in ("data", "start") else entry["step"] <= resume_step

    kept = [entry for entry in _lines(path) if entry["stage"] != stage or holds(entry)]
    started = {"event": "start", "stage": stage, "step": resume_step, "time": round(time.time(), 2)}
    path.write_text("".join(json.dumps(entry) + "\n" for entry in [*kept, event, started]))
    return path.open("a")
