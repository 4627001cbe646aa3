"""Chips and topologies that a program can be compiled for without having them.

XLA's compilers for TPU (libtpu) and GPU (the CUDA plugin) need a description of the devices and no device: see
`jax.experimental.topologies`. What a chip can do is data of this table; what a compiled program needs is the compiler's word.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxvlm.config import ConfigError
from jaxvlm.parallel.traffic import Traffic

GIB = 2**30


class Chip(NamedTuple):
    """Peak rates of one chip, all per second. `link` is all wires to its neighbours, `network` its share of the slower
    network between hosts (GPU) or slices (TPU); both in one direction."""

    name: str
    flops: float  # dense bfloat16
    memory: int  # bytes
    bandwidth: float  # bytes, of that memory
    link: float  # bytes
    network: float  # bytes
    usable: float  # share of the memory that a program may count on
    source: str


# TPU: cloud.google.com/tpu/docs/{v5e,v5p,v6e}; link and network as in jax-ml.github.io/scaling-book (wires x one-way rate).
# Their compiler keeps some memory for itself and refuses what does not fit. NVIDIA: data sheets of the SXM modules; link is
# NVLink in one direction, network one InfiniBand port a GPU (HDR 200 for A100, NDR 400 for H100), as in DGX systems. Of a
# GPU's memory a tenth is left to the CUDA context, cuBLAS and NCCL, which the compiler does not see.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 16 * GIB, 819e9, 4 * 45e9, 3.125e9, 0.984, "Google Cloud, TPU v5e"),
        Chip("v5p", 459e12, 95 * GIB, 2765e9, 6 * 90e9, 6.25e9, 0.99, "Google Cloud, TPU v5p"),
        Chip("v6e", 918e12, 32 * GIB, 1640e9, 4 * 90e9, 12.5e9, 0.976, "Google Cloud, TPU v6e"),
        Chip("a100", 312e12, 80 * GIB, 2039e9, 300e9, 25e9, 0.9, "NVIDIA A100 80GB SXM data sheet"),
        Chip("a100-40g", 312e12, 40 * GIB, 1555e9, 300e9, 25e9, 0.9, "NVIDIA A100 40GB SXM data sheet"),
        Chip("h100", 989e12, 80 * GIB, 3350e9, 450e9, 50e9, 0.9, "NVIDIA H100 SXM data sheet"),
        Chip("h200", 989e12, 141 * 10**9, 4800e9, 450e9, 50e9, 0.9, "NVIDIA H200 SXM data sheet"),
    )
}
KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "NVIDIA H200": "h200", "NVIDIA H100": "h100"}
KINDS |= {"NVIDIA A100-SXM4-40GB": "a100-40g", "NVIDIA A100": "a100"}  # how jax's `device_kind` begins

FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
CUBES[1024] = "8x8x16"
SHAPES = {"v5e": FLAT, "v6e": FLAT, "v5p": CUBES}
GPUS_PER_HOST = 8
GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

# What makes libtpu describe a topology on a machine that is none, quietly and beside other processes that do so.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# The autotuner and Triton's matmuls want a device to measure on; cuBLAS serves in their place.
GPU_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
EXTRAS = {"tpu": ("libtpu", "plan-tpu"), "cuda": ("jax_cuda13_plugin", "plan-gpu")}


class Target(NamedTuple):
    """`slices` TPU slices, or one group of GPUs, of `chips` chips each."""

    name: str
    chip: Chip
    chips: int
    slices: int = 1

    @property
    def platform(self) -> str:
        return "tpu" if self.chip.name in SHAPES else "cuda"

    @property
    def devices(self) -> int:
        return self.chips * self.slices

    @property
    def domain(self) -> int:
        """Devices that the fast links join: a slice, or the GPUs of a host."""
        return self.chips if self.platform == "tpu" else min(self.chips, GPUS_PER_HOST)


def known_targets() -> list[str]:
    """The names that `parse_target` takes, several slices apart."""
    return [f"{chip}-{count}" for chip in CHIPS for count in SHAPES.get(chip, GPU_COUNTS)]


def parse_target(name: str) -> Target:
    """`v5e-256`, `2xv5e-16` (two slices) or `h100-64`. The number counts chips; Google's own names of v5p count its cores,
    two a chip. Raises `ConfigError` for a name that is not known, with the nearest one and all there are.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*(?:-40g)?)-(\d+)", name)
    slices, chip, chips = (int(found[1] or 1), found[2], int(found[3])) if found else (1, "", 0)
    known = known_targets()
    if f"{chip}-{chips}" not in known or slices < 1:
        near = difflib.get_close_matches(name.split("x", 1)[-1], known, n=1, cutoff=0.0)[0]
        per_chip = "; ".join(f"{c}-" + "|".join(map(str, SHAPES.get(c, GPU_COUNTS))) for c in CHIPS)
        raise ConfigError(
            f"Unknown target '{name}'. Did you mean '{near}'? There are, counted in chips: {per_chip}. "
            "Several TPU slices are written 2xv5e-16."
        )
    if slices > 1 and chip not in SHAPES:
        raise ConfigError(f"Target '{name}': slices are of TPUs. Write {chip}-{slices * chips} for as many GPUs.")
    return Target(name, CHIPS[chip], chips, slices)


