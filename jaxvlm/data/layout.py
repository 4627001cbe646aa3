"""Where visual tokens stand in a sequence: the splice, computed on the host.

Layouts (recipes §0 facts 1 and 3): `llava` puts an image's tokens where its `<image>` stood, `hf` is the same
sequence reached by repeating a placeholder, `prismatic` puts all images right after BOS, or first when there
is none, `images_first` puts them in front of everything, BOS included (BLIP-2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxvlm.data import DataError
from jaxvlm.data.conversation import IMAGE_TOKEN, IMAGES_IN_FRONT, Encoded
from jaxvlm.data.tiles import WHOLE, ImagePlan

LAYOUTS = ("llava", "hf", *IMAGES_IN_FRONT)
TRUNCATIONS = ("after_splice", "before_splice", "drop", "error")
DROPPED = "and `truncation` is 'drop'."  # how the reason ends why a record that is too long is left out


class Spliced(NamedTuple):
    """One conversation of n tokens, visual tokens included, numbered from its own first tile."""

    tokens: np.ndarray  # int32 [n], the pad id under visual tokens
    visual_index: np.ndarray  # int32 [n], tile * P + patch, -1 for text, -2 for a row end
    targets: np.ndarray  # int32 [n], the next token
    weights: np.ndarray  # float32 [n], the weight of predicting the next token; 0 for the last
    num_images: int  # images that are used
    num_tiles: int  # tiles of those images
    dropped_images: int  # images that were cut off
    truncated: bool
    corners: np.ndarray | None = None  # int32 [n, 4], float32 [n, 4]: as in `ImagePlan`; of text [1, 0, 0, 0] of 0
    shares: np.ndarray | None = None


def splice(
    encoded: Encoded,
    plans: Sequence[ImagePlan],
    layout: str = "llava",
    length: int | None = None,
    truncation: str = "after_splice",
    *,
    tile_tokens: int,
    reserved: int = 0,
    bos_id: int | None = None,
    pad_id: int = 0,
) -> Spliced | None:
    """Replaces the IMAGE_TOKENs, in order, by the visual tokens of `plans` and cuts the result to `length` (None: no
    limit).

    Truncation: `after_splice` cuts the spliced sequence (LLaVA); `before_splice` cuts the text to `length -
    reserved`, whether it has images or not (Prismatic, whose text limit of 2048 is a length of 2048 + the visual
    tokens); `drop` returns None for a sequence that is too long; `error` raises `DataError`. A cut never falls
    inside an image: it moves in front of it, and images that no text follows are dropped. `tile_tokens` is P.
    """
    if layout not in LAYOUTS:
        raise DataError(f"There is no layout {layout!r}; the layouts are {', '.join(LAYOUTS)}.")
    tokens, weights = encoded.tokens, encoded.weights
    if layout in IMAGES_IN_FRONT:
        tokens, weights = _images_first(tokens, weights, bos_id if layout == "prismatic" else None)
    is_image = tokens == IMAGE_TOKEN
    counts = np.ones(len(tokens), np.int64)
    counts[is_image] = [len(plan.index) for plan in plans]
    keep = len(tokens)
    if length is not None:
        keep = _kept(is_image, counts, length, truncation, reserved)
        if keep is None:
            return None
    truncated = keep < len(tokens)
    tokens, weights, is_image, counts = tokens[:keep], weights[:keep], is_image[:keep], counts[:keep]
    used = plans[: int(is_image.sum())]
    starts = np.cumsum([0, *(plan.tiles for plan in used)]) * tile_tokens  # of each image, in visual tokens

    tokens = np.repeat(np.where(is_image, pad_id, tokens), counts).astype(np.int32)  # [n]
    weights = np.repeat(np.where(is_image, 0, weights), counts).astype(np.float32)
    visual = np.repeat(is_image, counts)
    visual_index = np.full(len(tokens), -1, np.int32)
    if used:
        visual_index[visual] = np.concatenate([shifted(plan.index, at) for plan, at in zip(used, starts, strict=False)])
    targets, next_weights = np.full_like(tokens, pad_id), np.zeros_like(weights)
    targets[:-1], next_weights[:-1] = tokens[1:], weights[1:]
    corners = shares = None
    if any(plan.shares is not None for plan in used):
        corners, shares = np.zeros((len(tokens), 4), np.int32), np.tile(WHOLE, (len(tokens), 1))
        corners[visual] = np.concatenate([plan.corners + at for plan, at in zip(used, starts, strict=False)])
        shares[visual] = np.concatenate([plan.shares for plan in used])
    cut = (len(used), int(starts[-1]) // tile_tokens, len(plans) - len(used), truncated)
    return Spliced(tokens, visual_index, targets, next_weights, *cut, corners, shares)


def shifted(index: np.ndarray, by: int) -> np.ndarray:
    """A visual index counted from another tile: text and row ends stay what they are."""
    return np.where(index >= 0, index + np.int32(by), index)


def _images_first(tokens: np.ndarray, weights: np.ndarray, bos_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    is_image = tokens == IMAGE_TOKEN
    order = np.argsort(~is_image, kind="stable")
    if len(tokens) and bos_id is not None and tokens[0] == bos_id:
        order = np.concatenate([[0], order[order != 0]])
    return tokens[order], weights[order]


def _kept(is_image: np.ndarray, counts: np.ndarray, length: int, truncation: str, reserved: int) -> int | None:
    """How many of the unspliced tokens stay; None when the whole sequence goes."""
    if truncation == "before_splice":
        if length <= reserved:
            raise DataError(f"length {length} leaves no room for text beside {reserved} visual tokens; raise `length`.")
        ends = np.cumsum(~is_image)
        limit = length - reserved
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
