import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvlm.data import DataError
from jaxvlm.data.conversation import IMAGE_TOKEN, Encoded
from jaxvlm.data.layout import splice
from jaxvlm.data.packing import assemble, plan
from jaxvlm.data.tiles import ImagePlan

samples = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=200)


@settings(max_examples=60, deadline=None)
@given(samples, st.integers(0, 5))
def test_every_sample_once_and_no_overflow(samples, seed):
    lengths, images = np.asarray(samples).T
    rows = plan(lengths, images, 50, 3, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(len(samples)))
    assert all(lengths[row].sum() <= 50 and images[row].sum() <= 3 for row in rows)
    again = plan(lengths, images, 50, 3, seed)
    assert len(rows) == len(again) and all(np.array_equal(a, b) for a, b in zip(rows, again, strict=True))


def test_order_depends_on_the_seed_and_rows_are_well_filled():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 400, 3000)
    images = np.ones(3000, int)
    rows = plan(lengths, images, 1024, 16, 0)
    assert lengths.sum() / (len(rows) * 1024) > 0.97
    other = plan(lengths, images, 1024, 16, 1)
    assert not np.array_equal(rows[0], other[0])
    assert max(len(row) for row in plan(np.ones(100), np.ones(100), 1000, 4, 0)) == 4  # images bound a row too


def test_too_large_a_sample_is_named():
    with pytest.raises(DataError, match="sample 1 has 9 tokens and 0 tiles, but a row holds 8 and 1"):
        plan([3, 9], [1, 0], 8, 1, 0)


def conversation(tokens, weights, plan=None):
    plan = plan or ImagePlan(1, None, None, np.arange(2))
    encoded = Encoded(np.asarray(tokens, np.int32), np.asarray(weights, np.float32))
    return splice(encoded, [plan] * tokens.count(IMAGE_TOKEN), tile_tokens=2)


def test_assembled_row():
    image = IMAGE_TOKEN
    first = conversation([1, image, 5, 6], [0, 0, 0, 1])
    second = conversation([1, 7, 8], [0, 1, 1])
    third = conversation([1, image, image, 9], [0, 0, 0, 1])
    row = assemble([first, second, third], 16, 2, source_ids=[0, 1, 0], pad_id=3)
    assert row["tokens"].tolist() == [1, 0, 0, 5, 6, 1, 7, 8, 1, 0, 0, 0, 0, 9, 3, 3]
    assert row["visual_index"].tolist() == [-1, 0, 1, -1, -1, -1, -1, -1, -1, 2, 3, 4, 5, -1, -1, -1]
    assert row["positions"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 0]
    assert row["segment_ids"].tolist() == [1] * 5 + [2] * 3 + [3] * 6 + [0] * 2
    assert row["loss_weights"].tolist() == [0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert row["source_ids"].tolist() == [0] * 5 + [1] * 3 + [0] * 8
    scored = row["loss_weights"] > 0
    assert row["targets"][scored].tolist() == [6, 7, 8, 9]
    ahead = np.roll(row["segment_ids"], -1)
    assert (row["segment_ids"][scored] == ahead[scored]).all()  # no target in another segment
    types = {key: value.dtype.name for key, value in row.items()}
    assert types.pop("loss_weights") == "float32" and set(types.values()) == {"int32"}


def test_tiles_take_the_slots_in_order():
    """Two images of two tiles, with row ends and a blended token, between images of one."""
    image = IMAGE_TOKEN
    corners, shares = (
        np.array([[0] * 4, [1, 2, 3, 3], [0] * 4]),
        np.float32([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [1, 0, 0, 0]]),
    )
    blended = ImagePlan(2, (1, 1), (9, 9), np.array([0, 1, -2]), corners, shares)
    single = ImagePlan(1, None, None, np.arange(2), corners[[0, 0]], shares[[0, 0]])
    first, last = (conversation([image, 5], [0, 1], single) for _ in range(2))
    row = assemble([first, conversation([image, image, 6], [0, 0, 1], blended), last], 16, 2, blends=True)
    assert row["visual_index"].tolist() == [0, 1, -1, 2, 3, -2, 6, 7, -2, -1, 10, 11, -1, -1, -1, -1]
    assert row["visual_corners"][[4, 7]].tolist() == [[3, 4, 5, 5], [7, 8, 9, 9]]
    assert row["visual_shares"][[4, 7]].tolist() == [[0.5, 0.5, 0, 0]] * 2 and (row["visual_shares"].sum(1) == 1).all()


def test_empty_row():
    row = assemble([], 4, 2)
    assert not row["segment_ids"].any() and not row["loss_weights"].any() and (row["visual_index"] == -1).all()
