"""Compiler flags that a run on TPUs or GPUs starts with, as few as there are reasons for.

  python3 launch/xla_flags.py v6e                  a line for the shell: eval "$(python3 launch/xla_flags.py v6e)"
  python3 launch/xla_flags.py v5litepod-16 --slices 2
  python3 launch/xla_flags.py h100 --why           each flag with its reason

The compilers' defaults are good: what MaxText used to set for overlapping collectives with compute (async collective
fusion on TPU, the latency hiding scheduler on GPU) is on by itself now, and a generation without an entry of its own needs
none. Flags of yours in LIBTPU_INIT_ARGS or XLA_FLAGS stay, after these, so they win.

That the compilers accept each of them is a test (`make test-plan`): an unknown one stops a job at its start. What they gain
has not been measured by us; the reasons are those of the projects named beside them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

Flags = dict[str, str]  # `name=value` to the reason

VMEM = "MaxText, dense models on v6e: twice the default scratch memory, so larger blocks of a matmul stay on the chip"
ALL_REDUCE = (
    "MaxText, data parallel over slices: gradients are summed over the slow network while the backward pass goes on"
)
CUBLAS = "MaxText on A3: cuBLAS matmuls; Triton's take long to tune and were slower"
NEXT_LAYER = "JAX-Toolbox: fetch the next scanned layer's parameters during this one's compute"
COMBINE = "MaxText, JAX-Toolbox: one large collective instead of many small ones"

TPU: dict[str, Flags] = {
    "v4": {},
    "v5e": {},
    "v5p": {},
    "v6e": {"xla_tpu_scoped_vmem_limit_kib=98304": VMEM},
}
TPU_SLICES: Flags = {  # on top, with several slices
    "xla_tpu_enable_data_parallel_all_reduce_opt=true": ALL_REDUCE,
    "xla_tpu_data_parallel_opt_different_sized_ops=true": f"{ALL_REDUCE}; gradients of unlike sizes too",
}

GPU_BASE: Flags = {
    "xla_gpu_enable_triton_gemm=false": CUBLAS,
    "xla_gpu_enable_pipelined_all_gather=true": NEXT_LAYER,
    "xla_gpu_enable_pipelined_reduce_scatter=true": NEXT_LAYER,
    "xla_gpu_enable_while_loop_double_buffering=true": f"{NEXT_LAYER}; without copies between the two buffers",
}
GPU_NODE: Flags = {
    "xla_gpu_all_gather_combine_threshold_bytes=134217728": f"{COMBINE}; 128 MiB inside a node",
    "xla_gpu_reduce_scatter_combine_threshold_bytes=67108864": f"{COMBINE}; 64 MiB inside a node",
}
GPU_NODES: Flags = {
    "xla_gpu_all_gather_combine_threshold_bytes=1073741824": f"{COMBINE}; 1 GiB between nodes, where latency counts",
    "xla_gpu_reduce_scatter_combine_threshold_bytes=134217728": f"{COMBINE}; 128 MiB between nodes",
}
GPUS = ("a100", "h100")
GENERATIONS = (*TPU, *GPUS)


def generation(name: str) -> str:
    """'v5litepod-16' and 'v5e' to 'v5e', 'H100:8' to 'h100'. Raises `ValueError` naming the known ones."""
    known = name.lower().split("-")[0].split(":")[0].replace("v5litepod", "v5e")
    if known not in GENERATIONS:
        raise ValueError(f"There are no flags for '{name}'. Known: {', '.join(GENERATIONS)}.")
    return known


def flags(name: str, slices: int = 1) -> Flags:
    """The flags for a generation, with `slices` TPU slices or GPU nodes."""
    name = generation(name)
    if name in TPU:
        return TPU[name] | (TPU_SLICES if slices > 1 else {})
    return GPU_BASE | (GPU_NODES if slices > 1 else GPU_NODE)


def shell_line(name: str, slices: int = 1) -> str:
    """`export LIBTPU_INIT_ARGS=...` or `export XLA_FLAGS=...`, the caller's own flags last."""
    variable = "LIBTPU_INIT_ARGS" if generation(name) in TPU else "XLA_FLAGS"
    values = " ".join(f"--{flag}" for flag in flags(name, slices))
    return f'export {variable}={shlex.quote(values)}" ${{{variable}:-}}"' if values else ":"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="launch/xla_flags.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("generation", help=f"{', '.join(GENERATIONS)}, or an accelerator type that begins with one")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices or GPU nodes of the job")
    parser.add_argument("--why", action="store_true", help="print each flag with its reason")
    options = parser.parse_args(argv)
    try:
        chosen = flags(options.generation, options.slices)
    except ValueError as error:
        parser.error(str(error))
    if options.why:
        print("\n".join(f"--{flag}\n    {why}" for flag, why in chosen.items()) or "None: the compiler's defaults.")
    else:
        print(shell_line(options.generation, options.slices))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
