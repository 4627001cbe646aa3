"""Official submission files: the model's words, rewritten as the protocol does, in the form each benchmark's own code takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxvlm.evals import tasks
from jaxvlm.evals.aggregates import by
from jaxvlm.evals.answers import match
from jaxvlm.evals.question_file import EvalError
from jaxvlm.evals.readers import completed
from jaxvlm.evals.scorers import Record
from jaxvlm.evals.sheets import write_xlsx

Answered = Sequence[tuple[dict, str]]  # (reference, words)


def export(
    task: str, protocol: str, predictions: Iterable[Record], references: Iterable[Record], out: str | Path
) -> int:
    """Writes the submission of `task` to `out` and returns the number of answers.

    Raises `EvalError` for a task that has no form of its own, and as `score` does for answers that do not fit.
    """
    about, how = tasks.find(task, protocol)
    if task not in WRITERS:
        raise EvalError(f"{task} has no submission file; these have: {', '.join(WRITERS)}.")
    references = completed(references, about.complete)
    answers = match(predictions, references)
    rewrite = how.rewrite or str
    answered = [(reference, rewrite(str(answers[reference["id"]].get("text", "")))) for reference in references]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    WRITERS[task](Path(out), answered)
    return len(answered)


def _json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _records(id_name: str, words_name: str) -> Callable[[Path, Answered], None]:
    """A JSON list of {id, words}."""
    return lambda path, answered: _json(path, [{id_name: q[id_name], words_name: words} for q, words in answered])


def _lines(path: Path, records: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def _seed(path: Path, answered: Answered) -> None:
    _lines(path, ({"question_id": q["question_id"], "prediction": words} for q, words in answered))


def _mmvet(path: Path, answered: Answered) -> None:
    _json(path, {q["id"]: words for q, words in answered})


def _pope(path: Path, answered: Answered) -> None:
    """A folder of {split}.jsonl, for POPE's evaluate.py."""
    path.mkdir(exist_ok=True)
    for split, part in by(answered, lambda item: item[0]["category"]).items():
        _lines(
            path / f"{split}.jsonl",
            (
                {"question_id": q["question_id"], "category": split, "question": q["question"], "answer": words}
                for q, words in part
            ),
        )


def _mme(path: Path, answered: Answered) -> None:
    """A folder of {task}.txt, for MME's calculation.py; line breaks and tabs in an answer become blanks."""
    path.mkdir(exist_ok=True)
    for name, part in by(answered, lambda item: item[0]["category"]).items():
        rows = [
            (q["image"], q["question"], q["answer"], words.replace("\n", " ").replace("\t", " ")) for q, words in part
        ]
        (path / f"{name}.txt").write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


def _mmbench(path: Path, answered: Answered) -> None:
    """LLaVA's sheet for MMBench's server (convert_mmbench_for_submission.py)."""
    columns = ["index", "question", "A", "B", "C", "D", "answer", "split", "prediction"]
    write_xlsx(path, columns, [{**q, "index": int(q["index"]), "prediction": words} for q, words in answered])


WRITERS: dict[str, Callable[[Path, Answered], None]] = {
    "vqav2": _records("question_id", "answer"),
    "gqa": _records("questionId", "prediction"),
    "vizwiz": _records("image", "answer"),
    "textvqa": _records("question_id", "answer"),
    "textvqa-ocr": _records("question_id", "answer"),
    "pope": _pope,
    "mme": _mme,
    "mmbench": _mmbench,
    "mmbench-cn": _mmbench,
    "seed-bench": _seed,
    "mm-vet": _mmvet,
    "docvqa": _records("questionId", "answer"),
    "infovqa": _records("questionId", "answer"),
    "st-vqa": _records("question_id", "answer"),
}
