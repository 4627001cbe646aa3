"""What the processes of a job agree on, and what a checkpoint says of itself. The runs that are killed: test_faults.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fault_runs import local
from jax.sharding import NamedSharding, PartitionSpec

from jaxvlm.config import CheckpointConfig, ConfigError, MeshConfig
from jaxvlm.parallel import processes
from jaxvlm.parallel.mesh import make_mesh
from jaxvlm.train.checkpoint import StageCheckpointer, content_hash
from jaxvlm.train.inspect_checkpoint import describe_checkpoint
from jaxvlm.train.state import TrainState
from jaxvlm.weights.saved import CheckpointError, explain_full_disk


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "names 2 hosts"),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1,c:1"}, "names 3 hosts"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_NUM_SLICES is 2"),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, "SLURM_NTASKS is 8"),
    ],
)
def test_a_process_alone_on_a_slice_refuses(environment, said):
    with pytest.raises(ConfigError, match=said):
        processes.refuse_to_be_alone(environment, 1)
    processes.refuse_to_be_alone(environment, 2)


def test_alone_where_nothing_names_others():
    processes.refuse_to_be_alone({"TPU_WORKER_HOSTNAMES": "localhost", "SLURM_NTASKS": "8"}, 1)  # an salloc shell


def test_half_an_address_is_refused():
    with pytest.raises(ConfigError, match="--coordinator"):
        processes.start(None, 2, 0)


@pytest.mark.parametrize(
    ("codes", "job"),
    [([0, 0], 0), ([-9, 75], 75), ([75, 1], 1), ([-6, 0], 75), ([None, 75], 75), ([None, 0], 75), ([1, -9], 1)],
)
def test_a_job_ends_with_the_error_that_running_again_does_not_mend(codes, job):
    assert local.job_code(codes) == job


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllReduce failed: Connection closed by peer"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: Read error: Connection reset by peer"), True),  # seen while saving
        (jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (KeyError("connection"), False),
    ],
)
def test_a_lost_peer_is_told_from_an_error_of_our_own(error, lost):
    assert processes.lost_peer(error) == lost
    outer = AssertionError("while saving")
    outer.__cause__ = error
    assert processes.lost_peer(outer) == lost


def test_a_watchdog_dumps_the_stacks_and_exits_75(tmp_path):
    code = (
        "import sys, time, pathlib; from jaxvlm.parallel.processes import Watchdog\n"
        "def stuck_in_a_collective(): time.sleep(60)\n"
        "dog = Watchdog(1.0, pathlib.Path(sys.argv[1])); dog.beat(7); stuck_in_a_collective()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(processes.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 75
    assert "after step 7" in done.stderr and "stuck_in_a_collective" in done.stderr
    assert json.loads((tmp_path / "process_0.json").read_text())["step"] == 7


def test_a_signal_in_the_only_process_stops_at_once():
    with processes.StopRequest("test").listening() as stop:
        assert not stop.agreed(3)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(3) and stop.signum == signal.SIGTERM


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_process_that_a_peer_has_told_to_stop_changes_nothing(signum):
    with processes.StopRequest("test").listening() as stop:
        stop.signum = signal.SIGTERM  # as `agreed` finds it, published by the peer
        os.kill(os.getpid(), signum)
        assert stop.agreed(3) and stop.signum == signal.SIGTERM


def state(scale: float = 1.0, mesh=None) -> TrainState:
    weights = {"llm": {"kernel": scale * jnp.arange(64.0).reshape(8, 8)}}
    sharding = NamedSharding(mesh or make_mesh(MeshConfig()), PartitionSpec("fsdp"))
    place = lambda tree: jax.tree.map(lambda x: jax.device_put(x, sharding), tree)  # noqa: E731
    return TrainState(jnp.int32(1), place(weights), place({"vision": {"kernel": jnp.ones((8, 3), jnp.bfloat16)}}), ())


def about(data: str = "d", frozen: str = "f") -> dict:
    return {"stage": "s", "data": data, "frozen": frozen, "steps": 9, "seed": 0, "origin": {}, "optimizer": {}}


def write(folder: Path, steps: int, policy: CheckpointConfig) -> None:
    saver = StageCheckpointer(folder, policy, about())
    for step in range(1, steps + 1):
        saver.save(state(step)._replace(step=jnp.int32(step)), wait=True)
    saver.close()


def test_kept_are_the_newest_and_every_kth(tmp_path):
    write(tmp_path / "checkpoints", 7, CheckpointConfig(keep=2, keep_every=3))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["3", "6", "7"]


def test_other_data_or_other_frozen_weights_are_refused(tmp_path):
    write(tmp_path / "checkpoints", 1, CheckpointConfig())
    for changed, said in ((about(data="x"), "other training data"), (about(frozen="x"), "other frozen weights")):
        saver = StageCheckpointer(tmp_path / "checkpoints", CheckpointConfig(), changed)
        with pytest.raises(CheckpointError, match=said):
            saver.restore(state())


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, damage):
    write(tmp_path / "checkpoints", 3, CheckpointConfig(keep=2))
    files = [p for p in (tmp_path / "checkpoints" / "3").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 16
    {"flip": lambda: largest.write_bytes(data), "cut": lambda: os.truncate(largest, 9), "delete": largest.unlink}[
        damage
    ]()
    assert largest.name in describe_checkpoint(tmp_path)
    saver = StageCheckpointer(tmp_path / "checkpoints", CheckpointConfig(keep=2), about())
    assert saver.latest_step() == 2
    np.testing.assert_array_equal(saver.restore(state()).trainable["llm"]["kernel"], 2 * np.arange(64.0).reshape(8, 8))
    assert "damaged" in capsys.readouterr().out
    assert [p.name.split("-")[0] for p in (tmp_path / "damaged").iterdir()] == ["3"]


def test_inspect_says_what_is_in_it(tmp_path):
    write(tmp_path / "checkpoints", 2, CheckpointConfig())
    text = describe_checkpoint(tmp_path / "checkpoints")
    for said in ("stage 's', step 2 of 9", "as their checksums say", "trainable/llm/kernel", "256 B", "[8, 8]"):
        assert said in text
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        describe_checkpoint(tmp_path / "damaged")


def test_the_hash_of_the_frozen_weights_sees_every_bit_and_no_mesh():
    one = {"a": {"b": jnp.arange(96, dtype=jnp.bfloat16).reshape(8, 12)}}
    first = content_hash(one)
    for axes in (MeshConfig(), MeshConfig(data=2, fsdp=4), MeshConfig(fsdp=2, tensor=4)):
        spread = NamedSharding(make_mesh(axes), PartitionSpec("fsdp", "tensor"))
        assert content_hash(jax.tree.map(lambda x, spread=spread: jax.device_put(x, spread), one)) == first
    x = one["a"]["b"]
    swapped = x.at[0, 1].set(x[1, 0]).at[1, 0].set(x[0, 1])
    assert (
        len({first, content_hash({"a": {"b": swapped}}), content_hash({"a": {"c": x}}), content_hash({"a": {"b": -x}})})
        == 4
    )


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ValueError("open: Read-only file system")])
def test_a_lost_permission_is_one_sentence(tmp_path, error):
    with pytest.raises(CheckpointError, match="not permitted any more"), explain_full_disk(tmp_path):
        raise error
