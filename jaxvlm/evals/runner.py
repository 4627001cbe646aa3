"""Running an evaluation: sighted, blind, and what needs no model at all; resumable, with intervals."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxvlm.config import EvalConfig
from jaxvlm.evals import baselines, question_file, statistics
from jaxvlm.evals.blind import picture_of
from jaxvlm.evals.question_file import EvalError, Question
from jaxvlm.evals.scorers.text import exact_match
from jaxvlm.infer.answers import Progress, append_records, read_records
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
    `EvalError` if such a file was written by another model or prompt, unless `overwrite`.
    """
    everything = question_file.read_questions(config.path, config.images)
    if any(question.category == "all" for question in everything):
        raise EvalError(f"{config.path}: 'all' cannot be a category, it is the name of the total.")
    questions = question_file.subset(everything, config.limits, seed)
    log(f"Evaluating {len(questions)} of {len(everything)} questions of {config.path}.")
    common = (engine, config, questions, Path(workdir), seed, overwrite, log)
    # Images are exchanged within the whole file, so that a question's wrong image is the same in every subset and a larger
    # subset can go on with a smaller one's answers.
    pictures = [question.image for question in everything if question.image]
    shown = picture_of(config.blind, pictures, seed, Path(), Path(workdir))
    sighted = _answers("sighted", lambda question: question.image, *common)
    blind = _answers(config.blind, lambda question: shown(question.image), *common) if config.blind else None
    majority = baselines.fit_majority(questions, training)
    return {
        "scores": score(questions, sighted["texts"], blind and blind["texts"], majority, seed=seed),
        "samples": draw_samples(questions, sighted["texts"], config.samples, seed),
        "info": {
            "task": config.task,
            "questions": config.path,
            "of": len(everything),
            "blind": config.blind,
            "majority": "training answers" if training is not None else "test answers (an upper bound)",
            "seed": seed,
            "interval": "95 % bootstrap percentile, resampling images",
            "seconds": sighted["seconds"] + (blind["seconds"] if blind else 0.0),
            "questions_per_second": sighted["rate"],
        },
    }


def _answers(
    mode: str,
    image_of: Callable[[Question], str | None],
    engine: Engine,
    config: EvalConfig,
    questions: Sequence[Question],
    workdir: Path,
    seed: int,
    overwrite: bool,
    log: Callable[[str], None],
) -> dict:
    """Answers in the order of `questions`: those in the mode's file, and the missing ones generated and appended."""
    path = workdir / f"answers-{mode}.jsonl"
    if overwrite:
        path.unlink(missing_ok=True)
    suffix = question_file.response_format(config.task)
    key = answer_key(engine, config, suffix, mode, seed)
    done = _resume(path, key)
    todo = [question for question in questions if question.id not in done]
    alike: dict[tuple, list[Question]] = {}  # a greedy answer is the same for the same prompt: many are, without images
    for question in todo:
        alike.setdefault((question.text, image_of(question)), []).append(question)
    groups = list(alike.values())
    requests = [question_file.request(group[0], suffix, image_of(group[0])) for group in groups]
    progress = Progress(f"eval {mode}", len(todo), log)
    if len(todo) < len(questions):
        log(f"eval {mode}: {len(questions) - len(todo)} answers found in {path}.")
    batches = engine.generate_batches(
        requests, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size or None
    )
    for batch in batches:
        records = [
            {
                "question_id": question.id,
                "prompt": requests[index]["messages"][0]["content"],
                "text": text,
                "answer": question.answer,
                "category": question.category,
                "image": requests[index]["images"][0] if requests[index]["images"] else None,
            }
            for index, text in batch
            for question in groups[index]
        ]
        append_records(path, records)
        done |= {record["question_id"]: record["text"] for record in records}
        progress.add(len(records))
    seconds = progress.seconds
    rate = len(todo) / seconds if todo else None
    return {"texts": [done[question.id] for question in questions], "seconds": seconds, "rate": rate}


def answer_key(engine: Engine, config: EvalConfig, suffix: str, mode: str, seed: int) -> dict:
    """What an answer depends on. The limits are not part of it: greedy answers do not depend on the other questions."""
    key = {
        "model": engine.fingerprint,
        "template": engine.prompt.template,
        "transform": engine.prompt.transform,
        "layout": engine.prompt.layout,
        "format": suffix,
        "max_new_tokens": config.max_new_tokens,
        "questions": hashlib.sha256(Path(config.path).read_bytes()).hexdigest()[:16],
        "mode": mode,
    }
    prompt = engine.prompt
    if prompt.grids or prompt.max_tiles or not prompt.tile_several:
        key["tiles"] = repr((prompt.grids, prompt.max_tiles, prompt.tile_several))
    return key | {"seed": seed} if mode == "shuffle" else key


def _resume(path: Path, key: dict) -> dict[str, str]:
    """Answers by question id from `path`; starts the file with its key if there is none."""
    records = read_records(path)
    if not records:
        append_records(path, [{"key": key}])
        return {}
    found = records[0].get("key", {})
    for name in key.keys() | found.keys():
        if found.get(name) != key.get(name):
            raise EvalError(
                f"{path} holds answers with another {name} ({found.get(name)!r}, now {key.get(name)!r}), and mixing "
                "them would give a meaningless score. Delete the file to start over, or evaluate into another folder."
            )
    return {record["question_id"]: record["text"] for record in records[1:]}


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
