"""The model `jaxvlm` of lmms-eval, which finds it by the entry point `lmms_eval.models` (lmms-eval 0.7).

lmms-eval imports this file with its list of models, so that nothing heavy is imported before a model is asked for. Its
base class exists only where it is installed: `JaxVLM` and `JaxVLMChat` are made when it looks for them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from jaxvlm.infer.answers import IMAGE_MARK, Progress, RequestError

CHUNKS = 8  # batches whose pictures are in memory at once; within them the longest prompts come first
MAX_NEW_TOKENS = 1024  # where a task does not say, as lmms-eval's own models take it
USED = {"max_new_tokens", "until", "do_sample", "temperature", "top_p", "seed"}
IGNORED = {"image_aspect_ratio", "skip_special_tokens", "use_cache"}  # for models that leave these to the task
NEUTRAL = {"num_beams": 1, "top_k": 0, "repetition_penalty": 1, "length_penalty": 1}  # what changes no answer


def manifest() -> Any:
    """What the entry point gives to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("jaxvlm", f"{__name__}.JaxVLM", f"{__name__}.JaxVLMChat")


def __getattr__(name: str) -> type:
    """The model of lmms-eval's simple tasks (a text and its pictures), and that of its chats (messages)."""
    if name not in ("JaxVLM", "JaxVLMChat"):
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from lmms_eval.api.model import lmms

    globals()[name] = made = type(name, (Answering, lmms), {"is_simple": name == "JaxVLM", "__module__": __name__})
    return made


