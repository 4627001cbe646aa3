"""Any resolution through the whole model: logits and greedy tokens against transformers, and training."""

from __future__ import annotations

from dataclasses import replace

import hf_copy
import jax
import numpy as np
import pytest
import tiny
from parity_log import record_parity
from PIL import Image

from jaxvlm.config import (
    ConfigError,
    ConnectorConfig,
    DataConfig,
    PromptConfig,
    SourceConfig,
    SVAConfig,
    VisionConfig,
)
from jaxvlm.data.assets import llava_json, toy
from jaxvlm.data.loader import Loader
from jaxvlm.data.tokenizer import Tokenizer
from jaxvlm.infer.engine import Engine
from jaxvlm.models.vlm import VLM
from jaxvlm.train.step import loss_sums

SIZE = 28  # of a tile, in 2 x 2 or 4 x 4 cells
SHAPES = [(70, 30), (25, 90), (64, 60)]
NEW = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tokenizer, and three pictures of different shapes."""
    folder = tmp_path_factory.mktemp("world")
    toy.write_tokenizer(folder / "tokenizer")
    for i, (width, height) in enumerate(SHAPES):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def llava_next(vocab):
    import transformers as t

    vision = dict(image_size=SIZE, patch_size=7, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    text = dict(vocab_size=vocab, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(intermediate_size=64, projection_dim=32, **vision),
        text_config=t.LlamaConfig(intermediate_size=128, max_position_embeddings=512, **text),
        image_token_index=vocab - 1,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
        tie_word_embeddings=False,
    )
    return t.LlavaNextForConditionalGeneration(config), "llava_next.image_processing_pil_llava_next"


def llava_onevision(vocab):
    """Grids up to 3 x 3, scaled down where they are more than two tiles large."""
    import transformers as t

    vision = dict(image_size=SIZE, patch_size=7, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    text = dict(vocab_size=vocab, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(intermediate_size=64, vision_use_head=False, **vision),
        text_config=t.Qwen2Config(intermediate_size=128, max_position_embeddings=512, **text),
        image_token_index=vocab - 1,
        video_token_index=vocab - 2,
        image_grid_pinpoints=[[SIZE * rows, SIZE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)],
        vision_aspect_ratio="anyres_max_2",
        tie_word_embeddings=False,
    )
    return t.LlavaOnevisionForConditionalGeneration(config), "llava_onevision.image_processing_pil_llava_onevision"


@pytest.mark.parametrize("make", [llava_next, llava_onevision])
def test_logits_and_greedy_tokens_are_transformers(world, tmp_path, make):
    """One image, and two of different shapes, with transformers' own preprocessing on its side."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import importlib

    from jaxvlm.weights import import_model, prompt_from

    vocab = Tokenizer(world / "tokenizer").vocab_size + 2
    model, module = make(vocab)
    hf_copy.randomise(model.eval(), seed=3)
    model.save_pretrained(tmp_path)
    config, params = import_model(tmp_path)
    config = replace(config, dtype="float32")
    prompt = replace(prompt_from(tmp_path), tokenizer=str(world / "tokenizer"), template="vicuna_v1")
    engine = Engine(config, prompt, params)
    module = importlib.import_module(f"transformers.models.{module}")
    size = {"height": SIZE, "width": SIZE} if make is llava_onevision else {"shortest_edge": SIZE}
    processor = next(value for name, value in vars(module).items() if name.endswith("ImageProcessorPil"))(
        size=size,
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=config.vision.mean,
        image_std=config.vision.std,
        image_grid_pinpoints=model.config.image_grid_pinpoints,
    )
    requests, seen = [], []
    for text, numbers in (("<image>\nWhat?", [0]), ("<image> and <image>?", [1, 2])):
        pictures = [str(world / f"{i}.png") for i in numbers]
        requests.append({"messages": [{"role": "user", "content": text}], "images": pictures})
        opened = [Image.open(path) for path in pictures]  # OneVision's processor puts the images of one text together
        seen.append(processor([opened] if make is llava_onevision else opened, return_tensors="pt"))
    prompts = [engine._prompt(request, i) for i, request in enumerate(requests)]
    assert make is llava_next or prompts[0].blend[1].max(1).min() < 1
    written, worst = engine._answer(prompts, 2, NEW, 0.0, 1.0, 0), 0.0
    for request, one, pixels, tokens in zip(requests, prompts, seen, written, strict=True):
        ids = torch.from_numpy(np.where(one.visual_index != -1, vocab - 1, one.tokens)[None].astype(np.int64))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
        with torch.no_grad():
            want = model(**inputs).logits[0].numpy()
            out = model.generate(
                **inputs, do_sample=False, max_new_tokens=NEW, eos_token_id=engine.tokenizer.eos_id, pad_token_id=0
            )
        worst = max(worst, np.abs(engine.logits([request]).values[0] - want).max() / np.abs(want).max())
        assert out[0, ids.shape[1] :].tolist() == tokens
    assert worst <= 2e-5
    record_parity(model.config.model_type, "logits", worst)


