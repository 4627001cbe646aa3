"""Several processes as one job: how they find each other, wait for each other, stop together and notice a dead peer."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxvlm.config import ConfigError, UserError

RETRY = 75  # EX_TEMPFAIL: what went wrong is the machine's doing; the same command again goes on
BARRIER_SECONDS = 1800.0
# What jax, gloo, NCCL and the coordination service say when a peer is gone. Anything else is an error of our own.
LOST = (
    "gloo",
    "nccl",
    "connection",
    "heartbeat",
    "unavailable",
    "deadline_exceeded",
    "barrier",
    "coordination",
    "aborted",
)
T = TypeVar("T")


# ------------------------------------------------------------------------------------------------------------- starting


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the job's processes, if there are several; call it before anything else asks jax for devices.

    The place in the job comes from the arguments (the flags of the main job), from the environment that `launch/local.py`
    sets, or from the cluster that jax detects by itself: TPU VMs and slices, GKE JobSet, SLURM, Open MPI. All but process 0
    are quiet from here on; their errors come with their number. Raises `ConfigError` for half an address, and for a
    process that would be alone on a slice of several hosts.
    """
    env = os.environ
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS")
    given = {
        "--coordinator": coordinator,
        "--num_processes": env.get("JAXVLM_NUM_PROCESSES") if num_processes is None else num_processes,
        "--process_id": env.get("JAXVLM_PROCESS_ID") if process_id is None else process_id,
    }
    missing = [flag for flag, value in given.items() if value is None]
    plain = not missing
    wanted = num_processes is not None or process_id is not None or "JAXVLM_NUM_PROCESSES" in env
    if missing and (wanted or (coordinator and not _on_cluster())):
        raise ConfigError(
            f"A process of several needs all of --coordinator, --num_processes and --process_id; add {missing[0]}."
        )
    if plain or _on_cluster():
        # Our own handler stops the job at a step that all agree on; jax's would swallow SIGTERM.
        jax.config.update("jax_enable_preemption_service", False)
        if plain and (platforms := env.get("JAX_PLATFORMS", "")).startswith("cpu") and platforms:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        place = (coordinator, int(given["--num_processes"]), int(given["--process_id"])) if plain else ()
        jax.distributed.initialize(*place, heartbeat_timeout_seconds=int(env.get("JAXVLM_HEARTBEAT_SECONDS", "100")))
    refuse_to_be_alone(env, jax.process_count())
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        sys.stderr = _Numbered(sys.stderr, f"[process {jax.process_index()}] ")


def _on_cluster() -> bool:
    """Whether jax detects a cluster by itself (an interactive SLURM shell, which has no task, is none)."""
    from jax._src import clusters

    kinds = clusters.ClusterEnv._cluster_types  # no public name says it, and `initialize` fails where there is none
    return any(not kind.opt_in_only_method and kind.is_env_present() for kind in kinds)


def refuse_to_be_alone(env: Any, process_count: int) -> None:
    """Raises `ConfigError` if the environment names several TPU hosts or SLURM tasks and this process is on its own.

    Such a process would wait for its peers for ever, or worse: each would train by itself into the same folder.
    """
    hosts = (env.get("TPU_WORKER_HOSTNAMES") or env.get("TPU_PROCESS_ADDRESSES") or "").split(",")
    named = {
        f"TPU_WORKER_HOSTNAMES names {len(hosts)} hosts": len(hosts),
        f"MEGASCALE_NUM_SLICES is {env.get('MEGASCALE_NUM_SLICES')}": int(env.get("MEGASCALE_NUM_SLICES") or 1),
        f"SLURM_NTASKS is {env.get('SLURM_NTASKS')}": int(env.get("SLURM_NTASKS") or 1)
        if "SLURM_STEP_ID" in env
        else 1,
    }
    if process_count == 1 and (why := next((text for text, count in named.items() if count > 1), "")):
        raise ConfigError(
            f"This process is alone, but {why}. Start the same command on every host at once (launch/ has a script for "
            "each kind of cluster), or give --coordinator HOST:PORT --num_processes N --process_id I. To use this host "
            "alone on purpose, unset that variable."
        )


