import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxvlm.config import ModelConfig, PromptConfig, VisionConfig
from jaxvlm.data import DataError
from jaxvlm.data import layout as layouts
from jaxvlm.data.conversation import IMAGE_TOKEN, Encoded
from jaxvlm.data.layout import LAYOUTS
from jaxvlm.data.tiles import ImagePlan, image_plan, tiling

I = IMAGE_TOKEN  # noqa: E741
P = 3


def encoded(tokens, weights=None):
    return Encoded(np.asarray(tokens, np.int32), np.asarray(weights or [0] * len(tokens), np.float32))


def splice(encoded, patches, *options, **more):
    """Each image is one tile of so many patches; `before_splice` keeps room for one."""
    plans = [ImagePlan(1, None, None, np.arange(patches))] * int((encoded.tokens == I).sum())
    return layouts.splice(encoded, plans, *options, tile_tokens=patches, reserved=patches, **more)


def test_visual_tokens_is_the_configs_count():
    def tokens(**vision):
        plan = image_plan(tiling(ModelConfig(vision=VisionConfig(**vision)), PromptConfig()), 30, 20)
        np.testing.assert_array_equal(plan.index, np.arange(len(plan.index)))
        return len(plan.index)

    assert tokens() == 576
    assert tokens(image_size=224, feature_tokens="cls_patch") == 257
    assert tokens(image_size=128, patch_size=32, pool=2) == 4


@pytest.mark.parametrize("layout", ["llava", "hf"])
def test_patches_stand_where_the_image_stood(layout):
    out = splice(encoded([1, 5, I, 6, 7, I, 8], [0, 0, 0, 0, 1, 0, 1]), P, layout, pad_id=9)
    assert out.tokens.tolist() == [1, 5, 9, 9, 9, 6, 7, 9, 9, 9, 8]
    assert out.visual_index.tolist() == [-1, -1, 0, 1, 2, -1, -1, 3, 4, 5, -1]
    assert out.targets.tolist() == [5, 9, 9, 9, 6, 7, 9, 9, 9, 8, 9]
    assert out.weights.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert (out.num_images, out.num_tiles, out.dropped_images, out.truncated) == (2, 2, 0, False)


def test_images_of_several_tiles_and_row_ends():
    """The second image has three tiles, of which it uses only parts, with a row end; the third is cut off."""
    plans = [ImagePlan(1, None, None, np.array([0, 1, 2])), ImagePlan(3, (1, 2), (9, 9), np.array([0, -2, 7, 8, -2]))]
    tokens = encoded([1, I, 5, I, 6, I, 7], [0, 0, 0, 0, 1, 0, 1])
    out = layouts.splice(tokens, [*plans, plans[0]], length=13, tile_tokens=P, pad_id=9)
    assert out.tokens.tolist() == [1, 9, 9, 9, 5, 9, 9, 9, 9, 9, 6]
    assert out.visual_index.tolist() == [-1, 0, 1, 2, -1, 3, -2, 10, 11, -2, -1]
    assert out.targets.tolist() == [9, 9, 9, 5, 9, 9, 9, 9, 9, 6, 9]
    assert out.weights.tolist() == [0] * 9 + [1, 0]
    assert (out.num_images, out.num_tiles, out.dropped_images, out.truncated) == (2, 4, 1, True)


def test_prismatic_puts_patches_after_bos_or_first():
    given_tokens = encoded([1, 5, I, 6, 7], [0, 0, 0, 1, 1])
    out = splice(given_tokens, P, "prismatic", bos_id=1)
    assert out.visual_index.tolist() == [-1, 0, 1, 2, -1, -1, -1] and out.tokens.tolist() == [
        1,
        0,
        0,
        0,
        5,
        6,
        7,
    ]
    assert out.weights.tolist() == [0, 0, 0, 0, 1, 1, 0]
    out = splice(given_tokens, P, "prismatic", bos_id=None)
    assert out.visual_index.tolist() == [0, 1, 2, -1, -1, -1, -1] and out.tokens.tolist() == [
        0,
        0,
        0,
        1,
        5,
        6,
        7,
    ]


