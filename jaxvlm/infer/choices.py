"""Choosing among short answers by the probability of the first token, as Prismatic evaluates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from jaxvlm.data import conversation
from jaxvlm.infer.answers import RequestError
from jaxvlm.infer.engine import Engine


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
