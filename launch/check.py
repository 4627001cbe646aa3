"""A look at everything a long job stands on, in a minute or two: run it first, on all workers, with the job's arguments.

  python launch/check.py --config C --workdir W [--devices 16] [--config.x=y ...]     (one process)
  python launch/local.py --processes 2 --devices 4 -- python launch/check.py ...      (several, on one machine)
  launch/tpu_vm.sh check ... -- --config C --workdir W                                (every worker of a slice)

One line each from process 0: the processes and devices, an all-reduce over all devices (its result, its bandwidth), the files
that the config names and one batch of every stage, and a checkpoint written to the work directory, read back and deleted.
Exit code 0 when all is well, 1 when something is not, with what to do about it. The first look at a large data set makes the
tables that the job would make, so the job finds them; give it time with --timeout.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from jaxvlm import job
from jaxvlm.config import RunConfig, UserError
from jaxvlm.data.assets import resolve_assets
from jaxvlm.main import load_config
from jaxvlm.parallel import processes
from jaxvlm.parallel.mesh import make_mesh, require_rows_divide
from jaxvlm.train.bucket import require_writable
from jaxvlm.weights.saved import is_address, place

MESSAGE_BYTES = 1000  # of a failure, as it travels to process 0
MEGABYTES = 64  # that each device reduces, and that a checkpoint holds


class CheckError(UserError):
    """Something that the job would fail on; the message ends with what to do."""


def main(argv: Sequence[str]) -> int:
    options, overrides = parse(argv)
    together = "Start it on every worker, as tpu_vm.sh and srun do; open the ports between them."
    try:
        with patience(options.timeout, "start", together):
            processes.start()
            jax.devices()
        config = load_config(options.config, overrides) if options.config else None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    limit = options.timeout
    passed = [
        report("devices", lambda: devices(options, config), limit, "Look at every worker's own: jaxvlm doctor."),
        report(
            "all-reduce", all_reduce, limit, "Look at the network between the workers, with NCCL_DEBUG=INFO on GPUs."
        ),
    ]
    if config:
        passed.append(report("data", lambda: data(config), limit, "Give it longer: --timeout.", alike=True))
    if options.workdir:
        passed.append(checkpoint(options.workdir, limit))
    if jax.process_index() == 0:
        left_out = [name for name, given in (("--config", config), ("--workdir", options.workdir)) if not given]
        note = f" Not all was looked at: {' and '.join(left_out)} not given." if left_out else ""
        print(f"{'All is well.' if all(passed) else 'The job would fail.'}{note}", flush=True)
    return 0 if all(passed) else 1


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="launch/check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="the job's, with its overrides")
    parser.add_argument("--workdir", help="the job's; a checkpoint is written there and deleted")
    parser.add_argument("--devices", type=int, help="how many there should be, over all processes")
    parser.add_argument("--processes", type=int, help="how many there should be")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one check may take (600)")
    options, overrides = parser.parse_known_args(argv)
    if strange := [word for word in overrides if not word.startswith("--config.")]:
        parser.error(f"unknown argument {strange[0]}")
    if overrides and not options.config:
        parser.error("overrides need --config")
    return options, overrides


@contextmanager
def patience(seconds: float, name: str, fix: str) -> Iterator[None]:
    """Ends the process when the block takes longer: a collective that waits for a lost peer cannot be interrupted."""

    def give_up() -> None:
        print(f"FAIL  {name:<12}not done in {seconds:g} s. {fix}", flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def report(name: str, check: Callable[[], str], seconds: float, fix: str, alike: bool = False) -> bool:
    """Runs a check on all processes; process 0 prints one line, or one for each thing that went wrong, and where.

    A check that fails on one process must not leave the others waiting: what it does together with them (a collective)
    comes after what it does alone. `alike` checks must say the same on all processes.
    """
    began = time.perf_counter()
    with patience(seconds, name, fix):
        problem, value = "", ""
        try:
            value = check()
        except (UserError, OSError, ValueError, RuntimeError) as error:
            problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}. {fix}"
        problems = gather(problem)
        if alike and not any(problems):
            values = gather(value)
            problems = ["" if other == values[0] else f"'{other}', but process 0 has '{values[0]}'" for other in values]
    if jax.process_index() == 0:
        for text in dict.fromkeys(filter(None, problems)):
            where = ", ".join(str(process) for process, other in enumerate(problems) if other == text)
            print(f"FAIL  {name:<12}{f'[process {where}] ' if len(problems) > 1 else ''}{text}", flush=True)
        if not any(problems):
            print(f"ok    {name:<12}{value} ({time.perf_counter() - began:.1f} s)", flush=True)
    return not any(problems)


def gather(text: str) -> list[str]:
    """The texts of all processes, cut to `MESSAGE_BYTES`."""
    mine = np.frombuffer(text.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0"), np.uint8)
    every = multihost_utils.process_allgather(mine).reshape(-1, MESSAGE_BYTES)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in every]


# ---------------------------------------------------------------------------------------------------------- the checks


def devices(options: argparse.Namespace, config: RunConfig | None) -> str:
    """As many processes and devices as expected, of one kind, evenly spread, and the config's mesh on them."""
    kinds = sorted({device.device_kind for device in jax.devices()})
    counts = sorted({sum(d.process_index == p for d in jax.devices()) for p in range(jax.process_count())})
    seen = (
        f"{jax.process_count()} process{'es' * (jax.process_count() > 1)}, {jax.device_count()} x {' and '.join(kinds)}"
    )
    idle = [path for kind in ("accel", "vfio/", "nvidia") for path in glob.glob(f"/dev/{kind}[0-9]*")]
    if jax.default_backend() == "cpu" and idle and os.environ.get("JAX_PLATFORMS") != "cpu":
        raise CheckError(f"jax uses the CPU, but there is {idle[0]}. `jaxvlm doctor` says what to install.")
    if options.processes not in (None, jax.process_count()):
        raise CheckError(f"{seen}, but {options.processes} processes are expected. Start it on every worker at once.")
    if options.devices not in (None, jax.device_count()):
        raise CheckError(
            f"{seen}, but {options.devices} devices are expected. Start it on every worker; see jaxvlm doctor there."
        )
    if len(kinds) > 1 or len(counts) > 1:
        raise CheckError(
            f"{seen}, {counts} a process: a mesh needs like devices, as many on each. Replace the odd worker."
        )
    if config is None:
        return seen
    mesh = make_mesh(config.mesh)
    for stage in config.stages:
        require_rows_divide(stage, mesh)
    axes = mesh.shape
    return f"{seen}; mesh {', '.join(f'{name}={size}' for name, size in axes.items() if size > 1) or 'of one'}"


