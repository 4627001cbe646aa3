"""Rows of tiled images: planning by the images' sizes, packing, and what happens when images change."""

import json

import numpy as np
import pytest
from data_helpers import llama_tokenizer, record
from PIL import Image

from jaxvlm.config import ConnectorConfig, DataConfig, ModelConfig, PromptConfig, SourceConfig, VisionConfig
from jaxvlm.data import DataError
from jaxvlm.data.image import load_image
from jaxvlm.data.loader import Loader
from jaxvlm.data.tiles import image_plans, image_tiles

MODEL = ModelConfig(VisionConfig(image_size=28, patch_size=14), ConnectorConfig(row_end=True))  # P = 4
SIZES = [(30, 20), (20, 30), (60, 60), (100, 28), (28, 100), (5, 5), (200, 190), (31, 7)]


def save(path, size, seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    llama_tokenizer(folder / "tokenizer")
    (folder / "images").mkdir()
    for i, size in enumerate(SIZES):
        save(folder / "images" / f"{i}.png", size, i)
    one = [record(f"<image>\nq {i}?", "a " * (1 + i), id=i, image=f"{i}.png") for i in range(8)]
    two = [record(f"<image> or <image> {i}?", "b", id=8 + i, image=[f"{i}.png", f"{i + 3}.png"]) for i in range(5)]
    text = [record(f"text {i}", "c", id=13 + i) for i in range(4)]
    (folder / "a.json").write_text(json.dumps(one + two + text))
    return folder


def loader(folder, file="a.json", *, data=None, prompt=None, model=MODEL, **options):
    source = SourceConfig(name="a", path=str(folder / file), images=str(folder / "images"))
    base = dict(tokenizer=str(folder / "tokenizer"), template="prism", transform="anyres", length=192)
    settings = dict(sources=(source,), packing=True, tiles_per_row=12, num_threads=1) | (data or {})
    options = dict(batch_size=2, seed=0, cache_dir=folder / "cache") | options
    return Loader(DataConfig(**settings), PromptConfig(**base | (prompt or {})), model, **options)


def conversations(made):
    """Every conversation of an epoch as what the model makes of it: tokens, labels, and of each visual token its place
    in the pixels, whichever row and slot it stands in.
    """
    found = []
    for batch in made.batches():
        for row in range(len(batch["tokens"])):
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                here = batch["segment_ids"][row] == segment
                index = batch["visual_index"][row][here]
                seen = [
                    (int(i) if i < 0 else (batch["pixels"][row, i // 4].tobytes(), int(i % 4))) for i in index.tolist()
                ]
                labels = batch["targets"][row][here] * (batch["loss_weights"][row][here] > 0)
                found.append((batch["tokens"][row][here].tolist(), labels.tolist(), seen))
    return sorted(found, key=lambda one: (one[0], str(one[1])))


@pytest.mark.parametrize("transform", ["anyres", "hd"])
def test_packed_rows_hold_the_same_conversations(folder, transform):
    made = loader(folder, prompt=dict(transform=transform))
    packed = conversations(made)
    assert made.num_rows < 17 and packed == conversations(
        loader(folder, prompt=dict(transform=transform), data=dict(packing=False))
    )
    stats = made.stats()
    batches = list(made.batches())
    assert stats["tiles"] == sum(batch["tile_mask"].sum() for batch in batches) > stats["images"] == 18
    assert all(batch["pixels"].shape[1:] == (12, 28, 28, 3) for batch in batches)
    assert max(batch["tile_mask"].sum(1).max() for batch in batches) <= 12
    for batch in batches:
        assert not batch["pixels"][~batch["tile_mask"]].any()


def test_rows_show_the_images_tiles_in_order(folder):
    """One row of two images: their tiles one after the other, and the tokens that `image_plans` says."""
    (folder / "two.json").write_text(json.dumps([record("<image> or <image>?", "b", image=["3.png", "0.png"])]))
    made = loader(folder, "two.json", batch_size=1)
    (batch,) = made.batches()
    cut = made._reader.splicing.tiling
    plans = image_plans(cut, [SIZES[3], SIZES[0]])
    pixels = [
        image_tiles(load_image(folder / "images" / f"{i}.png"), cut, p)[0] for i, p in zip((3, 0), plans, strict=True)
    ]
    used = plans[0].tiles + plans[1].tiles
    np.testing.assert_array_equal(batch["pixels"][0, :used], np.concatenate(pixels))
    index = batch["visual_index"][0]
    second = np.where(plans[1].index >= 0, plans[1].index + 4 * plans[0].tiles, -2)
    np.testing.assert_array_equal(index[index != -1], np.concatenate([plans[0].index, second]))
    assert index.max() < 4 * used and batch["tile_mask"].sum() == used


def test_a_cut_counts_the_tiles(folder):
    """The second image no longer fits: it goes, tiles and all."""
    (folder / "cut.json").write_text(
        json.dumps([record("<image> ?", "word", "<image> !", "b", image=["5.png", "6.png"])])
    )
    whole, cut = (loader(folder, "cut.json", batch_size=1, prompt=dict(length=n)).stats() for n in (192, 40))
    assert (whole["images"], whole["dropped_images"]) == (2, 0)
    assert (cut["images"], cut["dropped_images"], cut["truncated"]) == (1, 1, 1) and cut["tiles"] < whole["tiles"]
    (batch,) = loader(folder, "cut.json", batch_size=1, prompt=dict(length=40)).batches()
    assert batch["tile_mask"].sum() == cut["tiles"]
    with pytest.raises(DataError, match="has 2 images in 8 tiles, but a row holds 6; raise `tiles_per_row`"):
        loader(folder, "cut.json", data=dict(tiles_per_row=6))


def test_rows_have_as_many_tile_slots_as_the_data_needs(folder):
    """Alone the largest record decides; packed, the mean of a full row as well; and no record has too many."""
    asked = loader(folder, data=dict(packing=False, tiles_per_row=0))
    largest = max(int(batch["tile_mask"].sum(1).max()) for batch in asked.batches())
    assert asked.tiles_per_row == asked.stats()["tiles_per_row"] == largest > 6
    assert next(asked.batches())["pixels"].shape[1] == largest
    packed = loader(folder, data=dict(tiles_per_row=0), prompt=dict(length=1024))
    assert packed.tiles_per_row > largest and packed.stats()["fill"] > 0.5
    assert conversations(packed) == conversations(asked)
    assert loader(folder, data=dict(packing=False, tiles_per_row=0), prompt=dict(transform="naive")).tiles_per_row == 2
    # Before the splice there is room kept for one image alone.
    (folder / "two.json").write_text(json.dumps([record("<image> <image>", "b " * 50, image=["3.png", "0.png"])]))
    cut = dict(transform="naive", length=40, truncation="before_splice")
    with pytest.raises(DataError, match=r"has 46 tokens, but a row holds 40; raise `length`"):
        loader(folder, "two.json", data=dict(tiles_per_row=0), prompt=cut)


def test_blended_tokens_are_in_the_batch(folder):
    model = ModelConfig(VisionConfig(image_size=56, patch_size=14), ConnectorConfig(row_end=True))
    made = loader(
        folder, model=model, prompt=dict(grids=((3, 3),), max_tiles=2, length=512), data=dict(tiles_per_row=20)
    )
    for batch in made.batches():
        visual = batch["visual_index"] >= 0
        assert batch["visual_corners"].shape == batch["visual_shares"].shape == (2, 512, 4)
        np.testing.assert_array_equal(batch["visual_corners"][visual][:, 0], batch["visual_index"][visual])
        np.testing.assert_allclose(batch["visual_shares"].sum(-1), 1, rtol=1e-6)
        assert (batch["visual_shares"][visual].max(-1) < 1).any()


def test_images_that_change_are_planned_anew(folder, tmp_path):
    path = tmp_path / "late.png"
    (tmp_path / "late.json").write_text(
        json.dumps([record("<image>", "a", id="late", image=str(path)), record("<image>", "a", image="0.png")])
    )
    with pytest.raises(DataError, match="1 image files are missing or empty, the first: .*late.png"):
        loader(folder, tmp_path / "late.json")
    skipping = dict(data=dict(bad_records="skip", max_bad_share=1.0))
    assert loader(folder, tmp_path / "late.json", **skipping).stats()["records"] == 1
    path.write_text("no image")
    made = loader(folder, tmp_path / "late.json", **skipping)
    assert made.stats()["records"] == 1 and "late.png cannot be read" in open(made.skipped_path).read()
    with pytest.raises(DataError, match="record number 0: .*late.png cannot be read as an image"):
        loader(folder, tmp_path / "late.json")
    save(path, (30, 30))
    small = loader(folder, tmp_path / "late.json")
    save(path, (30, 90))
    with pytest.raises(DataError, match=r"late.png has \(30, 90\) pixels, but its header said \(30, 30\)"):
        list(small.batches())
    large = loader(folder, tmp_path / "late.json")
    assert large.fingerprint != small.fingerprint and large.stats()["tiles"] != small.stats()["tiles"]
    assert len(list(large.batches())) == 1


def test_features_of_tiles_take_the_place_of_pixels(folder):
    """Each tile's features stand where its pixels would."""
    cut = loader(folder)._reader.splicing.tiling
    paths = loader(folder).image_paths()
    rows, index = [], {}
    for path in paths:
        image = load_image(path)
        index[path] = len(rows)
        rows += list(image_tiles(image, cut, image_plans(cut, [image.size])[0])[0])
    array = np.stack(rows).mean((1, 2)).astype(np.float32)[:, None]  # [n, 1, 3]
    for pixels, features in zip(
        loader(folder).batches(), loader(folder, features=(array, index)).batches(), strict=True
    ):
        assert features.keys() ^ pixels.keys() == {"pixels", "features"}
        np.testing.assert_array_equal(features["features"][:, :, 0], pixels["pixels"].mean((2, 3)).astype(np.float32))
        np.testing.assert_array_equal(features["visual_index"], pixels["visual_index"])
