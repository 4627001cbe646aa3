"""The launch scripts: what they print, what reaches the job through all shells, and what they make of how it ends."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time

import pytest
from launch_helpers import LAUNCH, Place

TPU = ("--name", "llava", "--type", "v5litepod-16", "--zone", "us-west4-a")
# Everything that a shell would change, if one of those on the way were not told not to.
ODD = ["--config", "configs/llava15.py:llm=vicuna-13b,lora", "--workdir", "gs://bucket/llava run"]
ODD += [
    '--config.name=it\'s "a" run',
    "--config.description=$HOME `id` \\ * ; & | > <",
    "--config.stages[0].steps=5",
    "",
]

# A stand-in for the job that saves for a moment when it is told to stop, and notes how often it was told.
OBEDIENT = (
    'told() { echo told >>"$LOGS/told"; stop=1; }; trap told TERM; touch "$LOGS/ready"; '
    'while [ -z "$stop" ]; do sleep 0.05; done; sleep 0.3; exit 0'
)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


# -------------------------------------------------------------------------------------------------- usage and dry runs


SCRIPTS = {"job.sh", "tpu_vm.sh", "babysit.sh", "slurm.sbatch", "install.sh"}


def test_every_script_is_here():
    assert {path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch")} == SCRIPTS


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_help(place, script):
    done = place.run(script, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert f"launch/{script}" in done.stdout and "set -" not in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("job.sh", ["--check"], "after --"),
        ("job.sh", ["--config", "c.py"], "'--config'"),
        ("job.sh", ["--flags"], "--flags needs a value"),
        ("job.sh", ["--flags", "v99", "--", "x"], "v4, v5e, v5p, v6e, a100, h100"),
        ("install.sh", ["tpu;ls"], "tpu,data,gcs"),
        ("tpu_vm.sh", [*TPU], "Give a command"),
        ("tpu_vm.sh", ["crate", *TPU], "no command 'crate'"),
        ("tpu_vm.sh", ["create", "--name", "x", "--zone", "z"], "--type"),
        ("tpu_vm.sh", ["create", "--name", "x", "--zone", "z", "--type", "v5e-16"], "v5litepod-16"),
        ("tpu_vm.sh", ["create", "--name", "x", "--zone", "z", "--type", "a100"], "v5litepod-N"),
        ("tpu_vm.sh", ["create", *TPU, "--slices", "two"], "'two'"),
        ("tpu_vm.sh", ["create", *TPU, "--spots"], "--spots needs a value"),
        ("tpu_vm.sh", ["create", *TPU, "--sport", "1"], "--sport"),
        ("tpu_vm.sh", ["create", *TPU, "--", "--config", "c"], "nothing after --"),
        ("tpu_vm.sh", ["logs", *TPU, "--slices", "2", "--slice", "2"], "below 2"),
        ("tpu_vm.sh", ["run", *TPU], "after --"),
        ("babysit.sh", [*TPU, "--", "--config", "c", "--workdir", "runs/x"], "gs://"),
        ("babysit.sh", [*TPU, "--", "--config", "c"], "gs://"),
        ("babysit.sh", [*TPU, "--retries", "x", "--", *ODD], "'x'"),
        ("babysit.sh", ["--name", "x", "--", *ODD], "--type"),
        ("slurm.sbatch", ["--workdir", "w"], "--config"),
    ],
)
def test_bad_arguments_give_usage_and_2(place, script, arguments, says):
    done = place.run(script, *arguments)
    assert done.returncode == 2, done
    assert says in done.stderr and ("help" in done.stderr or "usage" in done.stderr)
    assert not place.noted("gcloud") and not (place.logs / "arguments").exists()


def printed(done: subprocess.CompletedProcess) -> list[list[str]]:
    assert done.returncode == 0, done
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_one_slice(place):
    [create] = printed(
        place.run("tpu_vm.sh", "create", *TPU, "--spot", "--project=p", "--create-flag=--tags=a b", "--dry-run")
    )
    where, gcloud = ["--zone=us-west4-a", "--project=p"], ["gcloud", "compute", "tpus"]
    asked = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=llava", "--spot"]
    assert create == [*gcloud, "queued-resources", "create", "llava", *where, *asked, "--tags=a b"]
    [delete] = printed(place.run("tpu_vm.sh", "delete", *TPU, "--project=p", "--dry-run"))
    assert delete == [*gcloud, "queued-resources", "delete", "llava", *where, "--force", "--quiet"]
    bundle, copy, install = printed(place.run("tpu_vm.sh", "install", *TPU, "--setup", "mount 'a b'", "--dry-run"))
    revision = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=place.clone, text=True).strip()
    assert bundle[0] == "git" and bundle[-2:] == [copy[5], "HEAD"] and revision in copy[5]
    assert copy[6:] == ["llava:jaxvlm.bundle", "--zone=us-west4-a", "--quiet", "--worker=all"]
    assert f"--detach {revision} && bash launch/install.sh tpu,data,gcs && {{ mount 'a b'; }}" in install[-1]
    [logs] = printed(place.run("tpu_vm.sh", "logs", *TPU, "--worker", "3", "--ssh-flag=--internal-ip", "--dry-run"))
    assert logs[3:] == ["tpu-vm", "ssh", "llava", *where[:1], "--quiet", "--worker=3", "--internal-ip", logs[-1]]
    assert not place.noted("gcloud")


def test_several_slices(place):
    more = (*TPU, "--slices", "2", "--dry-run")
    [create] = printed(place.run("tpu_vm.sh", "create", *more))
    assert create[-2:] == ["--node-count=2", "--node-prefix=llava"]
    runs = printed(place.run("tpu_vm.sh", "run", *more, "--", *ODD))
    assert [run[5] for run in runs] == ["llava-0", "llava-1"]
    remote = shlex.split(runs[0][-1].removeprefix("--command="))
    assert remote[:8] == [
        "bash",
        "jaxvlm/launch/job.sh",
        "--flags",
        "v5litepod-16",
        "--slices",
        "2",
        "--detach",
        "../jaxvlm-job",
    ]
    assert remote[8:] == ["--", *ODD]
    [logs] = printed(place.run("tpu_vm.sh", "logs", *more, "--slice", "1"))
    assert logs[5] == "llava-1"


@pytest.mark.parametrize("kind", ["v4-32", "v5litepod-8", "v5p-64", "v6e-16"])
def test_every_type_has_an_image_and_flags(place, kind):
    [create] = printed(place.run("tpu_vm.sh", "create", "--name", "x", "--zone", "z", "--type", kind, "--dry-run"))
    assert f"--accelerator-type={kind}" in create
    assert place.run("job.sh", "--flags", kind, "--dry-run", "--", "x").returncode == 0


def test_dry_run_of_a_babysitter(place):
    lines = printed(place.run("babysit.sh", *TPU, "--dry-run", "--", *ODD))
    calls = [" ".join(line[3:5]) for line in lines]
    ssh, queue = "tpu-vm ssh", "queued-resources"
    begin = [f"{queue} describe", f"{queue} create", f"{queue} describe", "bundle create", "tpu-vm scp"]
    assert calls == [*begin, ssh, ssh, ssh, "gs://bucket/llava run/stages/*/checkpoints/", f"{queue} delete"]
    assert not place.noted("gcloud")


def test_dry_run_of_an_installation(place):
    lines = printed(place.run("install.sh", "--dry-run", "cuda13,data,gcs"))
    assert [line[:2] for line in lines] == [["uv", "venv"], ["uv", "pip"], [".venv/bin/python", "-c"]]
    assert lines[1][-1] == ".[cuda13,data,gcs]" and lines[2][2].startswith("import jaxvlm")
    assert not place.noted("uv")


def test_uncommitted_changes_are_not_left_behind(place):
    (place.clone / "launch" / "README.md").write_text("changed")
    done = place.run("tpu_vm.sh", "install", *TPU)
    assert done.returncode == 1 and "Commit or stash" in done.stderr
    assert not place.noted("gcloud")


# --------------------------------------------------------------------------------------------------- the worker's end


def test_arguments_arrive_as_they_were(place):
    assert place.run("job.sh", "--", *ODD).returncode == 0
    assert place.arguments() == ODD
    [command] = printed(place.run("job.sh", "--dry-run", "--", *ODD))
    assert command == ["cd", str(place.clone), "&&", "python3", "-m", "jaxvlm.main", *ODD]


def test_flags_reach_the_job_with_the_callers_own_last(place):
    done = place.run(
        "job.sh", "--flags", "v6e-8", "--", "x", job='echo "$LIBTPU_INIT_ARGS"', LIBTPU_INIT_ARGS="--mine=1"
    )
    assert done.stdout.split() == ["--xla_tpu_scoped_vmem_limit_kib=98304", "--mine=1"]
    done = place.run("job.sh", "--flags", "v5e", "--", "x", job='echo "${LIBTPU_INIT_ARGS-none}"')
    assert done.stdout.split() == ["none"]


def test_a_check_takes_the_jobs_place(place):
    command = printed(place.run("job.sh", "--check", "--dry-run", "--", *ODD))[0]
    assert command[3:] == ["python3", "launch/check.py", *ODD]


@pytest.mark.parametrize(
    ("job", "code"),
    [
        ("exit 0", 0),
        ("exit 75", 75),
        ("exit 1", 1),
        ("exit 2", 2),
        ("kill -9 $$", 75),
        ("kill -ABRT $$", 75),
        ("kill -TERM $$", 75),
    ],
)
def test_exit_codes(place, job, code):
    done = place.run("job.sh", "--failed", "failures", "--", "x", job=job)
    assert done.returncode == code
    failures = place.clone / "failures"
    assert (failures.read_text().split()[1:] if failures.exists() else []) == ([str(code)] if code in (1, 2) else [])


@pytest.mark.parametrize("everybody", [False, True])
def test_told_to_stop_is_run_again_and_told_once(place, everybody):
    """A container's first process alone is signalled, and passes it on; a step of SLURM is signalled as a whole."""
    process = place.start("job.sh", *([] if everybody else ["--forward"]), "--", "x", job=OBEDIENT)
    wait_for(place.logs / "ready")
    (os.killpg if everybody else os.kill)(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75, out
    assert "told to stop, and saved" in out
    assert (place.logs / "told").read_text().split() == ["told"]


def test_detached(place):
    def job(*arguments, **more):
        return place.run("job.sh", *arguments, **more).stdout.strip()

    assert job("--state", "../job") == "none"
    assert "its output goes to ../job/log" in job("--detach", "../job", "--", *ODD, job=f"echo hello; {OBEDIENT}")
    wait_for(place.logs / "ready")
    assert job("--state", "../job") == "running"
    again = place.run("job.sh", "--detach", "../job", "--", "x")
    assert again.returncode == 1 and "runs already" in again.stderr
    job("--stop", "../job")
    wait_for(place.clone.parent / "job" / "exit_code")
    assert job("--state", "../job") == "exit 75"
    assert "hello" in (place.clone.parent / "job" / "log").read_text()
    assert (place.logs / "told").read_text().split() == ["told"]
    job("--detach", "../job", "--", "x", job="exit 3")
    wait_for(place.clone.parent / "job" / "exit_code")
    assert job("--state", "../job") == "exit 3"
    (place.clone.parent / "job" / "exit_code").unlink()
    assert job("--state", "../job") == "died"


# ----------------------------------------------------------------------------------------------- a life on spot slices


def babysit(place, job, *options, slices="1"):
    arguments = (*TPU, "--spot", "--slices", slices, "--poll", "0.1", *options, "--", *ODD)
    return place.run("babysit.sh", *arguments, job=job)


def verbs(place):
    """The calls that matter, in order, without looks and storage."""
    found = []
    for call in map(" ".join, place.noted("gcloud")):
        known = {"resources create": "create", "resources delete": "delete", "vm scp": "install", "--detach": "run"}
        found += [verb for words, verb in known.items() if words in call and "checkout" not in call]
    return found


def test_from_nothing_to_done(place):
    done = babysit(place, "exit 0", slices="2")
    assert done.returncode == 0, done
    assert verbs(place) == ["create", "install", "install", "run", "run", "delete"]
    assert place.arguments() == ODD  # through babysit.sh, tpu_vm.sh, gcloud's --command, the worker's shell and job.sh
    clone = place.logs / "homes" / "llava-1" / "1" / "jaxvlm"
    revision = ["git", "rev-parse", "HEAD"]
    assert subprocess.check_output(revision, cwd=clone) == subprocess.check_output(revision, cwd=place.clone)
    assert any("-e .[tpu,data,gcs]" in " ".join(call) for call in place.noted("uv"))


def test_a_preemption_and_a_75(place):
    """First the slices go while the job runs, then worker 1 asks to be run again, then it is done."""
    job = (
        'n=$(cat "$LOGS/lives" 2>/dev/null | wc -l); [ "$WORKER" = 0 ] && echo life >>"$LOGS/lives"; case $n in '
        '0) touch "$HOME/here"; echo SUSPENDED >"$LOGS/state"; while [ -e "$HOME/here" ]; do sleep 0.05; done; exit 1 ;; '
        '1 | 2) [ "$WORKER" = 0 ] || { echo step_1 >>"$LOGS/saved"; exit 75; } ;; esac'
    )
    done = babysit(place, job)
    assert done.returncode == 0, done
    assert "the slices are gone" in done.stdout and "exit code 75; again (0 of 5" in done.stdout
    first = ["create", "install", "run"]
    assert verbs(place)[:6] == [*first, "delete", *first[:2]] and verbs(place)[-1] == "delete"
    assert verbs(place).count("create") == 2


def test_an_error_ends_it(place):
    done = babysit(place, 'echo "what went wrong on $WORKER"; [ "$WORKER" = 0 ] || exit 3')
    assert done.returncode == 3
    assert "what went wrong on 1" in done.stdout
    assert verbs(place) == ["create", "install", "run", "delete"]
    assert babysit(place, "exit 3", "--keep").returncode == 3
    assert verbs(place)[4:] == ["create", "install", "run"]


def test_it_gives_up_without_progress(place):
    done = babysit(place, "exit 75", "--retries=3")
    assert done.returncode == 75
    assert "3 times without a new checkpoint" in done.stdout
    assert verbs(place).count("run") == 3 and verbs(place).count("create") == 1


def test_started_again_it_takes_up_what_runs(place):
    for command in ("create", "install"):
        assert place.run("tpu_vm.sh", command, *TPU).returncode == 0
    job = 'until [ -e "$LOGS/end" ]; do sleep 0.05; done; exit 0'
    assert place.run("tpu_vm.sh", "run", *TPU, "--", *ODD, job=job).returncode == 0
    (place.logs / "gcloud").unlink()
    process = place.start("babysit.sh", *TPU, "--poll", "0.1", "--", *ODD, job="exit 9")
    while sum("--state" in " ".join(call) for call in place.noted("gcloud")) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    (place.logs / "end").touch()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    assert verbs(place) == ["delete"]


def test_a_request_in_the_queue_keeps_its_place(place):
    (place.logs / "state").write_text("WAITING_FOR_RESOURCES\n")
    process = place.start("babysit.sh", *TPU, "--poll", "0.1", "--", *ODD, job="exit 0")
    while len(place.noted("gcloud")) < 4:  # it looks, and looks again
        assert process.poll() is None
        time.sleep(0.05)
    (place.logs / "state").write_text("ACTIVE\n")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    assert verbs(place) == ["install", "run", "delete"]


def test_join_wants_a_job(place):
    for command in ("create", "install"):
        assert place.run("tpu_vm.sh", command, *TPU).returncode == 0
    done = place.run("tpu_vm.sh", "join", *TPU, "--poll", "0.1")
    assert done.returncode == 1 and "no job was started" in done.stderr


# ---------------------------------------------------------------------------------------------------------------- SLURM


SLURM = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8", "JAXVLM_GPU": "a100"}


def sbatch(place, job, **more):
    return place.run("slurm.sbatch", *ODD, job=job, SLURM_SUBMIT_DIR=str(place.clone), **SLURM, **more)


def test_slurm_runs_and_requeues(place):
    done = sbatch(place, 'echo "$XLA_FLAGS" >"$LOGS/flags"; echo "$SRUN_CPUS_PER_TASK" >>"$LOGS/flags"')
    assert done.returncode == 0 and place.arguments() == ODD and not place.noted("scontrol"), done
    assert "1073741824" in (place.logs / "flags").read_text()  # two nodes
    assert (place.logs / "flags").read_text().split()[-1] == "8"
    assert sbatch(place, "exit 75").returncode == 0
    assert place.noted("scontrol") == [["requeue", "4242"]]


def test_slurm_stops_at_an_error(place):
    done = sbatch(place, "exit 1")
    assert done.returncode == 1 and "not queued again" in done.stderr and not place.noted("scontrol")
    assert not list(place.clone.glob(".slurm*"))
    done = sbatch(place, "exit 75", SLURM_RESTART_COUNT="50")
    assert done.returncode == 75 and "50 restarts" in done.stderr and not place.noted("scontrol")


def test_an_error_beside_a_75_counts(place):
    """srun's exit code is that of the peers who were left alone, not of the one who failed."""
    done = sbatch(place, "exit 1", OTHERS="75")
    assert done.returncode == 1 and not place.noted("scontrol"), done


def test_slurms_warning_saves_and_requeues(place):
    process = place.start("slurm.sbatch", *ODD, job=OBEDIENT, SLURM_SUBMIT_DIR=str(place.clone), **SLURM)
    wait_for(place.logs / "ready")
    process.terminate()  # --signal=B:TERM: the batch script alone
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    assert place.noted("scontrol") == [["requeue", "4242"]]
    assert (place.logs / "told").read_text().split() == ["told"]


def test_slurms_directives_and_dry_run(place):
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    directives = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH")
    )
    assert directives["ntasks-per-node"] == directives["gpus-per-node"]  # one process a GPU
    assert (
        directives["signal"].startswith("B:TERM@") and "requeue" in directives and directives["open-mode"] == "append"
    )
    code = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(i < code for i, line in enumerate(lines) if line.startswith("#SBATCH"))  # sbatch reads no further
    [command] = printed(place.run("slurm.sbatch", "--dry-run", "--check", *ODD))
    assert command[0] == "srun" and command[-len(ODD) - 2 :] == ["--check", "--", *ODD]
    assert not place.noted("srun")
