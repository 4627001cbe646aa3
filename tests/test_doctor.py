"""The doctor's judgement of machines that are not at hand, and its reading of this one."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from jaxvlm import doctor
from jaxvlm.doctor import Facts

REQUIREMENTS = [
    "jax<0.13,>=0.10.2",
    "ml_collections>=1.1",
    "packaging>=24",
    'fastapi>=0.115; extra == "serve"',
    'uvicorn>=0.30; extra == "serve"',
]
VERSIONS = {
    "jaxvlm": "0.1.0",
    "jax": "0.11.2",
    "jaxlib": "0.11.2",
    "ml-collections": "1.1.0",
    "packaging": "26.0",
}
GOOD = Facts(
    python=(3, 12, 1),
    requirements=REQUIREMENTS,
    versions=VERSIONS,
    backend="cpu",
    devices=[("cpu", None)],
    cores=2,
    memory=16 * 10**9,
    memory_available=12 * 10**9,
    disks={"work folder": 50 * 10**9, "cache": 50 * 10**9},
    cache="/home/me/.cache/jaxvlm",
)
GPU = dict(gpus=["NVIDIA H100 80GB HBM3"], driver="580.65.06", capability=9.0)


def examine(**changes) -> tuple[int, str]:
    lines: list[str] = []
    code = doctor.doctor(lines.append, facts=dataclasses.replace(GOOD, **changes))
    return code, "\n".join(lines)


def line(text: str, name: str) -> str:
    """The finding `name` and its advice, on one line without runs of spaces."""
    lines = text.splitlines()
    [index] = [i for i, candidate in enumerate(lines) if candidate[10:32].strip() == name]
    advice = lines[index + 1] if index + 1 < len(lines) and lines[index + 1].strip().startswith("->") else ""
    return " ".join(f"{lines[index]} {advice}".split())


def test_a_good_machine():
    code, text = examine()
    assert code == 0
    assert "problem" not in text
    assert "The main job can run here" in text
    assert line(text, "jax devices") == "ok jax devices cpu: 1 x cpu"


@pytest.mark.parametrize(
    ("changes", "name", "says"),
    [
        (dict(python=(3, 10, 4)), "Python", "3.11 or newer"),
        (dict(memory=4 * 10**9), "Memory", "needs 6.0 GB"),
        (dict(disks={"work folder": 10**9}), "Disk, work folder", "another --workdir"),
        (dict(disks={"cache": 10**8}), "Disk, cache", "set JAXVLM_CACHE"),
        (dict(requirements=None), "jaxvlm", "make setup"),
        (
            dict(versions=VERSIONS | {"jax": "0.7.2", "jaxlib": "0.7.2"}),
            "jax",
            "pip install 'jax<0.13,>=0.10.2'",
        ),
        (dict(versions=VERSIONS | {"jaxlib": "0.11.1"}), "jaxlib", "pip install jaxlib==0.11.2"),
        (
            dict(versions={k: v for k, v in VERSIONS.items() if k != "ml-collections"}),
            "ml_collections",
            "not installed -> pip install 'ml_collections>=1.1'",
        ),
        (dict(backend=None, jax_error="RuntimeError: no"), "jax devices", "does not start: RuntimeError: no"),
    ],
)
def test_what_stops_the_main_job(changes, name, says):
    code, text = examine(**changes)
    assert code == 1
    assert line(text, name).startswith("problem")
    assert says in line(text, name)
    assert f"To fix: {name}" in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (GPU, "make setup EXTRAS=cuda13"),
        (GPU | {"driver": "550.54"}, "make setup EXTRAS=cuda12"),
        (GPU | {"capability": 7.0}, "make setup EXTRAS=cuda12"),
        (GPU | {"driver": "470.1"}, "driver 525 or newer"),
        (GPU | {"driver": ""}, "make setup EXTRAS=cuda13"),
        (GPU | {"jax_platforms": "cpu"}, "unset JAX_PLATFORMS"),
        (
            GPU | {"versions": VERSIONS | {"jax-cuda13-plugin": "0.11.2"}, "jax_error": "Error: no driver"},
            "did not start (Error: no driver)",
        ),
    ],
)
def test_an_idle_gpu_is_reported_but_does_not_stop_the_main_job(changes, says):
    code, text = examine(**changes)
    assert code == 0
    assert line(text, "NVIDIA GPU").startswith("missing")
    assert says in line(text, "NVIDIA GPU")


def test_a_gpu_in_use():
    used = GPU | {"backend": "gpu", "devices": [("NVIDIA H100 80GB HBM3", 60 * 10**9)] * 2}
    code, text = examine(**used)
    assert code == 0
    assert line(text, "jax devices").endswith("gpu: 2 x NVIDIA H100 80GB HBM3 (60.0 GB)")
    assert line(text, "NVIDIA GPU").startswith("ok")
    _, text = examine(**used, versions=VERSIONS | {"jax": "0.10.2", "jaxlib": "0.10.2"})
    assert "need jax 0.11.2" in line(text, "NVIDIA GPU")


def test_tpu_machines():
    _, text = examine(tpu_chips=4)
    assert "make setup EXTRAS=tpu" in line(text, "TPU")
    _, text = examine(tpu_chips=4, backend="tpu", devices=[("TPU v5 lite", 16 * 10**9)] * 4)
    assert line(text, "TPU") == "ok TPU 4 chips"


def test_memory_in_use_is_only_noted():
    code, text = examine(memory_available=2 * 10**9)
    assert code == 0
    assert line(text, "Memory").startswith("note")


def test_optional_parts_come_from_the_metadata():
    _, text = examine(versions=VERSIONS | {"fastapi": "0.165"})
    assert "not installed: uvicorn" in line(text, "serve")
    assert "pip install -e '.[serve]'" in line(text, "serve")
    _, text = examine(versions=VERSIONS | {"fastapi": "0.165", "uvicorn": "0.5"})
    assert line(text, "serve").startswith("ok")


def test_cache_contents():
    _, text = examine(cache_size=2_000_000_000, assets={"easy-vqa": 9_000_000})
    assert "2.0 GB" in line(text, "Cache")
    assert line(text, "easy-vqa") == "ok easy-vqa 9 MB"
    assert line(text, "efficientnet-lite0").startswith("note")


def test_reading_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXVLM_CACHE", str(tmp_path))
    (tmp_path / "assets" / "easy-vqa").mkdir(parents=True)
    (tmp_path / "assets" / "easy-vqa" / "asset.json").write_bytes(b"12345")
    (tmp_path / "assets" / ".easy-vqa-unfinished").mkdir()
    facts = doctor.gather(tmp_path / "not" / "there")
    assert facts.python == sys.version_info[:3]
    assert facts.cores >= 1
    assert facts.backend == "cpu" and facts.devices[0][0] == "cpu", facts.jax_error
    assert facts.versions["ml-collections"]
    assert facts.assets == {"easy-vqa": 5} and facts.cache_size == 5
    assert set(facts.disks) == {"work folder", "cache"} and min(facts.disks.values()) > 0
    assert doctor.doctor(lambda text: None, facts=facts) in (0, 1)


def test_cache_is_where_the_assets_go(tmp_path, monkeypatch):
    assets = pytest.importorskip("jaxvlm.data.assets")
    for value in (str(tmp_path), ""):
        monkeypatch.setenv("JAXVLM_CACHE", value)
        monkeypatch.setattr(doctor, "_start_jax", lambda: ("cpu", [], ""))
        assert doctor.gather().cache == str(assets.cache_dir())
    assert set(doctor.ASSETS) <= set(assets.ASSETS)


def test_a_jax_that_does_not_start(monkeypatch):
    monkeypatch.setattr(doctor, "PROBE", "import sys; print('RuntimeError: the reason', file=sys.stderr); sys.exit(3)")
    assert doctor._start_jax() == (None, [], "RuntimeError: the reason")
    monkeypatch.setattr(doctor, "PROBE", "import os; os.abort()")
    backend, _, error = doctor._start_jax()
    assert backend is None and error


def test_nvidia_smi_output(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'Tesla V100, 550.54.15, 7.0'\necho 'NVIDIA A100, 550.54.15, 8.0'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor._read_nvidia() == (["Tesla V100", "NVIDIA A100"], "550.54.15", 7.0)
