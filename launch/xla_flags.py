"""Compiler flags that a run on TPUs or GPUs starts with, as few as there are reasons for.

  python3 launch/xla_flags.py v6e                  a line for the shell: eval "$(python3 launch/xla_flags.py v6e)"
  python3 launch/xla_flags.py a100 --slices 2      for several nodes
  python3 launch/xla_flags.py h100 --why           each flag with its reason

The compilers' defaults are good: what MaxText used to set for overlapping collectives with compute (async collective
fusion on TPU, the latency hiding scheduler on GPU) is on by itself now, and a generation without an entry needs none.
Flags of yours in LIBTPU_INIT_ARGS or XLA_FLAGS come after these, so they win.

`make test-plan` tests that the compilers accept each flag (an unknown one stops a job at its start) and that each changes
a compiled FSDP step. Others from the same sources did not and are left out: MaxText's data-parallel all-reduce flags for
several TPU slices, and pipelining and combining of reduce-scatters on GPUs. What these gain on a chip has not been measured
by us; the reasons are those of the projects named. Compiled, not run: on v6e a 1B step moves 8 % fewer bytes to and from
memory; on 8 H100 all four cost a 7B step 0.1 of 21.7 GiB.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

Flags = dict[str, str]  # `name=value` to the reason

VMEM = "MaxText, dense models on v6e: more scratch memory for a fused operation, so fewer trips to HBM"
CUBLAS = "MaxText on A3: matmuls by cuBLAS; Triton's take long to tune and were slower"
NEXT_LAYER = "JAX-Toolbox: fetch the next scanned layer's parameters during this one's compute"
BUFFERS = "JAX-Toolbox: two turns of the scan's loop at a time, with no copies between what they fetch into"
COMBINE = "MaxText, JAX-Toolbox: one large all-gather instead of many small ones"

TPU: dict[str, Flags] = {
    "v4": {},
    "v5e": {},
    "v5p": {},
    "v6e": {"xla_tpu_scoped_vmem_limit_kib=98304": VMEM},
}
GPU: Flags = {
    "xla_gpu_enable_triton_gemm=false": CUBLAS,
    "xla_gpu_enable_pipelined_all_gather=true": NEXT_LAYER,
    "xla_gpu_enable_while_loop_double_buffering=true": BUFFERS,
}
ONE_NODE: Flags = {"xla_gpu_all_gather_combine_threshold_bytes=134217728": f"{COMBINE}; 128 MiB inside a node"}
NODES: Flags = {"xla_gpu_all_gather_combine_threshold_bytes=1073741824": f"{COMBINE}; 1 GiB between nodes"}
GPUS = ("a100", "h100")
GENERATIONS = (*TPU, *GPUS)


def generation(name: str) -> str:
    """'v5litepod-16' and 'v5e' to 'v5e', 'H100:8' to 'h100'. Raises `ValueError` naming the known ones."""
    known = name.lower().split("-")[0].split(":")[0].replace("v5litepod", "v5e")
    if known not in GENERATIONS:
        raise ValueError(f"There are no flags for '{name}'. Known: {', '.join(GENERATIONS)}.")
    return known


def flags(name: str, slices: int = 1) -> Flags:
    """The flags for a generation, on `slices` GPU nodes or TPU slices (which makes no difference to TPUs)."""
    name = generation(name)
    return TPU[name] if name in TPU else GPU | (NODES if slices > 1 else ONE_NODE)


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
    parser.add_argument("--slices", type=int, default=1, help="GPU nodes or TPU slices of the job")
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
