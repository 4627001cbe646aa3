"""What needs no model: the majority answer and chance of a question file, to set beside a score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxvlm.evals.question_file import Question, plain_question
from jaxvlm.evals.scorers.text import normalise


@dataclass(frozen=True)
class Majority:
    """The most frequent answer by question text, by category, and overall: what a model could know without seeing."""

    by_question: dict[str, str]
    by_category: dict[str, str]
    overall: str

    def answer(self, question: Question) -> str:
        """The same question's majority answer, else its category's, else the overall one."""
        text = plain_question(question.text).lower()
        return self.by_question.get(text) or self.by_category.get(question.category) or self.overall


def fit_majority(questions: Sequence[Question], training: Iterable[tuple[str, str]] | None = None) -> Majority:
    """Counts the `training` (question, answer) pairs; ties go to the answer that comes first in the alphabet.

    Training files carry no category: a training question has that of the test question with the same text. Without
    `training` the test answers themselves are counted, which is an upper bound ("oracle"), not a fair baseline.
    """
    category_of = {plain_question(question.text).lower(): question.category for question in questions}
    if training is None:
        training = [(question.text, question.answer) for question in questions]
    texts: dict[str, Counter] = {}
    categories: dict[str, Counter] = {}
    overall: Counter = Counter()
    for text, answer in training:
        text, answer = plain_question(text).lower(), normalise(answer)
        texts.setdefault(text, Counter())[answer] += 1
        overall[answer] += 1
        if text in category_of:
            categories.setdefault(category_of[text], Counter())[answer] += 1
    return Majority(
        {text: _most_common(counts) for text, counts in texts.items()},
        {category: _most_common(counts) for category, counts in categories.items()},
        _most_common(overall) if overall else "",
    )


def _most_common(counts: Counter) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))


def chance(questions: Sequence[Question]) -> dict[str, float]:
    """Accuracy of a uniform guess, by category: 1 / (number of distinct answers that category has in the test set)."""
    answers: dict[str, set[str]] = {}
    for question in questions:
        answers.setdefault(question.category, set()).add(normalise(question.answer))
    return {category: 1 / len(values) for category, values in answers.items()}
