"""The two kernels beside training attention: cross-entropy from hidden states, and attention of one token over a cache.

  python benchmarks/head_bench.py [--rounds 7] [--out benchmarks/results/head.json]

On a CPU in float32 with small inputs, on a GPU in bfloat16 with the sizes of an 8B model. Sides take turns; on a GPU a
round is ten calls between two waits. Results (and gradients) of every side are compared with the first's before anything
is timed. Beside the times: for cross-entropy the memory that the compiler sets aside (of jax's sides); for decoding, one token
through the caches of `LAYERS` layers, the bytes that the rows see over the time, as a share of the memory's bandwidth where
`BANDWIDTH` has it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from attention_bench import CALLS, DTYPE, ON_GPU, as_torch, prepared, seconds
from shared import commit, cpu_name

from jaxvlm.kernels.cross_entropy import linear_cross_entropy
from jaxvlm.kernels.decode_attention import IMPLEMENTATIONS, decode_attention

BANDWIDTH = {
    "NVIDIA A100": 2.0e12,
    "NVIDIA H100": 3.35e12,
    "NVIDIA H200": 4.8e12,
}  # bytes/s, data sheets (A100 80 GB, SXM)
# tokens, width, vocabulary, and the share of the tokens that is supervised
CROSS_ENTROPY = [(*((4096, 4096, 128256) if ON_GPU else (512, 576, 49152)), share) for share in (1.0, 0.5)]
# rows, heads, key heads, head dimension, slots, mean of what a row sees of them
DECODE = [(32, 32, 8, 128, 4096, 4096), (32, 32, 8, 128, 4096, 2000), (1, 32, 32, 128, 4096, 4096)]
DECODE = DECODE if ON_GPU else [(32, 9, 3, 64, 256, 256), (32, 9, 3, 64, 1024, 500)]
LAYERS = 4


def cross_entropy_sides(tokens: int, width: int, vocabulary: int, supervised: float) -> dict:
    """Of each side what makes its call, which gives loss and gradients of hidden states and head; jax's with its program.

    The head is float32, as trained parameters are, and cast for the products.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (tokens, width), DTYPE)
    head = jax.random.normal(keys[1], (width, vocabulary)) / width**0.5
    targets = jax.random.randint(keys[2], (tokens,), 0, vocabulary)
    weights = jnp.where(jax.random.uniform(keys[3], (tokens,)) < supervised, 1 / (tokens * supervised), 0.0)

    def fused(hidden, head, targets, weights):
        return linear_cross_entropy(hidden[None], head, targets[None], weights[None])[0]

    def logits(hidden, head, targets, weights):
        values = (hidden @ head.astype(DTYPE)).astype(jnp.float32)
        return (optax.softmax_cross_entropy_with_integer_labels(values, targets) * weights).sum()

    def of_jax(run):
        given = hidden, head, targets, weights
        compiled = jax.jit(jax.value_and_grad(run, argnums=(0, 1))).lower(*given).compile()
        return lambda _: jax.tree.leaves(compiled(*given)), compiled.memory_analysis().temp_size_in_bytes

    def of_torch():
        given = [as_torch(x) for x in (hidden, head, targets, weights)]

        def run(_):
            hidden, head = (x.detach().requires_grad_() for x in given[:2])
            values = (hidden @ head.to(hidden.dtype)).float()
            loss = (torch.nn.functional.cross_entropy(values, given[2].long(), reduction="none") * given[3]).sum()
            return loss, *torch.autograd.grad(loss, (hidden, head))

        return run, None

    return {
        "jaxvlm": lambda: of_jax(fused),
        "jax, logits and optax": lambda: of_jax(logits),
        "torch, logits": of_torch,
    }


