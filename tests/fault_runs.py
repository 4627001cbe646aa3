"""Jobs of several processes that are killed, stopped, starved and cut off, and what becomes of them.

    python tests/fault_runs.py --kills 50 --out docs/reliability.md      (make test-faults)

Every scenario ends with the run carried to its end by starting the same command again, and with its parameters compared,
bit for bit, with those of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]

import local  # noqa: E402 - launch/local.py

CONFIG = [
    f"--config={ROOT}/configs/quickstart.py:tiny",
    "--config.checkpoint.every_steps=5",
    "--config.stages[0].steps=15",
    "--config.stages[1].steps=30",
]
os.environ["JAXVLM_HEARTBEAT_SECONDS"] = "10"
os.environ["OMP_NUM_THREADS"] = "1"


class Job:
    """A running job; `output` fills while it runs."""

    def __init__(self, workdir: Path, processes: int, *overrides: str):
        command = [sys.executable, "-m", "jaxvlm.main", *CONFIG, *overrides, f"--workdir={workdir}"]
        os.environ["PYTHONPATH"] = str(ROOT)
        self.workdir, self.output, self.started = workdir, [], time.monotonic()
        self.left = half_written(workdir)
        self.children = local.start(command, processes, 1)
        self.readers = [threading.Thread(target=self._read, args=(child,), daemon=True) for child in self.children]
        for reader in self.readers:
            reader.start()

    def _read(self, child: subprocess.Popen) -> None:
        self.output.extend(child.stdout)

    def until(self, happened: Callable[[], bool]) -> bool:
        """Whether it happened before a process ended."""
        while all(child.poll() is None for child in self.children):
            if happened():
                return True
            time.sleep(0.002)
        return False

    def end(self, seconds: float = 30.0) -> tuple[list[int | None], float]:
        """Exit codes of the processes, None for those that had to be killed after `seconds`, and how long they took."""
        start = time.monotonic()
        while any(child.poll() is None for child in self.children) and time.monotonic() - start < seconds:
            time.sleep(0.01)
        codes, took = [child.poll() for child in self.children], time.monotonic() - start
        for child in self.children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for reader in self.readers:
            reader.join(timeout=5)
        return codes, took

    def text(self) -> str:
        return "".join(self.output)


def last_step(workdir: Path) -> tuple[int, int]:
    """(stage, step) of the newest line of metrics.jsonl."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        entry = [entry for entry in entries if "loss" in entry][-1]
        return (entry["stage"] == "instruct", entry["step"])
    return (0, 0)


