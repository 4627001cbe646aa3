"""Opening a llava-hf checkpoint: jaxvlm beside transformers, each in a process of its own, alternating.

  python benchmarks/import_bench.py [--gigabytes 2] [--rounds 5] [--device cpu] [--out benchmarks/results/import.json]

The checkpoint is synthetic: random float16 in four shards, in a temporary folder, and in the page cache before the first round.
It is opened as it is stored, and as float32, our own default. Timed is the call, all its classes imported before, until every
parameter is on the GPU (`--device gpu`) or, on the CPU, has been read once: a side that only maps the file has not done so yet.
Beside it stand the processor seconds of the call, which neighbours on a shared machine hardly change, and the whole process with
its imports. Memory is what the process has resident, and of that what is anonymous (mapped pages of a file can be given back):
the peak during the call, sampled every 2 ms, less what it was before, less the size of the parameters if the host has them.

The host of a virtual machine may have taken unused memory back, and then gives it again at a fraction of the speed of memory. So
just before the call each side asks for as much memory as the parameters need and gives it back; what that took is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
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
CASES = {"as stored": 1, "float32": 2}  # bytes of a parameter for each in the file
MEASURES = ("seconds", "cpu_seconds", "process_seconds", "resident_above", "anonymous_above")


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


def load(side: str, case: str, folder: str, device: str, started: float) -> None:
    """In a process of its own, `started` as the clock of the machine has it: loads and prints the measures."""
    import numpy as np

    if side == "jaxvlm":
        import jax
        import jax.numpy as jnp

        from jaxvlm.weights import import_model

        jnp.zeros(1).block_until_ready()

        def run():
            leaves = jax.tree.leaves(import_model(folder, dtype=None if case == "as stored" else case)[1])
            jax.block_until_ready(leaves)
            return leaves
    else:
        import torch
        import transformers
        from transformers import CLIPVisionModel, LlamaModel, LlavaForConditionalGeneration  # noqa: F401, not in the call

        place = {"cpu": {}, "gpu": {"device_map": "cuda"}}[device]
        torch.zeros(1, device=place.get("device_map", "cpu"))
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()

        def run():
            dtype = "auto" if case == "as stored" else case
            leaves = list(LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, **place).parameters())
            if device == "gpu":
                torch.cuda.synchronize()
            return [leaf.detach() for leaf in leaves]

    on_host = device == "cpu"
    room = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) * CASES[case] * on_host
    start = time.monotonic()
    bytearray(room)
    fetched = time.monotonic() - start
    before, peak, stop = resident(), [0, 0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[:] = map(max, peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, cpu = time.monotonic(), time.process_time()
    kept = run()
    for leaf in kept if on_host else ():
        np.asarray(leaf).reshape(-1).view("u2").max()
    end, cpu = time.monotonic(), time.process_time() - cpu
    stop.set()
    watcher.join()
    size = sum(leaf.nbytes for leaf in kept)
    above = [most - held - size * on_host for most, held in zip(peak, before, strict=True)]
    values = dict(zip(MEASURES, (end - start, cpu, end - started - fetched, *above), strict=True))
    print(json.dumps(values | {"fetching_memory_seconds": fetched, "bytes": size, "leaves": len(kept)}))


def resident() -> list[int]:
    """Bytes of this process's memory that are resident, and those of them that are anonymous."""
    found = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if "kB" in line)
    return [int(found[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="benchmarks/results/import.json")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--load", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        *what, started = options.load
        return load(*what, float(started))
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_checkpoint(Path(folder), options.gigabytes)
        size = sum(len(file.read_bytes()) for file in Path(folder).glob("*.safetensors"))  # into the page cache
        print(f"{size / 1e9:.2f} GB, {parameters / 1e6:.0f} M parameters")
        found: dict[str, dict[str, list[dict]]] = {case: {side: [] for side in SIDES} for case in CASES}
        for number in range(options.rounds):
            for case in CASES:
                for side in SIDES:
                    last = measured(side, case, folder, options.device)
                    found[case][side].append(last)
                    print(f"round {number + 1}, {case}, {side}: {described(last)}", flush=True)
    result = {
        "what": "loading a llava-hf checkpoint until every parameter was read, peak memory above the result",
        "device": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "loaded_on": gpu_name() if options.device == "gpu" else "cpu",
        "versions": {name: metadata.version(name) for name in ("jax", "torch", "transformers", "safetensors")},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "checkpoint_bytes": size,
    }
    for case, rounds in found.items():
        medians = {name: {s: statistics.median(r[name] for r in rounds[s]) for s in SIDES} for name in MEASURES}
        ratios = {name: medians[name]["transformers"] / medians[name]["jaxvlm"] for name in MEASURES[:3]}
        result[case] = {"medians": medians, "transformers_over_ours": ratios, "rounds": rounds}
        for side in SIDES:
            print(f"{case}, {side}: {described({name: medians[name][side] for name in MEASURES})}")
        print(
            f"{case}: transformers takes {ratios['seconds']:.2f} of our time, {ratios['process_seconds']:.2f} with imports"
        )
    Path(options.out).write_text(json.dumps(result, indent=2) + "\n")


def gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def measured(side: str, case: str, folder: str, device: str) -> dict:
    command = [sys.executable, __file__, "--load", side, case, folder, device, str(time.monotonic())]
    platforms = {} if device == "gpu" else {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | platforms)
    return json.loads(done.stdout.splitlines()[-1])


def described(values: dict) -> str:
    seconds = f"{values['seconds']:.2f} s ({values['cpu_seconds']:.2f} s of processor), process {values['process_seconds']:.2f} s"
    above = ", ".join(f"{values[name] / 2**20:.0f} MiB {name.split('_')[0]}" for name in MEASURES[3:])
    return f"{seconds}; above the parameters {above}"


if __name__ == "__main__":
    main()
