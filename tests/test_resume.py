"""Kill -9 at any moment, run the same command again, and get the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from jaxvlm.config import to_dict
from jaxvlm.data.assets import toy
from jaxvlm.train.metrics import read_metrics
from jaxvlm.train.state import flat
from jaxvlm.weights.saved import load_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    config = tiny.run_config(toy.write_dataset(folder / "data"), toy.write_tokenizer(folder / "tok"))
    values = to_dict(config)
    for stage in values["stages"]:
        stage["steps"] = 40
    values["checkpoint"] = {"every_steps": 5, "keep": 2}
    values["eval"]["task"] = ""
    path = folder / "config.py"
    path.write_text(
        "import json\nfrom jaxvlm.config_files import complete\n"
        f"def get_config(arg=None):\n    return complete(json.loads({json.dumps(json.dumps(values))}))\n"
    )
    return path


def start(config: Path, workdir: Path) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jaxvlm.main", "--config", str(config), "--workdir", str(workdir)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(process: subprocess.Popen, workdir: Path, stage: str, step: int) -> None:
    """Until metrics.jsonl shows that step, or the process is gone."""
    while process.poll() is None:
        if any(e["stage"] == stage and e["step"] >= step for e in read_metrics(workdir / "metrics.jsonl")):
            return
        time.sleep(0.005)


def parameters(workdir: Path) -> dict:
    return {path: np.asarray(leaf) for path, leaf in flat(load_model(workdir)[0]).items()}


@pytest.fixture(scope="module")
def uninterrupted(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    process = start(config_file, workdir)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return workdir


def test_killed_runs_end_in_the_same_parameters(config_file, uninterrupted, tmp_path):
    rng, workdir = random.Random(0), tmp_path / "run"
    for stage in ("align", "instruct"):
        process = start(config_file, workdir)
        wait_for_step(process, workdir, stage, rng.randint(6, 38))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (workdir / "model").exists()
    process = start(config_file, workdir)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "resuming from step" in output
    ours, expected = parameters(workdir), parameters(uninterrupted)
    assert ours.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(ours[path], leaf, err_msg=path)
    losses = [
        [(e["stage"], e["step"], e["loss"]) for e in read_metrics(w / "metrics.jsonl")]
        for w in (workdir, uninterrupted)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_saves_and_says_how_to_go_on(config_file, uninterrupted, tmp_path, signum, code):
    workdir = tmp_path / "run"
    process = start(config_file, workdir)
    wait_for_step(process, workdir, "instruct", 12)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    assert "everything is saved" in output
    assert f"--workdir {workdir}" in output
    process = start(config_file, workdir)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for path, leaf in parameters(uninterrupted).items():
        np.testing.assert_array_equal(parameters(workdir)[path], leaf, err_msg=path)


def test_a_finished_run_is_not_trained_again(config_file, uninterrupted):
    before = parameters(uninterrupted)
    output, _ = start(config_file, uninterrupted).communicate(timeout=300)
    assert output.count("resuming from step 40") == 2
    for path, leaf in parameters(uninterrupted).items():
        np.testing.assert_array_equal(before[path], leaf)


REPEATED = """
import os, signal, sys
from jaxvlm.main import main
from jaxvlm.train.checkpoint import StageCheckpointer
from jaxvlm.train.metrics import Meter

add, finish, stopping = Meter.add, StageCheckpointer._finish, False

def signalled_add(self, step, *more):
    global stopping
    add(self, step, *more)
    if step == 12:
        stopping = True
        os.kill(os.getpid(), signal.SIGTERM)

def signalled_finish(self):
    if stopping:
        print("again while saving", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    finish(self)

Meter.add, StageCheckpointer._finish = signalled_add, signalled_finish
sys.exit(main(sys.argv[1:]))
"""


def test_signals_repeated_while_saving_do_not_cost_the_save(config_file, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", REPEATED, "--config", str(config_file), "--workdir", str(workdir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "again while saving" in done.stdout and "after step 12 of 40; everything is saved" in done.stdout
    output, _ = start(config_file, workdir).communicate(timeout=300)
    assert "resuming from step 12" in output
    for path, leaf in parameters(uninterrupted).items():
        np.testing.assert_array_equal(parameters(workdir)[path], leaf, err_msg=path)
