"""Our attention beside that of jax, torch and, where they are installed, tokamax and flash-attn, in one run.

  python benchmarks/attention_bench.py [--rounds 7] [--out benchmarks/results/attention.json]

On a CPU in float32 with small inputs, on a GPU in bfloat16 with large ones and every implementation of ours that serves there,
the named ones too. Rows are uniform (all of a row is one sequence) or packed: sequences of random lengths one after the other,
each causal by itself, no padding. A side that knows no sequences gets the mask that makes it right, [B, 1, S, S], made before.

The sides take turns, round by round, and each round takes the next of several inputs (of packed rows also other lengths). On a
GPU a round is ten calls in a row between two waits, its tenth the time of one. Reported are medians, and FLOP/s that count only the
pairs of a query and a key that it sees: 4 for each pair, head and dimension forward, 2.5 times that backward. Before anything
is timed, results and gradients of every side are compared with ours (XLA); a side that differs or fails is in the table as such.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants some of the GPU

import jax
import jax.numpy as jnp
import numpy as np
import torch
from shared import Case, commit, cpu_name
from torch.nn.attention import SDPBackend, sdpa_kernel

from jaxvlm.kernels import intervals
from jaxvlm.kernels.attention import IMPLEMENTATIONS, attention

ON_GPU = jax.default_backend() == "gpu"
DTYPE = "bfloat16" if ON_GPU else "float32"
TOLERANCE = 0.05 if ON_GPU else 1e-4  # of the largest number compared
CALLS = 10 if ON_GPU else 1  # in a row
INPUTS = 3


CPU_CASES = [
    Case(2, 577, 12, 12, 64, causal=False),
    Case(1, 1024, 9, 3, 64, causal=True),
    Case(1, 2048, 9, 3, 64, causal=True, segment=450),
]
GPU_CASES = [Case(64, tokens, 16, 16, head_dim, False) for tokens, head_dim in ((577, 64), (729, 72))]
GPU_CASES += [Case(16384 // s, s, 16, 16, 128, causal) for s in (2048, 4096, 8192, 16384) for causal in (False, True)]
GPU_CASES += [Case(16384 // s, s, 32, 8, 128, causal=True, segment=900) for s in (4096, 8192)]


class Inputs(NamedTuple):
    """q and d_out [B, S, H, h], k and v [B, S, K, h] in `DTYPE`, on the device; ids int32 [B, S], numpy."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    d_out: jax.Array
    ids: np.ndarray


def draw(case: Case, seed: int) -> Inputs:
    rng, keys = np.random.default_rng(seed), jax.random.split(jax.random.key(seed), 4)
    ids = np.ones((case.batch, case.length), np.int32)
    if case.segment:
        ids += np.cumsum(rng.random(ids.shape) < 1 / case.segment, axis=1).astype(np.int32)
    heads = case.heads, case.kv_heads, case.kv_heads, case.heads
    shapes = [(case.batch, case.length, count, case.head_dim) for count in heads]
    return Inputs(*(jax.random.normal(key, shape, DTYPE) for key, shape in zip(keys, shapes, strict=True)), ids)


def useful_flops(case: Case, ids: np.ndarray) -> float:
    """Of the forward pass."""
    span = (intervals.causal if case.causal else intervals.bidirectional)(jnp.asarray(ids))
    pairs = int((span[1] - span[0]).sum())
    return 4.0 * pairs * case.heads * case.head_dim


def mask_of(case: Case, ids: np.ndarray) -> np.ndarray | None:
    """bool [B, 1, S, S] for packed rows."""
    if not case.segment:
        return None
    return ((ids[:, :, None] == ids[:, None, :]) & np.tri(case.length, dtype=bool))[:, None]


# -------------------------------------------------------------------------- sides: (case, inputs) -> forward, with gradients


def of_jax(attend, prepare):
    """`prepare(case, ids)` gives what `attend(case, q, k, v, prepared)` takes beside q, k and v."""

    def side(case: Case, inputs: list[Inputs]):
        def forward(q, k, v, _, more):
            return attend(case, q, k, v, more)

        def both(q, k, v, d_out, more):
            out, pull = jax.vjp(lambda *x: attend(case, *x, more), q, k, v)
            return out, *pull(d_out)

        given = [(*each[:4], prepare(case, each.ids)) for each in inputs]
        compiled = [jax.jit(run).lower(*given[0]).compile() for run in (forward, both)]
        return [lambda i, run=run: run(*given[i]) for run in compiled]

    return side


