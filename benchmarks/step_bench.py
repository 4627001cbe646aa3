"""Whole training steps and generation of LLaVA-1.5 models, beside transformers + torch, in one run on the same device.

  python benchmarks/step_bench.py [--case NAME ...] [--rounds 8] [--out benchmarks/results/step.json]

On a GPU in bfloat16: stage 1 of the 7B (frozen decoder), its LoRA stage, full fine-tunes of a 1.1B and a 3B decoder, and greedy
generation by the 7B; on a CPU the same code on a toy model in float32. Parameters are random. Samples have the lengths of the
665K mixture (those of packing_bench.py; captions for stage 1): jaxvlm packs them into rows of the length that suits them; torch has
as many of them in a batch, grouped by length and padded, with gradient checkpointing and sdpa, which is how the reference trainers
do it.

Each side of each case is a process of its own, which has the device alone. Every step takes other samples. jaxvlm's waits for the
one before it and torch's for itself, as their trainers do. Reported are useful tokens a second (padding is not useful; an image
counts its visual tokens), of jaxvlm over all timed steps and of torch the median of its steps, since each new shape costs it
seconds once; their ratio, and MFU by `train.flops` (useful FLOPs without recomputation; torch's from the ratio).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault(
    "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
)  # only the process that measures jaxvlm takes the memory

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from packing_bench import mixture
from shared import commit, cpu_name

from jaxvlm.config import LLMConfig, LoRAConfig, MeshConfig, ModelConfig, OptimizerConfig, VisionConfig

ON_GPU = jax.default_backend() == "gpu"
DTYPE = "bfloat16" if ON_GPU else "float32"
WARM_UP = 2  # steps before the timed ones
# --attention and --trace, for the child processes
ATTENTION, TRACE = "STEP_BENCH_ATTENTION", "STEP_BENCH_TRACE"


class Case(NamedTuple):
    """`rows` of `length` tokens and `slots` images make a step; for generation they are the batch, and `length` the new tokens."""

    name: str
    llm: LLMConfig
    trainable: tuple[str, ...] = ()  # of a training step
    rows: int = 1
    length: int = 2048
    slots: int = 3
    captions: bool = False  # an image and a short text each


LLAMA_7B = LLMConfig(vocab_size=32000, width=4096, depth=32, num_heads=32, num_kv_heads=32, head_dim=128, mlp_dim=11008)
LLAMA_3B = LLMConfig(vocab_size=128256, width=3072, depth=28, num_heads=24, num_kv_heads=8, head_dim=128, mlp_dim=8192)
LLAMA_1B = LLMConfig(vocab_size=32000, width=2048, depth=22, num_heads=32, num_kv_heads=4, head_dim=64, mlp_dim=5632)
TOY = LLMConfig(vocab_size=2000, width=256, depth=4, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=704)
CLIP_L = VisionConfig(image_size=336, patch_size=14, width=1024, depth=24, num_heads=16, mlp_dim=4096)
TOY_CLIP = VisionConfig(image_size=336, patch_size=14, width=128, depth=3, num_heads=2, mlp_dim=512)
LORA = LoRAConfig(rank=128, alpha=256.0)
ALIGN, ADAPT, TUNE = ("connector/.*",), ("connector/.*", "llm/.*lora_.*"), ("connector/.*", "llm/.*")

GPU_CASES = [
    Case("stage 1, 7B", LLAMA_7B, ALIGN, rows=7, length=2432, slots=4, captions=True),
    Case("stage 2, LoRA, 7B", dataclasses.replace(LLAMA_7B, lora=LORA), ADAPT, rows=2, length=4096, slots=5),
    Case("stage 2, 1.1B", LLAMA_1B, TUNE, rows=4, length=4096, slots=5),
    Case("stage 2, 3B", LLAMA_3B, TUNE, rows=2, length=4096, slots=5),
    Case("generation, 7B, batch 1", LLAMA_7B, rows=1, length=128),
    Case("generation, 7B, batch 32", LLAMA_7B, rows=32, length=128),
]
CPU_CASES = [
    Case("stage 1, toy", TOY, ALIGN, rows=2, captions=True),
    Case("stage 2, LoRA, toy", dataclasses.replace(TOY, lora=dataclasses.replace(LORA, rank=16)), ADAPT, rows=1),
    Case("stage 2, toy", TOY, TUNE, rows=1),
    Case("generation, toy, batch 4", TOY, rows=4, length=16),
]
CASES = GPU_CASES if ON_GPU else CPU_CASES
PROMPT_TEXT = 48  # tokens of a prompt beside its image
POOL = 10_000  # samples that rows are packed from
LONGEST = 2048  # tokens of a sample, where LLaVA cuts it


def model_of(case: Case) -> ModelConfig:
    vision, remat = CLIP_L if ON_GPU else TOY_CLIP, "dots" if case.trainable else "none"  # what fits 80 GB
    return ModelConfig(vision=vision, llm=case.llm, dtype=DTYPE, remat=remat, attention=os.environ.get(ATTENTION, ""))


def traced(case: Case) -> contextlib.AbstractContextManager:
    """jax's profiler for what is done in it, if --trace asks for it."""
    folder = os.environ.get(TRACE)
    return jax.profiler.trace(Path(folder) / case.name.replace(" ", "_")) if folder else contextlib.nullcontext()


