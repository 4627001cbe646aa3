"""Sampling against its definition, and streaming text without broken characters."""

from __future__ import annotations

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxvlm.infer.detokenizer import BROKEN, Detokenizer, cut_at
from jaxvlm.infer.sampler import nucleus, row_keys, sample, step_keys


def test_frequencies_follow_the_tempered_softmax():
    logits, count, temperature = np.array([2.0, 1.0, 0.0, -1.0], np.float32), 20_000, 1.7
    keys = row_keys(0, np.arange(count, dtype=np.uint32))
    drawn = sample(np.tile(logits, (count, 1)), keys, temperature, 1.0, greedy=False)
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    found = np.bincount(drawn, minlength=4) / count
    assert np.abs(found - expected).max() < 5 * np.sqrt(0.25 / count)


def test_greedy_and_the_narrowest_nucleus_take_the_most_likely():
    logits = np.random.default_rng(0).normal(size=(64, 50)).astype(np.float32)
    keys = row_keys(1, np.arange(64, dtype=np.uint32))
    best = logits.argmax(-1)
    assert (np.asarray(sample(logits, keys, 0.0, 1.0, greedy=True)) == best).all()
    assert (np.asarray(sample(logits, keys, 1.0, 0.0, greedy=False)) == best).all()


def test_keys_differ_by_row_and_step():
    keys = row_keys(3, np.arange(5, dtype=np.uint32))
    data = np.concatenate([jax.random.key_data(step_keys(keys, np.int32(step))) for step in range(4)])
    assert len(np.unique(data, axis=0)) == 20


@given(arrays(np.float32, (3, 17), elements=st.floats(-8, 8, width=32)), st.floats(0.01, 0.999))
@settings(deadline=None, max_examples=60)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(logits, top_p):
    kept = np.isfinite(np.asarray(nucleus(logits, top_p)))
    for row, inside in zip(logits.astype(np.float64), kept, strict=True):
        probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        assert (
            probabilities[inside].max() == probabilities.max()
        )  # one of the likeliest: devices flush subnormal logits
        assert probabilities[inside].sum() > top_p - 1e-4  # enough,
        assert probabilities[inside].sum() - probabilities[inside].min() < top_p + 1e-4  # and no more than needed
        if not inside.all():
            assert probabilities[inside].min() >= probabilities[~inside].max() - 1e-7


def decode_bytes(ids) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=2))
@settings(max_examples=300)
def test_pieces_join_to_the_whole_text(text, stops):
    """Whatever the characters, one byte a token: no piece holds half of one, and stop texts never show."""
    writer = Detokenizer(decode_bytes, stops)
    pieces = []
    for byte in text.encode("utf-8", errors="replace"):
        pieces.append(writer.add(byte))
        if writer.stopped:
            break
    pieces.append(writer.finish())
    whole = text.encode("utf-8", errors="replace").decode("utf-8")
    assert "".join(pieces) == cut_at(whole, stops).strip()
    assert all(BROKEN not in piece for piece in pieces) or BROKEN in whole


def test_characters_come_as_soon_as_they_are_whole():
    writer = Detokenizer(decode_bytes)
    assert [writer.add(byte) for byte in "a é".encode()] == ["a", "", "", " é"]
    assert writer.add(0xE2) == "" and writer.finish() == BROKEN


def test_an_unfinished_character_is_no_stop():
    writer = Detokenizer(decode_bytes, [BROKEN])
    assert [writer.add(byte) for byte in "é".encode()] == ["", "é"] and not writer.stopped


def test_a_possible_stop_is_held_back():
    writer = Detokenizer(decode_bytes, ["END"])
    assert [writer.add(byte) for byte in b"aENb"] == ["a", "", "", "ENb"]
    assert [writer.add(byte) for byte in b"END!"] == ["", "", "", ""] and writer.stopped