class _Numbered:
    """A stream whose lines say which process wrote them."""

    def __init__(self, stream: Any, prefix: str):
        self.stream, self.prefix, self.fresh = stream, prefix, True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            self.stream.write((self.prefix if self.fresh else "") + line)
            self.fresh = line.endswith("\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def describe_mesh(mesh: Mesh) -> str:
    """Which devices hold which part of the mesh: one line a process, a range of coordinates for each axis."""
    axes = "x".join(f"{name}={size}" for name, size in mesh.shape.items())
    lines = [f"Mesh {axes}: {mesh.size} {mesh.devices.flat[0].device_kind} devices in {jax.process_count()} processes."]
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    if jax.process_count() > 1:
        for process in range(jax.process_count()):
            where = np.argwhere(owners == process)
            spans = [
                f"{a} {low}-{high}" for a, low, high in zip(mesh.shape, where.min(0), where.max(0), strict=True) if high
            ]
            ids = ",".join(str(device.id) for device in mesh.devices[owners == process])
            lines.append(f"  process {process}: devices {ids}: {', '.join(spans) or 'all axes 0'}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- waiting


def _client() -> Any:
    from jax._src import distributed  # the coordination service has no public name; orbax and MaxText use this one

    return distributed.global_state.client


def barrier(name: str, seconds: float = BARRIER_SECONDS) -> None:
    """Waits until every process has come here. Raises jax's error naming the barrier and who is missing after `seconds`."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(f"jaxvlm: {name}", round(seconds * 1000))


def first_then_others(name: str, function: Callable[[], T]) -> T:
    """`function` in process 0, and then in the others, which find on the shared disk what it has made there."""
    result = function() if jax.process_index() == 0 else None
    barrier(name)
    return function() if jax.process_index() else result


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all must call."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array([flag])).any())


def whole(x: Any) -> np.ndarray:
    """The value of an array that may be spread over processes, on every host; all must call."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


# ------------------------------------------------------------------------------------------------------------- stopping


class StopRequest:
    """SIGINT or SIGTERM in any process, turned into one step after which all of them stop.

    The process that is told after step s publishes s + 2 before it dispatches step s + 1. Whoever asks after step n has
    waited for the numbers of step n - 1, a global step, so nobody has asked after s + 2 before that was published: all
    stop there, though their host loops are not in step. `scope` keeps the stages of one job apart.
    """

    def __init__(self, scope: str):
        self.key, self.signum, self.at = f"jaxvlm/stop/{scope}", 0, None
        self.asked = False

    def agreed(self, step: int) -> bool:
        """To be called after every step; True for the one after which to stop."""
        if jax.process_count() == 1:
            return bool(self.signum)
        if self.signum and not self.asked:
            self.asked = True
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
                _client().key_value_set(self.key, json.dumps([step + 2, int(self.signum)]))
        if self.at is None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # no such key: nobody has been told
                self.at, self.signum = json.loads(_client().key_value_try_get(self.key))
        return self.at == step

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Takes SIGINT and SIGTERM; further ones change nothing.

        Schedulers repeat SIGTERM, and send it to processes that a peer has already told to stop: none may cost the save.
        Who will not wait has SIGQUIT, which is nobody's routine.
        """

        def handler(signum, _):
            if not self.signum:
                self.signum = signum
                print("\nStopping after this step, saving first (Ctrl-\\ ends at once, without saving).", flush=True)

        try:
            old = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread (a notebook's worker, say): signals stay as they are
            old = {}
        try:
            yield self
        finally:
            for s, previous in old.items():
                signal.signal(s, previous)


# ------------------------------------------------------------------------------------------------- noticing what is wrong


class Watchdog:
    """Ends the process with exit code 75 and every thread's stack if no step is done for `seconds`; 0 only writes heartbeats.

    A peer that is alive but stuck never misses the coordination service's heartbeats (ecosystem.md 4.3): only the lack of
    steps shows it. `folder`/process_N.json says every ten seconds, at most, which step this process has done and when.
    """

    def __init__(self, seconds: float, folder: Path):
        self.seconds, self.path = seconds, folder / f"process_{jax.process_index()}.json"
        self.beat_at, self.step, self.closed = time.monotonic(), 0, threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def beat(self, step: int) -> None:
        self.step, self.beat_at = step, time.monotonic()

    def close(self) -> None:
        self.closed.set()
        self.thread.join()

    def _watch(self) -> None:
        every = min(10.0, self.seconds / 10) if self.seconds else 10.0
        while not self.closed.wait(every):
            silent = time.monotonic() - self.beat_at
            if self.seconds and silent > self.seconds:
                print(
                    f"error: no step for {silent:.0f} s after step {self.step}. The stacks of this process:",
                    file=sys.stderr,
                )
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
                leave(RETRY)
            with contextlib.suppress(OSError):  # a full disk is the checkpoint's to report
                self.path.write_text(
                    json.dumps({"step": self.step, "time": time.time(), "silent_seconds": round(silent, 1)})
                )


@contextlib.contextmanager
def leaving_peers() -> Iterator[None]:
    """Ends a process of several at once when what is inside fails: with exit code 75 if another process is gone.

    Nothing is closed on the way: a checkpoint that is being written needs the peers too, and would be waited for in vain.
    Errors that are explained to the user, and interruptions, pass.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        traceback.print_exception(error)
        if lost_peer(error):
            print(
                "error: another process of the job is gone. Run the same command again everywhere: it resumes.",
                file=sys.stderr,
            )
            leave(RETRY)
        leave(1)


def lost_peer(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that another process of the job is gone or does not answer.

    By its words: jax raises a failed collective as JaxRuntimeError, or as ValueError where it was dispatched at once.
    """
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return any(
        isinstance(cause, (RuntimeError, ValueError)) and any(word in str(cause).lower() for word in LOST)
        for cause in causes
    )


def leave(code: int) -> None:
    """Ends the process now: Python's own way out would wait at jax's shutdown barrier for peers that do not come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