def samples(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Lengths, the visual tokens included, and images (0 or 1) of samples in random order."""
    if not case.captions:
        return mixture(POOL, LONGEST)[:2]
    text = np.random.default_rng(0).lognormal(3.1, 0.4, POOL).astype(int) + 3  # 25 tokens or so
    return text + 576, np.ones(POOL, int)


def timed(step: Callable, batches: Iterable, ahead: bool) -> tuple[list[float], list[float]]:
    """The losses of all steps, and the seconds between those of the timed ones. A step returns its loss, on the device; with
    `ahead` the next timed step is given to the device before that is waited for."""
    losses, waiting, stamps = [], [], []

    def wait():
        losses.append(float(waiting.pop(0)))
        stamps.append(time.perf_counter())

    for number, batch in enumerate(batches):
        waiting.append(step(batch))
        while len(waiting) > (ahead and number >= WARM_UP):
            wait()
    while waiting:
        wait()
    return losses, np.diff(stamps)[WARM_UP - 1 :].tolist()


# ----------------------------------------------------------------------------------------------------------- jaxvlm


def packed_batches(case: Case, steps: int) -> list[dict[str, np.ndarray]]:
    """Batches of random tokens and pixels in the layout of the loader's."""
    from jaxvlm.data import packing

    lengths, images = samples(case)
    rows, rng = packing.plan(lengths, images, case.length, case.slots), np.random.default_rng(1)
    side = model_of(case).vision.image_size
    found = []
    for step in range(steps):
        shape = (case.rows, case.length)
        batch = {
            "tokens": rng.integers(3, case.llm.vocab_size, shape, dtype=np.int32),
            "targets": rng.integers(3, case.llm.vocab_size, shape, dtype=np.int32),
            "visual_index": np.full(shape, -1, np.int32),
            "loss_weights": np.zeros(shape, np.float32),
            "pixels": rng.integers(0, 256, (case.rows, case.slots, side, side, 3), dtype=np.uint8),
            "tile_mask": np.zeros((case.rows, case.slots), bool),
        }
        batch |= {name: np.zeros(shape, np.int32) for name in ("positions", "segment_ids", "source_ids")}
        for row in range(case.rows):
            at, tile = 0, 0
            first, last = rows.offsets[step * case.rows + row : step * case.rows + row + 2]
            for number, sample in enumerate(rows.samples[first:last], 1):
                length, visual = lengths[sample], 576 * images[sample]
                here = (row, slice(at, at + length))
                batch["segment_ids"][here], batch["positions"][here] = number, np.arange(length)
                batch["loss_weights"][row, at + visual + (length - visual) // 2 : at + length] = 1  # the answer
                if visual:
                    batch["visual_index"][row, at : at + visual] = tile * 576 + np.arange(576)
                    batch["tile_mask"][row, tile] = True
                    tile += 1
                at += length
        found.append(batch)
    return found


def jax_params(case: Case) -> dict:
    """Random parameters, the trained ones in float32 and the others as they are computed with."""
    from jaxvlm.models.vlm import init_params
    from jaxvlm.train.state import cast, merge, split

    @jax.jit
    def make(key):
        params = init_params(model_of(case), key)
        if not case.trainable:
            return cast(params, DTYPE)
        trainable, frozen = split(params, case.trainable)
        return merge(trainable, cast(frozen, DTYPE))

    return make(jax.random.key(0))


def jax_train(case: Case, rounds: int) -> dict:
    from jaxvlm.models.vlm import VLM
    from jaxvlm.parallel.mesh import make_mesh
    from jaxvlm.train import flops
    from jaxvlm.train.optimizer import make_optimizer
    from jaxvlm.train.state import TrainState, flat, split
    from jaxvlm.train.step import make_step, step_options

    model = model_of(case)
    batches = packed_batches(case, rounds + WARM_UP)
    trainable, frozen = split(jax_params(case), case.trainable)
    shares = flops.trainable_shares(flat(trainable), flat(frozen))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-4), 1000, trainable)
    state = TrainState(jnp.int32(0), trainable, frozen, jax.jit(optimizer.init)(trainable))
    del trainable, frozen
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.device_put(state, there)  # as it comes back, so that the step is compiled once
    with jax.set_mesh(mesh):
        options = dict(donate_argnums=0, out_shardings=there, compiler_options=step_options(model))
        step = jax.jit(make_step(VLM(model), optimizer, 1), **options)

        def one(batch):
            nonlocal state
            state, metrics = step(state, batch)
            return metrics["loss"]

        losses, taken = timed(one, map(jax.device_put, batches), ahead=True)
        with traced(case):
            float(one(jax.device_put(batches[-1])))
    counted, took = batches[WARM_UP:], sum(taken)
    useful = sum(sum(flops.batch_flops(model, batch, shares).values()) for batch in counted)
    tokens = sum(int((batch["segment_ids"] > 0).sum()) for batch in counted)
    peak, source = flops.peak_flops()
    return {
        "tokens_per_second": tokens / took,
        "mfu": useful / took / peak,
        "peak": source,
        "seconds": taken,
        "losses": losses,
        "fill": tokens / (len(counted) * case.rows * case.length),
        "samples_per_step": float(np.mean([batch["segment_ids"].max(axis=1).sum() for batch in counted])),
    }


