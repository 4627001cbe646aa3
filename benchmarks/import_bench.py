"""Opening a llava-hf checkpoint: jaxvlm beside transformers, each in a process of its own, alternating.

  python benchmarks/import_bench.py [--gigabytes 2] [--rounds 3] [--out benchmarks/results/import.json]

The checkpoint is synthetic: random float16 in four shards, in a temporary folder, and in the page cache before the first round.
Timed is the call that loads it, imports apart, until every parameter has been read once: a side that only maps the file has not
done so yet. Memory is what the process has resident, and of that what is anonymous (mapped pages of a file can be given back):
the peak during the call, sampled every 2 ms, less what it was before, less the size of the parameters.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

SIDES = ("jaxvlm", "transformers")
KINDS = ("resident_above", "anonymous_above")


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """A LLaVA of about that size in float16; gives its number of parameters."""
    import numpy as np
    import torch
    import transformers as t
    from safetensors.numpy import save_file

    width, inner = (2048, 5632) if gigabytes >= 0.5 else (512, 1408)
    layer, table = 4 * width**2 + 3 * width * inner, 2 * 32064 * width
    depth = max(1, round((gigabytes * 5e8 - table) / layer))
    vision = t.CLIPVisionConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4)
    text = t.LlamaConfig(
        vocab_size=32064,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=width // 128,
    )
    config = t.LlavaConfig(vision_config=vision, text_config=text, dtype="float16")
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = t.LlavaForConditionalGeneration(config)
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(max(p.numel() for p in model.parameters())) * 0.02).astype(np.float16)
    tensors = {hub_name(name): noise[: p.numel()].reshape(tuple(p.shape)) for name, p in model.state_dict().items()}
    names, index = list(tensors), {}
    for shard in range(4):
        file = f"model-{shard + 1:05d}-of-00004.safetensors"
        part = names[shard * len(names) // 4 : (shard + 1) * len(names) // 4]
        save_file({name: np.ascontiguousarray(tensors[name]) for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(p.numel() for p in model.parameters())


def hub_name(name: str) -> str:
    """A name in memory as the checkpoints on the hub spell it."""
    if name.startswith("lm_head"):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    for part, spelt in (("language_model.", "language_model.model."), ("vision_tower.", "vision_tower.vision_model.")):
        if name.startswith(part) and not name.startswith(spelt):
            return spelt + name.removeprefix(part)
    return name


def load(side: str, folder: str) -> None:
    """In a process of its own: loads and prints {seconds, above, parameters}."""
    import numpy as np

    if side == "jaxvlm":
        import jax
        import jax.numpy as jnp

        from jaxvlm.weights import import_model

        jnp.zeros(1).block_until_ready()

        def run():
            leaves = jax.tree.leaves(import_model(folder, dtype=None)[1])
            return read([np.asarray(leaf) for leaf in leaves]), leaves
    else:
        import torch
        import transformers

        torch.zeros(1)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()

        def run():
            model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
            leaves = list(model.parameters())
            return read([leaf.detach().numpy() for leaf in leaves]), leaves

    before, peak, stop = resident(), [0, 0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[:] = map(max, peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    size, kept = run()
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    above = {kind: peak[i] - before[i] - size for i, kind in enumerate(KINDS)}
    print(json.dumps({"seconds": seconds, **above, "bytes": size, "leaves": len(kept)}))


def read(arrays: list) -> int:
    """Reads every byte; the size in bytes."""
    for array in arrays:
        array.reshape(-1).view("u2").max()
    return sum(array.nbytes for array in arrays)


def resident() -> list[int]:
    """Bytes of this process's memory that are resident, and those of them that are anonymous."""
    found = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if "kB" in line)
    return [int(found[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="benchmarks/results/import.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return load(options.side, options.folder)
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_checkpoint(Path(folder), options.gigabytes)
        size = sum(len(file.read_bytes()) for file in Path(folder).glob("*.safetensors"))  # into the page cache
        print(f"{size / 1e9:.2f} GB, {parameters / 1e6:.0f} M parameters")
        found: dict[str, list[dict]] = {side: [] for side in SIDES}
        for number in range(options.rounds):
            for side in SIDES:
                command = [sys.executable, __file__, "--side", side, "--folder", folder]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
                last = found[side][-1]
                above = ", ".join(f"{last[kind] / 2**20:.0f} MiB {kind.split('_')[0]}" for kind in KINDS)
                print(f"round {number + 1} {side:12} {last['seconds']:.2f} s, above the parameters {above}")
    medians = {key: {s: statistics.median(r[key] for r in found[s]) for s in SIDES} for key in ("seconds", *KINDS)}
    seconds = medians["seconds"]
    result = {
        "what": "loading a llava-hf checkpoint until every parameter was read, peak memory above the result",
        "device": f"{platform.machine()}, {platform.system()}",
        "versions": {name: metadata.version(name) for name in ("jax", "torch", "transformers", "safetensors")},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "checkpoint_bytes": size,
        **medians,
        "transformers_seconds_over_ours": seconds["transformers"] / seconds["jaxvlm"],
        "rounds": found,
    }
    Path(options.out).write_text(json.dumps(result, indent=2) + "\n")
    print(f"transformers takes {result['transformers_seconds_over_ours']:.2f} of our time. Written: {options.out}")


if __name__ == "__main__":
    main()
