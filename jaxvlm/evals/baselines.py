"""What needs no model: the majority answer and chance, of a question file or of a benchmark, to set beside a score."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxvlm.evals import tasks
from jaxvlm.evals.aggregates import COGNITION, PERCEPTION, Row, by, mean
from jaxvlm.evals.question_file import Question, plain_question
from jaxvlm.evals.scorers import Record
from jaxvlm.evals.scorers.choice import LETTERS
from jaxvlm.evals.scorers.text import normalise
from jaxvlm.evals.scoring import score


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


# ------------------------------------------------------------------------------------------------------------ benchmarks

TRIED = 3  # constant answers
YES_NO = ("pope", "mme", "vsr")
SUMS = {"perception": PERCEPTION, "cognition": COGNITION, "total": (*PERCEPTION, *COGNITION)}  # MME's


def guessed(task: str, protocol: str, references: Sequence[Record]) -> float | None:
    """What a benchmark's headline number is expected to be if every answer is a uniform guess, each by itself.

    A guess among k options is right with 1/k. Means, whatever of, are those of 1/k. The chance that all of a group are
    right is the product of 1/k over its questions:
    - MME: a task has 100 x the mean of 1/2 + 100 x the mean over images of 1/2 x 1/2, so 75 points; the headline is their
      sum over the tasks that are there, 750 for perception.
    - MMBench: 100 x the mean over circles of the product over passes of 1/k, so k^-k for k options (25 for two, 0.39 for
      four). MMVP: 25.
    - A question file: 1 / the number of distinct answers of the question's category.
    - POPE's F1 of a split with a share p of yes: precision p and recall 1/2, so 100 x 2p(1/2) / (p + 1/2), as for
      many questions; of several splits the mean.

    `references` are complete (`readers.completed`). None where answers are not chosen among options.
    """
    about, how = tasks.find(task, protocol)
    shares = [0.5 if task in YES_NO else 1 / len(one["choices"]) if one.get("choices") else None for one in references]
    if task == "questions":
        answers = by(references, lambda one: one["category"])
        kinds = {name: len({normalise(str(one["answer"])) for one in part}) for name, part in answers.items()}
        shares = [1 / kinds[one["category"]] for one in references]
    if not shares or None in shares:
        return None
    rows = [
        Row(one["id"], one["group"], None, {"accuracy": share}, True, one)
        for one, share in zip(references, shares, strict=True)
    ]
    if task == "mme":
        parts = by(rows, lambda row: row.reference["category"])
        return sum(mean(part) + _all_right(part) for name, part in parts.items() if name in SUMS[how.headline])
    if how.headline in ("circular", "pair_accuracy"):
        return _all_right(rows)
    if how.headline == "f1":
        splits = by(rows, lambda row: row.reference["category"]).values()
        yes = [sum(row.reference["label"] == "yes" for row in part) / len(part) for part in splits]
        return sum(100 * share / (share + 0.5) for share in yes) / len(yes)
    return (how.aggregate or about.aggregate)(rows).get(how.headline)


def _all_right(rows: Sequence[Row]) -> float:
    """Per cent of groups of which every question is expected to be right."""
    groups = by(rows, lambda row: row.group).values()
    return 100 * sum(math.prod(row.values["accuracy"] for row in part) for part in groups) / len(groups)


def one_answer(task: str, protocol: str, references: Sequence[Record]) -> float | None:
    """A benchmark's headline number for a model that says the same to every question: the best of the most frequent answers.

    It is told how often they are right, so this is more than a model could know without seeing. None where the protocol does not
    read words, or no reference says what is right in words.
    """
    _, how = tasks.find(task, protocol)
    said = Counter(filter(None, map(_right_words, references)))
    if how.takes != "text" or not said:
        return None
    values = []
    for text, _ in said.most_common(TRIED):
        constant = [{"id": one["id"], "text": text} for one in references]
        values.append(score(task, protocol, constant, references)["value"])
    return max((value for value in values if value is not None), default=None)


def _right_words(reference: Record) -> str | None:
    """What a right answer would say; None where it is no text, letter, number or yes and no."""
    said = reference.get("label", reference.get("answer"))
    if answers := reference.get("answers"):  # of several people
        said = Counter(one["answer"] if isinstance(one, dict) else one for one in answers).most_common(1)[0][0]
    if isinstance(said, int) and reference.get("choices"):
        return LETTERS[said]
    if isinstance(said, str):
        return said.capitalize() if said in ("yes", "no") else said
    return None if said is None or isinstance(said, list | dict) else str(bool(said) if "label" in reference else said)