def decode_sides(rows: int, heads: int, kv_heads: int, head_dim: int, slots: int, mean: int) -> tuple[dict, int]:
    """Of each side what makes its call, which gives the output; and the bytes of keys and values that the rows see."""
    keys, rng = jax.random.split(jax.random.key(0), 3), np.random.default_rng(0)
    q = jax.random.normal(keys[0], (rows, heads, head_dim), DTYPE)
    k, v = (jax.random.normal(key, (LAYERS, rows, kv_heads, slots, head_dim), DTYPE) for key in keys[1:])
    spread = min(mean, slots - mean)
    end = rng.integers(mean - spread, mean + spread + 1, rows).clip(1).astype(np.int32)

    def of_jax(name):
        def run(q, k, v, end):
            def layer(q, number):
                span = {"k_start": jnp.zeros(rows, jnp.int32), "k_end": end}
                return decode_attention(q, k, v, number, **span, implementation=name), None

            return jax.lax.scan(layer, q, jnp.arange(LAYERS))[0]

        given = q, k, v, jnp.asarray(end)
        compiled = jax.jit(run).lower(*given).compile()
        return lambda _: [compiled(*given)], None

    def of_torch():
        one, *caches = as_torch(q)[:, :, None], as_torch(k), as_torch(v)
        mask = torch.tensor(np.arange(slots) < end[:, None], device=one.device)[:, None, None]

        def run(_):
            x = one
            with torch.no_grad():
                for pair in zip(*caches, strict=True):
                    x = torch.nn.functional.scaled_dot_product_attention(x, *pair, mask, enable_gqa=heads != kv_heads)
            return [x[:, :, 0]]

        return run, None

    names = [each.name for each in reversed(IMPLEMENTATIONS["gpu" if ON_GPU else "cpu"])]
    found = {f"jaxvlm {name}": lambda name=name: of_jax(name) for name in names}
    item = jnp.dtype(DTYPE).itemsize
    return found | {"torch sdpa": of_torch}, 2 * LAYERS * int(end.sum()) * kv_heads * head_dim * item


def measure(sides: dict, rounds: int) -> tuple[dict, dict[str, list[float]], dict[str, str]]:
    """What was made of every side and its seconds of every round; and why the others have none."""
    ready, failed = prepared(sides, lambda make: make(), lambda made: made[0](0))
    times = {name: [] for name in ready}
    for turn in range(rounds + 1):
        for name, (run, _) in ready.items():
            taken = seconds(run, 0)
            if turn:  # not the first
                times[name].append(taken)
    return ready, times, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default="benchmarks/results/head.json")
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    kind = jax.devices()[0].device_kind
    bandwidth = next((value for name, value in BANDWIDTH.items() if kind.startswith(name)), None)
    result = {
        "what": "cross-entropy from hidden states with gradients; decode attention",
        "device": kind if ON_GPU else f"{cpu_name()}, {threads} threads",
        "dtype": DTYPE,
        "calls_in_a_row": CALLS,
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "torch", "numpy")},
        "commit": commit(),
        "cases": [],
    }
    for shape in CROSS_ENTROPY:
        ready, times, failed = measure(cross_entropy_sides(*shape), options.rounds)
        case = "cross-entropy, {} tokens x {} x {}, {:.0%} supervised".format(*shape)
        memory = {name: size for name, (_, size) in ready.items() if size is not None}
        notes = {name: f"{size / 2**20:.0f} MiB beside inputs and results" for name, size in memory.items()}
        show(case, times, failed, notes)
        result["cases"].append({"case": case, "seconds": times, "failed": failed, "temporary_bytes": memory})
    for shape in DECODE:
        sides, moved = decode_sides(*shape)
        _, times, failed = measure(sides, options.rounds)
        case = "decoding, {} rows, {} over {} heads of {}, {} slots, {} seen".format(*shape)
        notes = {}
        for name, taken in times.items():
            speed = moved / statistics.median(taken)
            share = f", {speed / bandwidth:.0%} of the memory's" if bandwidth else ""
            notes[name] = f"{speed / 1e9:.1f} GB/s{share}"
        show(case, times, failed, notes)
        result["cases"].append({"case": case, "seconds": times, "failed": failed, "bytes": moved})
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"Written to {options.out}.")


def show(case: str, times: dict[str, list[float]], failed: dict[str, str], notes: dict[str, str]) -> None:
    print(case)
    ours = statistics.median(next(iter(times.values())))
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(f"  {name:24s}{middle * 1e3:9.2f} ms{middle / ours:7.2f}x  {notes.get(name, '')}", flush=True)
    for name, why in failed.items():
        print(f"  {name:24s}{why}", flush=True)


if __name__ == "__main__":
    main()
