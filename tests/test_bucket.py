"""A work directory in a bucket: a Google Cloud Storage in this process's memory, the real clients, real runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from fake_gcs import served
from test_resume import ROOT, config_file, parameters, uninterrupted, wait_for_step  # noqa: F401 - two are fixtures

from jaxvlm.config import ConfigError, RunConfig
from jaxvlm.job import claim_workdir
from jaxvlm.train import bucket
from jaxvlm.train.inspect_checkpoint import describe_checkpoint
from jaxvlm.train.metrics import read_metrics
from jaxvlm.weights.saved import CheckpointError, explain_full_disk


@pytest.fixture(scope="module")
def emulator():
    """A bucket 'runs', empty, that this process and those it starts see as gs://runs."""
    with served("runs") as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        yield epath.Path("gs://runs")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXVLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "workdirs"


def start(config: Path, workdir: str, cache: Path) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAXVLM_CACHE": str(cache)}
    command = [sys.executable, "-m", "jaxvlm.main", "--config", str(config), "--workdir", workdir]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_run_killed_on_one_machine_goes_on_on_another(config_file, uninterrupted, emulator, tmp_path):  # noqa: F811
    """Two caches stand for two machines: only the bucket is common to them."""
    config = tmp_path / "config.py"
    config.write_text(config_file.read_text().replace('\\"every_steps\\": 5', '\\"every_steps\\": 10'))
    first = start(config, "gs://runs/tiny", tmp_path / "one")
    while first.poll() is None and not list((tmp_path / "one" / "workdirs").glob("*/metrics.jsonl")):
        time.sleep(0.1)
    wait_for_step(first, next((tmp_path / "one" / "workdirs").iterdir()), "instruct", 12)
    first.send_signal(signal.SIGKILL)
    output, _ = first.communicate()
    assert first.returncode == -signal.SIGKILL, output
    assert "step 40 of 40" in describe_checkpoint("gs://runs/tiny/stages/0_align")

    second = start(config, "gs://runs/tiny", tmp_path / "two")
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 0, output
    assert "resuming from step" in output and "Model saved to gs://runs/tiny/model" in output
    run = tmp_path / "copy"
    download(emulator / "tiny", run)
    for path, leaf in parameters(uninterrupted).items():
        np.testing.assert_array_equal(parameters(run)[path], leaf, err_msg=path)
    resumed = int(re.search(r"resuming from step (\d+)\n(?!.*resuming)", output, re.S)[1])
    steps = {(entry["stage"], entry["step"]) for entry in read_metrics(run / "metrics.jsonl")}
    assert steps >= {("instruct", step) for step in range(resumed + 1, 41)}
    assert (run / "report.html").is_file() and not (run / "heartbeats").exists()


def test_other_settings_and_other_files_are_refused(emulator, cache):
    (emulator / "full" / "notes.txt").write_text("not a run")
    with pytest.raises(ConfigError, match="gs://runs/full is not empty and holds no jaxvlm run"):
        claim_workdir(RunConfig(), emulator / "full")
    claim_workdir(RunConfig(), emulator / "mine")
    claim_workdir(RunConfig(), emulator / "mine")
    with pytest.raises(ConfigError, match="gs://runs/mine holds a run with other settings"):
        claim_workdir(RunConfig(seed=1), emulator / "mine")


def download(place: epath.Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in place.iterdir():
        if path.is_dir():
            download(path, folder / path.name)
        else:
            (folder / path.name).write_bytes(path.read_bytes())


def test_the_newer_file_wins_and_a_deleted_run_is_forgotten(emulator, cache):
    (emulator / "files" / "config.json").write_text("{}")
    with bucket.opened("gs://runs/files") as (folder, store):
        (folder / "eval").mkdir()
        (folder / "eval" / "answers.jsonl").write_text("1\n")
        (folder / "features").mkdir()
        (folder / "features" / "large.bin").write_text("stays here")
        assert store == emulator / "files"
    assert (store / "eval" / "answers.jsonl").read_text() == "1\n"
    assert not (store / "features").exists()

    (folder / "eval" / "answers.jsonl").write_text("1\n2\n")  # a run that was killed before it was copied
    os.utime(folder / "eval" / "answers.jsonl", (2**32, 2**32))
    (store / "eval" / "other.jsonl").write_text("of another machine")
    with bucket.opened("gs://runs/files"):
        assert (folder / "eval" / "answers.jsonl").read_text() == "1\n2\n"
        assert (folder / "eval" / "other.jsonl").read_text() == "of another machine"
        assert not (folder / "config.json").exists()
    assert (store / "eval" / "answers.jsonl").read_text() == "1\n2\n"

    store.rmtree()
    with bucket.opened("gs://runs/files"):
        assert not list(folder.iterdir())


def test_only_what_changed_is_copied_again(emulator, cache, monkeypatch):
    with bucket.opened("gs://runs/changes") as (folder, store):
        (folder / "a.txt").write_text("a")
        copies = bucket.Copies(folder, store)
        copies.close()
        (store / "a.txt").write_text("as it is there")
        (folder / "b.txt").write_text("b")
        copies.send()
        assert (store / "a.txt").read_text() == "as it is there"
        assert (store / "b.txt").read_text() == "b"


@pytest.mark.parametrize("address", ["gs://nobodys/run", "s3://bucket/run"])
def test_places_that_do_not_serve_are_told(emulator, cache, address):
    wanted = (CheckpointError, "The bucket must exist") if address.startswith("gs") else (ConfigError, "only gs://")
    with pytest.raises(wanted[0], match=wanted[1]), bucket.opened(address):
        raise AssertionError("opened")
    assert not cache.exists() or not list(cache.iterdir())


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(bucket, "NEEDS", {"gcsfs": "gcsfs", "google.nothing.there": "google-cloud-storage"})
    with pytest.raises(ConfigError, match=r"needs google-cloud-storage\..*pip install -e '.\[gcs\]'"):
        bucket.require("gs://runs/x")


def test_a_permission_lost_while_saving_is_one_sentence():
    said = "PERMISSION_DENIED: Error writing object: HTTP response code: 403"
    with (
        pytest.raises(CheckpointError, match="gs://runs/x is not permitted any more.*Earlier checkpoints"),
        explain_full_disk(epath.Path("gs://runs/x")),
    ):
        raise ValueError(said)


def test_a_failed_copy_is_said_once_and_made_later(emulator, cache, monkeypatch, capsys):
    monkeypatch.setattr(bucket, "EVERY_SECONDS", 0.02)
    with bucket.opened("gs://runs/later") as (folder, store):
        writes, write = [], type(store).write_bytes

        def refuse(self, data):
            writes.append(self)
            raise OSError("Forbidden")

        with monkeypatch.context() as patch:
            patch.setattr(type(store), "write_bytes", refuse)
            (folder / "metrics.jsonl").write_text("{}\n")
            while len(writes) < 3:
                time.sleep(0.01)
        assert type(store).write_bytes is write
    assert (store / "metrics.jsonl").read_text() == "{}\n"
    assert capsys.readouterr().err.count("tried again") == 1
    shutil.rmtree(folder)
