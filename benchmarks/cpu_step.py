"""The quickstart's stage-2 step and generation, beside transformers + torch, in one run on the same cores.

  python benchmarks/cpu_step.py [--rounds 5] [--out benchmarks/results/cpu_step.json]

Both sides hold the same (randomly initialised) 135 M decoder, the same rank-16 adapters and linear connector, and take the
same conversations; the losses are compared before anything is timed. Steps alternate between the two, so that a busy machine
slows both. Reported are medians and their ratio. Torch is timed on the packed rows (with a block-diagonal mask) and on the
padded, one-conversation-a-row batches that the reference trainers make.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from shared import commit, cpu_name

from jaxvlm.config import LoRAConfig, MeshConfig, ModelConfig, OptimizerConfig
from jaxvlm.data.assets import resolve
from jaxvlm.data.loader import Loader
from jaxvlm.infer.engine import Engine
from jaxvlm.job import resolve_assets
from jaxvlm.main import load_config
from jaxvlm.models.vlm import VLM, init_params
from jaxvlm.parallel.mesh import make_mesh
from jaxvlm.train.optimizer import make_optimizer
from jaxvlm.train.state import TrainState, split
from jaxvlm.train.step import make_step
from jaxvlm.weights import import_part

TARGETS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
TARGETS |= {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
NEW_TOKENS = 16


class Adapter(torch.nn.Module):
    """PEFT's arithmetic: base(x) + B(A(x)) * alpha / r, with the base frozen."""

    def __init__(self, base: torch.nn.Linear, rank: int, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.a = torch.nn.Linear(base.in_features, rank, bias=False)
        self.b = torch.nn.Linear(rank, base.out_features, bias=False)
        torch.nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x)) * self.scale


def torch_llm(model: ModelConfig) -> transformers.LlamaForCausalLM:
    """The decoder of the config, randomly initialised."""
    c = model.llm
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        intermediate_size=c.mlp_dim,
        num_hidden_layers=c.depth,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_positions,
        tie_word_embeddings=c.tie_embeddings,
        rope_theta=c.rope_theta,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).float().eval()


class TorchStep:
    """Forward, backward and AdamW over connector and adapters, on batches in jaxvlm's own layout."""

    def __init__(self, llm, connector: dict, lora: LoRAConfig, learning_rate: float, clip: float):
        self.llm = llm.requires_grad_(False)
        for module in list(llm.modules()):
            for name, child in list(module.named_children()):
                if name in TARGETS:
                    setattr(module, name, Adapter(child, lora.rank, lora.alpha / lora.rank))
        kernel, bias = (torch.tensor(np.asarray(connector["linear_1"][k])) for k in ("kernel", "bias"))
        self.norm = torch.nn.LayerNorm(kernel.shape[0])
        self.linear = torch.nn.Linear(*kernel.shape)
        self.linear.weight.data, self.linear.bias.data = kernel.T.contiguous(), bias
        adapters = [p for p in llm.parameters() if p.requires_grad]
        self.trainable = [*adapters, *self.norm.parameters(), *self.linear.parameters()]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=learning_rate, weight_decay=0.0)
        self.clip = clip

    def __call__(self, batch: dict) -> float:
        tokens, index = (torch.tensor(batch[k]).long() for k in ("tokens", "visual_index"))
        segments = torch.tensor(batch["segment_ids"])
        features = torch.tensor(batch["features"])  # [B, T, N, Dv]
        visual = self.linear(self.norm(features.flatten(1, 2)))  # [B, T * N, D]
        placed = torch.gather(visual, 1, index.clamp(min=0)[..., None].expand(-1, -1, visual.shape[-1]))
        x = torch.where(index[..., None] >= 0, placed, self.llm.get_input_embeddings()(tokens))
        length = tokens.shape[1]
        same = (segments[:, :, None] == segments[:, None, :]) & torch.ones(length, length).tril().bool()
        mask = torch.where(same, 0.0, torch.finfo(torch.float32).min)[:, None]  # [B, 1, S, S]
        positions = torch.tensor(batch["positions"]).long()
        logits = self.llm(inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False).logits
        targets = torch.tensor(np.where(batch["loss_weights"] > 0, batch["targets"], -100)).long()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, self.clip)
        self.optimizer.step()
        return loss.item()


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def padded_rows(config, stage, batch, features) -> dict:
    """As many conversations as `batch` holds, one a row, padded to the longest: the reference trainers' batch."""
    count = sum(int(row.max()) for row in batch["segment_ids"])
    data = dataclasses.replace(stage.data, packing=False, tiles_per_row=1)
    loader = Loader(data, config.prompt, config.model, batch_size=count, steps=1, seed=0, features=features)
    rows = next(loader.batches(0))
    longest = int((rows["segment_ids"] > 0).sum(1).max())
    return {k: v[:, :longest] if k not in ("features", "tile_mask") else v for k, v in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default="benchmarks/results/cpu_step.json")
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)

    config = resolve_assets(load_config("configs/quickstart.py"))
    stage, model = config.stages[1], config.model
    llm = torch_llm(model)
    with tempfile.TemporaryDirectory() as folder:
        llm.save_pretrained(folder)
        params = init_params(model, jax.random.key(0))
        loaded = import_part(folder, "llm", model)
    params["llm"] = _overlay(params["llm"], loaded)

    images = sorted(str(path) for path in Path(resolve("asset:easy-vqa/images/train")).iterdir())
    rng = np.random.default_rng(0)
    shape = (len(images), model.vision.num_tokens, model.vision.feature_width)
    features = [rng.normal(size=shape).astype(np.float32)], {path: i for i, path in enumerate(images)}
    loader = Loader(stage.data, config.prompt, model, batch_size=stage.batch_size, steps=4, seed=0, features=features)
    batch = next(loader.batches(0))

    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    settings = dataclasses.replace(stage.optimizer, schedule="constant", warmup_ratio=0.0, learning_rate=1e-4)
    state, step = jax_step(model, params, stage.trainable, settings, mesh)
    peer = TorchStep(llm, params["connector"], model.llm.lora, settings.learning_rate, settings.clip_norm)

    losses = []
    with jax.set_mesh(mesh):
        for _ in range(2):  # adapters start at zero, so the first losses must agree; the second pass is warm-up
            state, metrics = step(state, batch)
            losses.append((float(metrics["loss"]), peer(batch)))
    np.testing.assert_allclose(*losses[0], rtol=1e-4)

    padded = padded_rows(config, stage, batch, features)
    times: dict[str, list[float]] = {"jaxvlm": [], "torch, packed rows": [], "torch, padded rows": []}
    for _ in range(options.rounds):
        with jax.set_mesh(mesh):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            float(metrics["loss"])
            times["jaxvlm"].append(time.perf_counter() - start)
        times["torch, packed rows"].append(seconds(lambda: peer(batch)))
        times["torch, padded rows"].append(seconds(lambda: peer(padded)))

    generation = time_generation(config, params, llm, options.rounds)
    result = {
        "what": "quickstart stage-2 step (LoRA r16, packed) and greedy generation against transformers + torch",
        "device": f"{platform.processor() or platform.machine()}, {threads} threads",
        "cpu": cpu_name(),
        "versions": {n: metadata.version(n) for n in ("jax", "jaxlib", "flax", "torch", "transformers", "numpy")},
        "commit": commit(),
        "batch": {
            "rows": batch["tokens"].shape,
            "tokens": int((batch["segment_ids"] > 0).sum()),
            "supervised": int((batch["loss_weights"] > 0).sum()),
            "padded_rows": padded["tokens"].shape,
        },
        "first_losses": losses[0],
        "step_seconds": {name: statistics.median(values) for name, values in times.items()},
        "step_seconds_all": times,
        "step_speedup": {
            name: statistics.median(values) / statistics.median(times["jaxvlm"])
            for name, values in times.items()
            if name != "jaxvlm"
        },
        "generation": generation,
    }
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(result, indent=2) + "\n")
    for name, value in result["step_seconds"].items():
        print(f"step        {name:20s} {value:7.3f} s  {value / result['step_seconds']['jaxvlm']:.2f}x jaxvlm's time")
    for name in ("jaxvlm", "torch"):
        value = generation["seconds"][name]
        print(f"generation  {name:20s} {value:7.3f} s  {value / generation['seconds']['jaxvlm']:.2f}x jaxvlm's time")
    print(f"Written to {options.out}.")


