"""What a run tells while it trains: times by a clock of the test's own, writers read back by other code."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxvlm import main
from jaxvlm.config import ConfigError, LogConfig, OptimizerConfig, StageConfig
from jaxvlm.train import metrics
from jaxvlm.train.metrics import Meter, compile_seconds, read_events, read_metrics, stage_result
from jaxvlm.train.writers import open_writers, scalars

BATCH = {
    "segment_ids": np.array([[1, 1, 2, 0]]),
    "positions": np.array([[0, 1, 0, 0]]),
    "visual_index": np.full((1, 4), -1),
    "loss_weights": np.ones((1, 4)),
}
DATA = {"sources": {"a": {}}}


class Loss(float):
    """A step's loss that is there at once, or not yet."""

    ready = True

    def is_ready(self):
        return self.ready


def result(ready=True):
    loss = Loss(1.0)
    loss.ready = ready
    return {"loss": loss, "grad_norm": 1.0, "supervised_tokens": 4, "tokens": 3, "images": 0}


def meter(path, start=0, num_steps=10, groups=(), **log):
    optimizer = OptimizerConfig(learning_rate=0.5, schedule="constant", warmup_ratio=0.0, learning_rate_scales=groups)
    stage = StageConfig(name="one", optimizer=optimizer)
    state = SimpleNamespace(
        trainable={"connector": {"kernel": np.ones((2, 2))}}, frozen={"llm": {"kernel": np.ones(3)}}
    )
    return Meter(stage, tiny.model_config(), state, num_steps, start, path / "metrics.jsonl", LogConfig(**log), DATA)


@pytest.fixture
def clock(monkeypatch):
    metrics.peak_flops()  # measures with a real clock, once
    now = SimpleNamespace(time=1000.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: now.time, time=lambda: now.time))
    return now


def test_goodput_counts_lost_steps_and_pauses_over_restarts(tmp_path, clock):
    """Ten steps of 2 s are 20 s of use. They took 6 steps, 3 that a kill lost, 75 s of pause, and 4 more steps."""
    for start, stop in ((0, 9), (6, 10)):
        one = meter(tmp_path, start)
        for step in range(start + 1, stop + 1):
            one.add(step, BATCH, result())  # reads the step before
            clock.time += 2.0
        one.close()
        clock.time += 75.0
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [e["step"] for e in entries] == list(range(1, 11))
    assert entries[-1]["goodput"] == pytest.approx(20 / (18 + 75 + 8), abs=1e-4)
    assert entries[-1]["fill"] == 0.75


def test_waiting_for_data_counts_where_the_device_waits_too(tmp_path, clock):
    def slow():
        for _ in range(4):
            clock.time += 3.0
            yield BATCH

    one = meter(tmp_path)
    for step, batch in one.batches(slow()):
        one.add(step, batch, result(ready=step % 2 == 0))  # odd steps are still at work when the next batch is there
        clock.time += 1.0
    one.close()
    shares = [e["data_wait_share"] for e in read_metrics(tmp_path / "metrics.jsonl")]
    # Of step 1's 7 s (3 + 1 + 3) the first three, as it hid the other wait itself; then 4 s each, 3 of them where the step
    # was done. The last has 1 s.
    assert shares == [pytest.approx(3 / 7, abs=1e-4), 0.75, 0.0, 0.0]


