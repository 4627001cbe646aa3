"""Did tuning hurt the language model? Perplexity of held-out text, and multiple choice by likelihood, without any picture.

Questions are worded and scored as EleutherAI's lm-evaluation-harness does (MMLU, ARC, HellaSwag): each answer's log
likelihood after the question, and the same per character.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxvlm.evals.question_file import EvalError
from jaxvlm.evals.readers import read_lines
from jaxvlm.evals.statistics import paired_interval, wilson_interval
from jaxvlm.infer.engine import Engine
from jaxvlm.infer.texts import sequence_losses


class Choice(NamedTuple):
    """A question as the model reads it, its answers with the blank before them, and which one is right."""

    id: str
    context: str
    answers: list[str]
    right: int


def perplexity(engine: Engine, text: str, *, window: int = 1024, batch_size: int = 4) -> dict[str, Any]:
    """Perplexity per token and bits per byte of a text; the second can be compared across tokenizers.

    Windows of at most `window` tokens overlap by half, so that each token is scored once and all but the first have half a
    window or more before them. `windows` holds each one's nats per scored token, for pairing with another model's.
    """
    ids = np.array(engine.tokenizer.encode(text), np.int64)
    if len(ids) < 2:
        raise EvalError("A perplexity takes a text of two tokens or more.")
    first = [] if engine.tokenizer.bos_id is None else [engine.tokenizer.bos_id]
    window = min(window, engine.config.llm.max_positions) - len(first)
    stride, sequences, done = max(1, window // 2), [], 0 if first else 1
    for start in range(0, len(ids), stride):
        part = ids[start : start + window]
        fresh = np.arange(start, start + len(part)) >= done
        sequences.append((np.array([*first, *part]), np.array([*[False] * len(first), *fresh])))
        done = start + len(part)
        if done == len(ids):
            break
    losses, counts = sequence_losses(engine, sequences, batch_size), np.array([c.sum() for _, c in sequences])
    mean = losses.sum() / counts.sum()
    return {
        "tokens": int(counts.sum()),
        "loss": float(mean),
        "perplexity": float(np.exp(mean)),
        "bits_per_byte": float(losses.sum() / np.log(2) / len(text.encode())),
        "windows": (losses / counts).tolist(),
    }


def choose(engine: Engine, questions: Sequence[Choice], *, batch_size: int = 4) -> dict[str, Any]:
    """Accuracy in per cent by the summed log likelihood, and `accuracy_norm` by that per character of the answer.

    `right` and `right_norm` hold them by id, with Wilson's 95 % intervals beside. `cut` counts answers whose question was too
    long for the model and lost its beginning.
    """
    sequences, sizes, cut = [], [], 0
    for question in questions:
        for answer in question.answers:
            ids, counted = encode(engine, question.context, answer)
            over = max(0, len(ids) - engine.config.llm.max_positions)
            cut += over > 0
            sequences.append((ids[over:], counted[over:]))
            sizes.append(len(answer) - 1)  # without the blank before it
    losses = sequence_losses(engine, sequences, batch_size)
    right, right_norm, at = {}, {}, 0
    for question in questions:
        part = slice(at, at := at + len(question.answers))
        right[question.id] = float(losses[part].argmin() == question.right)
        right_norm[question.id] = float((losses[part] / sizes[part]).argmin() == question.right)
    found: dict[str, Any] = {"n": len(questions), "cut": cut}
    for name, flags in (("accuracy", right), ("accuracy_norm", right_norm)):
        low, high = wilson_interval(sum(flags.values()), len(flags))
        found[name] = 100 * sum(flags.values()) / len(flags)
        found[f"{name}_interval"] = (100 * low, 100 * high)
    return found | {
        "chance": 100 * float(np.mean([1 / len(q.answers) for q in questions])),
        "right": right,
        "right_norm": right_norm,
    }


def encode(engine: Engine, context: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of both together after the model's first token, and which are of the answer, by their characters.

    A token across the border is the answer's. Without a first token of the tokenizer's own, a context must not be empty.
    """
    ids, spans = engine.tokenizer.encode(context + answer, offsets=True)
    counted = [bool(end > len(context)) for _, end in spans]
    if engine.tokenizer.bos_id is not None:
        ids, counted = [engine.tokenizer.bos_id, *ids], [False, *counted]
    return np.array(ids, np.int64), np.array(counted)