def of_torch(attend, prepare):
    def side(case: Case, inputs: list[Inputs]):
        given = [([as_torch(x) for x in each[:4]], prepare(case, each.ids)) for each in inputs]

        def forward(i):
            (q, k, v, _), more = given[i]
            with torch.no_grad():
                return attend(case, q, k, v, more)

        def both(i):
            (*qkv, d_out), more = given[i]
            qkv = [x.detach().requires_grad_() for x in qkv]
            out = attend(case, *qkv, more)
            return out, *torch.autograd.grad(out, qkv, d_out)

        return forward, both

    return side


def ours(name: str):
    def attend(case, q, k, v, span):
        return attention(q, k, v, k_start=span[0], k_end=span[1], implementation=name)

    def prepare(case, ids):
        if not (case.causal or case.segment):
            return None, None
        return intervals.causal(jnp.asarray(ids))

    return of_jax(attend, prepare)


def jax_mask(case, ids):
    mask = mask_of(case, ids)
    return None if mask is None else jnp.asarray(mask)


def jax_nn(implementation: str):
    def attend(case, q, k, v, mask):
        causal = case.causal and mask is None
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation=implementation)

    return of_jax(attend, jax_mask)


def tokamax_attention(case, q, k, v, mask):
    import tokamax

    return tokamax.dot_product_attention(q, k, v, mask=mask, is_causal=case.causal and mask is None)


def sdpa(backend: SDPBackend | None):
    def attend(case, q, k, v, mask):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options = dict(attn_mask=mask, is_causal=case.causal and mask is None, enable_gqa=case.heads != case.kv_heads)
        if backend is None:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    def prepare(case, ids):
        mask = mask_of(case, ids)
        return None if mask is None else torch.tensor(mask, device="cuda" if ON_GPU else "cpu")

    return of_torch(attend, prepare)


def torch_varlen(case, q, k, v, ends):
    """All sequences one after the other, by what `torch.nn.attention.varlen` calls (not all of its versions group queries)."""
    edges, longest = ends
    flat = (x.flatten(0, 1) for x in (q, k, v))
    options = 0.0, case.causal, False  # dropout, and nothing for debugging
    return torch.ops.aten._flash_attention_forward(*flat, edges, edges, longest, longest, *options)[0].view(q.shape)


def flash_attn(case, q, k, v, ends):
    """The same of the package flash-attn."""
    from flash_attn import flash_attn_varlen_func

    edges, longest = ends
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return flash_attn_varlen_func(*flat, edges, edges, longest, longest, causal=case.causal).view(q.shape)


def sequence_edges(case, ids):
    row = np.arange(case.batch)[:, None] * (ids.max() + 1)
    starts = np.flatnonzero(np.diff((ids + row).ravel(), prepend=-1))
    edges = np.append(starts, ids.size)
    return torch.tensor(edges, dtype=torch.int32, device="cuda"), int(np.diff(edges).max())


def sides(case: Case) -> dict:
    """By name, ours first."""
    backend = "gpu" if ON_GPU else "cpu"
    found = {f"jaxvlm {each.name}": ours(each.name) for each in reversed(IMPLEMENTATIONS[backend])}  # XLA's first
    if not ON_GPU or case.segment or case.length <= 4096:  # it keeps all scores
        found["jax.nn"] = jax_nn("xla")
    if not ON_GPU:
        return found | {"torch sdpa": sdpa(None)}
    found["jax.nn cuDNN"] = jax_nn("cudnn")
    if torch.cuda.is_available():
        kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION, "default": None}
        found |= {f"torch sdpa, {name}": sdpa(kind) for name, kind in kinds.items()}
        found["torch varlen"] = of_torch(torch_varlen, sequence_edges)
        if importlib.util.find_spec("flash_attn"):
            found["flash-attn varlen"] = of_torch(flash_attn, sequence_edges)
    if importlib.util.find_spec("tokamax"):
        found["tokamax"] = of_jax(tokamax_attention, jax_mask)
    return found


# ------------------------------------------------------------------------------------------------------------ measuring


def wait(result) -> None:
    if isinstance(jax.tree.leaves(result)[0], jax.Array):
        jax.block_until_ready(result)
    elif ON_GPU:
        torch.cuda.synchronize()


def seconds(run, i: int) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        result = run(i)
    wait(result)
    return (time.perf_counter() - start) / CALLS


