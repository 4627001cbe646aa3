"""Losses of plain token sequences, without a template or images: the language model alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxvlm.infer import decoding, shapes
from jaxvlm.infer.engine import Engine


def sequence_losses(
    engine: Engine, sequences: Sequence[tuple[np.ndarray, np.ndarray]], batch_size: int = 4
) -> np.ndarray:
    """float64 [n]: of each (tokens int [t], counted bool [t]) the summed cross-entropy, in nats, of the counted tokens.

    The first token is predicted from nothing and cannot be counted. Longest first, padded to a few lengths.
    """
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index][0]))
    found = np.zeros(len(sequences))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        rows = engine._rows(len(order), batch_size)
        shape = (rows, shapes.bucket(len(sequences[part[0]][0])))
        tokens, targets, lengths = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(rows, np.int32)
        weights = np.zeros(shape, np.float32)
        for row, index in enumerate(part):
            ids, counted = sequences[index]
            lengths[row] = size = len(ids)
            tokens[row, :size], targets[row, : size - 1], weights[row, : size - 1] = ids, ids[1:], counted[1:]
        with engine._on_mesh():
            inputs = (engine._put(tokens), None, None, None, lengths, targets, weights)
            means, _ = decoding.answer_losses(engine.config, engine.params, *inputs)
        found[part] = np.asarray(means, np.float64)[: len(part)] * weights.sum(1)[: len(part)]
    return found
