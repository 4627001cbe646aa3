"""What seeing is worth, and the labels that follow, on answers made for the purpose."""

import random

import pytest
from eval_files import questions
from eval_helpers import right_words

from jaxvlm.evals.scoring import score
from jaxvlm.evals.seeing import labels_in_words, seeing


def results(task, protocol, count, *rights):
    """Questions, and of each share in `rights` the result of answers that are right in that share of them."""
    references, found = questions(task, count), []
    for right in rights:
        rng = random.Random(right)
        marks = [rng.random() < right for _ in references]
        words = [right_words(task, protocol, q) if mark else "?" for q, mark in zip(references, marks, strict=True)]
        answers = [{"id": q["id"], "text": text} for q, text in zip(references, words, strict=True)]
        found.append(score(task, protocol, answers, references) | {"blind": "noimage"})
    return references, *found


@pytest.mark.parametrize(
    ("sighted", "blind", "shown"),
    [
        (0.9, 0.3, "–"),
        (0.87, 0.86, "language-centric, language bias"),
        (0.6, 0.26, "–"),
        (0.33, 0.3, "language-centric?"),
        (0.9, 0.55, "language bias?"),
    ],
)
def test_labels(sighted, blind, shown):
    """mmstar's four letters: chance is 25, so a language bias begins at 55, and what seeing is worth is known to some 4 points."""
    references, *two = results("mmstar", "cambrian", 600, sighted, blind)
    for one in references:
        one["choices"] = list("wxyz")
    found = seeing(*two, references, resamples=200)
    assert found["gap"] == pytest.approx(two[0]["value"] - two[1]["value"]) and found["chance"] == 25
    assert found["gap_interval"][0] < found["gap"] < found["gap_interval"][1]
    assert found["prior"] == pytest.approx(two[1]["value"] - 25)
    assert labels_in_words(found["labels"]) == shown


def test_sums_are_of_their_own_size():
    """MME's perception ends at 2000, so 5 % are 100 points; without a simple chance only the first label is given."""
    references, *two = results("mme", "llava15", 280, 0.95, 0.94)
    found = seeing(*two, references, resamples=200)
    assert 5 < abs(found["gap"]) < 100 and found["labels"]["language-centric"] is True
    references, *two = results("ocrbench", "official", 40, 1.0, 1.0)
    assert seeing(*two, references, resamples=100)["labels"] == {"language-centric": True}