def all_reduce() -> str:
    """Device i holds i + 1 everywhere; the sum over all must be n (n + 1) / 2. Bandwidth as in nccl-tests ("bus")."""
    count = jax.device_count()
    mesh = everything()
    elements = (MEGABYTES if jax.default_backend() != "cpu" else 4) * 2**20 // 4
    values = jax.make_array_from_callback(
        (count, elements),
        NamedSharding(mesh, PartitionSpec("all")),
        lambda index: np.full((1, elements), index[0].start or 0, np.float32) + 1,
    )

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=PartitionSpec("all"), out_specs=PartitionSpec())
    def reduce(shard: jax.Array) -> jax.Array:  # [1, elements]
        return jax.lax.psum(shard, "all")

    result = np.asarray(reduce(values).addressable_data(0))
    expected = count * (count + 1) / 2
    if not (result == expected).all():
        raise CheckError(
            f"the sum over {count} devices is {result.min():g} to {result.max():g} and not {expected:g}. A device or link "
            "computes wrongly: leave that worker out, and try again without flags in XLA_FLAGS and LIBTPU_INIT_ARGS."
        )
    if count == 1:
        return "one device, nothing to reduce"
    times = []
    for _ in range(5):
        began = time.perf_counter()
        reduce(values).block_until_ready()
        times.append(time.perf_counter() - began)
    seconds = sorted(times)[len(times) // 2]
    size = elements * 4
    bandwidth = 2 * (count - 1) / count * size / seconds
    took = f"{size / 2**20:.0f} MiB in {seconds * 1e3:.1f} ms, {bandwidth / 1e9:.1f} GB/s a device"
    return f"sum over {count} devices is right; {took}"


def data(config: RunConfig) -> str:
    """The files that the config names are here; every stage plans its rows (one plan on all processes) and gives a batch."""
    config = resolve_assets(config)
    named = {f"config.init.{part}": getattr(config.init, part) for part in ("model", "vision", "connector", "llm")}
    named |= {"config.eval.path": config.eval.path, "config.prompt.tokenizer": config.prompt.tokenizer}
    for key, path in named.items():
        if path and not epath.Path(path).exists():
            raise CheckError(f"{key} is '{path}', which is not there. Copy or mount it on every worker.")
    lines, plans = [], ""
    for number, stage in enumerate(config.stages):
        loader = job.stage_loader(number, config)
        batch = next(loader.batches())
        plans += repr(loader.fingerprint)
        lines.append(
            f"{stage.name}: {loader.num_rows:,} rows, {'x'.join(map(str, batch['tokens'].shape))} tokens a process"
        )
    return f"{'; '.join(lines)}; plan {hashlib.sha256(plans.encode()).hexdigest()[:8]}"


def checkpoint(workdir: str, limit: float) -> bool:
    """The work directory can be written, is one place for all processes, and takes a checkpoint. Nothing stays in it."""
    fix = "Create it, or get the right to write there."
    if is_address(workdir) and not report("bucket", lambda: f"{require_writable(workdir)} answers", limit, fix):
        return False
    directory = epath.Path(place(workdir))
    trial, is_new, first = directory / ".launch-check", not directory.exists(), jax.process_index() == 0
    token = gather(str(time.time_ns()))[0]

    def write() -> str:
        if first:
            trial.mkdir(parents=True, exist_ok=True)
            (trial / "token").write_text(token)
        return f"{workdir} can be written"

    def read() -> str:
        if not (trial / "token").exists() or (trial / "token").read_text() != token:
            raise CheckError(
                f"{workdir} is another place than on process 0. Give a --workdir on a file system that all share."
            )
        return "one place for all processes"

    try:
        return (
            report("workdir", write, limit, fix)
            and report("shared", read, limit, "Give a --workdir on a file system that all share.")
            and report("checkpoint", lambda: round_trip(trial / "state", int(token)), limit, "Look at the storage.")
        )
    finally:
        if first and trial.exists():
            (directory if is_new else trial).rmtree()


def round_trip(path: epath.Path, seed: int) -> str:
    """Writes an array sharded over all devices, reads it, compares, and says how fast."""
    rows = jax.device_count()
    columns = max(1, (MEGABYTES if jax.default_backend() != "cpu" else 4) * 2**20 // 4 // rows)
    sharding = NamedSharding(everything(), PartitionSpec("all"))
    values = np.random.default_rng(seed).random((rows, columns), np.float32)
    state = {"x": jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])}
    began = time.perf_counter()
    ocp.save(path, state)
    saved = time.perf_counter()
    loaded = ocp.load(path, {"x": jax.ShapeDtypeStruct(values.shape, np.float32, sharding=sharding)})
    read = time.perf_counter()
    for shard in loaded["x"].addressable_shards:
        if not np.array_equal(shard.data, values[shard.index]):
            raise CheckError(f"a checkpoint in {path.parent.parent} reads back other values. Use another storage.")
    out, back = values.nbytes / (saved - began), values.nbytes / (read - saved)
    return f"{values.nbytes / 1e6:.0f} MB written ({out / 1e6:.0f} MB/s), read back the same ({back / 1e6:.0f} MB/s), deleted"


def everything() -> Mesh:
    """All devices along one axis, in jax's order: `jax.make_mesh` wants slices told apart."""
    return Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.exit(code)
