"""Which conversations share a row, and the arrays of that row.

Packing is decided on token counts and tile counts alone, before any image is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxvlm.data import DataError
from jaxvlm.data.layout import Spliced, shifted
from jaxvlm.data.tiles import WHOLE

OPEN_ROWS = 64  # rows that are being filled at a time; more fills better and plans slower


def plan(
    lengths: np.ndarray,
    num_tiles: np.ndarray,
    row_length: int,
    tiles_per_row: int,
    seed: int | Sequence[int],
) -> list[np.ndarray]:
    """Rows of sample indices, each sample in exactly one: best fit over samples in random order.

    `lengths` and `num_tiles` are int [n]. The result is a function of the arguments only. Every row holds at
    most `row_length` tokens and `tiles_per_row` tiles. Raises `DataError` for a sample that fits in no row.
    """
    lengths, num_tiles = np.asarray(lengths, np.int64), np.asarray(num_tiles, np.int64)
    too_large = np.flatnonzero((lengths > row_length) | (num_tiles > tiles_per_row))
    if len(too_large):
        i = int(too_large[0])
        raise DataError(
            f"sample {i} has {lengths[i]} tokens and {num_tiles[i]} tiles, but a row holds {row_length} and"
            f" {tiles_per_row}; raise `length` or `tiles_per_row`."
        )
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows: list[list[int]] = []
    slots = np.zeros(OPEN_ROWS, np.int64)  # which row is being filled in each slot
    tokens_left = np.full(OPEN_ROWS, -1, np.int64)  # -1: the slot is free
    tiles_left = np.zeros(OPEN_ROWS, np.int64)
    for i, tokens, tiles in zip(order.tolist(), lengths[order].tolist(), num_tiles[order].tolist(), strict=True):
        room = np.where((tokens_left >= tokens) & (tiles_left >= tiles), tokens_left, row_length + 1)
        slot = int(room.argmin())
        if room[slot] > row_length:  # none has room: open a row in a free slot, or in place of the fullest
            slot = int(tokens_left.argmin())
            slots[slot], tokens_left[slot], tiles_left[slot] = len(rows), row_length, tiles_per_row
            rows.append([])
        rows[slots[slot]].append(i)
        tokens_left[slot] -= tokens
        tiles_left[slot] -= tiles
    return [np.asarray(row, np.int64) for row in rows]


def assemble(
    samples: Sequence[Spliced],
    row_length: int,
    tile_tokens: int,
    *,
    source_ids: Sequence[int] = (),
    pad_id: int = 0,
    blends: bool = False,
) -> dict[str, np.ndarray]:
    """One row of the Batch from the conversations that share it, in order; arrays [row_length] (DESIGN, the
    Batch).

    The tiles of the conversations' images take the row's tile slots in the same order. With `blends` the row has
    'visual_corners' int32 and 'visual_shares' float32, [row_length, 4], too: see `tiles.ImagePlan`.
    """
    row = {
        "tokens": np.full(row_length, pad_id, np.int32),
        "visual_index": np.full(row_length, -1, np.int32),
        "positions": np.zeros(row_length, np.int32),
        "segment_ids": np.zeros(row_length, np.int32),
        "targets": np.full(row_length, pad_id, np.int32),
        "loss_weights": np.zeros(row_length, np.float32),
        "source_ids": np.zeros(row_length, np.int32),
    }
    if blends:
        row["visual_corners"] = np.zeros((row_length, 4), np.int32)
        row["visual_shares"] = np.tile(WHOLE, (row_length, 1))
    start = tile = 0
    for segment, sample in enumerate(samples, start=1):
        part = slice(start, start + len(sample.tokens))
        offset = tile * tile_tokens
        row["tokens"][part] = sample.tokens
        row["visual_index"][part] = shifted(sample.visual_index, offset)
        row["positions"][part] = np.arange(len(sample.tokens))
        row["segment_ids"][part] = segment
        row["targets"][part] = sample.targets
        row["loss_weights"][part] = sample.weights  # 0 at the last token, so no target crosses into the next one
        row["source_ids"][part] = source_ids[segment - 1] if source_ids else 0
        if sample.shares is not None:
            row["visual_corners"][part], row["visual_shares"][part] = sample.corners + offset, sample.shares
        start, tile = part.stop, tile + sample.num_tiles
    return row
