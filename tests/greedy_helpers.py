"""Greedy answers, held against a loop over an oracle's logits."""

from collections.abc import Callable

import numpy as np

NEW = 8


def check_logits_and_greedy(engine, requests: list[dict], oracle: Callable) -> float:
    """`vlm.generate` of the requests in one batch is, token for token, what the oracle's logits say one by one.

    `oracle(tokens [n], visual_index [n], images)` gives logits [n, V] of a whole sequence. Returns the largest error of
    our logits, over the oracle's largest magnitude.
    """
    prompts = [engine._prompt(request, i) for i, request in enumerate(requests)]
    written = engine._answer(prompts, len(prompts), NEW, 0.0, 1.0, 0)
    found, worst = engine.logits(requests).values, 0.0
    for row, (one, tokens) in enumerate(zip(prompts, written, strict=True)):
        ids, index, wanted = one.tokens, one.visual_index, []
        while len(wanted) < NEW and not set(wanted) & set(engine.end_ids):
            values = np.asarray(oracle(ids, index, one.images))
            if not wanted:
                worst = max(worst, np.abs(found[row, : len(ids)] - values).max() / np.abs(values).max())
            first, second = np.sort(values[-1])[[-1, -2]]
            assert first - second > 1e-4  # rounding cannot decide
            wanted.append(int(values[-1].argmax()))
            ids, index = np.append(ids, wanted[-1]), np.append(index, -1)
        assert tokens == wanted
    assert len(prompts) > 1 and max(len(set(tokens)) for tokens in written) > 2  # not one word over and over
    assert engine.generate(requests, max_new_tokens=NEW) == [engine.decode(tokens).strip() for tokens in written]
    return worst