def half_written(workdir: Path) -> set[tuple[str, int]]:
    """Folders of checkpoints that are not whole; a killed job leaves some."""
    found = set()
    for path in workdir.glob("stages/*/checkpoints/*tmp*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def finish(workdir: Path, processes: int) -> str:
    """Runs the job to its end, and returns what it printed."""
    job = Job(workdir, processes)
    codes, _ = job.end(300)
    assert codes == [0] * processes, f"{codes}\n{job.text()}"
    return job.text()


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    """The model's parameters and the losses of every step, read in a process of its own."""
    code = (
        "import sys, numpy as np; from jaxvlm.weights.saved import load_model; from jaxvlm.train.state import flat\n"
        "np.savez(sys.argv[2], **{k: np.asarray(v) for k, v in flat(load_model(sys.argv[1])[0]).items()})"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.npz"
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run([sys.executable, "-c", code, str(workdir), str(path)], check=True, env=environment)
        found = dict(np.load(path))
    return found | {"losses": losses(workdir)}


def losses(workdir: Path) -> np.ndarray:
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([entry["loss"] for entry in entries if "loss" in entry])


def assert_same(workdir: Path, expected: dict[str, np.ndarray]) -> None:
    found = parameters(workdir)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=f"{workdir}: {path}")


# ---------------------------------------------------------------------------------------------------------- random kills


def kill_somewhere(job: Job, where: str, rng: random.Random) -> bool:
    """Kills one process with -9 at a random point of `where`; whether the job was still there to be hit."""
    if where == "data":
        moment = time.monotonic() + rng.uniform(1.0, 9.0)
        hit = job.until(lambda: time.monotonic() > moment)
    elif where == "step":
        begun: list[tuple[int, int]] = []
        count, pause = rng.randint(1, 12), rng.uniform(0, 0.05)

        def steps_done() -> bool:
            now = last_step(job.workdir)
            if not begun or now < begun[0]:
                begun[:] = [now]
            return now[0] > begun[0][0] or now[1] >= begun[0][1] + count

        hit = job.until(steps_done)
        time.sleep(pause)
    elif where == "save":
        hit = job.until(lambda: half_written(job.workdir) - job.left)
        time.sleep(rng.uniform(0, 0.3))
    else:
        hit = job.until(lambda: any(job.workdir.glob("eval/answers-*.jsonl")))
        time.sleep(rng.uniform(0, 0.5))
    victim = rng.choice(job.children)
    if hit and victim.poll() is None:
        victim.kill()
        return True
    return False


class Kill(NamedTuple):
    where: str
    reached: tuple[int, int]
    codes: list[int | None]
    seconds: float


def kills(folder: Path, processes: int, count: int, expected: dict, seed: int) -> list[Kill]:
    """`count` kills in one run, which ends as it would have without them."""
    rng, workdir, done = random.Random(seed), folder / f"kills-{processes}-{seed}", []
    plan = [("data", "step", "save", "step", "save", "data", "step")[i % 7] for i in range(count - 1)] + ["eval"]
    for where in plan:
        job = Job(workdir, processes)
        hit = kill_somewhere(job, where, rng)
        codes, took = job.end()
        if not hit:
            assert codes == [0] * processes, f"{codes}\n{job.text()}"
            break
        done.append(Kill(where, last_step(workdir), codes, took))
        others = [code for code in codes if code != -signal.SIGKILL]
        assert all(code in (75, -signal.SIGABRT, 0, None) for code in others), f"{where}: {codes}\n{job.text()}"
        print(f"  {processes} processes, killed in {where} at {last_step(workdir)}: {codes} {took:.1f} s", flush=True)
    finish(workdir, processes)
    assert_same(workdir, expected)
    shutil.rmtree(workdir)
    return done


# ------------------------------------------------------------------------------------------------------------ the faults


class Row(NamedTuple):
    fault: str
    what: str
    seconds: float
    codes: list[int | None]


def fault_killed(workdir: Path, where: str) -> Row:
    job = Job(workdir, 2)
    ready = {
        "idle": lambda: any(workdir.glob("eval/answers-*.jsonl")),
        "stepping": lambda: last_step(workdir) >= (1, 7),
    }
    assert job.until(ready.get(where, lambda: half_written(workdir) and last_step(workdir) >= (1, 4))), job.text()
    job.children[1].kill()
    codes, took = job.end()
    return Row(f"process 1 killed (-9) while {where}", "process 0 ends by itself", took, codes)


def fault_stopped(workdir: Path) -> Row:
    job = Job(workdir, 2, "--config.checkpoint.watchdog_seconds=20", "--config.stages[0].steps=15")
    assert job.until(lambda: last_step(workdir) >= (1, 7)), job.text()
    job.children[1].send_signal(signal.SIGSTOP)
    start = time.monotonic()
    codes = [job.children[0].wait(timeout=120), None]
    took = time.monotonic() - start
    job.end(0)
    dumped = "stacks of this process" in job.text()
    what = "the watchdog (20 s) writes every stack" if dumped else "noticed by the coordination service"
    return Row("process 1 stopped (SIGSTOP)", f"{what}; process 0 ends, the launcher kills process 1", took, codes)


def fault_disk_full(workdir: Path) -> Row:
    job = Job(workdir, 2)
    assert job.until(lambda: last_step(workdir) >= (1, 6)), job.text()
    free = shutil.disk_usage(workdir).free
    ballast = workdir.parent / "ballast"
    with ballast.open("wb") as file:
        file.write(b"\0" * max(0, free - 300_000))
    start = time.monotonic()
    codes, _ = job.end(60)
    ballast.unlink()
    assert "disk is full" in job.text(), job.text()
    return Row(
        "disk full while saving",
        "process 0 names folder, size and free space (exit 1)",
        time.monotonic() - start,
        codes,
    )


def fault_bit_flip(workdir: Path) -> Row:
    job = Job(workdir, 2)
    assert job.until(lambda: last_step(workdir) >= (1, 18)), job.text()
    for child in job.children:
        child.kill()
    codes, _ = job.end()
    steps = [p for p in (workdir / "stages/1_instruct/checkpoints").iterdir() if p.name.isdigit()]
    newest = max(steps, key=lambda p: int(p.name))
    file = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    start = time.monotonic()
    job = Job(workdir, 2)
    assert job.until(lambda: "resuming from step" in job.text().split("Stage 2")[-1]), job.text()
    took = time.monotonic() - start
    codes, _ = job.end(300)
    assert "is damaged" in job.text() and f"resuming from step {int(newest.name) - 5}" in job.text(), job.text()
    return Row("a bit of the newest checkpoint flipped", "said, set aside, the one before is used", took, codes)


def fault_sigterm(workdir: Path) -> Row:
    job = Job(workdir, 2)
    assert job.until(lambda: last_step(workdir) >= (1, 7)), job.text()
    job.children[1].send_signal(signal.SIGTERM)
    codes, took = job.end(60)
    assert codes == [0, 0] and job.text().count("everything is saved") == 1, f"{codes}\n{job.text()}"
    step = int(job.text().split("after step ")[1].split()[0])
    assert (workdir / f"stages/1_instruct/checkpoints/{step}").is_dir()
    return Row("SIGTERM to process 1 alone", "both stop after the same step, saved", took, codes)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of 48 MB, where this user may mount one."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder], capture_output=True, check=False
    )
    try:
        yield folder if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", folder], check=False)


