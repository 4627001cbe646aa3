"""Scorers, baselines, subsets and intervals against cases worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvlm.evals import baselines, blind, question_file, statistics
from jaxvlm.evals.question_file import EvalError, Question
from jaxvlm.evals.scorers import text as text_scorers


def question(name, text="what colour?", answer="red", category="what", image="a.png"):
    return Question(name, image, text, answer, category)


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("Red.", "red", 1),
        (" red \n", "RED", 1),
        ("red..", "red", 1),
        ("dark red", "red", 0),
        ("t-shirt", "tshirt", 0),
        ("3.5", "3.5", 1),
        ("", "red", 0),
    ],
)
def test_exact_match(prediction, answer, right):
    assert text_scorers.exact_match(prediction, answer) == right


@given(st.text(max_size=20), st.text(max_size=20))
def test_exact_match_is_symmetric_and_ignores_case_blanks_and_periods(a, b):
    assert text_scorers.exact_match(a, b) == text_scorers.exact_match(b, a)
    assert text_scorers.exact_match(a, a) == 1
    plain = "".join(c for c in a if c.isascii() and c.isprintable())
    assert text_scorers.exact_match(f"  {plain.upper()}. ", plain) == 1


def test_majority_falls_back_from_question_to_category_to_all():
    questions = [
        question("1", "What colour?", "red"),
        question("2", "what shape?", "circle"),
        question("3", "is it red?", "no", "yesno"),
        question("4", "new one?", "no", "other"),
        question("5", "unseen", "red"),
    ]
    suffix = question_file.SHORT_ANSWER
    training = [(f"<image>\nwhat colour?{suffix}", "Blue")] * 3 + [("what colour?", "red"), ("what shape?", "circle")]
    training += [("is it red?", "no."), ("is it red?", "yes"), ("unrelated", "no")]
    table = baselines.fit_majority(questions, training)
    assert [table.answer(q) for q in questions] == ["blue", "circle", "no", "blue", "blue"]
    oracle = baselines.fit_majority(questions)
    assert [oracle.answer(q) for q in questions] == ["red", "circle", "no", "no", "red"]


def test_chance_is_one_over_the_answers_of_the_category():
    questions = [question(str(i), answer=a) for i, a in enumerate(["red", "Red.", "blue", "green"])]
    questions.append(question("9", answer="yes", category="yesno"))
    assert baselines.chance(questions) == {"what": 1 / 3, "yesno": 1.0}


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5))
def test_subsets_are_nested_and_in_file_order(small, more, seed):
    questions = [question(str(i), category="ab"[i % 3 == 0]) for i in range(60)]
    first = question_file.subset(questions, [("a", small)], seed)
    second = question_file.subset(questions, [("a", small + more), ("b", 5)], seed)
    assert len(first) == min(small, 40) and {q.id for q in first} <= {q.id for q in second}
    assert [int(q.id) for q in second] == sorted(int(q.id) for q in second)
    assert question_file.subset(questions, (), seed) == questions


def test_limits_name_the_known_categories():
    with pytest.raises(EvalError, match="'colour', which has no question. Known: what."):
        question_file.subset([question("1")], [("colour", 3)], 0)


@given(st.integers(2, 30), st.integers(0, 9))
def test_shuffled_images_leave_none_in_place(count, seed):
    pictures = [f"{i}.png" for i in range(count)]
    other = blind.shuffled(pictures * 2, seed)
    assert sorted(other.values()) == sorted(other) == sorted(pictures) and all(a != b for a, b in other.items())
    with pytest.raises(EvalError, match="two different images"):
        blind.shuffled(pictures[:1] * 2, seed)


def test_requests_carry_the_format_once_and_the_marker_only_with_an_image():
    plain, ready = question("1"), question("2", text="what colour?" + question_file.SHORT_ANSWER)
    made = [question_file.request(q, question_file.SHORT_ANSWER, "a.png") for q in (plain, ready)]
    assert {m["messages"][0]["content"] for m in made} == {f"<image>\nwhat colour?{question_file.SHORT_ANSWER}"}
    blind = question_file.request(plain, question_file.SHORT_ANSWER, None)
    assert blind["images"] == [] and "<image>" not in blind["messages"][0]["content"]
    with pytest.raises(EvalError, match="Did you mean 'vqa'"):
        question_file.response_format("vqaa")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "test.jsonl:2 is not a line of JSON"),
        ('{"question_id": 2, "text": "x"}', "test.jsonl:2 has no 'answer'"),
        ('{"question_id": 1, "text": "x", "answer": "y"}', "question_id 1 occurs twice"),
        ('{"question_id": 2, "text": "x", "answer": "y", "image": "no.png"}', "no.png does not exist"),
    ],
)
def test_bad_question_files(tmp_path, line, message):
    path = tmp_path / "test.jsonl"
    path.write_text('{"question_id": 1, "text": "x", "answer": "y"}\n' + line + "\n")
    with pytest.raises(EvalError, match=message):
        question_file.read_questions(path)


def test_training_answers_from_conversations_and_question_files(tmp_path):
    turns = [
        {"from": "human", "value": f"<image>\nwhat colour?{question_file.SHORT_ANSWER}"},
        {"from": "gpt", "value": " red"},
        {"from": "human", "value": "is it?"},
        {"from": "gpt", "value": "yes"},
    ]
    (tmp_path / "a.json").write_text(json.dumps([{"id": 1, "conversations": turns}]))
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"text": "hm?", "answer": "no"}) + "\n\n" + json.dumps({"id": 2}) + "\n"
    )
    pairs = question_file.read_training_answers([tmp_path / "a.json", tmp_path / "b.jsonl"])
    assert pairs == [("what colour?", "red"), ("is it?", "yes"), ("hm?", "no")]


# ----------------------------------------------------------------------------------------------------------- intervals


def test_bootstrap_of_a_proportion_is_the_binomials():
    values = np.repeat([1.0, 0.0], [280, 120])
    low, high = statistics.bootstrap_interval(values, resamples=4000, seed=1)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 400)
    assert abs(low - (0.7 - half)) < 0.006 and abs(high - (0.7 + half)) < 0.006
    assert statistics.bootstrap_interval(values, resamples=4000, seed=1) == (low, high)
    wilson = statistics.wilson_interval(280, 400)
    assert np.allclose(wilson, (low, high), atol=0.008)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = statistics.bootstrap_interval(rng.random(150) < 0.4, resamples=300, seed=trial)
        covered += low <= 0.4 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_groups_that_move_together_widen_the_interval():
    values = np.repeat(np.arange(40) % 2, 10).astype(float)
    together = statistics.bootstrap_interval(values, np.repeat(np.arange(40), 10))
    apart = statistics.bootstrap_interval(values)
    assert 2.5 < (together[1] - together[0]) / (apart[1] - apart[0]) < 4  # sqrt(10) for ten equal answers


def test_paired_interval_removes_what_is_shared():
    rng = np.random.default_rng(0)
    hard = rng.random(300) < 0.5
    first, second = hard.astype(float), hard.astype(float)
    second[:15] = 0
    low, high = statistics.paired_interval(first, second)
    assert 0 <= low <= (first - second).mean() <= high < 0.06


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share(case):
    successes, count = case
    low, high = statistics.wilson_interval(successes, count)
    assert 0 <= low <= successes / count + 1e-12 and successes / count - 1e-12 <= high <= 1
    if count == 100 and successes == 50:
        assert np.allclose((low, high), (0.4038, 0.5962), atol=1e-4)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_bootstrap_stays_within_the_values(values):
    low, high = statistics.bootstrap_interval(values, resamples=50)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_no_values_no_interval():
    with pytest.raises(ValueError, match="at least one"):
        statistics.bootstrap_interval([])
