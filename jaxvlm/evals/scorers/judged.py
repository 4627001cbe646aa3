"""Answers that another model rates: how MM-Vet and LLaVA-Bench read the judge's words. Asking it: evals/judges.py."""

from __future__ import annotations

from jaxvlm.evals.scorers import Record, Scored

UNREADABLE = (-1.0, -1.0)  # LLaVA-Bench's pair for a review that it cannot read; it is averaged like any other


def rating(content: str) -> float | None:
    """MM-Vet's: what stands before the first blank is a number from 0 to 1, else None (the judge is asked again)."""
    try:
        score = float(content.split(" ")[0].strip())
    except ValueError:
        return None
    return score if 0.0 <= score <= 1.0 else None


def pair(content: str) -> tuple[float, float]:
    """LLaVA-Bench's: the first line, commas as blanks, splits at blanks into exactly two numbers; else (-1, -1).

    So "8, 7" (three parts, one empty) is a failure, and "8,7" and "8 7" are not.
    """
    parts = content.split("\n")[0].replace(",", " ").split(" ")
    try:
        return (float(parts[0]), float(parts[1])) if len(parts) == 2 else UNREADABLE
    except ValueError:
        return UNREADABLE


def mmvet(prediction: Record, reference: Record) -> Scored:
    """The mean of the runs' scores in the judgement; a run that could not be read after all tries counts 0.0."""
    scores = [0.0 if score is None else float(score) for score in prediction["judgement"]["scores"]]
    valid = None not in prediction["judgement"]["scores"]
    return Scored(scores, {"score": sum(scores) / len(scores)}, valid, "" if valid else "the judge gave no number")


def llava_bench(prediction: Record, reference: Record) -> Scored:
    """The judge's ratings of the reference answer and of the model's, 1 to 10 each."""
    reference_rating, model_rating = map(float, prediction["judgement"]["pair"])
    valid = (reference_rating, model_rating) != UNREADABLE
    values = {"reference": reference_rating, "model": model_rating}
    return Scored(
        (reference_rating, model_rating), values, valid, "" if valid else "the judge's review has no two numbers"
    )
