"""Thirty AdamW steps of each stage, against torch: the same tiny LLaVA, the same batches, the same losses."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers

from jaxvlm.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, SourceConfig, StageConfig
from jaxvlm.data.assets import toy
from jaxvlm.data.loader import Loader
from jaxvlm.parallel.mesh import make_mesh
from jaxvlm.train.loop import train_stage
from jaxvlm.train.metrics import read_metrics
from jaxvlm.train.state import flat
from jaxvlm.weights import import_model

STEPS = 30
IMAGE_TOKEN = 511


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A random LLaVA of transformers, saved as a llava-hf folder."""
    torch.manual_seed(0)
    c = tiny.model_config()
    vision = transformers.CLIPVisionConfig(
        hidden_size=c.vision.width,
        intermediate_size=c.vision.mlp_dim,
        num_hidden_layers=c.vision.depth,
        num_attention_heads=c.vision.num_heads,
        image_size=c.vision.image_size,
        patch_size=c.vision.patch_size,
    )
    text = transformers.LlamaConfig(
        vocab_size=c.llm.vocab_size,
        hidden_size=c.llm.width,
        intermediate_size=c.llm.mlp_dim,
        num_hidden_layers=c.llm.depth,
        num_attention_heads=c.llm.num_heads,
        num_key_value_heads=c.llm.num_kv_heads,
        rms_norm_eps=c.llm.norm_eps,
        max_position_embeddings=c.llm.max_positions,
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    model = transformers.LlavaForConditionalGeneration(config).float()
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    return folder


def _torch_inputs(batch: dict, vision) -> dict:
    """The same rows as transformers takes them: placeholders for visual tokens, labels on the predicted token."""
    tokens, visual = batch["tokens"], batch["visual_index"]
    labels = np.full_like(tokens, -100)
    rows, columns = np.nonzero(batch["loss_weights"])
    labels[rows, columns + 1] = batch["targets"][rows, columns]
    pixels = batch["pixels"].reshape(-1, *batch["pixels"].shape[2:])[batch["tile_mask"].reshape(-1)]
    pixels = (pixels / np.float32(255) - np.float32(vision.mean)) / np.float32(vision.std)
    return dict(
        input_ids=torch.tensor(np.where(visual >= 0, IMAGE_TOKEN, tokens)).long(),
        attention_mask=torch.tensor(batch["segment_ids"] > 0).long(),
        labels=torch.tensor(labels).long(),
        pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)).float() if len(pixels) else None,
    )


@pytest.mark.parametrize(
    ("name", "file", "template", "trains", "optimizer"),
    [
        ("align", "align.json", "plain", "multi_modal_projector", dict(learning_rate=5e-3)),
        ("instruct", "instruct.json", None, "multi_modal_projector language_model lm_head", dict(learning_rate=1e-3)),
        (
            "clipped",
            "instruct.json",
            None,
            "multi_modal_projector language_model lm_head",
            dict(learning_rate=1e-3, clip_norm=0.5, weight_decay=0.1, warmup_rounding="floor"),
        ),
    ],
)
def test_thirty_steps_equal_torch(reference, tmp_path, name, file, template, trains, optimizer):
    data, tokenizer = toy.write_dataset(tmp_path / "data", 20), toy.write_tokenizer(tmp_path / "tok")
    prompt = tiny.run_config(data, tokenizer).prompt
    model, params = import_model(reference)
    model = dataclasses.replace(model, dtype="float32", remat="full")
    source = SourceConfig(name="toy", path=str(data / file), images=str(data / "images"))
    stage = StageConfig(
        name=name,
        trainable=("connector/.*",) if name == "align" else ("connector/.*", "llm/.*"),
        data=DataConfig(sources=(source,), template=template),
        optimizer=OptimizerConfig(**optimizer),
        batch_size=4,
        steps=STEPS,
    )
    loader = Loader(stage.data, prompt, model, batch_size=4, steps=STEPS, seed=0)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        run = tmp_path / "run"
        trained, _ = train_stage(stage, model, params, loader, mesh, run, run / "stages" / name, CheckpointConfig())
    ours = [entry["loss"] for entry in read_metrics(tmp_path / "run" / "metrics.jsonl")]

    oracle = transformers.LlavaForConditionalGeneration.from_pretrained(reference)
    for key, parameter in oracle.named_parameters():
        parameter.requires_grad = any(part in key for part in trains.split())
    decayed = [p for k, p in oracle.named_parameters() if p.requires_grad and not ("norm" in k or k.endswith("bias"))]
    others = [p for k, p in oracle.named_parameters() if p.requires_grad and ("norm" in k or k.endswith("bias"))]
    decay = optimizer.get("weight_decay", 0.0)
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=optimizer["learning_rate"], betas=(0.9, 0.999), eps=1e-8)
    warmup = 0 if optimizer.get("warmup_rounding") == "floor" else 1  # of 0.03 * 30 steps
    rates = transformers.get_cosine_schedule_with_warmup(adamw, warmup, STEPS)
    theirs = []
    for batch in loader.batches(0):
        loss = oracle(**_torch_inputs(batch, model.vision)).loss
        adamw.zero_grad()
        loss.backward()
        if "clip_norm" in optimizer:
            torch.nn.utils.clip_grad_norm_(decayed + others, optimizer["clip_norm"])
        adamw.step()
        rates.step()
        theirs.append(loss.item())
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert (
        ours[-1] < (0.98 if name == "align" else 0.8) * ours[0]
    )  # it learns (through a frozen random decoder: little)

    oracle.save_pretrained(tmp_path / "after")
    _, expected = import_model(tmp_path / "after")
    expected, (_, before) = flat(expected), import_model(reference)  # training took the first copy's buffers
    before = flat(before)
    for path, leaf in flat(trained).items():
        distance = np.linalg.norm(np.asarray(leaf) - np.asarray(expected[path]))
        assert distance <= 1e-3 * np.linalg.norm(np.asarray(expected[path])), path
        moved = not np.array_equal(np.asarray(leaf), np.asarray(before[path]))
        assert moved == (path.startswith("connector") or (name != "align" and path.startswith("llm"))), path
