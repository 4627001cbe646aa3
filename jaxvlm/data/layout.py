"""Where visual tokens stand in a sequence: the splice, computed on the host.

Layouts (recipes §0 facts 1 and 3): `llava` puts an image's tokens where its `<image>` stood, `hf` is the same
sequence reached by repeating a placeholder, `prismatic` puts all images right after BOS, or first when there
is none.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxvlm.config import ModelConfig
from jaxvlm.data import DataError
from jaxvlm.data.conversation import IMAGE_TOKEN, Encoded

LAYOUTS = ("llava", "prismatic", "hf")
TRUNCATIONS = ("after_splice", "before_splice", "drop", "error")


class Spliced(NamedTuple):
    """One conversation of n tokens, visual tokens included, numbered from its own first image."""

    tokens: np.ndarray  # int32 [n], the pad id under visual tokens
    visual_index: np.ndarray  # int32 [n], image * P + patch, -1 for text
    targets: np.ndarray  # int32 [n], the next token
    weights: np.ndarray  # float32 [n], the weight of predicting the next token; 0 for the last
    num_images: int  # images that are used
    dropped_images: int  # images that were cut off
    truncated: bool


def visual_tokens(model: ModelConfig) -> int:
    """Visual tokens of one tile (P). Planner, packer and model all take it from here."""
    return model.tile_tokens


def splice(
    encoded: Encoded,
    num_visual_tokens: int,
    layout: str = "llava",
    length: int | None = None,
    truncation: str = "after_splice",
    *,
    images_per_row: int = 1,
    bos_id: int | None = None,
    pad_id: int = 0,
) -> Spliced | None:
    """Replaces each IMAGE_TOKEN by `num_visual_tokens` positions and cuts the result to `length` (None: no
    limit).

    Truncation: `after_splice` cuts the spliced sequence (LLaVA); `before_splice` cuts the text to `length -
    images_per_row * num_visual_tokens`, whether it has images or not (Prismatic, whose text limit of 2048 is
    a length of 2048 + the visual tokens); `drop` returns None for a sequence that is too long; `error` raises
    `DataError`. A cut never falls inside an image: it moves in front of it, and images that no text follows
    are dropped.
    """
    if layout not in LAYOUTS:
        raise DataError(f"There is no layout {layout!r}; the layouts are {', '.join(LAYOUTS)}.")
    tokens, weights = encoded.tokens, encoded.weights
    if layout == "prismatic":
        tokens, weights = _images_first(tokens, weights, bos_id)
    is_image = tokens == IMAGE_TOKEN
    counts = np.where(is_image, num_visual_tokens, 1)
    keep = len(tokens)
    if length is not None:
        keep = _kept(is_image, counts, length, truncation, images_per_row * num_visual_tokens)
        if keep is None:
            return None
    total = int(is_image.sum())
    truncated = keep < len(tokens)
    tokens, weights, is_image, counts = tokens[:keep], weights[:keep], is_image[:keep], counts[:keep]
    num_images = int(is_image.sum())

    tokens = np.repeat(np.where(is_image, pad_id, tokens), counts).astype(np.int32)  # [n]
    weights = np.repeat(np.where(is_image, 0, weights), counts).astype(np.float32)
    visual_index = np.full(len(tokens), -1, np.int32)
    visual_index[np.repeat(is_image, counts)] = np.arange(num_images * num_visual_tokens)
    targets, next_weights = np.full_like(tokens, pad_id), np.zeros_like(weights)
    targets[:-1], next_weights[:-1] = tokens[1:], weights[1:]
    return Spliced(tokens, visual_index, targets, next_weights, num_images, total - num_images, truncated)


def _images_first(tokens: np.ndarray, weights: np.ndarray, bos_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    is_image = tokens == IMAGE_TOKEN
    order = np.argsort(~is_image, kind="stable")
    if len(tokens) and bos_id is not None and tokens[0] == bos_id:
        order = np.concatenate([[0], order[order != 0]])
    return tokens[order], weights[order]


def _kept(is_image: np.ndarray, counts: np.ndarray, length: int, truncation: str, visual: int) -> int | None:
    """How many of the unspliced tokens stay; None when the whole sequence goes."""
    if truncation == "before_splice":
        if length <= visual:
            raise DataError(f"length {length} leaves no room for text beside {visual} visual tokens; raise `length`.")
        ends = np.cumsum(~is_image)
        limit = length - visual
    elif truncation in TRUNCATIONS:
        ends = np.cumsum(counts)
        limit = length
    else:
        raise DataError(f"There is no truncation {truncation!r}; choose one of {', '.join(TRUNCATIONS)}.")
    keep = int(np.searchsorted(ends, limit, side="right"))
    if keep == len(is_image):
        return keep
    if truncation == "drop":
        return None
    if truncation == "error":
        raise DataError(
            f"the sequence has {ends[-1]} tokens but `length` is {length}; raise it, or choose another `truncation`."
        )
    while keep and is_image[keep - 1]:
        keep -= 1
    return keep