class Answering:
    """What both classes do; the other half of them is lmms-eval's `lmms`.

    Args:
        pretrained: a run's workdir, or a model in any format that `jaxvlm.load` reads.
        batch_size: of lmms-eval's --batch_size; auto is 16.
        dtype: as in `jaxvlm.load`.
        seed: of answers that are drawn.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        dtype: str | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        from jaxvlm.infer.engine import BATCH_SIZE, load

        if device:
            raise RequestError(f"device={device} does not reach JAX; leave it out, and set JAX_PLATFORMS=cpu or cuda.")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise RequestError("Start lmms-eval as one process, without accelerate or torchrun.")
        auto = str(batch_size).startswith("auto")
        self.batch_size = int(max_batch_size or BATCH_SIZE) if auto else int(batch_size)
        self.seed = seed
        self.engine = load(str(pretrained), dtype=dtype)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of lmms-eval's requests, batched; see `sampling` for what tasks may ask for.

        Raises `RequestError` naming task and question for one that cannot be answered.
        """
        names = _names(requests)
        wanted = [request.args[1 if self.is_simple else 2] for request in requests]
        kinds = [tuple(self.sampling(*pair).items()) for pair in zip(wanted, names, strict=True)]
        answers, progress = [""] * len(requests), Progress("jaxvlm", len(requests), print)
        for kind in dict.fromkeys(kinds):
            places = [place for place, other in enumerate(kinds) if other == kind]
            for part in _parts(places, CHUNKS * self.batch_size):
                asked = [self._request(requests[place], names[place]) for place in part]
                for batch in self.engine.generate_batches(asked, batch_size=self.batch_size, **dict(kind)):
                    for index, text in batch:
                        answers[part[index]] = text
                    progress.add(len(batch))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """For each (context, continuation) the mean loss of the continuation as the answer, its end included, and
        whether every token of it is the likeliest.

        A loss, though the name says otherwise: lmms-eval's multiple choice takes the least, and its models of LLaVA
        give this one. Each pair is wrapped, because lmms-eval 0.7.3 makes a text of a bare one.
        """
        from lmms_eval.api.instance import GenerationResult

        found, names, progress = [], _names(requests), Progress("jaxvlm", len(requests), print)
        for part in _parts(range(len(requests)), CHUNKS * self.batch_size):
            asked = [self._option(requests[place], names[place]) for place in part]
            losses = dict(pair for batch in self.engine.answer_losses(asked, self.batch_size) for pair in batch)
            found += [GenerationResult(losses[index]) for index in range(len(part))]
            progress.add(len(part))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not there: rounds in which a task makes the next question from the last answer."""
        raise NotImplementedError(f"{requests[0].task_name} has several rounds, which jaxvlm does not answer.")

    def sampling(self, wanted: Mapping[str, Any], name: str) -> dict[str, Any]:
        """The engine's options for a task's `generation_kwargs`. Raises `RequestError` for what it does not have."""
        for key, value in wanted.items():
            if key not in USED | IGNORED and (key not in NEUTRAL or value not in (None, NEUTRAL[key])):
                fix = f"add {key}={NEUTRAL[key]} to --gen_kwargs" if key in NEUTRAL else "take it out of the task"
                raise RequestError(
                    f"{name} asks for {key}={value!r}, which jaxvlm does not have. To go without, {fix}."
                )
        until = wanted.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(filter(None, until))
        limit = int(wanted.get("max_new_tokens") or MAX_NEW_TOKENS)
        limit = min(limit, self.engine.config.llm.max_positions)  # a cache has room for all, and tasks ask for 49,152
        options: dict[str, Any] = {"max_new_tokens": limit, "stop": stop}
        temperature = float(wanted.get("temperature") or 0)
        if temperature > 0 and wanted.get("do_sample", True):
            top_p, seed = wanted.get("top_p"), wanted.get("seed")
            options["temperature"] = temperature
            options["top_p"] = 1.0 if top_p is None else float(top_p)
            options["seed"] = self.seed if seed is None else int(seed)
        return options

    def _document(self, request: Any) -> Any:
        number, task, split = request.args[-3:]
        return self.task_dict[task][split][number]

    def _request(self, request: Any, name: str) -> dict:
        """What the engine is asked, of (context, kwargs, doc_to_visual, ...) or (context, doc_to_messages, kwargs, ...)."""
        if self.is_simple:
            context, _, to_pictures, *_ = request.args
            return _asked(context, to_pictures(self._document(request)), name)
        turns = request.args[1](self._document(request))
        return {"id": name, "messages": [turn | {"content": _content(turn["content"], name)} for turn in turns]}

    def _option(self, request: Any, name: str) -> dict:
        """A request with the `answer` whose loss is wanted; for mutual information one without context and document."""
        context, said, *rest = request.args
        document = self._document(request) if rest else None
        said = said(document) if callable(said) else said
        # Without the space in front that lmms-eval adds: the model's template has its own.
        return _asked(context, rest[0](document) if rest else (), name) | {"answer": str(said).strip()}


def _asked(context: str, pictures: Sequence[Any] | None, name: str) -> dict:
    """Pictures stand in front of a text that has no <image> of its own, each on a line, as in LLaVA."""
    pictures = [_picture(picture, name) for picture in pictures or ()]
    marks = "" if IMAGE_MARK in context else f"{IMAGE_MARK}\n" * len(pictures)
    return {"id": name, "messages": [{"role": "user", "content": marks + context}], "images": pictures}


def _content(parts: Any, name: str) -> Any:
    """A chat message's parts as the engine reads them: lmms-eval has pictures under `url`."""
    if isinstance(parts, str):
        return parts
    return [
        p if p["type"] == "text" else {"type": "image", "image": _picture(p["url"], name, p["type"])} for p in parts
    ]


def _picture(item: Any, name: str, kind: str = "image") -> Any:
    """A picture or its path. Raises `RequestError` for a video or sound."""
    if kind != "image" or not isinstance(item, Image.Image | str):
        raise RequestError(f"{name} shows {kind} as {type(item).__name__}; jaxvlm reads text and pictures.")
    return item


def _names(requests: Sequence[Any]) -> list[str]:
    """What a request is called in errors; random numbers follow from it, so that a question asked again has another."""
    seen: Counter[str] = Counter()
    names = []
    for request in requests:
        name = f"{request.task_name}/{request.doc_id}"
        names.append(f"{name}#{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def _parts(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (places[start : start + size] for start in range(0, len(places), size))
