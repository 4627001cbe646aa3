"""launch/check.py: all well on one process and on several, and what it says of each thing that is not."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import pytest
from launch_helpers import LAUNCH, ROOT

sys.path.insert(0, str(LAUNCH))
import check  # noqa: E402

TINY = ["--config", "configs/quickstart.py:tiny"]


def several(count: int, *words: str, shell: str = "") -> tuple[int, list[str]]:
    """check.py as two processes with two devices each: the job's exit code, and the `count` things that process 0 said."""
    command = [sys.executable, "launch/check.py", *words]
    if shell:  # for arguments that differ between the processes
        command = ["bash", "-c", f'exec "$@" {shell}', "sh", *command]
    local = [sys.executable, "launch/local.py", "--processes", "2", "--devices", "2", "--", *command]
    done = subprocess.run(local, cwd=ROOT, capture_output=True, text=True, timeout=300)
    # Gloo writes to the same pipe, sometimes into a line.
    said = re.findall(r"^\[0\].*?((?:ok {4}|FAIL {2}|All is well|The job would).*)", done.stdout, re.M)
    assert len(said) == count, done
    return done.returncode, said


def here(capsys, *words: str) -> tuple[int, dict[str, str]]:
    """check.py in this process of eight devices: its exit code, and its lines by what they are about."""
    code = check.main([*words, "--timeout", "120"])
    lines = capsys.readouterr().out.splitlines()
    return code, {line[6:18].strip(): line for line in lines if line.startswith(("ok", "FAIL"))} | {"end": lines[-1]}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(check.processes, "start", lambda: None)  # this process has used its devices already


def test_two_processes(tmp_path):
    code, lines = several(7, *TINY, "--workdir", str(tmp_path / "new" / "run"), "--devices", "4", "--processes", "2")
    assert code == 0, lines
    assert [line.split()[:2] for line in lines[:-1]] == [
        ["ok", name] for name in ("devices", "all-reduce", "data", "workdir", "shared", "checkpoint")
    ]
    assert lines[0].startswith("ok    devices     2 processes, 4 x cpu; mesh fsdp=4 (")
    assert "sum over 4 devices is right" in lines[1]
    assert lines[-1].startswith("All is well.")
    assert not (tmp_path / "new" / "run").exists()


def test_processes_that_differ(tmp_path):
    """Other data and another disk on process 1; every later check still runs on both, and none waits for the other."""
    odd = f"--config.seed=$JAXVLM_PROCESS_ID --workdir={tmp_path}/$JAXVLM_PROCESS_ID"
    code, lines = several(6, *TINY, "--devices", "8", shell=odd)
    assert code == 1
    devices, reduce, data, workdir, shared, end = lines
    assert devices.startswith("FAIL  devices     [process 0, 1] 2 processes, 4 x cpu, but 8 devices are expected.")
    assert reduce.startswith("ok") and workdir.startswith("ok")
    assert data.startswith("FAIL  data        [process 1] 'align: ") and "but process 0 has 'align" in data
    assert shared.startswith("FAIL  shared      [process 1] ") and "a file system that all share" in shared
    assert end.startswith("The job would fail.")
    assert not list(tmp_path.iterdir())


def test_slurm_is_found(tmp_path):
    """As srun starts processes, without launch/local.py."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job = {
        "SLURM_JOB_ID": "4242",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": port,
    }
    here = os.environ | job | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    command = [sys.executable, "launch/check.py", "--processes", "2", "--devices", "2"]
    tasks = [here | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
    pipes = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started = [subprocess.Popen(command, env=task, **pipes) for task in tasks]
    out = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], out
    assert "2 processes, 2 x cpu" in out[0] and "ok " not in out[1]


def test_one_process(capsys, tmp_path):
    (tmp_path / "kept").write_text("mine")
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    code, lines = here(capsys, *TINY, *mesh, "--workdir", str(tmp_path), "--devices", "8")
    assert code == 0, lines
    assert "8 x cpu; mesh data=2, fsdp=2, tensor=2" in lines["devices"]
    assert "align: 80 rows, 4x128 tokens a process; instruct: 240 rows" in lines["data"]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_was_not_given_is_said(capsys):
    code, lines = here(capsys)
    assert code == 0 and set(lines) == {"devices", "all-reduce", "end"}
    assert lines["end"] == "All is well. Not all was looked at: --config and --workdir not given."


@pytest.mark.parametrize(
    ("words", "about", "says"),
    [
        (["--devices", "16"], "devices", "16 devices are expected. Start it on every worker"),
        (["--processes", "2"], "devices", "2 processes are expected. Start it on every worker"),
        ([*TINY, "--config.mesh.fsdp=3"], "devices", "needs 3 devices"),
        (
            [*TINY, "--config.stages[0].batch_size=12"],
            "devices",
            "batch_size = 12 rows in 1 micro-batches do not divide over data x fsdp = 1 x 8",
        ),
        ([*TINY, "--config.init.llm=weights/none"], "data", "config.init.llm is 'weights/none', which is not there"),
        ([*TINY, "--config.stages[0].data.sources[0].path=none.json"], "data", "none.json"),
        (["--workdir", "/proc/none"], "workdir", "get the right to write there"),
    ],
)
def test_what_is_wrong_and_what_to_do(capsys, words, about, says):
    code, lines = here(capsys, *words)
    assert code == 1 and lines[about].startswith("FAIL") and says in lines[about], lines
    assert lines["end"].startswith("The job would fail.")


def test_a_wrong_sum_and_a_wrong_checkpoint(capsys, monkeypatch, tmp_path):
    psum = check.jax.lax.psum
    monkeypatch.setattr(check.jax.lax, "psum", lambda values, axis: 2 * psum(values, axis))
    load = check.ocp.load
    monkeypatch.setattr(check.ocp, "load", lambda *args: {"x": load(*args)["x"] + 1})
    code, lines = here(capsys, "--workdir", str(tmp_path / "w"))
    assert code == 1
    assert "the sum over 8 devices is 72 to 72 and not 36" in lines["all-reduce"]
    assert "reads back other values" in lines["checkpoint"]
    assert not (tmp_path / "w").exists()


def test_a_check_that_hangs_ends_the_process():
    code = "import check, time\nwith check.patience(0.1, 'all-reduce', 'Look at the network.'): time.sleep(600)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=LAUNCH, env=None, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stdout == "FAIL  all-reduce  not done in 0.1 s. Look at the network.\n"


def test_half_a_cluster_is_not_one_process(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    done = subprocess.run([sys.executable, "launch/check.py"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "add --num_processes" in done.stderr


def test_usage(capsys):
    for words in (["--bogus"], ["--config.seed=1"]):
        with pytest.raises(SystemExit) as stopped:
            check.main(words)
        assert stopped.value.code == 2
    assert check.main(["--config", "none.py"]) == 1
    assert "no config file 'none.py'" in capsys.readouterr().err
