"""A connector's closed-form start: features are sent to the embeddings of the words that describe their image.

A randomly started connector first has to find the language model's input space at all. Ridge regression from the cached
features to the mean input embedding of each caption's telling words puts it there before the first step; stage 1 then
teaches what a regression cannot, how the words follow each other. Our own device, for short runs; no reference has it.
"""

from __future__ import annotations

import itertools

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxvlm.config import ConfigError, ModelConfig
from jaxvlm.data.loader import Loader
from jaxvlm.parallel.processes import whole

LAYER_NORM_EPS = 1e-5
REGULARISATION = 100.0  # on features of unit variance, summed over some thousand images
MAX_CAPTIONS = 8192


def ridge_start(config: ModelConfig, params: dict, loader: Loader) -> dict:
    """The parameters with the connector solved for in closed form from the captions of `loader`'s rows.

    Needs a `linear` connector and batches with cached 'features'. A token that occurs in more than half of the captions
    ('a', the closing newline) says nothing of an image and is left out. The output is scaled to the root mean square of
    the embeddings it imitates. Raises `ConfigError` for another connector or batches without features.
    """
    if config.connector.kind != "linear" or not config.connector.bias:
        raise ConfigError("init.connector_start = 'ridge' needs model.connector.kind = 'linear', with its bias.")
    pairs = list(itertools.islice(_pairs(loader), MAX_CAPTIONS))
    words = [np.unique(tokens) for _, tokens in pairs]
    occurrences = np.bincount(np.concatenate(words), minlength=config.llm.vocab_size)
    telling = occurrences <= len(pairs) / 2
    embedding = whole(params["llm"]["embed"]["embedding"]).astype(np.float64)

    x, y = [], []
    for (features, _), tokens in zip(pairs, words, strict=True):
        if len(kept := tokens[telling[tokens]]):
            x.append(_norm(features) if config.connector.input_norm else features)  # [N, Dv]
            y.append(np.repeat(embedding[kept].mean(0)[None], len(features), axis=0))  # [N, D]
    x, y = np.concatenate(x).astype(np.float64), np.concatenate(y)
    x_mean, y_mean = x.mean(0), y.mean(0)
    x_centred = x - x_mean
    gram = x_centred.T @ x_centred + REGULARISATION * np.eye(x.shape[1])
    kernel = np.linalg.solve(gram, x_centred.T @ (y - y_mean))  # [Dv, D]
    bias = y_mean - x_mean @ kernel
    used = np.unique(np.concatenate(words))
    scale = np.sqrt((embedding[used] ** 2).mean() / ((x @ kernel + bias) ** 2).mean())

    old = params["connector"]["linear_1"]
    new = {"kernel": kernel * scale, "bias": bias * scale}
    solved = {}
    for name, value in new.items():
        value = multihost_utils.broadcast_one_to_all(value.astype(np.float32))  # the same bits on hosts of two kinds
        solved[name] = jax.make_array_from_callback(value.shape, old[name].sharding, lambda at, value=value: value[at])
    return params | {"connector": params["connector"] | {"linear_1": solved}}


def _pairs(loader: Loader):
    """(features [N, Dv], supervised target tokens [n]) of each conversation with one image, over one pass of rows."""
    for batch in loader.batches(0):
        if "features" not in batch:
            raise ConfigError("init.connector_start = 'ridge' needs the first stage's cache_features = True.")
        for row in range(len(batch["tokens"])):
            per_tile = batch["features"].shape[2]
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                inside = batch["segment_ids"][row] == segment
                visual = batch["visual_index"][row][inside]
                tiles = np.unique(visual[visual >= 0] // per_tile)
                tokens = batch["targets"][row][inside & (batch["loss_weights"][row] > 0)]
                if len(tiles) == 1 and len(tokens):
                    yield np.asarray(batch["features"][row, tiles[0]], np.float32), tokens


def _norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + LAYER_NORM_EPS)
