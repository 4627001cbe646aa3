"""Choosing among answers: by the probability of the first token (Prismatic), or by the loss of each (SEED-Bench)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from jaxvlm.data import conversation
from jaxvlm.infer.answers import RequestError
from jaxvlm.infer.engine import BATCH_SIZE, Engine


def choose(engine: Engine, requests: Sequence[dict], batch_size: int | None) -> Iterator[list[tuple[dict, str, dict]]]:
    """Batches of (request, chosen answer, the `probabilities` of its `candidates` or the `losses` of its `options`)."""
    for candidates in dict.fromkeys(request["candidates"] for request in requests if "candidates" in request):
        asked = [request for request in requests if request.get("candidates") == candidates]
        for batch in choose_batches(engine, asked, candidates, batch_size):
            yield [(asked[i], candidates[np.argmax(shares)], {"probabilities": shares}) for i, shares in batch]
    asked = [request for request in requests if "options" in request]
    for batch in loss_batches(engine, asked, batch_size):
        yield [(asked[i], asked[i]["options"][np.argmin(losses)], {"losses": losses}) for i, losses in batch]


def choose_batches(
    engine: Engine, requests: Sequence[dict], candidates: Sequence[str], batch_size: int | None = None
) -> Iterator[list[tuple[int, list[float]]]]:
    """Batch by batch, longest prompts first: lists of (request index, a probability for each of `candidates`).

    The softmax of the first token of the answer, of which the candidates' shares are taken and made to sum to 1. Raises
    `RequestError` if two candidates begin with the same token.
    """
    tokens = first_tokens(engine, candidates)
    for batch in engine.first_logits(requests, batch_size):
        yield [(index, _shares(logits[tokens].astype(np.float64))) for index, logits in batch]


def loss_batches(
    engine: Engine, requests: Sequence[dict], batch_size: int | None = None
) -> Iterator[list[tuple[int, list[float]]]]:
    """Batch by batch: lists of (request index, the mean cross-entropy of each of the request's `options` as the answer)."""
    size = batch_size or BATCH_SIZE
    for start in range(0, len(requests), size):
        part = requests[start : start + size]
        places = [(i, k) for i, request in enumerate(part) for k in range(len(request["options"]))]
        answered = [{**part[i], "answer": part[i]["options"][k]} for i, k in places]
        losses = {places[at]: loss for batch in engine.answer_losses(answered, batch_size) for at, (loss, _) in batch}
        yield [(start + i, [losses[i, k] for k in range(len(request["options"]))]) for i, request in enumerate(part)]


def _shares(logits: np.ndarray) -> list[float]:
    grown = np.exp(logits - logits.max())
    return (grown / grown.sum()).tolist()


def first_tokens(engine: Engine, candidates: Sequence[str]) -> list[int]:
    """The token that begins an answer of each candidate in the model's template (" Yes" and "Yes" may be two tokens)."""
    template, layout = engine.prompt.template, engine.prompt.layout
    asked = {"role": "user", "content": "?"}
    start = len(conversation.prompt([asked], engine.tokenizer, template, layout))
    tokens = []
    for words in candidates:
        record = {"id": words, "conversations": [asked, {"role": "assistant", "content": words}]}
        tokens.append(int(conversation.encode(record, engine.tokenizer, template, layout).tokens[start]))
    if len(set(tokens)) < len(tokens):
        raise RequestError(
            f"Of the candidates {', '.join(candidates)} two begin with the same token ({tokens}): in this tokenizer the first "
            "token does not tell them apart. Ask for words instead (another protocol)."
        )
    return tokens