def jax_generate(case: Case, rounds: int) -> dict:
    from jaxvlm.infer import decoding, shapes

    model, params, rng = model_of(case), jax_params(case), np.random.default_rng(0)
    side = model.vision.image_size
    width = 576 + PROMPT_TEXT
    index = np.full((case.rows, width), -1, np.int32)
    index[:, :576] = np.arange(576)
    lengths, padded = np.full(case.rows, width, np.int32), shapes.bucket(width)
    room = shapes.capacity(case.length)
    keys = jax.random.split(jax.random.key(0), case.rows)
    limits = np.full(case.rows, case.length, np.int32)
    sampling = decoding.Sampling(keys, np.float32(1), np.float32(1), np.int32([-1]), limits)

    def pad(x, value):
        return np.pad(x, ((0, 0), (padded - width, 0)), constant_values=value)

    def run():
        pixels = rng.integers(0, 256, (case.rows, side, side, 3), dtype=np.uint8)
        tokens = pad(rng.integers(3, case.llm.vocab_size, (case.rows, width), dtype=np.int32), 0)
        start = time.perf_counter()
        visual = decoding.encode_images(model, params, [jnp.asarray(pixels)])
        slots = shapes.slots(padded + room)
        logits, cache = decoding.prefill(model, slots, params, tokens, pad(index, -1), visual, None, lengths)
        np.asarray(logits)
        middle = time.perf_counter()
        out, _ = decoding.decode(model, room, True, params, cache, logits, lengths, sampling)
        assert (np.asarray(out)[:, : case.length] >= 0).all()
        return time.perf_counter() - start, time.perf_counter() - middle

    taken = [run() for _ in range(rounds + WARM_UP)][WARM_UP:]
    with traced(case):
        run()
    whole, decode = (statistics.median(each) for each in zip(*taken, strict=True))
    cached = 2 * case.llm.depth * case.llm.num_kv_heads * case.llm.head_dim * jnp.dtype(DTYPE).itemsize  # of a token
    weights = sum(
        leaf.nbytes for name, tree in params["llm"].items() if name != "embed" for leaf in jax.tree.leaves(tree)
    )
    moved = weights + case.rows * (width + case.length / 2) * cached  # by a step in the middle
    return {
        "tokens_per_second": case.rows * case.length / whole,
        "decode_bytes_per_second": moved * (case.length - 1) / decode,
        "seconds": [list(each) for each in taken],
    }


