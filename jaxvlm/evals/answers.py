"""Answers: matching them to questions, reading files of them, writing the benchmarks' submissions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from jaxvlm.evals.question_file import EvalError, plain_question
from jaxvlm.evals.readers import ID_NAMES
from jaxvlm.evals.scorers import Record

WORDS = ("text", "prediction", "answer")  # what the answer's own field may be called, first come
PICTURES = (".jpg", ".jpeg", ".png")


def match(predictions: Iterable[Record], references: Sequence[Record], subset: bool = False) -> dict[str, dict]:
    """Predictions by their question's id, each with its words as `text`.

    Raises `EvalError` for answers that are doubled or to no question, and unless `subset` for questions without one.
    """
    names: dict[str, str] = {}
    for reference in references:
        for name in _aliases(reference):
            names[name] = "" if name in names else reference["id"]  # a name of two questions names none
    names |= {reference["id"]: reference["id"] for reference in references}
    found: dict[str, dict] = {}
    for prediction in predictions:
        tried = list(_names(prediction))
        question = next((names[name] for name in tried if names.get(name)), None)
        if question is None:
            raise EvalError(
                f"No question has the answer's id {' or '.join(map(repr, tried)) or '(none)'}; ids of questions are like "
                f"{', '.join(repr(reference['id']) for reference in references[:3])}."
            )
        if question in found:
            raise EvalError(f"There are two answers to the question {question}; keep one of them.")
        words = next((prediction[name] for name in WORDS if name in prediction), None)
        found[question] = dict(prediction) if words is None else {**prediction, "text": words}
    lacking = [reference["id"] for reference in references if reference["id"] not in found]
    if not found or (lacking and not subset):
        raise EvalError(
            f"{len(lacking)} of {len(references)} questions have no answer, {', '.join(lacking[:3])} among them. A score "
            "over some of the questions is not the benchmark's: ask for it by subset=True (--subset)."
        )
    return found


def _aliases(reference: Record) -> Iterator[str]:
    """Other names by which LLaVA's files call a question."""
    if "image_id" in reference and "question" in reference:  # TextVQA
        yield f"{reference['image_id']}/{plain_question(reference['question']).lower()}"
    if reference["id"].endswith(PICTURES):  # VizWiz
        yield _stem(reference["id"])
    if reference["id"].startswith("v1_"):  # MM-Vet
        yield reference["id"][3:]


def _names(prediction: Record) -> Iterator[str]:
    """What an answer's question may be called, the surest first."""
    name = next((str(prediction[key]) for key in (*ID_NAMES, "image") if key in prediction), None)
    if name is None:
        return
    if "category" in prediction:  # POPE
        yield f"{prediction['category']}/{name}"
    if "prompt" in prediction:  # MME, TextVQA: several questions have one question_id
        yield f"{_stem(name)}/{plain_question(prediction['prompt']).lower()}"
    if "question" in prediction and "image" in prediction:  # MME's own
        yield f"{prediction.get('category')}/{_stem(name)}/{plain_question(prediction['question']).lower()}"
    yield name
    yield _stem(name)


def _stem(name: str) -> str:
    """A picture's name without its ending; other names keep their periods."""
    return name.rpartition(".")[0] if name.endswith(PICTURES) else name
