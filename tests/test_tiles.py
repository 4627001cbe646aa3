"""Images as tiles: grids, pixels, counts and places of visual tokens against transformers and the papers' rules."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from jaxvlm.config import ConnectorConfig, ModelConfig, PromptConfig, SVAConfig, VisionConfig
from jaxvlm.data import DataError
from jaxvlm.data.image import image_size, load_image, tiles, transform
from jaxvlm.data.tiles import GRIDS, best_grid, image_plan, image_plans, image_tiles, tile_regions, tiling

MEAN = VisionConfig().mean
SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
MAX_9 = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7))  # LLaVA-OneVision's


def made(transform="anyres", side=24, patch=14, *, row_end=True, **prompt):
    """The tiling of a tower of side x side cells."""
    vision = VisionConfig(image_size=side * patch, patch_size=patch)
    model = ModelConfig(vision=vision, connector=ConnectorConfig(row_end=row_end))
    return tiling(model, PromptConfig(transform=transform, **prompt))


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pinpoints(tiling):
    return [[rows * tiling.views[0][0], columns * tiling.views[0][0]] for rows, columns in tiling.grids]


# ---------------------------------------- anyres


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (200, 9), (9, 200), (48, 48), (97, 100), (1, 1), (500, 333)])
def test_pixels_are_llava_nexts(size):
    """Transformers' processor: grid, resizing, padding, order of the tiles, the squashed whole view in front."""
    module = pytest.importorskip("transformers.models.llava_next.image_processing_pil_llava_next")
    cut = made(side=4, patch=6)
    processor = module.LlavaNextImageProcessorPil(
        size={"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
        do_rescale=False,
        do_normalize=False,
        image_grid_pinpoints=pinpoints(cut),
    )
    image = picture(*size)
    want = processor(image, return_tensors="np")["pixel_values"][0].transpose(0, 2, 3, 1)
    plan = image_plan(cut, *size)
    (found,) = image_tiles(image, cut, plan)
    assert len(found) == plan.tiles and found.dtype == np.uint8
    np.testing.assert_array_equal(found, want)


@given(SIZES)
@example((336, 672))
@example((672, 336))
@example((1000, 1))
@example((1, 3000))
@example((337, 1009))
def test_places_are_llava_nexts(size):
    """Transformers' merge, applied to the tokens' own numbers, and its processor's count."""
    torch = pytest.importorskip("torch")
    from transformers import LlavaNextModel, LlavaNextProcessor

    width, height = size
    cut = made()
    plan = image_plan(cut, width, height)
    config = SimpleNamespace(
        image_grid_pinpoints=pinpoints(cut), vision_config=SimpleNamespace(image_size=336, patch_size=14)
    )
    numbers = torch.arange(plan.tiles * 576, dtype=torch.float64).view(plan.tiles, 576, 1)
    (merged,), _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config), [numbers], [(height, width)], "default", torch.full((1,), -2.0).double()
    )
    np.testing.assert_array_equal(plan.index, merged[:, 0].numpy())
    processor = SimpleNamespace(
        image_processor=config, patch_size=14, num_additional_image_tokens=1, vision_feature_select_strategy="default"
    )
    processor._get_unpadded_features = partial(LlavaNextProcessor._get_unpadded_features, processor)
    counted = LlavaNextProcessor._get_number_of_features(processor, height, width, 336, 336) - 1
    assert len(plan.index) == counted <= 2928


@given(SIZES, st.sampled_from([4, 9]))
@example((2304, 2304), 9)
@example((2304, 384), 4)
def test_scaling_down_is_onevisions(size, most):
    """`anyres_max_N`: the mean of four tokens is torch's bilinear resizing of the merged map."""
    torch = pytest.importorskip("torch")
    from transformers import LlavaOnevisionModel

    width, height = size
    cut = made(side=9, patch=14, grids=MAX_9, max_tiles=most)
    plan = image_plan(cut, width, height)
    config = SimpleNamespace(
        image_grid_pinpoints=pinpoints(cut), vision_config=SimpleNamespace(image_size=126, patch_size=14)
    )
    features = np.random.default_rng(0).normal(size=(plan.tiles, 81, 3)).astype(np.float32)
    newline = np.float32([7, 8, 9])
    (want,), _ = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=config),
        [torch.from_numpy(features)],
        [(height, width)],
        torch.from_numpy(newline),
        vision_aspect_ratio=f"anyres_max_{most}",
    )
    np.testing.assert_allclose(plan.shares.sum(1), 1, rtol=1e-6)
    found = (features.reshape(-1, 3)[plan.corners] * plan.shares[..., None]).sum(1)
    found[plan.index == -2] = newline
    np.testing.assert_allclose(found, want.numpy(), rtol=0, atol=1e-5)
    assert (plan.shares.max(1) == 1).all() or len(plan.index) < 81 + 1.21 * most * 81 + 54