def test_images_first_go_before_bos():
    out = splice(encoded([1, 5, I, 6, I, 7], [0, 0, 0, 1, 0, 1]), P, "images_first", bos_id=1, pad_id=9)
    assert out.tokens.tolist() == [9] * 6 + [1, 5, 6, 7]
    assert out.visual_index.tolist() == [0, 1, 2, 3, 4, 5, -1, -1, -1, -1]
    assert out.weights.tolist() == [0] * 7 + [1, 1, 0] and out.targets.tolist() == [9] * 5 + [1, 5, 6, 7, 9]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_only_costs_nothing(layout):
    out = splice(encoded([1, 2, 3], [0, 1, 1]), P, layout, length=3)
    assert out.tokens.tolist() == [1, 2, 3] and (out.visual_index == -1).all() and out.num_images == 0


@pytest.mark.parametrize(
    "length, tokens, images",
    [
        (10, [1, 0, 0, 0, 5, 6, 0, 0, 0, 7], (2, 0)),
        (9, [1, 0, 0, 0, 5, 6], (1, 1)),  # no text would follow the second image
        (8, [1, 0, 0, 0, 5, 6], (1, 1)),  # never inside an image
        (5, [1, 0, 0, 0, 5], (1, 1)),
        (4, [1], (0, 2)),
        (1, [1], (0, 2)),
    ],
)
def test_after_splice_counts_the_image(length, tokens, images):
    out = splice(encoded([1, I, 5, 6, I, 7]), P, length=length)
    assert out.tokens.tolist() == tokens and (out.num_images, out.dropped_images) == images
    assert out.truncated == (length < 10)


def test_before_splice_cuts_the_text_alone():
    sequence = encoded([1, I, 5, 6, 7, 8], [0, 0, 0, 1, 1, 1])
    out = splice(sequence, P, length=7, truncation="before_splice")
    assert out.tokens.tolist() == [1, 0, 0, 0, 5, 6, 7] and out.truncated
    text = splice(encoded([1, 5, 6, 7, 8]), P, length=7, truncation="before_splice")
    assert text.tokens.tolist() == [1, 5, 6, 7]  # the same limit without an image
    with pytest.raises(DataError, match="length 3 leaves no room"):
        splice(sequence, P, length=3, truncation="before_splice")


def test_drop_error_and_unknown_names():
    sequence = encoded([1, I, 5, 6])
    assert splice(sequence, P, length=5, truncation="drop") is None
    assert splice(sequence, P, length=6, truncation="drop").num_images == 1
    with pytest.raises(DataError, match="6 tokens but `length` is 5"):
        splice(sequence, P, length=5, truncation="error")
    with pytest.raises(DataError, match="no truncation 'cut'.*after_splice"):
        splice(sequence, P, length=5, truncation="cut")
    with pytest.raises(DataError, match="no layout 'cambrian'.*prismatic"):
        splice(sequence, P, "cambrian")


@given(
    st.lists(st.sampled_from([I, 3, 4, 5]), min_size=1, max_size=12),
    st.integers(1, 30),
    st.integers(1, 4),
    st.sampled_from(LAYOUTS),
)
def test_an_image_is_whole_or_gone(tokens, length, patches, layout):
    weights = [float(token > 3) for token in tokens]
    out = splice(encoded(tokens, weights), patches, layout, length, pad_id=0)
    assert len(out.tokens) <= length
    visual = out.visual_index[out.visual_index >= 0]
    np.testing.assert_array_equal(visual, np.arange(out.num_images * patches))
    assert out.num_images + out.dropped_images == tokens.count(I)
    whole = splice(encoded(tokens, weights), patches, layout, None)
    np.testing.assert_array_equal(out.tokens, whole.tokens[: len(out.tokens)])
    assert out.truncated == (len(whole.tokens) > length)
    np.testing.assert_array_equal(out.weights[:-1], whole.weights[: len(out.tokens)][:-1])
    assert not out.weights[-1:].any() and (out.targets[out.weights > 0] > 3).all()