# ------------------------------------------------------------------------------------------------------------ torch


def torch_model(case: Case):
    """transformers' LLaVA of the same shape, what trains in float32, adapters as PEFT computes them."""
    import torch
    import transformers
    from cpu_step import TARGETS, Adapter

    c, v = case.llm, model_of(case).vision
    text = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp_dim, num_hidden_layers=c.depth,
        num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        image_size=v.image_size, patch_size=v.patch_size, hidden_size=v.width, num_hidden_layers=v.depth,
        num_attention_heads=v.num_heads, intermediate_size=v.mlp_dim,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=1)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, DTYPE))
    with torch.device("cuda" if ON_GPU else "cpu"):
        model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
        torch.set_default_dtype(default)
        model.requires_grad_(False)
        if case.llm.lora.rank:
            for module in list(model.model.language_model.modules()):
                for name, child in list(module.named_children()):
                    if name in TARGETS:
                        setattr(module, name, Adapter(child, c.lora.rank, c.lora.alpha / c.lora.rank))
    trained = [model.model.multi_modal_projector] if case.trainable else []
    if case.trainable == TUNE:
        trained += [model.model.language_model, model.lm_head]
    for module in trained:
        module.float().requires_grad_(True)
    return model


def grouped_batches(case: Case, steps: int, size: int) -> list[np.ndarray]:
    """Samples of each step: within 50 batches sorted by length, then batches in random order (as LLaVA groups them)."""
    lengths, _ = samples(case)
    rng = np.random.default_rng(2)
    chosen = rng.permutation(len(lengths))[: steps * size]
    batches = np.array_split(chosen[np.argsort(lengths[chosen], kind="stable")], steps)
    return [batches[i] for i in rng.permutation(steps)]


def torch_train(case: Case, rounds: int, size: int) -> dict:
    import torch

    device = "cuda" if ON_GPU else "cpu"
    model, side = torch_model(case), model_of(case).vision.image_size
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    (lengths, images), rng = samples(case), np.random.default_rng(1)
    batches, tokens = [], []
    for chosen in grouped_batches(case, rounds + WARM_UP, size):
        longest = int(lengths[chosen].max())
        ids = rng.integers(3, case.llm.vocab_size, (len(chosen), longest))
        mask = np.arange(longest) < lengths[chosen][:, None]
        visual = 576 * images[chosen][:, None]
        ids = np.where(np.arange(longest) < visual, 1, ids)
        answered = mask & (np.arange(longest) >= visual + (lengths[chosen][:, None] - visual) // 2)
        inputs = {"input_ids": ids, "attention_mask": mask.astype(int), "labels": np.where(answered, ids, -100)}
        inputs = {name: torch.tensor(x, device=device) for name, x in inputs.items()}
        if images[chosen].any():
            shape = (int(images[chosen].sum()), 3, side, side)
            inputs["pixel_values"] = torch.randn(shape, device=device, dtype=getattr(torch, DTYPE))
        batches.append(inputs)
        tokens.append(int(lengths[chosen].sum()))

    def one(inputs):
        with torch.autocast(device, torch.bfloat16, enabled=ON_GPU):
            loss = model(**inputs, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses, taken = timed(one, batches, ahead=False)
    rates = np.array(tokens[WARM_UP:]) / taken
    return {"tokens_per_second": float(np.median(rates)), "rates": rates.tolist(), "seconds": taken, "losses": losses}


def torch_generate(case: Case, rounds: int) -> dict:
    import torch

    device = "cuda" if ON_GPU else "cpu"
    model, side, taken = torch_model(case).eval(), model_of(case).vision.image_size, []
    ids = torch.randint(3, case.llm.vocab_size, (case.rows, 576 + PROMPT_TEXT), device=device)
    ids[:, :576] = 1
    options = dict(max_new_tokens=case.length, min_new_tokens=case.length, do_sample=False, pad_token_id=0)
    if ON_GPU:
        options["cache_implementation"] = "static"  # which transformers compiles the decoding for
    for _ in range(rounds + WARM_UP):
        pixels = torch.randn((case.rows, 3, side, side), device=device, dtype=getattr(torch, DTYPE))
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), **options)
        assert out.cpu().shape[1] == ids.shape[1] + case.length
        taken.append(time.perf_counter() - start)
    return {
        "tokens_per_second": case.rows * case.length / statistics.median(taken[WARM_UP:]),
        "seconds": taken[WARM_UP:],
    }


