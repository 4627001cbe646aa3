"""Runs a command as N processes of a `jax.distributed` job on this machine, with D simulated devices each.

  python launch/local.py --processes 2 --devices 4 -- python -m jaxvlm.main --config C --workdir W

Every process gets, in its environment, the coordinator's address and its place in the job:
  JAX_COORDINATOR_ADDRESS, JAXVLM_NUM_PROCESSES, JAXVLM_PROCESS_ID
Their output comes through with a prefix. When one process fails, the others get a few seconds and are then ended, stopped
ones too. The exit code is that of an error, if a process had one; 75 if processes were killed or lost each other, which
the same command mends; 0 if all went well. `--retries N` runs the command again after a 75, at most so many times.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TextIO

GRACE_SECONDS = 10.0  # peers of a failed process notice by themselves in this time, or not at all
RETRY = 75


def environment(process: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """What process `process` gets on top of the caller's environment."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAXVLM_NUM_PROCESSES": str(processes),
        "JAXVLM_PROCESS_ID": str(process),
    }


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: Sequence[str], processes: int, devices: int, port: int | None = None) -> list[subprocess.Popen]:
    """Starts the processes, stdout and stderr of each in one pipe. Killing and waiting is the caller's."""
    port = port or free_port()
    return [
        subprocess.Popen(
            command,
            env=os.environ | environment(process, processes, devices, port),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for process in range(processes)
    ]


def run(command: Sequence[str], processes: int, devices: int, port: int | None = None, out: TextIO = sys.stdout) -> int:
    """Starts the processes, passes their output on, and returns the job's exit code."""
    children = start(command, processes, devices, port)
    lock = threading.Lock()

    def copy(index: int) -> None:
        for line in children[index].stdout:
            with lock:
                out.write(f"[{index}] {line}")
                out.flush()

    readers = [threading.Thread(target=copy, args=(index,), daemon=True) for index in range(processes)]
    for reader in readers:
        reader.start()
    try:
        code = wait(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
        for reader in readers:
            reader.join(timeout=5)
    return code


def wait(children: Sequence[subprocess.Popen], clock: Callable[[], float] = time.monotonic) -> int:
    """Waits for all; returns the job's exit code, see `job_code`. SIGTERM is passed on, for preemption drills."""
    previous = signal.signal(signal.SIGTERM, lambda *_: [child.terminate() for child in children])
    deadline = None
    try:
        while any(child.poll() is None for child in children):
            if deadline is None and any(child.poll() for child in children):
                deadline = clock() + GRACE_SECONDS
            if deadline is not None and clock() > deadline:
                break
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return job_code([child.poll() for child in children])


def job_code(codes: Sequence[int | None]) -> int:
    """The exit code of a job whose processes ended with `codes` (None: it had to be ended, negative: by that signal)."""
    errors = [code for code in codes if code is not None and code > 0 and code != RETRY]
    return errors[0] if errors else RETRY if any(code != 0 for code in codes) else 0


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="launch/local.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="simulated CPU devices in each process")
    parser.add_argument("--port", type=int, help="the coordinator's port (a free one)")
    parser.add_argument("--retries", type=int, default=0, help="how often to run the command again after exit code 75")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command to run")
    options = parser.parse_args(argv)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command or options.processes < 1 or options.devices < 1:
        parser.error("give at least one process, one device, and a command after --")
    if not shutil.which(command[0]):
        parser.error(f"{command[0]} is not a program; give the whole command after --")
    if options.dry_run:
        for process in range(options.processes):
            values = environment(process, options.processes, options.devices, options.port or 12345)
            print(*(f"{name}={value}" for name, value in values.items()), shlex.join(command))
        return 0
    for _ in range(options.retries + 1):
        code = run(command, options.processes, options.devices, options.port)
        if code != RETRY:
            break
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