def test_several_images_stay_single_where_the_recipe_says_so():
    """LLaVA-OneVision: one letterboxed tile and one row end for each of several images; one image is tiled."""
    cut = made(side=2, patch=4, tile_several=False)
    image = picture(20, 9)
    (alone,) = image_plans(cut, [(20, 9)])
    both = image_plans(cut, [(20, 9), (8, 8)])
    assert alone.tiles > 1 and [plan.tiles for plan in both] == [1, 1]
    assert both[0].index.tolist() == [0, 1, 2, 3, -2]
    (found,) = image_tiles(image, cut, both[0])
    np.testing.assert_array_equal(found[0], transform(image, "letterbox", 8, MEAN))
    assert [plan.tiles > 1 for plan in image_plans(made(side=2, patch=4), [(20, 9), (8, 8)])] == [True, True]


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (200, 9), (24, 24), (150, 100), (1, 1)])
def test_pixels_are_onevisions(size):
    """`anyres_max_9` by its name alone: transformers' processor, for one image and for several."""
    module = pytest.importorskip("transformers.models.llava_onevision.image_processing_pil_llava_onevision")
    vision = VisionConfig(image_size=24, patch_size=6, mean=(0.5, 0.4, 0.3))
    model = ModelConfig(vision=vision, connector=ConnectorConfig(row_end=True))
    cut = tiling(model, PromptConfig(transform="anyres_max_9"))
    assert (cut.max_tiles, cut.tile_several, cut.grids) == (9, False, MAX_9)
    processor = module.LlavaOnevisionImageProcessorPil(
        size={"height": 24, "width": 24},
        do_rescale=False,
        do_normalize=False,
        image_mean=vision.mean,
        image_grid_pinpoints=pinpoints(cut),
        resample=Image.Resampling.BICUBIC,
    )
    image, other = picture(*size), picture(17, 9)
    for images in ([image], [image, other]):
        want = processor([images], return_tensors="np")["pixel_values"]
        plans = image_plans(cut, [each.size for each in images])
        for each, plan, pixels in zip(images, plans, want, strict=True):
            (found,) = image_tiles(each, cut, plan)
            np.testing.assert_array_equal(found, pixels[: plan.tiles].transpose(0, 2, 3, 1))
    same = made(side=4, patch=6, grids=MAX_9, max_tiles=9, tile_several=False)
    assert image_plan(cut, *size).index.tolist() == image_plan(same, *size).index.tolist()


# ---------------------------------------- hd