# -------------------------------------------------------------------------------------------------------- measuring


def one_side(case: Case, side: str, rounds: int, size: int) -> dict:
    """What a child process does."""
    if side == "jaxvlm":
        return (jax_train if case.trainable else jax_generate)(case, rounds)
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch_train(case, rounds, size) if case.trainable else torch_generate(case, rounds)


def in_process(case: Case, side: str, rounds: int, size: int = 0) -> dict:
    """The side's result, or why there is none."""
    command = [sys.executable, __file__, "--case", case.name, "--side", side, "--rounds", str(rounds)]
    memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    environment = os.environ | (memory if side == "jaxvlm" else {})
    done = subprocess.run([*command, "--size", str(size)], capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="this alone (repeatable)")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--attention", default="", help="jaxvlm's kernel by name, as config.model.attention")
    parser.add_argument("--trace", metavar="DIR", default="", help="keep a profile of one more of jaxvlm's steps there")
    parser.add_argument("--out", default="benchmarks/results/step.json")
    parser.add_argument("--side", choices=["jaxvlm", "torch"], help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault(ATTENTION, options.attention)
    os.environ.setdefault(TRACE, options.trace)
    chosen = [case for case in CASES if case.name in (options.case or names)]
    if options.side:
        print(json.dumps(one_side(chosen[0], options.side, options.rounds, options.size)))
        return
    threads = len(os.sched_getaffinity(0))
    result = {
        "what": "training steps and generation of LLaVA-1.5 models against transformers + torch",
        "device": jax.devices()[0].device_kind if ON_GPU else f"{cpu_name()}, {threads} threads",
        "dtype": DTYPE,
        "attention": options.attention or "the default",
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "torch", "transformers")},
        "commit": commit(),
        "cases": [],
    }
    print(f"{'':28s}{'jaxvlm':>14s}{'torch':>14s}{'ratio':>8s}{'MFU':>7s}{'torch':>7s}   (tokens a second)")
    for case in chosen:
        ours = in_process(case, "jaxvlm", options.rounds)
        size = max(round(ours.get("samples_per_step", case.rows)), 1)
        theirs = in_process(case, "torch", options.rounds, size)
        row = {"case": case.name, "rows": case.rows, "length": case.length, "jaxvlm": ours, "torch": theirs}
        failed = [
            f"{name}: {side['failed']}" for name, side in (("jaxvlm", ours), ("torch", theirs)) if "failed" in side
        ]
        if not failed:
            row["ratio"] = ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
            speeds = f"{ours['tokens_per_second']:14.1f}{theirs['tokens_per_second']:14.1f}{ratio:8.2f}"
            shares = f"{ours['mfu']:7.0%}{ours['mfu'] / ratio:7.0%}" if "mfu" in ours else ""
            print(f"{case.name:28s}{speeds}{shares}", flush=True)
        for why in failed:
            print(f"{case.name:28s}{why}", flush=True)
        result["cases"].append(row)
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"Written to {options.out}.")


if __name__ == "__main__":
    main()
