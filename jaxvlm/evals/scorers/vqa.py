"""Open answers against several people's: VQAv2, TextVQA, VizWiz; and GQA against one."""

from __future__ import annotations

import string
from collections.abc import Sequence

from jaxvlm.evals.scorers import Record, Scored, accuracy
from jaxvlm.evals.scorers.normalise import evalai, flat, punctuation, vizwiz, vqa

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
PEOPLE = 10  # answers that TextVQA's evaluator insists on


def soft_accuracy(answer: str, people: Sequence[str]) -> float:
    """min(1, matches among the others / 3), averaged over leaving out each of `people` in turn.

    The others are told apart by position: equal answers of two people count as two. (The official code compares records
    and relies on their `answer_id` for that.) With ten people 1, 2, 3 matches give 0.3, 0.6, 0.9.
    """
    matches = people.count(answer)
    without, with_one = min(1.0, matches / 3), min(1.0, (matches - 1) / 3)
    return (matches * with_one + (len(people) - matches) * without) / len(people) if matches else 0.0


def answers_of(reference: Record) -> list[str]:
    """The people's answers of an official record: strings, or records with an `answer`."""
    return [item if isinstance(item, str) else item["answer"] for item in reference["answers"]]


def vqav2(prediction: Record, reference: Record) -> Scored:
    """The official score since 2021-03: both sides are rewritten, but only if the people disagree (vqaEval.py).

    So "Yes" against ten times "yes" is wrong.
    """
    answer, people = flat(prediction["text"]), [flat(item) for item in answers_of(reference)]
    if len(set(people)) > 1:
        answer, people = vqa(answer), [vqa(item) for item in people]
    return accuracy(answer, soft_accuracy(answer, people))


def vqav2_prismatic(prediction: Record, reference: Record) -> Scored:
    """Prismatic's copy: the prediction always rewritten, the people's answers only freed of punctuation."""
    answer = vqa(prediction["text"])
    return accuracy(answer, soft_accuracy(answer, [punctuation(item) for item in answers_of(reference)]))


def textvqa(prediction: Record, reference: Record) -> Scored:
    """mmf's TextVQAAccuracyEvaluator, which LLaVA, Prismatic and Cambrian share: EvalAI's rewriting of both sides."""
    answer, people = evalai(prediction["text"]), [evalai(item) for item in answers_of(reference)]
    if len(people) != PEOPLE:
        return accuracy(answer, 0.0, valid=False, note=f"not {PEOPLE} answers: the official code stops")
    return accuracy(answer, soft_accuracy(answer, people))


def vizwiz_accuracy(prediction: Record, reference: Record) -> Scored:
    """VizWiz's: the prediction rewritten, the people's answers as they are; and whether it says unanswerable."""
    answer = vizwiz(prediction["text"])
    values = {
        "accuracy": soft_accuracy(answer, answers_of(reference)),
        "unanswerable": float(answer == "unanswerable"),
    }
    return Scored(answer, values)


def gqa(prediction: Record, reference: Record) -> Scored:
    """GQA's own: equal strings, nothing rewritten."""
    return accuracy(prediction["text"], prediction["text"] == reference["answer"])


def gqa_rewrite_llava(text: str) -> str:
    """What LLaVA submits: periods at the end stripped, lower case (convert_gqa_for_eval.py)."""
    return text.rstrip(".").lower()


def gqa_rewrite_prismatic(text: str) -> str:
    """What Prismatic submits: no ASCII punctuation, so the answers t-shirt and dry-erase board cannot be given."""
    return text.translate(NO_PUNCTUATION).lower()


def gqa_cambrian(prediction: Record, reference: Record) -> Scored:
    """Cambrian's: lower case, then periods stripped, against the lower-case answer."""
    text = prediction["text"].lower().rstrip(".")
    return accuracy(text, text == reference["answer"].lower())
