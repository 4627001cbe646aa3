"""Chance of each benchmark's headline number, by formula, against models that guess, many times over."""

from __future__ import annotations

import random

import eval_helpers
import numpy as np
import pytest

from jaxvlm.evals import score, tasks
from jaxvlm.evals.baselines import guessed, one_answer
from jaxvlm.evals.readers import completed

ROUNDS = 300


def benchmark(task, count):
    return completed(eval_helpers.questions(task, count), tasks.find_task(task).complete)


def uneven(references):
    """CV-Bench with four options in 3D: its mean of 2D and 3D is not the mean over questions."""
    return [one | ({"choices": list("abcd")} if one["source"] == "Omni3D" else {}) for one in references]


def few_yes(references):
    return [one for i, one in enumerate(references) if one["label"] == "no" or i % 5 == 0]


CASES = {
    "mme": ("llava15", 112, None, ("Yes", "No")),
    "mmbench": ("official", 90, None, None),
    "mmvp": ("cambrian", 80, None, None),
    "cv-bench": ("cambrian", 120, uneven, None),
    "scienceqa": ("llava15", 60, None, None),
    "seed-bench": ("cambrian", 60, None, None),
    "pope": ("llava15", 1800, few_yes, ("Yes", "No")),
    "vsr": ("jaxvlm", 60, None, ("True", "False")),
}


@pytest.mark.parametrize(
    ("task", "protocol", "expected"),
    [
        ("pope", "llava15", 100 * 2 / 3),  # always yes: precision 1/2, recall 1
        ("mme", "llava15", 500.0),  # half of the questions of each of ten tasks, of no image both
        ("questions", "vqa", None),
        ("scienceqa", "llava15", None),
        ("vqav2", "llava15", None),
    ],
)
def test_one_answer_is_the_best_constant(task, protocol, expected):
    references = benchmark(task, 112 if task == "mme" else 120)
    right = [eval_helpers.right_words(task, protocol, one) for one in references]
    best = 0.0
    for text in set(right):
        answers = [{"id": one["id"], "text": text} for one in references]
        best = max(best, score(task, protocol, answers, references)["value"] or 0.0)
    assert one_answer(task, protocol, references) == pytest.approx(best)
    assert expected is None or best == pytest.approx(expected)


def test_one_answer_of_what_is_not_words():
    assert one_answer("pope", "prismatic", benchmark("pope", 6)) is None
    assert one_answer("refcoco", "official", benchmark("refcoco", 6)) is None


@pytest.mark.parametrize("task", CASES)
def test_chance_is_what_guessing_gives(task):
    protocol, count, change, words = CASES[task]
    references, rng = benchmark(task, count), random.Random(0)
    references = change(references) if change else references
    values = []
    for _ in range(ROUNDS if count < 1000 else 40):
        answers = [
            {"id": one["id"], "text": rng.choice(words or eval_helpers.LETTERS[: len(one["choices"])])}
            for one in references
        ]
        values.append(score(task, protocol, answers, references)["value"])
    error = np.std(values) / np.sqrt(len(values))
    assert guessed(task, protocol, references) == pytest.approx(np.mean(values), abs=3.5 * error)
    assert error > 0


def test_chance_by_hand():
    mme = benchmark("mme", 112)  # two images a task
    assert guessed("mme", "official", mme) == 750 and guessed("mme", "llava15", mme[:4]) == 150  # two tasks are left
    circle = [one for one in benchmark("mmbench", 9) if one["group"] == "1"]  # three passes of three options
    assert guessed("mmbench", "official", circle) == pytest.approx(100 / 27)
    assert guessed("cv-bench", "cambrian", uneven(benchmark("cv-bench", 12))) == 37.5  # not 41.7
    assert guessed("mmvp", "cambrian", benchmark("mmvp", 8)) == 25
    labels = [
        {"question_id": i, "category": "random", "image": "x", "text": "q", "label": w} for i, w in enumerate("ynnn")
    ]
    labels = [one | {"label": {"y": "yes", "n": "no"}[one["label"]]} for one in labels]
    labels = completed(labels, tasks.find_task("pope").complete)
    assert guessed("pope", "llava15", labels) == pytest.approx(100 * 2 * 0.25 * 0.5 / 0.75)
    assert guessed("pope", "cambrian", labels) == 50 and guessed("tallyqa", "jaxvlm", benchmark("tallyqa", 5)) == 6.25


def test_no_chance_where_nothing_is_chosen():
    for task in ("gqa", "docvqa", "mmmu"):  # MMMU has open questions too
        assert guessed(task, "official", benchmark(task, 20)) is None
    assert guessed("pope", "llava15", []) is None
