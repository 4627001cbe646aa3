"""A few questions asked of a model in training: the accuracy of a small draw of the run's own question file."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from jaxvlm.config import RunConfig, WatchConfig
from jaxvlm.evals import question_file
from jaxvlm.evals.question_file import EvalError
from jaxvlm.evals.scorers.text import exact_match
from jaxvlm.infer.engine import Engine


def slim_scores(config: RunConfig, watch: WatchConfig, mesh: Mesh) -> Callable[[int, dict], dict]:
    """A function (step, parameters) -> {"scores": {category: accuracy, ..., "all"}, "n": questions, "seconds"}.

    `watch.questions` are drawn from `config.eval`'s file as `config.eval.limits` are, so the smaller draw lies in the larger.
    Every call makes an engine of the parameters as they are, adapters beside their weights, and drops it; the compiled
    functions depend on the config and shapes alone and are kept. Raises `EvalError` for questions that cannot be asked.
    """
    for name, count in watch.questions:
        if name == "all" or count < 1:
            raise EvalError(
                f"watch.questions has {count} of '{name}'; name categories other than 'all', and at least 1 of each."
            )
    everything = question_file.read_questions(config.eval.path, config.eval.images)
    questions = question_file.subset(everything, watch.questions, config.seed, "watch.questions")
    suffix = question_file.response_format(config.eval.task)
    requests = [question_file.request(question, suffix, question.image) for question in questions]
    categories = np.array([question.category for question in questions])

    def ask(step: int, params: dict) -> dict:
        started = time.perf_counter()
        engine = Engine(config.model, config.prompt, params, mesh=mesh)
        length, size = config.eval.max_new_tokens, config.eval.batch_size or None
        texts = engine.generate(requests, max_new_tokens=length, batch_size=size)
        right = np.array([exact_match(text, one.answer) for text, one in zip(texts, questions, strict=True)])
        scores = {str(name): float(right[categories == name].mean()) for name, _ in watch.questions}
        seconds = round(time.perf_counter() - started, 2)
        return {"scores": scores | {"all": float(right.mean())}, "n": len(questions), "seconds": seconds}

    return ask
