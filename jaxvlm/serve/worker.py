"""The one thread that computes: requests that wait together, and are to be answered alike, make a batch."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxvlm.infer.detokenizer import cut_at
from jaxvlm.infer.engine import Engine


class Sampling(NamedTuple):
    """How an answer is written; see `Engine.generate`. Requests with an equal one can share a batch."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None  # None: drawn anew. Given, an answer is the same whatever shares its batch
    stop: tuple[str, ...]


class Answer(NamedTuple):
    """What is told of an answer beside its text."""

    text: str
    prompt_tokens: int  # those of images included
    tokens: int
    ended: bool  # and was not cut at its limit of tokens


@dataclass(eq=False)
class Job:
    """A request that waits or is being answered."""

    request: dict
    prompt_tokens: int
    sampling: Sampling
    say: Callable[[str], bool] | None  # takes the pieces of a streamed answer; False: nobody listens any more
    answer: Future = field(default_factory=Future)


class Worker:
    """Answers requests in a thread of its own, first come first served, until `close`."""

    def __init__(self, engine: Engine, batch_size: int):
        self.engine, self.batch_size = engine, batch_size
        self._waiting: list[Job] = []
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: dict, sampling: Sampling, say: Callable[[str], bool] | None = None) -> Future:
        """The future `Answer`; `say`, if given, is called with its pieces as they are written, in the worker's thread.

        Raises `UserError` for a request that cannot be answered, before any other could suffer from it.
        """
        job = Job(request, self.engine.prompt_length(request), sampling, say)
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()
        return job.answer

    def close(self) -> None:
        """Answers what waits and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                jobs = self._take()
            jobs = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
            try:
                if jobs and jobs[0].say:
                    jobs[0].answer.set_result(self._stream(jobs[0]))
                elif jobs:
                    self._answer(jobs)
            except Exception as error:  # whatever it was, the next requests are not to blame
                for job in jobs:
                    if not job.answer.done():
                        job.answer.set_exception(error)

    def _take(self) -> list[Job]:
        """The job that has waited longest, with those that may share its batch."""
        first = self._waiting[0]
        taken = [first]
        if not first.say:
            alike = [job for job in self._waiting if not job.say and job.sampling == first.sampling]
            taken = alike[: self.batch_size]
        self._waiting = [job for job in self._waiting if job not in taken]
        return taken

    def _answer(self, jobs: list[Job]) -> None:
        options, stops = self._options(jobs[0].sampling)
        requests = [job.request for job in jobs]
        if jobs[0].sampling.seed is not None:  # a row's random numbers follow from the seed and its request's id
            requests = [request | {"id": 0} for request in requests]
        for batch in self.engine.token_batches(requests, batch_size=self.batch_size, **options):
            for index, tokens in batch:
                text, count = self.engine.decode(tokens), len(tokens)
                ended = tokens[-1] in self.engine.end_ids
                if len(cut := cut_at(text, stops)) < len(text):
                    # The batch wrote on; counted are the tokens up to the one that made the stop text whole.
                    count = next(n for n in range(1, count + 1) if self._holds(tokens[:n], stops))
                    text, ended = cut, True
                job = jobs[index]
                job.answer.set_result(Answer(text.strip(), job.prompt_tokens, count, ended))

    def _stream(self, job: Job) -> Answer:
        options, stops = self._options(job.sampling)
        pieces, said = self.engine.stream(**job.request, stop=stops, **options), []
        while True:
            try:
                said.append(next(pieces))
            except StopIteration as end:
                return Answer("".join(said), job.prompt_tokens, *end.value)
            if not job.say(said[-1]):
                return Answer("".join(said), job.prompt_tokens, 0, False)  # which nobody reads

    def _options(self, sampling: Sampling) -> tuple[dict, tuple[str, ...]]:
        """The engine's options, with a seed where none is given, and the stop texts."""
        options = sampling._asdict()
        stops = options.pop("stop")
        return options | {"seed": secrets.randbits(31) if sampling.seed is None else sampling.seed}, stops

    def _holds(self, tokens: list[int], stops: tuple[str, ...]) -> bool:
        text = self.engine.decode(tokens)
        return any(stop in text for stop in stops)