def jax_step(model: ModelConfig, params: dict, trainable, settings: OptimizerConfig, mesh):
    moving, frozen = split(jax.tree.map(jnp.copy, params), trainable)  # the step takes its buffers
    optimizer = make_optimizer(settings, 100, moving)
    state = TrainState(jnp.int32(0), moving, frozen, optimizer.init(moving))
    with jax.set_mesh(mesh):
        return state, jax.jit(make_step(VLM(model), optimizer, 1), donate_argnums=0)  # as train.loop does


def time_generation(config, params, llm, rounds: int) -> dict:
    """Thirty-two text prompts of the evaluation's length, sixteen new tokens each, batch 32, greedy."""
    model = dataclasses.replace(config.model, llm=dataclasses.replace(config.model.llm, lora=LoRAConfig()))
    plain = {**params, "llm": _without_adapters(params["llm"])}
    engine = Engine(model, config.prompt, plain)
    question = (
        "What colour is the shape in the picture that you see?\nAnswer the question using a single word or phrase."
    )
    requests = [{"messages": [{"role": "user", "content": f"{n} {question}"}], "images": []} for n in range(10, 42)]
    tokens = [engine._prompt(request, 0).tokens for request in requests]
    ids = torch.tensor(np.stack(tokens)).long()
    for module in list(llm.modules()):  # the base weights alone, as deployed
        for name, child in list(module.named_children()):
            if isinstance(child, Adapter):
                setattr(module, name, child.base)

    def ours():
        return engine.generate(requests, max_new_tokens=NEW_TOKENS, batch_size=32)

    def theirs():
        return llm.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)

    theirs_text = [engine.decode(row[ids.shape[1] :].tolist()) for row in theirs()]
    agree = sum(a == b.strip() or a == b for a, b in zip(ours(), theirs_text, strict=True))
    times: dict[str, list[float]] = {"jaxvlm": [], "torch": []}
    for _ in range(rounds):
        times["jaxvlm"].append(seconds(ours))
        times["torch"].append(seconds(theirs))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "prompts": len(requests),
        "prompt_tokens": int(ids.shape[1]),
        "new_tokens": NEW_TOKENS,
        "same_text": agree,
        "seconds": medians,
        "seconds_all": times,
        "speedup": medians["torch"] / medians["jaxvlm"],
    }


def _overlay(old: dict, new: dict) -> dict:
    return {k: _overlay(v, new[k]) if isinstance(v, dict) and k in new else new.get(k, v) for k, v in old.items()}


def _without_adapters(tree: dict) -> dict:
    return {k: _without_adapters(v) if isinstance(v, dict) else v for k, v in tree.items() if not k.startswith("lora_")}


if __name__ == "__main__":
    main()