FAULTS: dict[str, Callable[[Path], Row]] = {
    "idle": lambda w: fault_killed(w, "idle"),
    "stepping": lambda w: fault_killed(w, "stepping"),
    "saving": lambda w: fault_killed(w, "saving"),
    "sigstop": fault_stopped,
    "flip": fault_bit_flip,
    "sigterm": fault_sigterm,
}


def run_fault(name: str, folder: Path, expected: dict) -> Row | None:
    """One fault, and the run carried to the same end; None where a small disk cannot be mounted."""
    with small_disk(folder / "small") if name == "disk" else contextlib.nullcontext(folder) as place:
        if place is None:
            return None
        workdir = place / f"fault-{name}"
        row = fault_disk_full(workdir) if name == "disk" else FAULTS[name](workdir)
        finish(workdir, 2)
        assert_same(workdir, expected)
    print(f"  {row}", flush=True)
    return row


def resized(folder: Path, reference: dict) -> tuple[float, float]:
    """4 processes, then 2, then 1: the largest relative difference of a loss, of all steps and of those after the change."""
    workdir = folder / "resized"
    for processes, until in ((4, (0, 8)), (2, (1, 8))):
        job = Job(workdir, processes, *GENTLE)
        assert job.until(lambda until=until: last_step(workdir) >= until), job.text()
        for child in job.children:
            child.kill()
        job.end()
    job = Job(workdir, 1, *GENTLE)
    assert job.end(300)[0] == [0], job.text()
    found = losses(workdir)
    assert len(found) == len(reference["losses"])
    difference = np.abs(found / reference["losses"] - 1)
    return float(difference.max()), float(difference[20:].max())


# A stage of toy rates is chaotic: rounding grows tenfold in ten steps. At these rates the curve itself can be compared.
GENTLE = ["--config.stages[0].optimizer.learning_rate=1e-3", "--config.stages[1].optimizer.learning_rate=3e-4"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability.md")
    options = parser.parse_args()
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="jaxvlm-faults-"))
    expected = {}
    for processes in (2, 4):
        finish(folder / f"whole-{processes}", processes)
        expected[processes] = parameters(folder / f"whole-{processes}")
        print(f"{processes} processes uninterrupted: {time.monotonic() - start:.0f} s", flush=True)
    rows = [run_fault(name, folder, expected[2]) for name in (*FAULTS, "disk")]
    done: list[tuple[int, Kill]] = []
    seed = 0
    while len(done) < options.kills:
        processes = 4 if seed % 3 == 2 else 2
        some = kills(folder, processes, min(9, options.kills - len(done)), expected[processes], seed)
        done += [(processes, kill) for kill in some]
        seed += 1
    gentle = folder / "gentle"
    job = Job(gentle, 1, *GENTLE)
    assert job.end(300)[0] == [0], job.text()
    drift = resized(folder, {"losses": losses(gentle)})
    write(options.out, [row for row in rows if row], done, drift, time.monotonic() - start)
    shutil.rmtree(folder)


def write(out: Path, rows: list[Row], done: list[tuple[int, Kill]], drift: tuple[float, float], seconds: float) -> None:
    """Puts the measurements between the page's two marks."""
    lines = [f"{len(done)} kills and {len(rows)} faults in {seconds / 60:.0f} minutes on {os.cpu_count()} cores.", ""]
    lines += [
        "| fault | what happened | exit codes | until all had ended or gone on | parameters |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        codes = ", ".join("killed by the launcher" if code is None else str(code) for code in row.codes)
        lines.append(f"| {row.fault} | {row.what} | {codes} | {row.seconds:.1f} s | same bits |")
    lines += [
        "",
        "| killed (-9) in | processes | kills | peers ended after (median, most) | ended by the launcher after 30 s | parameters |",
        "|---|---|---|---|---|---|",
    ]
    for processes in (2, 4):
        for where in ("data", "step", "save", "eval"):
            mine = [kill for count, kill in done if (count, kill.where) == (processes, where)]
            times = [kill.seconds for kill in mine]
            hung = sum(None in kill.codes for kill in mine)
            if mine:
                spread = f"{np.median(times):.1f} s, {max(times):.1f} s"
                lines.append(f"| {where} | {processes} | {len(mine)} | {spread} | {hung} | same bits |")
    lines += [
        "",
        f"4 processes, then 2, then 1: no loss differs by more than {drift[0]:.1e} of its value from the run of one process.",
    ]
    before, after = out.read_text().split("<!-- measured -->\n")[::2]
    out.write_text(before + "<!-- measured -->\n" + "\n".join(lines) + "\n<!-- measured -->\n" + after)


if __name__ == "__main__":
    main()