TOWER = VisionConfig(image_size=SIZE, patch_size=14, width=32, depth=3, num_heads=4, mlp_dim=64)
SVA = SVAConfig(width=32, num_heads=4, depth=1, grid=4, llm_layers=(0,))
SMALL = replace(TOWER, patch_size=7, width=16, depth=2)
SEVERAL = VisionConfig(kind="fused", towers=(SMALL, replace(SMALL, image_size=56)))


@pytest.mark.parametrize(
    ("settings", "prompt", "slots"),
    [
        ({"vision": TOWER, "connector": ConnectorConfig("linear", row_end=True)}, {"transform": "anyres"}, 14),
        (
            {"vision": SEVERAL, "connector": ConnectorConfig("sva", row_end=True, sva=SVA)},
            {"transform": "letterbox_unpad"},
            2,
        ),
    ],
)
def test_tiles_and_row_ends_train(world, settings, prompt, slots):
    """The row end learns, and packed rows with kept features of tiles teach what single ones with pixels do."""
    from jaxvlm.train.features import cached_features

    model = tiny.model_config(**settings)
    turns = [[("<image>\nWhat colour is it?", "red " * (1 + i))] for i in range(4)]
    records = [llava_json.record(f"{i}", f"{i % 3}.png", turns[i]) for i in range(4)]
    llava_json.write_json(world / "data.json", records)
    prompt = PromptConfig(str(world / "tokenizer"), "vicuna_v1", max_tiles=1, length=256, **prompt)
    source = SourceConfig(path=str(world / "data.json"), images=str(world))
    params = hf_copy.random_params(model)

    @jax.jit
    def run(params, batch):
        weights = batch["loss_weights"] / batch["loss_weights"].sum()

        def loss(connector):
            return loss_sums(VLM(model), params | {"connector": connector}, batch, weights, 1)[0]

        return jax.value_and_grad(loss)(params["connector"])

    def loss(packing, batch_size, features=None):
        settings = DataConfig(sources=(source,), packing=packing, tiles_per_row=slots if packing else 6)
        loader = Loader(settings, prompt, model, batch_size=batch_size, seed=0, steps=1, features=features)
        (batch,) = loader.batches()
        assert ("tile_regions" in batch) == (model.connector.kind == "sva")
        return loader, *run(params, batch)

    loader, single, gradient = loss(False, 4)
    assert np.abs(gradient["newline"]).max() > 1e-4
    tables, rows = cached_features(
        model, params["vision"], loader.image_paths(), prompt, world / "features", batch_size=4
    )
    tiles = sum(plan.tiles for plan in (Engine(model, prompt, params)._plans([p])[0] for p in rows))
    assert [len(table) for table in tables] == [tiles] * (2 if model.connector.kind == "sva" else 1)
    _, value, again = loss(True, 2, (tables, rows))
    np.testing.assert_allclose(value, single, rtol=1e-5)
    np.testing.assert_allclose(again["newline"], gradient["newline"], rtol=1e-3, atol=1e-6)


def test_features_that_cannot_be_kept_are_refused(tmp_path):
    from jaxvlm.train.features import cached_features

    several = PromptConfig(transform="anyres", tile_several=False)
    with pytest.raises(ConfigError, match="prompt.tile_several = False"):
        cached_features(tiny.model_config(), {}, [], several, tmp_path)
