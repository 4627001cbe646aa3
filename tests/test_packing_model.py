"""Packed rows teach exactly what the same conversations teach one by one: loss and every gradient, in every layout."""

from __future__ import annotations

import json

import hf_copy
import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from jaxvlm.config import ConnectorConfig, DataConfig, PromptConfig, SourceConfig, VisionConfig
from jaxvlm.data.assets import toy
from jaxvlm.data.layout import LAYOUTS
from jaxvlm.data.loader import Loader
from jaxvlm.models.vlm import VLM
from jaxvlm.train.state import flat
from jaxvlm.train.step import loss_sums

TOWER = VisionConfig(image_size=28, patch_size=14, width=32, depth=2, num_heads=4, mlp_dim=64)
MODEL = tiny.model_config(vision=TOWER, connector=ConnectorConfig("mlp2x_gelu", row_end=True))
# One tile; three of each image; four or three with tokens that are means of others.
TRANSFORMS = {
    "one tile": dict(transform="letterbox"),
    "anyres": dict(transform="anyres", grids=((1, 2), (2, 1))),
    "anyres_max": dict(transform="anyres", grids=((1, 3), (2, 1)), max_tiles=1),
}
RECORDS = [
    (["<image>\nWhat colour is it?", "red"], ["0.png"]),
    (["Left <image> or right <image>?", "left is red", "And now?", "right"], ["1.png", "2.png"]),
    (["Say teal.", "teal"], []),
    (["Is there <image>?", "yes", "What else?", "a blue triangle and a green circle"], ["2.png"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, three pictures of different shapes, and conversations with none, one and two of them."""
    folder = tmp_path_factory.mktemp("packing")
    toy.write_tokenizer(folder / "tokenizer")
    for i, (width, height) in enumerate([(70, 30), (25, 90), (64, 60)]):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    records = [
        {
            "id": i,
            "conversations": [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(turns)],
            "image": images,
        }
        for i, (turns, images) in enumerate(RECORDS)
    ]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def params():
    return hf_copy.random_params(MODEL)


@jax.jit
def loss_and_gradients(params, batch, weights):
    return jax.value_and_grad(lambda p: loss_sums(VLM(MODEL), p, batch, weights, 1)[0])(params)


def epoch(folder, layout, transform, packing, params):
    """Loss and gradients of the mean over an epoch's supervised tokens, and the number of its rows that are not empty."""
    source = SourceConfig(name="data", path=str(folder / "data.json"), images=str(folder))
    data = DataConfig(sources=(source,), packing=packing, tiles_per_row=8, num_threads=1)
    prompt = PromptConfig(str(folder / "tokenizer"), "vicuna_v1", layout=layout, length=256, **TRANSFORMS[transform])
    loader = Loader(data, prompt, MODEL, batch_size=2, seed=1, epochs=1.0, cache_dir=folder / "cache")
    batches = list(loader.batches())
    total = sum(batch["loss_weights"].sum() for batch in batches)
    parts = [loss_and_gradients(params, batch, batch["loss_weights"] / total) for batch in batches]
    sums = jax.tree.map(lambda *leaves: sum(np.asarray(leaf, np.float64) for leaf in leaves), *parts)
    return sums, loader.num_rows, loader.stats()["tiles"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_packed_equals_unpacked(folder, params, layout, transform):
    (loss, grads), rows, tiles = epoch(folder, layout, transform, True, params)
    (single_loss, single_grads), singles, single_tiles = epoch(folder, layout, transform, False, params)
    assert rows < singles == len(RECORDS) and tiles == single_tiles
    assert tiles == 4 if transform == "one tile" else tiles >= 12
    np.testing.assert_allclose(loss, single_loss, rtol=1e-5)
    grads, single_grads = flat(grads), flat(single_grads)
    largest = max(np.abs(leaf).max() for leaf in single_grads.values())
    assert np.abs(single_grads["connector/newline"]).max() > 1e-4 * largest
    for path, leaf in single_grads.items():
        scale = max(np.abs(leaf).max(), 1e-3 * largest)  # a key bias has no gradient but rounding
        np.testing.assert_allclose(grads[path], leaf, rtol=1e-5, atol=1e-5 * scale, err_msg=path)