def hd_oracle(width, height):
    """LLaVA-1.5-HD (Liu et al. 2024, App. A.1) from its rules: 224-pixel tiles, 16 x 16 cells of 14 pixels each.

    Up to six tiles; keep as much detail as possible, then as few pixels; take out the cells that show padding alone;
    a token ends each row; the whole view's 256 tokens come first.
    """
    shapes = [(r, c) for r in range(1, 7) for c in range(1, 7) if r == 1 or c == 1 or r * c in (4, 6)]
    assert set(shapes) == set(GRIDS["hd"])

    def detail(shape):
        scale = min(shape[1] * 224 / width, shape[0] * 224 / height)
        return min(int(width * scale) * int(height * scale), width * height)

    most = max(map(detail, shapes))
    rows, columns = min((s for s in shapes if detail(s) == most), key=lambda s: s[0] * s[1])
    shown = np.zeros((rows * 224, columns * 224), bool)
    scale = min(columns * 224 / width, rows * 224 / height)
    wide, high = min(int(np.ceil(width * scale)), columns * 224), min(int(np.ceil(height * scale)), rows * 224)
    top, left = (rows * 224 - high) // 2, (columns * 224 - wide) // 2
    shown[top : top + high, left : left + wide] = True
    tokens = list(range(256))
    for y in range(rows * 16):
        cells = [x for x in range(columns * 16) if shown[y * 14 : y * 14 + 14, x * 14 : x * 14 + 14].any()]
        tokens += [256 * (1 + y // 16 * columns + x // 16) + y % 16 * 16 + x % 16 for x in cells]
        tokens += [-2] if cells else []
    return (rows, columns), tokens


@given(SIZES)
@example((224, 224))
@example((448, 448))
@example((672, 448))
@example((225, 224))
@example((3000, 1))
def test_hd_is_the_papers(size):
    cut = made("hd", side=16)
    plan = image_plan(cut, *size)
    grid, tokens = hd_oracle(*size)
    scale = [min(c * 224 / size[0], r * 224 / size[1]) for r, c in (plan.grid, grid)]
    if plan.grid != grid:  # two shapes of as many tiles that show as much: the first of the list
        assert np.prod(plan.grid) == np.prod(grid) and scale[0] == pytest.approx(scale[1])
    else:
        assert plan.index.tolist() == tokens


def test_hd_chooses_as_the_paper_says():
    """224 pixels are not blown up to 448, and the whole view is there even if one tile shows everything."""
    cut = made("hd", side=16)
    plan = image_plan(cut, 224, 224)
    assert plan.grid == (1, 1) and plan.tiles == 2 and len(plan.index) == 256 + 16 * 17
    assert image_plan(cut, 672, 448).grid == (2, 3) and image_plan(cut, 100, 900).grid == (5, 1)
    named = made("hd224", side=16)
    assert image_plan(named, 300, 500).index.tolist() == image_plan(cut, 300, 500).index.tolist()
    with pytest.raises(DataError, match="'hd224' cuts tiles of 224 pixels, but the tower's have another size; 'hd'"):
        made("hd224", side=24)
    image = picture(60, 20)
    found = tiles(image, "hd", 8, MEAN, (1, 3))
    np.testing.assert_array_equal(found[0], transform(image, "letterbox", 8, MEAN))
    large = np.asarray(image.resize((24, 8), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(np.concatenate(found[1:], axis=1), large)


# ---------------------------------------- letterbox_unpad


def cambrian_shown(width, height, side):
    """Cambrian's rule for a grid over an image that was padded to a square, in the order of its divisions."""
    shown = np.ones((side, side), bool)
    wide = width / height > 1
    content = int(height * (side / width)) if wide else int(width * (side / height))
    bar = (side - content) // 2
    if bar > 0:
        rows = shown if wide else shown.T
        rows[:bar] = rows[-bar:] = False
    return shown


@given(SIZES)
@example((49, 49))
@example((1000, 999))
@example((10, 300))
@example((2000, 80))
@example((3, 3000))
def test_bars_are_left_out_as_in_cambrian(size):
    """The tokens of a sequence, and what of each tower's grid an aggregator may look at."""
    towers = tuple(VisionConfig(image_size=14 * side) for side in (24, 96))
    sva = ConnectorConfig(kind="sva", row_end=True, sva=SVAConfig(grid=24))
    cut = tiling(ModelConfig(VisionConfig(kind="fused", towers=towers), sva), PromptConfig(transform="letterbox_unpad"))
    plan = image_plan(cut, *size)
    shown = cambrian_shown(*size, 24)
    if max(size) / min(size) > 24:  # nothing is left: Cambrian fails
        assert not shown.any() and len(plan.index) == (2 * 25 if size[0] > size[1] else 24 * 3)
        return
    numbers = np.where(shown, np.arange(576).reshape(24, 24), -1)[shown.any(1)][:, shown.any(0)]
    assert plan.index.tolist() == np.pad(numbers, [(0, 0), (0, 1)], constant_values=-2).reshape(-1).tolist()
    assert plan.tiles == 1 and plan.regions.shape == (1, 2, 4)
    for (top, bottom, left, right), side in zip(plan.regions[0], (24, 96), strict=True):
        found = np.zeros((side, side), bool)
        found[top:bottom, left:right] = True
        np.testing.assert_array_equal(found, cambrian_shown(*size, side))


def test_bars_are_left_out_of_any_grid():
    """Without an aggregator, row ends or other images; the pixels are those of `letterbox`."""
    cut = made("letterbox_unpad", side=4, patch=6, row_end=False, tile_several=False)
    plan, other = image_plans(cut, [(40, 20), (20, 40)])
    assert plan.index.tolist() == list(range(4, 12)) and other.index.tolist() == [
        i for i in range(16) if i % 4 in (1, 2)
    ]
    assert tile_regions(cut, [plan], 3) == {} and not cut.tiled and cut.sized
    (found,) = image_tiles(picture(40, 20), cut, plan)
    np.testing.assert_array_equal(found[0], transform(picture(40, 20), "letterbox", 24, MEAN))
    with pytest.raises(DataError, match=r"has \(20, 40\) pixels, but its header said \(40, 20\)"):
        image_tiles(picture(20, 40), cut, plan)


def test_regions_stand_in_the_tiles_slots():
    sva = ModelConfig(
        VisionConfig(kind="fused", towers=(VisionConfig(image_size=56),) * 2),
        ConnectorConfig(kind="sva", sva=SVAConfig(grid=4)),
    )
    cut = tiling(sva, PromptConfig(transform="letterbox_unpad"))
    plans = image_plans(cut, [(40, 20), (20, 40)])
    found = tile_regions(cut, plans, 3)["tile_regions"]
    assert found.dtype == np.int32 and found[:, 0].tolist() == [[1, 3, 0, 4], [0, 4, 1, 3], [0] * 4]
    assert tile_regions(cut, [], 1)["tile_regions"].tolist() == [[[0] * 4] * 2]
    assert tiling(sva, PromptConfig(transform="letterbox")).cells == ()


def test_bars_have_the_towers_own_colour():
    tower = VisionConfig(image_size=24, patch_size=6, mean=(0.5,) * 3, fill=(1.0, 0.0, 0.0))
    cut = tiling(ModelConfig(tower), PromptConfig(transform="letterbox"))
    (view,) = image_tiles(picture(40, 20), cut, image_plan(cut, 40, 20))
    assert (view[0, 0] == [255, 0, 0]).all()


# ---------------------------------------- single tiles, towers, refusals


def test_a_fixed_grid_may_end_its_rows():
    """24 x 24 tokens and 24 row ends; without the token, what it always was."""
    model = ModelConfig(connector=ConnectorConfig(kind="sva", row_end=True, sva=SVAConfig(grid=24)))
    index = image_plan(tiling(model, PromptConfig()), 5, 7).index.reshape(24, 25)
    assert (index[:, -1] == -2).all() and index[:, :-1].reshape(-1).tolist() == list(range(576))
    assert image_plan(made("crop", row_end=False), 5, 7).index.tolist() == list(range(576))


def test_towers_of_other_sizes_get_their_own_tiles():
    towers = tuple(VisionConfig(image_size=size, patch_size=size // 4, mean=(0.5,) * 3) for size in (24, 32))
    fused = VisionConfig(kind="fused", towers=towers)
    cut = tiling(ModelConfig(vision=fused), PromptConfig(transform="anyres"))
    image = picture(50, 20)
    plan = image_plan(cut, 50, 20)
    views = image_tiles(image, cut, plan)
    assert [view.shape for view in views] == [(plan.tiles, size, size, 3) for size in (24, 32)]
    np.testing.assert_array_equal(views[1], tiles(image, "anyres", 32, (0.5,) * 3, plan.grid))
    alike = VisionConfig(kind="fused", towers=(towers[0], towers[0]))
    assert len(tiling(ModelConfig(vision=alike), PromptConfig()).views) == 1


def test_what_cannot_be_tiled_is_refused():
    for model, prompt, words in (
        (
            ModelConfig(connector=ConnectorConfig(kind="qformer")),
            dict(transform="hd"),
            "transform 'hd' needs .*qformer",
        ),
        (
            ModelConfig(VisionConfig(feature_tokens="cls_patch")),
            dict(transform="anyres"),
            "cls_patch' gives 577 a tile",
        ),
        (ModelConfig(connector=ConnectorConfig(kind="resampler", row_end=True)), {}, "row_end needs"),
        (ModelConfig(), dict(transform="anyres", grids=((0, 2),)), r"prompt.grids are \(rows, columns\)"),
        (ModelConfig(), dict(transform="anyres", truncation="before_splice"), "choose 'after_splice'"),
        (
            ModelConfig(),
            dict(transform="tile"),
            "no image transform 'tile'; .*letterbox, letterbox_unpad, anyres, .*hd224",
        ),
        (ModelConfig(), dict(transform="letterbox_unpad", truncation="before_splice"), "choose 'after_splice'"),
        (ModelConfig(connector=ConnectorConfig(kind="resampler")), dict(transform="letterbox_unpad"), "needs visual"),
    ):
        with pytest.raises(DataError, match=words):
            tiling(model, PromptConfig(**prompt))
    cut = made(side=2, patch=4)
    with pytest.raises(DataError, match=r"x.png has \(20, 10\) pixels, but its header said \(10, 20\)"):
        image_tiles(picture(20, 10), cut, image_plan(cut, 10, 20), "x.png")


def test_plans_are_shared_and_read_only():
    cut = made()
    plan = image_plan(cut, 640, 480)
    assert image_plan(cut, 1280, 960).index is plan.index
    with pytest.raises(ValueError, match="read-only"):
        plan.index[0] = 5
    assert json.loads(json.dumps(GRIDS["anyres"])) == [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
    assert best_grid(10, 1000, cut.grids, 336) == (3, 1)


# ---------------------------------------- sizes


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_the_headers_size_is_the_images(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation or 1
    path = tmp_path / "image"
    picture(20, 11).save(path, kind, **({"exif": exif} if orientation else {}))
    assert image_size(path) == load_image(path).size == ((11, 20) if orientation in (6, 8) else (20, 11))
    assert image_size(path.read_bytes()) == image_size(path)


def test_sizes_of_what_is_already_in_memory(tmp_path):
    assert image_size(picture(20, 11)) == image_size(np.asarray(picture(20, 11))) == (20, 11)
    with pytest.raises(DataError, match="must be uint8"):
        image_size(np.zeros(5))
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(DataError, match="x.png cannot be read as an image"):
        image_size(tmp_path / "x.png")
