"""Packing: no sample lost, no row too full, rows full and shuffled; and the arrays of a row."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvlm.data import DataError
from jaxvlm.data.conversation import IMAGE_TOKEN, Encoded
from jaxvlm.data.layout import splice
from jaxvlm.data.packing import Rows, _waste, assemble, plan, slots_needed
from jaxvlm.data.tiles import ImagePlan

BENCH = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "packing_bench.py"))
samples = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=200)


def check(rows, lengths, tiles, row_length, tiles_per_row):
    """Every sample once, no row empty and none too full."""
    np.testing.assert_array_equal(np.sort(rows.samples), np.arange(len(lengths)))
    assert rows.offsets[0] == 0 and rows.offsets[-1] == len(lengths) and (np.diff(rows.offsets) > 0).all()
    assert np.add.reduceat(lengths[rows.samples], rows.offsets[:-1]).max() <= row_length
    assert np.add.reduceat(tiles[rows.samples], rows.offsets[:-1]).max() <= tiles_per_row


@settings(max_examples=60, deadline=None)
@given(samples, st.sampled_from([(50, 3), (51, 4), (400, 3), (60, 30)]), st.sampled_from([1, 7, 8192]))
def test_every_sample_once_and_no_overflow(samples, row, stream):
    """One after the other, and many streams of them at a time."""
    lengths, tiles = np.asarray(samples).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxvlm.data.packing.STREAM", stream)
        rows, again = (plan(lengths, tiles, *row) for _ in range(2))
    check(rows, lengths, tiles, *row)
    np.testing.assert_array_equal(rows.samples, again.samples)
    np.testing.assert_array_equal(rows.offsets, again.offsets)


def test_rows_like_the_665k_mixture_are_full_and_shuffled():
    """Rows of 4,096: tokens at least 0.97, image slots at least 0.85, and an order that is as good as random."""
    lengths, tiles, source = BENCH["mixture"](60_000, 4096)
    assert 800 < lengths.mean() < 900 and lengths.max() > 2048  # recipes §4.5
    slots = slots_needed(lengths, tiles, 4096)
    rows = plan(lengths, tiles, 4096, slots)
    check(rows, lengths, tiles, 4096, slots)
    assert lengths.sum() / (len(rows) * 4096) > 0.99
    assert tiles.sum() / (len(rows) * slots) > 0.87
    shuffled = BENCH["quality"](rows.samples, rows.offsets, lengths, source)
    assert shuffled["rank_correlation"] > 0.999 and shuffled["moved_mean"] < 300 and shuffled["moved_most"] < 3000
    assert 0.8 < shuffled["mix_mean"] < 1.2 and shuffled["mix_most"] < 1.6 and abs(shuffled["drift"]) < 0.02
    by_source = BENCH["quality"](np.argsort(source, kind="stable"), rows.offsets, lengths, source)
    assert by_source["mix_mean"] > 50 and by_source["rank_correlation"] < 0.5  # the measures see what is not shuffled


def test_rows_of_many_tiles_are_full():
    """Any resolution: one to five tiles an image, 580 tokens each, some cut away."""
    rng = np.random.default_rng(0)
    lengths, tiles, _ = BENCH["mixture"](20_000, 8192)
    tiles *= rng.choice([1, 3, 4, 5], len(tiles))
    lengths = np.where(tiles > 0, lengths - 576 + (tiles * 580 * rng.uniform(0.75, 1, len(tiles))).astype(int), lengths)
    slots = slots_needed(lengths, tiles, 8192)
    rows = plan(lengths, tiles, 8192, slots)
    check(rows, lengths, tiles, 8192, slots)
    assert lengths.sum() / (len(rows) * 8192) > 0.98 and tiles.sum() / (len(rows) * slots) > 0.9


def test_images_bound_a_row_too():
    rows = plan(np.ones(100), np.ones(100), 1000, 4)
    assert len(rows) == 25 and (np.diff(rows.offsets) == 4).all()


def test_what_a_room_is_expected_to_waste():
    """Of samples that are all alike, the remainder; of room for fewer tiles, what they cannot fill."""
    waste = _waste(np.full(9, 16), np.full(9, 1), 256, 4)  # [5, 257]
    np.testing.assert_allclose(waste[4, :64], np.arange(64) % 16, atol=1e-9)
    np.testing.assert_allclose(waste[2, 32:], np.arange(225), atol=1e-9)
    np.testing.assert_allclose(waste[0], np.arange(257), atol=1e-9)
    both = _waste(np.array([100, 30]), np.array([0, 0]), 256, 0)[0]
    # 8 draws of two kinds nearly always hold the one that is wanted: 100 + 30, 3 x 30, 100 + 2 x 30.
    assert (
        both[130] < 1
        and both[99] == pytest.approx(99 % 30, abs=1)
        and both[160] < 1
        and both[170] == pytest.approx(10, abs=1)
    )


def test_slots_for_the_tiles():
    assert slots_needed(np.array([100, 100]), np.array([1, 1]), 400) == 5  # 4 would do if no token were wasted
    assert slots_needed(np.array([100, 100]), np.array([9, 0]), 200) == 10
    assert slots_needed(np.array([100, 100]), np.array([9, 0]), 100) == 9  # the largest must fit
    assert slots_needed(np.array([100, 100]), np.array([0, 0]), 400) == 1


def test_too_large_a_sample_is_named():
    with pytest.raises(DataError, match="sample 1 has 9 tokens and 0 tiles, but a row holds 8 and 1"):
        plan([3, 9], [1, 0], 8, 1)


def test_parts_of_rows():
    rows = Rows(np.array([3, 1, 2, 0]), np.array([0, 2, 3, 4]))
    assert rows.first(2).samples.tolist() == [3, 1, 2] and rows.first(2).offsets.tolist() == [0, 2, 3]
    joined = Rows.joined([rows.first(1), rows])
    assert joined.samples.tolist() == [3, 1, 3, 1, 2, 0] and joined.offsets.tolist() == [0, 2, 4, 5, 6]
    assert len(rows.first(9)) == 3


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
