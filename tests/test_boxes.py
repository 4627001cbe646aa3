"""Boxes between frames: drawn on the pixels that the transforms make, and back again."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from data_helpers import llama_tokenizer, record
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from jaxvlm.config import DataConfig, ModelConfig, PromptConfig, SourceConfig, VisionConfig
from jaxvlm.data import DataError
from jaxvlm.data.boxes import FRAMES, TRANSFORM_FRAMES, convert_boxes
from jaxvlm.data.image import TILED, TRANSFORMS
from jaxvlm.data.loader import Loader
from jaxvlm.data.table import open_table, table_text
from jaxvlm.templates import TRANSFORM_VERSIONS

GREY = (0.5, 0.5, 0.5)


def numbers(text):
    return [float(number) for number in re.findall(r"[\d.]+", text)]


def test_the_frames_by_hand():
    assert (
        convert_boxes("at [0.00, 0.00, 1.00, 1.00].", (200, 100), "original", "square")
        == "at [0.00, 0.25, 1.00, 0.75]."
    )
    assert convert_boxes("[0.00, 0.25, 1.00, 0.75]", (200, 100), "square", "original") == "[0.00, 0.00, 1.00, 1.00]"
    assert convert_boxes("[0.25, 0.10, 0.75, 0.90]", (200, 100), "original", "crop") == "[0.00, 0.10, 1.00, 0.90]"
    assert convert_boxes("[0.10, 0.25, 0.90, 0.50]", (100, 200), "original", "crop") == "[0.10, 0.00, 0.90, 0.50]"
    assert convert_boxes("[0.0, 0.25, 0.5, 1.0]", (100, 200), "original", "square") == "[0.25, 0.25, 0.5, 1.0]"


@pytest.mark.parametrize("name", TRANSFORM_VERSIONS)
@pytest.mark.parametrize("size", [(90, 60), (61, 97), (40, 200)])
def test_a_box_is_where_the_transform_shows_it(name, size):
    """A white box on black: its edges in the transformed image against the converted text."""
    width, height = size
    box = (round(0.4 * width), round(0.42 * height), round(0.62 * width), round(0.57 * height))
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), box)
    text = "[{:.6f}, {:.6f}, {:.6f}, {:.6f}]".format(*(edge / size[i % 2] for i, edge in enumerate(box)))
    made = {**TRANSFORMS, **TILED}[name](image, 500, GREY)
    shown = (np.asarray(made)[..., 0] > 191) & (np.abs(np.asarray(made)[..., 0] - 127) > 20)
    ys, xs = np.nonzero(shown)
    edges = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    found = numbers(convert_boxes(text, size, "original", TRANSFORM_FRAMES[name]))
    np.testing.assert_allclose(found, np.array(edges) / 500, atol=0.012)


def test_every_transform_has_a_frame():
    assert set(TRANSFORM_FRAMES) == set(TRANSFORM_VERSIONS) and set(TRANSFORM_FRAMES.values()) == {*FRAMES, "crop"}


unit = st.integers(0, 1000).map(lambda n: n / 1000)


@given(st.tuples(unit, unit, unit, unit), st.integers(1, 900), st.integers(1, 900))
@example((0.0, 0.0, 1.0, 1.0), 1, 900)
@example((0.0, 0.0, 0.0, 0.0), 3, 7)
def test_to_the_square_and_back(box, width, height):
    x1, x2, y1, y2 = *sorted(box[:2]), *sorted(box[2:])
    text = f"[{x1:.6f}, {y1:.6f}, {x2:.6f}, {y2:.6f}]"
    square = convert_boxes(text, (width, height), "original", "square")
    assert all(0 <= number <= 1 for number in numbers(square))
    back = numbers(convert_boxes(square, (width, height), "square", "original"))
    np.testing.assert_allclose(back, [x1, y1, x2, y2], atol=2e-6 * max(width / height, height / width))


@pytest.mark.parametrize(
    "text, found",
    [
        ("[0.5, 0.25, 0.75, 0.5]", "[0.5, 0.38, 0.75, 0.5]"),  # decimals as many as the longest number has
        ("[0.50, 0.20, 0.75, 0.60]", "[0.50, 0.35, 0.75, 0.55]"),
        ("[0.500,0.200, 0.750 ,0.600]", "[0.500, 0.350, 0.750, 0.550]"),
        ("[0, 0.2, 1, 0.6]", "[0.0, 0.3, 1.0, 0.6]"),
        (
            "two [0.50, 0.20, 0.75, 0.60], [0.10, 0.00, 0.20, 1.00]!",
            "two [0.50, 0.35, 0.75, 0.55], [0.10, 0.25, 0.20, 0.75]!",
        ),
    ],
)
def test_the_form_is_kept(text, found):
    assert convert_boxes(text, (200, 100), "original", "square") == found
    assert convert_boxes(text, (200, 100), "square", "square") == text == convert_boxes(text, (9, 9), "square", "crop")


@pytest.mark.parametrize(
    "text",
    [
        "[0.9, 0.2, 0.1, 0.6]",
        "[0.1, 0.6, 0.2, 0.2]",
        "[1, 0, 1, 1]",
        "[0.1, 0.2, 0.3]",
        "[0.1, 0.2, 0.3, 0.4, 0.5]",
        "[1.5, 0.2, 1.7, 0.4]",
        "[10.5, 0.2, 11.7, 0.4]",
        "[-0.1, 0.2, 0.3, 0.4]",
        "(0.1, 0.2, 0.3, 0.4)",
        "[.1, .2, .3, .4]",
    ],
)
def test_what_is_no_box_stays(text):
    assert convert_boxes(text, (200, 100), "original", "square") == text


def test_boxes_outside_are_refused_and_others_cut():
    assert convert_boxes("[0.00, 0.20, 0.50, 0.60]", (200, 100), "original", "crop") == "[0.00, 0.20, 0.50, 0.60]"
    assert convert_boxes("[0.00, 0.00, 0.50, 1.00]", (200, 100), "square", "original") == "[0.00, 0.00, 0.50, 1.00]"
    with pytest.raises(DataError, match=r"the box \[0.00, 0.20, 0.22, 0.60\] lies outside .*200 x 100.*frame 'crop'"):
        convert_boxes("[0.00, 0.20, 0.22, 0.60]", (200, 100), "original", "crop")
    with pytest.raises(DataError, match="lies outside .*'original'.*leave the record out"):
        convert_boxes("[0.00, 0.80, 0.25, 0.90]", (200, 100), "square", "original")
    with pytest.raises(DataError, match="no frame 'padded' for boxes; the frames are original, square"):
        convert_boxes("", (2, 1), "padded", "square")


# ---------------------------------------- in a data set


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boxes")
    llama_tokenizer(folder / "tokenizer")
    for kind in ("coco", "vg"):
        (folder / kind).mkdir()
        Image.new("RGB", (200, 100)).save(folder / kind / "wide.png")
    return folder


def said(folder, records, transform="letterbox", **source):
    """What the model is trained on, and what is left out."""
    (folder / "data.json").write_text(json.dumps(records))
    config = SourceConfig(name="s", path=str(folder / "data.json"), images=str(folder), **source)
    vision = VisionConfig(image_size=28, patch_size=14)
    prompt = PromptConfig(tokenizer=str(folder / "tokenizer"), template="prism", length=256, transform=transform)
    data = DataConfig(sources=(config,), bad_records="skip", max_bad_share=1.0)
    made = Loader(data, prompt, ModelConfig(vision), batch_size=1, seed=0, cache_dir=folder / "cache")
    table = open_table(made._tables[0])
    texts = ["".join(text for text, _ in table_text(table, row, made.tokenizer)) for row in range(len(table.record))]
    left_out = Path(made.skipped_path).read_text().splitlines() if made.skipped_path else []
    return texts, [json.loads(line)["reason"] for line in left_out]


def region(box, folder="coco", **more):
    texts = (f"<image>\nProvide a short description for this region: {box}", f"It is at {box}.")
    return record(*texts, image=f"{folder}/wide.png", **more)


def test_a_source_names_its_frame(folder):
    """Questions and answers are converted for the transform in use; text, and what has no image, is not."""
    rows = [region("[0.20, 0.00, 0.80, 1.00]"), record("a list [0.20, 0.00, 0.80, 1.00]", "yes")]
    for transform, boxes, found in (
        ("letterbox", "original", "[0.20, 0.25, 0.80, 0.75]"),
        ("naive", "original", "[0.20, 0.00, 0.80, 1.00]"),
        ("crop", "original", "[0.00, 0.00, 1.00, 1.00]"),
        ("letterbox", "", "[0.20, 0.00, 0.80, 1.00]"),
    ):
        (first, second), bad = said(folder, rows, transform, boxes=boxes)
        assert first.count(found) == 2 and "[0.20, 0.00, 0.80, 1.00]" in second and not bad


def test_the_sources_of_the_mix_have_their_own_frames(folder):
    box = "[0.20, 0.30, 0.80, 0.70]"
    rows = [region(box), region(box, "vg"), record(f"<image>\nWhat {box}?", "It", image="coco/wide.png")]
    mix = dict(boxes="mix", mix="llava_v1_5_mix665k")
    texts, _ = said(folder, rows, "naive", **mix)
    assert [text.count(box) for text in texts] == [2, 0, 1] and texts[1].count("[0.20, 0.10, 0.80, 0.90]") == 2
    texts, _ = said(folder, rows, "letterbox", **mix)
    assert [text.count(box) for text in texts] == [0, 2, 1] and texts[0].count("[0.20, 0.40, 0.80, 0.60]") == 2


def test_records_whose_boxes_cannot_be_converted_are_named(folder):
    outside, several = region("[0.00, 0.20, 0.20, 0.60]", id="o"), region("[0.40, 0.20, 0.60, 0.60]", id="s")
    several["conversations"][0]["value"] += "<image>"
    several["image"] = ["coco/wide.png", "vg/wide.png"]
    missing = region("[0.40, 0.20, 0.60, 0.60]", id="m") | {"image": "coco/gone.png"}
    texts, bad = said(folder, [outside, several, missing, region("[0.40, 0.20, 0.60, 0.60]")], "crop", boxes="original")
    assert len(texts) == 2 and "[0.30, 0.20, 0.70, 0.60]" in texts[1]  # the first is the one without its image
    assert re.match(r"record 'o': the box \[0.00, 0.20, 0.20, 0.60\] lies outside", bad[0])
    assert bad[1] == "record 's' has boxes and 2 images, and a box does not say which one it is in."
    assert "gone.png" in bad[2] and len(bad) == 3


def test_frames_that_there_are_not(folder):
    for source in (dict(boxes="padded"), dict(boxes="mix")):
        with pytest.raises(DataError, match="Source 's': `boxes` is the frame .* original or square, or 'mix'"):
            said(folder, [region("[0.1, 0.1, 0.2, 0.2]")], **source)


def test_boxes_follow_an_image_that_changes(folder):
    """Also one that was not there, or unreadable, when the table was made."""
    (folder / "late").mkdir()
    row = region("[0.20, 0.00, 0.80, 1.00]", "late")
    image = folder / "late" / "wide.png"
    assert said(folder, [row, region("[0.20, 0.00, 0.80, 1.00]")], boxes="original")[1] == [
        f"image file {image} is missing or empty"
    ]
    image.write_bytes(b"half of it")
    for size, box in (((200, 100), "[0.20, 0.25, 0.80, 0.75]"), ((100, 200), "[0.35, 0.00, 0.65, 1.00]")):
        Image.new("RGB", size).save(image)
        texts, bad = said(folder, [row, region("[0.20, 0.00, 0.80, 1.00]")], boxes="original")
        assert texts[0].count(box) == 2 and not bad
