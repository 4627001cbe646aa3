"""What can be said of attention on a TPU without one: our kernel and jax's splash attention, compiled, and their work counted.

  pip install libtpu==0.0.52 && python benchmarks/tpu_compiled.py [--out benchmarks/results/tpu_compiled.json]

**Nothing is run**: no time here is measured. Both are compiled for one chip, forward with backward, by the TPU's own compiler;
reported are the fast memory that each kernel takes (of v5e, the only one whose modules libtpu 0.0.52 prints) and the memory beside
inputs and results. Counted are the blocks of scores that each computes, for rows of the lengths of packing_bench.py: ours
skips what no query of a block sees; splash's grid is that of its static causal mask, and segments are masked inside it.
The least time is that of the counted products at the data sheet's peak, or of reading inputs and writing results once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from importlib import metadata
from pathlib import Path

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from shared import Case, commit

from jaxvlm.kernels import block_ranges, intervals, tpu_attention

CHIPS = {  # topology, bfloat16 FLOP/s, bytes/s (data sheets)
    "v5e": ("v5e:1x1", 197e12, 0.82e12),
    "v5p": ("v5p:1x1x1", 459e12, 2.77e12),
    "v6e": ("v6e:1x1", 918e12, 1.64e12),
}


CASES = [
    Case(4, 4096, 32, 8, 128, True),
    Case(4, 4096, 32, 8, 128, True, 900),
    Case(2, 8192, 32, 8, 128, True, 900),
    Case(32, 577, 16, 16, 64, False),
]


def ids_of(case: Case) -> np.ndarray:
    rng, ids = np.random.default_rng(0), np.ones((case.batch, case.length), np.int32)
    return ids + np.cumsum(rng.random(ids.shape) < 1 / case.segment, axis=1).astype(np.int32) if case.segment else ids


def span_of(case: Case, ids) -> tuple[jax.Array, jax.Array]:
    return (intervals.causal if case.causal else intervals.bidirectional)(jnp.asarray(ids))


def ours(case: Case):
    def run(q, k, v, ids):
        return tpu_attention.attention(q, k, v, *span_of(case, ids), case.head_dim**-0.5, None)

    return run


def theirs(case: Case):
    """With blocks as large as ours, its fused backward, and the length padded to whole blocks."""
    block = tpu_attention.block_size(case.length)
    length = -(-case.length // block) * block
    kind = masks.CausalMask((length, length)) if case.causal else masks.FullMask((length, length))
    sizes = {name: block for name in ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")}
    sizes = splash.BlockSizes(**sizes, block_kv_dkv_compute=block, use_fused_bwd_kernel=True)

    def run(q, k, v, ids):
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([kind] * case.heads), head_shards=1, q_seq_shards=1, block_sizes=sizes
        )
        more = ((0, 0), (0, length - case.length))
        heads = [jnp.pad(x.swapaxes(1, 2), ((0, 0), *more, (0, 0))) for x in (q * case.head_dim**-0.5, k, v)]
        ids = jnp.pad(ids, more)
        return jax.vmap(kernel)(*heads, splash.SegmentIds(ids, ids))[:, :, : case.length].swapaxes(1, 2)

    return run


def compiled(case: Case, run, device) -> dict:
    sharding = jax.sharding.SingleDeviceSharding(device)

    def loss(q, k, v, ids):
        return jnp.square(run(q, k, v, ids).astype(jnp.float32)).sum()

    shapes = [(case.batch, case.length, heads, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    arguments.append(jax.ShapeDtypeStruct(shapes[0][:2], jnp.int32, sharding=sharding))
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arguments)
    module = traced.lower(lowering_platforms=("tpu",)).compile()
    found = {"temporary_bytes": module.memory_analysis().temp_size_in_bytes}
    if "v5 lite" in device.device_kind:
        calls = module.as_text().split('custom_call_target="tpu_custom_call"')[1:]
        sizes = [re.search(r'"used_scoped_memory_configs":\[\{[^\]]*?"size":"(\d+)"', call) for call in calls]
        found["fast_memory_bytes"] = [int(size[1]) for size in sizes if size]
    return found


def work(case: Case) -> dict[str, float]:
    """Blocks of scores that each computes for one head of all rows, and FLOPs of the whole call, forward and backward."""
    ids, block = ids_of(case), tpu_attention.block_size(case.length)
    length = -(-case.length // block) * block
    start, end = (jnp.pad(x, ((0, 0), (0, length - case.length))) for x in span_of(case, ids))
    blocks = length // block
    counts = {
        "jaxvlm": int(block_ranges.key_ranges(start, end, block, block).count.sum()),
        "jaxvlm, backward": int(block_ranges.query_ranges(start, end, block, block, blocks).count.sum()),
        "splash": case.batch * (blocks * (blocks + 1) // 2 if case.causal else blocks**2),
    }
    one = 2 * block * block * case.head_dim * case.heads
    forward, backward = 2 * one, 5 * one  # products
    return {
        "blocks": counts,
        "useful_flops": 7 * 2 * int((end - start).sum()) * case.head_dim * case.heads,
        "jaxvlm_flops": counts["jaxvlm"] * forward + counts["jaxvlm, backward"] * backward,
        "splash_flops": counts["splash"] * (forward + backward),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/results/tpu_compiled.json")
    options = parser.parse_args()
    result = {
        "what": "attention for TPUs, compiled and counted; nothing was run",
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")},
        "commit": commit(),
        "cases": [],
    }
    for case in CASES:
        counted = work(case)
        print(f"{case}\n  blocks of a head {counted['blocks']}")
        item, sizes = 2, (4 * case.heads + 4 * case.kv_heads)  # q, out, d_out, dq and k, v, dk, dv, of each head
        moved = item * sizes * case.batch * case.length * case.head_dim
        row = {"case": str(case), **counted, "least_bytes": moved, "chips": {}}
        for chip, (topology, peak, bandwidth) in CHIPS.items():
            device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
            both = {name: compiled(case, side(case), device) for name, side in (("jaxvlm", ours), ("splash", theirs))}
            for name, found in both.items():
                found["least_seconds"] = max(counted[f"{name}_flops"] / peak, moved / bandwidth)
                fast = "".join(f", {size / 2**20:.1f} MiB" for size in found.get("fast_memory_bytes", []))
                print(
                    f"  {chip} {name:8s} least {found['least_seconds'] * 1e3:6.2f} ms, "
                    f"{found['temporary_bytes'] / 2**20:6.0f} MiB beside{fast and '; fast memory' + fast[1:]}",
                    flush=True,
                )
            row["chips"][chip] = both
        result["cases"].append(row)
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"Written to {options.out}.")


if __name__ == "__main__":
    main()
