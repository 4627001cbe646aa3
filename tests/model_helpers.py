"""What the tests of imported and exported models share: our logits, transformers' inputs, and trees compared."""

from functools import partial

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxvlm.config import ModelConfig
from jaxvlm.models.vlm import VLM


@partial(jax.jit, static_argnums=0)
def _logits(model: ModelConfig, params, batch):
    return VLM(model).apply({"params": params}, batch, method=lambda m, b: m.logits(m(b)))


def logits(model: ModelConfig, params, tokens, index, pixels) -> np.ndarray:
    """float32 [S, V] of one row: int32 `tokens` and `visual_index` [S], uint8 `pixels` [T, s, s, 3]."""
    length = len(tokens)
    batch = {"tokens": tokens[None], "visual_index": index[None], "pixels": pixels[None]}
    batch |= {"positions": np.arange(length)[None], "segment_ids": np.ones((1, length), np.int32)}
    return np.asarray(_logits(model, params, batch))[0]


def prompt(count: int, seed: int = 0, side: int = 28) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, visual_index, pixels) of some text with one image of `count` visual tokens in it."""
    tokens = np.array([1, 5, *[0] * count, 7, 8, 9, 10], np.int32)
    index = np.full(len(tokens), -1, np.int32)
    index[2 : 2 + count] = np.arange(count)
    return tokens, index, np.random.default_rng(seed).integers(0, 256, (1, side, side, 3)).astype(np.uint8)


def inputs(tokens, index, pixels, vision, image: int) -> dict:
    """The same for a LLaVA class of transformers, whose image token is `image`."""
    import torch

    values = ((pixels / 255 - np.array(vision.mean)) / np.array(vision.std)).transpose(0, 3, 1, 2)
    ids = torch.tensor(np.where(index == -1, tokens, image)[None]).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.tensor(values).float()}


def relative_error(found, expected) -> float:
    """The largest absolute error over the largest magnitude."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def assert_same(a, b) -> None:
    a, b = (flatten_dict(tree, sep="/") for tree in (a, b))
    assert sorted(a) == sorted(b)
    for path in a:
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)