def test_evaluating_is_in_no_step(tmp_path, clock):
    """Of 2 s a step, and 30 s of evaluation after the second; what was waiting is written down first."""
    one = meter(tmp_path)

    def measure():
        assert [e["step"] for e in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
        clock.time += 30.0
        return {"scores": {"all": 0.5}, "n": 4, "seconds": 30.0}

    for step in (1, 2, 3):
        one.add(step, BATCH, result())
        clock.time += 2.0
        if step == 2:
            one.evaluate("slim", step, measure)
    one.close()
    assert [e["seconds"] for e in read_metrics(tmp_path / "metrics.jsonl")] == [2.0, 2.0, 2.0]
    assert one.has("slim", 2) and not one.has("slim", 3) and not one.has("held_out", 2)
    meter(tmp_path, start=2).close()
    assert read_events(tmp_path / "metrics.jsonl", "slim")[0]["step"] == 2
    meter(tmp_path, start=1).close()
    assert read_events(tmp_path / "metrics.jsonl", "slim") == []


def test_every_group_has_its_rate(tmp_path):
    one = meter(tmp_path, groups=(("a", 0.1),))
    one.add(1, BATCH, result())
    one.close()
    (entry,) = read_metrics(tmp_path / "metrics.jsonl")
    assert entry["learning_rate"] == 0.5 and entry["learning_rates"] == {"a": 0.05}


def test_only_compiling_counts_as_compiling():
    compile_seconds()
    double, x = jax.jit(lambda x: jnp.sin(x) * 2.125), jnp.ones(3)
    before = compile_seconds()
    double(x)
    first = compile_seconds()
    double(x)
    assert before < first == compile_seconds()


def test_memory_is_the_largest_peak_of_the_devices(monkeypatch):
    stats = [{"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 7}, None]
    devices = [SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert metrics.peak_memory() == 7
    monkeypatch.setattr(jax, "local_devices", lambda: devices[2:])
    assert metrics.peak_memory() is None


# ------------------------------------------------------------------------------------------------------------- writers


def test_what_is_written_is_flat_numbers():
    assert scalars({"stage": "x", "loss": 1.5, "source_loss": {"a": 2.0}}) == {"loss": 1.5, "source_loss/a": 2.0}


def test_an_unknown_writer_and_a_missing_package_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="'mlflow'; known: tensorboard, wandb"):
        open_writers(("mlflow",), tmp_path, "one", 0)
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxvlm\[log\]'"):
        open_writers(("tensorboard",), tmp_path, "one", 0)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    one = meter(tmp_path)
    one.add(1, BATCH, result())
    one.close()
    before = (tmp_path / "metrics.jsonl").read_text()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert open_writers(("tensorboard", "wandb"), tmp_path, "one", 0) == []
    other = meter(tmp_path)
    other.add(1, BATCH, result())
    other.close()
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra `log` is not installed")
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    one = meter(tmp_path, to=("tensorboard",))
    for step in (1, 2):
        one.add(step, BATCH, result())
    one.close()
    (file,) = (tmp_path / "tensorboard" / "one").glob("events.*")
    data, found = file.read_bytes(), {}
    while data:  # TFRecord: length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        payload, data = data[12 : 12 + size], data[16 + size :]
        assert masked_crc32c(payload)
        event = event_pb2.Event.FromString(payload)
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    assert found["loss", 1] == found["loss", 2] == 1.0 and found["fill", 2] == 0.75


def test_wandb_keeps_a_run_without_a_network(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra `log` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    one = meter(tmp_path, to=("wandb",))
    one.add(1, BATCH, result())
    one.close()
    wandb.teardown()  # what a process does at its end: its service writes the rest
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"one/loss" in file.read_bytes() and (tmp_path / "wandb_id").read_text() in file.name


# ------------------------------------------------------------------------------------------------------------- profile


def test_a_trace_of_steps_is_written(tmp_path, capsys):
    one, double = meter(tmp_path, profile_steps=(2, 3)), jax.jit(lambda x: x * 2.5)
    for step, batch in one.batches([BATCH] * 4):
        one.add(step, batch, result() | {"supervised_tokens": double(jnp.float32(step))})
        assert (one.trace is not None) == (step == 2)
    one.close()
    assert list((tmp_path / "profile" / "one").rglob("*.xplane.pb"))
    assert "xprof --logdir" in capsys.readouterr().out
    assert stage_result("one", read_metrics(tmp_path / "metrics.jsonl")).steps == 4


def test_profile_steps_of_the_main_job(capsys):
    base = ["--config", "configs/quickstart.py:tiny", "--print_config"]
    assert main.main([*base, "--profile_steps", "10:14"]) == 0
    assert json.loads(capsys.readouterr().out)["log"]["profile_steps"] == [10, 14]
    assert main.main([*base, "--profile_steps", "14"]) == 1
    assert "FIRST:LAST" in capsys.readouterr().err