def change(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """After minus before, with the paired bootstrap's 95 % interval: of `loss` for a text, of accuracies for questions.

    A text's windows are only the same for one tokenizer; otherwise there is the difference in bits per byte alone.
    """
    if "windows" in before:
        found: dict[str, Any] = {"bits_per_byte": after["bits_per_byte"] - before["bits_per_byte"]}
        if len(before["windows"]) == len(after["windows"]) and before["tokens"] == after["tokens"]:
            found["loss"] = after["loss"] - before["loss"]
            found["loss_interval"] = paired_interval(after["windows"], before["windows"])
        return found
    found = {}
    for name, flags in (("accuracy", "right"), ("accuracy_norm", "right_norm")):
        ours, theirs = ([100 * run[flags][key] for key in before[flags]] for run in (after, before))
        found[name] = after[name] - before[name]
        found[f"{name}_interval"] = paired_interval(ours, theirs)
    return found


# -------------------------------------------------------------------------------------------------------------- readers


def read_mmlu(path: str | Path, shots: int = 5) -> list[Choice]:
    """MMLU's CSV (question, A, B, C, D, letter; no header): a file, or the folder with test/ and dev/.

    With the folder up to `shots` questions of the subject in dev/ stand before each, as in the paper; a file has none.
    """
    path, found = Path(path), []
    files = sorted((path / "test").glob("*_test.csv")) if path.is_dir() else [path]
    for file in files:
        subject = re.sub(r"_(test|val|dev)$", "", file.stem)
        lead = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        examples = path / "dev" / f"{subject}_dev.csv"
        if path.is_dir() and shots:
            lead += "".join(f"{_mmlu(row)} {row[5]}\n\n" for row in _mmlu_rows(examples)[:shots])
        for place, row in enumerate(_mmlu_rows(file)):
            found.append(
                Choice(f"{subject}/{place}", lead + _mmlu(row), [f" {c}" for c in "ABCD"], "ABCD".index(row[5]))
            )
    if not found:
        raise EvalError(f"{path} holds no questions; MMLU's folder has test/*_test.csv.")
    return found


def _mmlu_rows(file: Path) -> list[list[str]]:
    if not file.is_file():
        raise EvalError(f"{file} is not a file; MMLU's folder has test/SUBJECT_test.csv and dev/SUBJECT_dev.csv.")
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.reader(lines) if row]
    bad = next((n for n, row in enumerate(rows, 1) if len(row) != 6 or row[5].strip() not in {*"ABCD"}), None)
    if bad:
        raise EvalError(f"{file}: row {bad} is not question, A, B, C, D, letter: {rows[bad - 1]!r}.")
    return [[cell.strip() for cell in row] for row in rows]


def _mmlu(row: Sequence[str]) -> str:
    return row[0] + "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", row[1:5], strict=True)) + "\nAnswer:"


def read_arc(path: str | Path) -> list[Choice]:
    """ARC's JSONL: AI2's (`question.stem`, `question.choices`) or the Hub's (`question`, `choices.text`, `choices.label`)."""

    def one(record: dict) -> Choice:
        question = record["question"]
        if isinstance(question, dict):
            question, options = question["stem"], [(c["label"], c["text"]) for c in question["choices"]]
        else:
            options = list(zip(record["choices"]["label"], record["choices"]["text"], strict=True))
        right = [label for label, _ in options].index(record["answerKey"])
        return Choice(str(record["id"]), f"Question: {question}\nAnswer:", [f" {text}" for _, text in options], right)

    return _read(path, one, "ARC")


def read_hellaswag(path: str | Path) -> list[Choice]:
    """HellaSwag's JSONL: `activity_label`, `ctx_a`, `ctx_b`, `endings`, `label`; WikiHow's marks in brackets are taken out."""

    def plain(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    def one(record: dict) -> Choice:
        context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
        return Choice(
            str(record["ind"]), plain(context), [f" {plain(e)}" for e in record["endings"]], int(record["label"])
        )

    return _read(path, one, "HellaSwag")


def _read(path: str | Path, one: Callable[[dict], Choice], name: str) -> list[Choice]:
    found = []
    for place, record in enumerate(read_lines(Path(path)), 1):
        try:
            found.append(one(record))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EvalError(
                f"{path}: record {place} is not in {name}'s form ({error!r}): {json.dumps(record)[:200]}"
            ) from None
    if not found or len({question.id for question in found}) < len(found):
        raise EvalError(f"{path} holds no questions, or two of one id.")
    return found


READERS: dict[str, Callable[..., list[Choice]]] = {"mmlu": read_mmlu, "arc": read_arc, "hellaswag": read_hellaswag}