def require_compiler(target: Target) -> None:
    """Raises `ConfigError` with the command to type when the target's compiler is not installed."""
    module, extra = EXTRAS[target.platform]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"Planning for {target.name} needs the compiler in '{module}', which is not installed. "
            f"In the clone of jaxvlm: pip install -e '.[{extra}]'"
        )


def environment(target: Target, present: dict[str, str]) -> dict[str, str]:
    """The environment of a process that compiles for `target`, from the `present` one."""
    env = present | {"JAX_PLATFORMS": "cpu"}
    if target.platform == "tpu":
        return env | TPU_ENVIRONMENT
    return env | {"XLA_FLAGS": GPU_FLAGS}


def topology_devices(target: Target) -> list[Any]:
    """The devices of the target's topology, to make a mesh of. They can be compiled for and hold nothing."""
    if target.platform == "tpu":
        more = {"num_slices": target.slices} if target.slices > 1 else {}
        shape = SHAPES[target.chip.name][target.chips]
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{target.chip.name}:{shape}", **more)
    else:
        hosts = target.chips // target.domain
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=target.name,
            target_config=_gpu_config(target.chip),
            topology=f"1x{hosts}x{target.domain}",
        )
    return list(topology.devices)


def chip_of(device: jax.Device) -> Chip | None:
    """The table's entry for a device that is here, or None."""
    return next((CHIPS[name] for kind, name in KINDS.items() if device.device_kind.startswith(kind)), None)


def link_seconds(target: Target, mesh: Mesh, found: list[Traffic]) -> dict[str, float]:
    """Seconds a step, at least, that the collectives over each combination of mesh axes keep the links busy.

    Inside a domain every wire of a chip is taken to carry its share. Where a group crosses domains, what crosses is divided
    over the members of one domain, each with its part of the slower network (the hierarchical algorithms of NCCL and of
    TPU multislice); the slower of the two counts.
    """
    seconds: dict[str, float] = {}
    for each in found:
        members = np.arange(mesh.size).reshape(mesh.devices.shape)
        members = members[tuple(slice(None) if a in each.axes else 0 for a in mesh.axis_names)].reshape(-1)
        local = np.unique(members // target.domain, return_counts=True)[1]
        over_network = each.wire_bytes / local.max() / target.chip.network if len(local) > 1 else 0.0
        over_links = each.wire_bytes / target.chip.link if local.max() > 1 else 0.0
        name = "+".join(each.axes)
        seconds[name] = seconds.get(name, 0.0) + each.times * max(over_links, over_network)
    return seconds


def _gpu_config(chip: Chip) -> str:
    """A GpuTargetConfigProto in text form: what XLA:GPU wants to know of a device (CUDA's device properties)."""
    ampere = chip.name.startswith("a100")
    cores, shared, optin, fpus, clock, major, l2 = (
        (108, 167936, 166912, 64, 1.41, 8, 40 * 2**20) if ampere else (132, 233472, 232448, 128, 1.98, 9, 50 * 2**20)
    )
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus} block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {l2}
  clock_rate_ghz: {clock} device_memory_size: {chip.memory} shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} minor: 0 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "NVIDIA {chip.name.upper()}"
"""