def as_torch(x: jax.Array) -> torch.Tensor:
    """The same memory on a GPU, a copy on a CPU (whose arrays torch may not write)."""
    return torch.from_dlpack(x) if ON_GPU else torch.tensor(np.asarray(x))


def numbers(x) -> jax.Array:
    return jnp.from_dlpack(x.detach().contiguous()) if isinstance(x, torch.Tensor) else x


@jax.jit
def difference(found, truth) -> jax.Array:
    """The largest, as a share of the largest number."""
    found, truth = found.astype(jnp.float32), truth.astype(jnp.float32)
    return jnp.abs(found - truth).max() / jnp.abs(truth).max()


def prepared(sides: dict, build: Callable, results: Callable) -> tuple[dict[str, Any], dict[str, str]]:
    """Of every side what `build(side)` gives, where its `results` are those of the first; or why it is left out.

    All are built (compiled) at once; the results are compared one by one.
    """
    ready, failed, truth = {}, {}, None
    with ThreadPoolExecutor() as pool:
        building = {name: pool.submit(build, side) for name, side in sides.items()}
        for name, each in building.items():
            try:
                built = each.result()
                found = [numbers(x) for x in results(built)]
                truth = truth or found
                error = max(float(difference(*pair)) for pair in zip(found, truth, strict=True))
            except Exception as error:  # whatever another library raises: the table says it
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                continue
            if error <= TOLERANCE:
                ready[name] = built
            else:  # NaN too
                failed[name] = f"differs from ours by {error:.1e} of the largest number"
    return ready, failed


def measure(case: Case, rounds: int, wanted: list[str]) -> dict:
    inputs = [draw(case, seed) for seed in range(INPUTS)]
    flops = statistics.median(useful_flops(case, each.ids) for each in inputs)
    chosen = {
        name: side
        for number, (name, side) in enumerate(sides(case).items())
        if not (number and wanted) or any(text in name for text in wanted)
    }
    ready, failed = prepared(chosen, lambda side: side(case, inputs), lambda runs: runs[1](0))
    times = {name: ([], []) for name in ready}
    for runs in ready.values():
        for run in runs:
            seconds(run, 1)  # once, untimed
    for turn in range(rounds):
        for name, runs in ready.items():
            for taken, run in zip(times[name], runs, strict=True):
                taken.append(seconds(run, turn % INPUTS))
    rows = {}
    for name, (forward, both) in times.items():
        rows[name] = {"forward_seconds": statistics.median(forward), "both_seconds": statistics.median(both)}
        rows[name] |= {"forward_flops": flops / rows[name]["forward_seconds"]}
        rows[name] |= {"both_flops": 3.5 * flops / rows[name]["both_seconds"], "all_seconds": [forward, both]}
    return {"case": str(case), **case._asdict(), "useful_forward_flops": flops, "sides": rows, "failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--case", action="append", default=[], help="cases with this text alone (repeatable)")
    parser.add_argument("--side", action="append", default=[], help="sides with this text and the first (repeatable)")
    parser.add_argument("--out", default="benchmarks/results/attention.json")
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    names = [n for n in ("jax", "jaxlib", "torch", "numpy", "tokamax", "flash_attn") if importlib.util.find_spec(n)]
    result = {
        "what": "attention, forward and forward with backward",
        "device": jax.devices()[0].device_kind if ON_GPU else f"{cpu_name()}, {threads} threads",
        "dtype": DTYPE,
        "versions": {name: metadata.version(name) for name in names},
        "commit": commit(),
        "cases": [],
    }
    for case in GPU_CASES if ON_GPU else CPU_CASES:
        if options.case and not any(text in str(case) for text in options.case):
            continue
        measured = measure(case, options.rounds, options.side)
        result["cases"].append(measured)
        print(f"{case}\n  {'':24s}{'forward':>12s}{'GFLOP/s':>9s}{'+ backward':>12s}{'GFLOP/s':>9s}")
        for name, row in measured["sides"].items():
            columns = [
                f"{row[k + '_seconds'] * 1e3:9.2f} ms{row[k + '_flops'] / 1e9:9.1f}" for k in ("forward", "both")
            ]
            print(f"  {name:24s}{''.join(columns)}", flush=True)
        for name, why in measured["failed"].items():
            print(f"  {name:24s}{why}", flush=True)
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"Written to {options.out}.")


if __name__ == "__main__":
    main()
