"""Running an evaluation: sighted, blind, and what needs no model at all; resumable, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxvlm.config import EvalConfig
from jaxvlm.evals import baselines, question_file, statistics
from jaxvlm.evals.blind import picture_of
from jaxvlm.evals.question_file import EvalError, Question
from jaxvlm.evals.scorers.text import exact_match
from jaxvlm.infer.answers import answer_requests, merged, parts, speed
from jaxvlm.infer.engine import Engine


def run(
    engine: Engine,
    config: EvalConfig,
    *,
    workdir: str | Path,
    training: Iterable[tuple[str, str]] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> dict:
    """Evaluates `engine` on the question file of `config` and returns `{"scores", "samples", "info"}`.

    `scores` maps each category, and 'all', to sighted, blind, majority and chance accuracy (fractions), n, and 95 %
    intervals (bootstrap over images). `training` holds (question, answer) pairs for the majority baseline
    (`question_file.read_training_answers`); without it the test answers serve and `info` says so.
    Answers go to `workdir/answers-{mode}.jsonl` as they come; a second call answers only what is missing. Raises
    `RequestError` if such a file was written by another model or prompt, unless `overwrite`.
    """
    everything = question_file.read_questions(config.path, config.images)
    if any(question.category == "all" for question in everything):
        raise EvalError(f"{config.path}: 'all' cannot be a category, it is the name of the total.")
    questions = question_file.subset(everything, config.limits, seed)
    log(f"Evaluating {len(questions)} of {len(everything)} questions of {config.path}.")
    # Images are exchanged within the whole file, so that a question's wrong image is the same in every subset and a larger
    # subset can go on with a smaller one's answers.
    pictures = [question.image for question in everything if question.image]
    shown = picture_of(config.blind, pictures, seed, Path(), Path(workdir))
    common = (engine, config, questions, Path(workdir), overwrite, log)
    sighted, took = _answers("sighted", [question.image for question in questions], *common)
    blind = _answers(config.blind, [shown(question.image) for question in questions], *common) if config.blind else None
    majority = baselines.fit_majority(questions, training)
    return {
        "scores": score(questions, sighted, blind and blind[0], majority, seed=seed),
        "samples": draw_samples(questions, sighted, config.samples, seed),
        "info": {
            "task": config.task,
            "questions": config.path,
            "of": len(everything),
            "blind": config.blind,
            "majority": "training answers" if training is not None else "test answers (an upper bound)",
            "seed": seed,
            "interval": "95 % bootstrap percentile, resampling images",
            "seconds": took["seconds"] + (blind[1]["seconds"] if blind else 0.0),
            "questions_per_second": took["per_second"],
        },
    }


def _answers(
    mode: str,
    images: Sequence[str | None],
    engine: Engine,
    config: EvalConfig,
    questions: Sequence[Question],
    workdir: Path,
    overwrite: bool,
    log: Callable[[str], None],
) -> tuple[list[str], dict]:
    """Answers in the order of `questions`, each about its one of `images`, and their `speed`."""
    path = workdir / f"answers-{mode}.jsonl"
    if overwrite:
        for file in parts(path):
            file.unlink()
    suffix = question_file.response_format(config.task)
    asked = [question_file.request(question, suffix, image) for question, image in zip(questions, images, strict=True)]
    options = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size or None}
    answer_requests(engine, asked, path, **options, label=f"eval {mode}", log=log)
    found = merged(path, [question.id for question in questions])
    return [answer["text"] for answer in found], speed(found)


def score(
    questions: Sequence[Question],
    sighted: Sequence[str],
    blind: Sequence[str] | None,
    majority: baselines.Majority,
    *,
    seed: int = 0,
) -> dict[str, dict]:
    """Accuracy by category and for 'all', with intervals; needs no model, so saved answers can be scored again."""
    truth = [question.answer for question in questions]
    right = np.array([exact_match(text, answer) for text, answer in zip(sighted, truth, strict=True)])
    prior = np.array([exact_match(majority.answer(question), question.answer) for question in questions])
    guess = baselines.chance(questions)
    lucky = np.array([guess[question.category] for question in questions])
    unseen = None
    if blind is not None:
        unseen = np.array([exact_match(text, answer) for text, answer in zip(blind, truth, strict=True)])
    groups = np.array([question.image or question.id for question in questions])
    names = np.array([question.category for question in questions])
    scores = {}
    for name in [*dict.fromkeys(names.tolist()), "all"]:
        rows = np.arange(len(names)) if name == "all" else np.flatnonzero(names == name)
        entry = {
            "sighted": float(right[rows].mean()),
            "blind": None,
            "majority": float(prior[rows].mean()),
            "chance": float(lucky[rows].mean()),
            "n": len(rows),
            "sighted_interval": statistics.bootstrap_interval(right[rows], groups[rows], seed=seed),
        }
        if unseen is not None:
            entry["blind"] = float(unseen[rows].mean())
            entry["blind_interval"] = statistics.bootstrap_interval(unseen[rows], groups[rows], seed=seed)
            entry["gain"] = entry["sighted"] - entry["blind"]
            entry["gain_interval"] = statistics.paired_interval(right[rows], unseen[rows], groups[rows], seed=seed)
        scores[name] = entry
    return scores


def draw_samples(questions: Sequence[Question], texts: Sequence[str], count: int, seed: int) -> list[dict]:
    """`count` questions about different images, drawn by the seed in turn from each category: not hand-picked."""
    order = np.random.default_rng([seed, count]).permutation(len(questions))
    queues: dict[str, list[int]] = {name: [] for name in dict.fromkeys(question.category for question in questions)}
    for index in order:
        queues[questions[index].category].append(int(index))
    drawn, images = [], set()
    while len(drawn) < count and any(queues.values()):
        for queue in queues.values():
            while queue and questions[queue[-1]].image in images:
                queue.pop()
            if queue and len(drawn) < count:
                drawn.append(queue.pop())
                images.add(questions[drawn[-1]].image)
    return [
        {
            "question_id": questions[index].id,
            "category": questions[index].category,
            "image": questions[index].image,
            "question": questions[index].text,
            "prediction": texts[index],
            "answer": questions[index].answer,
            "right": bool(exact_match(texts[index], questions[index].answer)),
        }
        for index in drawn
    ]
