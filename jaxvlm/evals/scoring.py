"""`score`: predictions and references in, numbers out. It runs no model, so saved answers can be scored again and again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxvlm.evals import tasks
from jaxvlm.evals.aggregates import Row
from jaxvlm.evals.answers import match
from jaxvlm.evals.question_file import IMAGE_MARK, EvalError
from jaxvlm.evals.readers import collector_paused, completed
from jaxvlm.evals.scorers import Record


@collector_paused()
def score(
    task: str,
    protocol: str,
    predictions: Iterable[Record],
    references: Iterable[Record],
    *,
    split: str = "",
    model: str = "",
    subset: bool = False,
) -> dict[str, Any]:
    """Scores answers of `task` as `protocol` does.

    Args:
        predictions: records with an id (`question_id`, `questionId`, `id`, `index`, ...) and the model's words as `text`,
            `answer` or `prediction`: LLaVA's answers and the official submissions are such records. Protocols that do not
            read words take `probabilities`, `losses` or `judgement` instead.
        references: the benchmark's records in its official fields, as `tasks.read_references` gives them.
        split: the questions' split; left empty, it is told by their number.
        model: the fingerprint of the model that answered; left empty, what the predictions say.
        subset: score what was answered and leave out the rest. Otherwise every question must have its answer.

    Returns:
        `per_sample`, in the references' order: id, group, parsed, valid, scores, and a note where the official code would
        have stopped; `aggregate`, numbers in per cent where they are shares; `invalid`, how many answers could not be
        understood; `headline`, the aggregate that papers print, and its `value`; and what the numbers depend on: task,
        protocol, split, n, prompt (a hash of every question as the protocol asks it), prompts_as_asked (how many answers
        say that they were to that prompt), judge, model.

    Raises `EvalError` for an unknown task or protocol, answers that are missing, doubled or to no question, and records
    that lack what the scorer needs.
    """
    about, how = tasks.find(task, protocol)
    references = completed(references, about.complete)
    answers = match(predictions, references, subset)
    rows, notes = [], {}
    for reference in references:
        if reference["id"] in answers:
            row, note = _row(task, how, answers[reference["id"]], reference)
            rows.append(row)
            if note:
                notes[row.id] = note
    aggregate = (how.aggregate or about.aggregate)(rows)
    used = [answers[row.id] for row in rows]
    return {
        "task": task,
        "protocol": protocol,
        "split": split or tasks.split_of(about, len(rows)),
        "n": len(rows),
        "headline": how.headline,
        "value": aggregate.get(how.headline),
        "invalid": sum(not row.valid for row in rows),
        **_prompts(how, rows, used),
        "judge": _judge(used),
        "model": model or _models(used),
        "aggregate": aggregate,
        "per_sample": [
            {"id": row.id, "group": row.group, "parsed": row.parsed, "valid": row.valid, "scores": row.values}
            | ({"note": notes[row.id]} if row.id in notes else {})
            for row in rows
        ],
    }


def _row(task: str, how: tasks.Protocol, answer: Mapping, reference: dict) -> tuple[Row, str]:
    if how.takes not in answer:
        raise EvalError(f"The answer to {reference['id']} of {task} has no '{how.takes}', which this protocol scores.")
    if how.takes == "text" and not isinstance(answer["text"], str):
        raise EvalError(f"The answer to {reference['id']} of {task} is {answer['text']!r}, not a text.")
    if how.rewrite:
        answer = {**answer, "text": how.rewrite(answer["text"])}
    try:
        parsed, values, valid, note = how.scorer(answer, reference)
    except KeyError as error:
        raise EvalError(f"Question {reference['id']} of {task}: no field {error} in its reference or answer.") from None
    return Row(reference["id"], reference["group"], parsed, values, valid, reference), note


def _prompts(how: tasks.Protocol, rows: Sequence[Row], answers: Sequence[Mapping]) -> dict[str, Any]:
    """The hash of the protocol's prompts (None where the references lack the words), and which answers were to them."""
    try:
        asked = [how.prompt(row.reference) for row in rows]
    except KeyError:
        return {"prompt": None, "prompts_as_asked": None}
    digest = hashlib.sha256("\0".join(asked).encode(errors="surrogatepass")).hexdigest()[:16]
    told = [(a["prompt"], words) for a, words in zip(answers, asked, strict=True) if isinstance(a.get("prompt"), str)]
    alike = sum(prompt.replace(IMAGE_MARK, "").strip() == words.strip() for prompt, words in told)
    return {"prompt": digest, "prompts_as_asked": f"{alike} of {len(told)}" if told else None}


def _judge(answers: Sequence[Mapping]) -> dict[str, str] | None:
    """Which models judged and with which prompts, from the judgements themselves."""
    judgements = [answer["judgement"] for answer in answers if "judgement" in answer]
    if not judgements:
        return None
    return {
        name: "+".join(sorted({str(judgement.get(field) or "unknown") for judgement in judgements}))
        for name, field in (("model", "judge"), ("prompt", "prompt"))
    }


def _models(answers: Sequence[Mapping]) -> str:
    """The models that the answers name: the fingerprint in our metadata, else LLaVA's model_id."""
    names = {str((a.get("metadata") or {}).get("model") or a.get("model_id") or "unknown") for a in answers}
    return "+".join(sorted(names)) or "unknown"
