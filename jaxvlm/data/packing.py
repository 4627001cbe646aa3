"""Which conversations share a row, and the arrays of that row.

Packing is decided on token counts and tile counts alone, before any image is decoded.

A row is filled from a small pool of the samples that come next. Its first sample is the oldest of the pool; each
further one is the sample that leaves the room from which least is expected to be wasted, with an advantage for older
samples. What is wasted of a room of r tokens and s tiles follows from the data's own distribution: if the best of
`DRAWS` random samples were put into it, and so on, until nothing fits (`_waste`). So tokens and tiles are weighed against
each other without a weight to set: rows do not run out of tiles while there is room for tokens. The pool is small, so
samples stay near their places, and the planned order is about as random as the order they came in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxvlm.data import DataError
from jaxvlm.data.layout import Spliced, shifted
from jaxvlm.data.tiles import WHOLE

POOL = 64  # samples to choose from; more of them fill rows better, and move samples further
STREAM = 8192  # samples that a stream has at least
STREAMS = 128  # at most; their ends, where the pool runs dry, are less full
DRAWS = 8  # random samples that stand for the choice a pool leaves when a row is nearly full
BINS = 256  # parts of a row, in which what is expected to be wasted is reckoned
SAMPLED = 20_000  # samples that the expectation is made from
UNIT = 16  # waste is compared in 1/UNIT tokens
TOO_LARGE = 2**30


@dataclass(frozen=True)
class Rows:
    """Rows of samples: row i holds `samples[offsets[i] : offsets[i + 1]]`."""

    samples: np.ndarray  # int64 [n], indices
    offsets: np.ndarray  # int64 [rows + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def first(self, count: int) -> Rows:
        """The first `count` rows, or all if there are fewer."""
        count = min(count, len(self))
        return Rows(self.samples[: self.offsets[count]], self.offsets[: count + 1])

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of all parts, one after the other."""
        sizes = np.concatenate([np.diff(part.offsets) for part in parts])
        return cls(np.concatenate([part.samples for part in parts]), np.append(0, np.cumsum(sizes)))


def plan(lengths: np.ndarray, num_tiles: np.ndarray, row_length: int, tiles_per_row: int) -> Rows:
    """Rows that hold each sample once, at most `row_length` tokens and `tiles_per_row` tiles each.

    `lengths` and `num_tiles` are int [n], of samples in random order: rows keep about to it. The result is a function of
    the arguments only. Raises `DataError` for a sample that fits in no row.
    """
    lengths, num_tiles = np.asarray(lengths, np.int64), np.asarray(num_tiles, np.int64)
    too_large = np.flatnonzero((lengths > row_length) | (num_tiles > tiles_per_row))
    if len(too_large):
        i = int(too_large[0])
        raise DataError(
            f"sample {i} has {lengths[i]} tokens and {num_tiles[i]} tiles, but a row holds {row_length} and"
            f" {tiles_per_row}; raise `length` or `tiles_per_row`."
        )
    # Streams are packed in step with each other, as one array: sample i is in stream i % streams. ------------------
    streams = min(max(len(lengths) // STREAM, 1), STREAMS)
    steps = -(-len(lengths) // streams)
    # Room for tiles and tokens as one number, and what a sample takes of it too: their difference is what it leaves.
    width = 2 * row_length + 2
    sizes = np.full((steps + POOL, streams), row_length + 1, np.int32)  # more than there is room for, if none are left
    sizes.reshape(-1)[: len(lengths)] = num_tiles * width + lengths
    sizes = np.ascontiguousarray(sizes.T)
    empty = tiles_per_row * width + row_length
    costs = _costs(_waste(lengths[:SAMPLED], num_tiles[:SAMPLED], row_length, tiles_per_row), width)
    later = max(row_length * UNIT // (80 * POOL), 1)  # the cost of coming a step later: of POOL steps, 1/80 row

    row = np.full((streams, steps + POOL), -1, np.int64)  # of each sample, counted in its stream
    pool = sizes[:, :POOL].astype(np.int64)  # [streams, POOL]
    place = np.tile(np.arange(POOL), (streams, 1))  # of the pool's samples, in their streams
    room, current, each = np.full(streams, -1), np.full(streams, -1), np.arange(streams)
    for step in range(steps):
        cost = costs.take(room[:, None] - pool + 1, mode="clip") + place * later
        best = cost.argmin(1)
        full = np.flatnonzero(cost[each, best] >= TOO_LARGE)
        if len(full):  # nothing fits any more: the oldest opens a new row
            best[full] = place[full].argmin(1)
            current[full] += 1
            room[full] = empty
        row[each, place[each, best]] = current
        room -= pool[each, best]
        pool[each, best], place[each, best] = sizes[:, step + POOL], step + POOL

    # Row g is row g // streams of stream g % streams, for as long as all have rows. ---------------------------------
    number = (row * streams + each[:, None]).T.reshape(-1)[: len(lengths)]  # of sample i's row
    samples = number.argsort(kind="stable")
    opens = np.flatnonzero(np.diff(number[samples], prepend=-1))
    return Rows(samples, np.append(opens, len(samples)))


def _costs(waste: np.ndarray, width: int) -> np.ndarray:
    """The waste in 1/UNIT tokens of a room of s tiles and r tokens at 1 + s * width + r, and TOO_LARGE where r or s is negative.

    For a negative r the index is that of a room of one tile less, but beyond the tokens of a row; if it is negative itself,
    `take` makes it 0.
    """
    costs = np.full((len(waste), width), TOO_LARGE, np.int32)
    costs[:, : waste.shape[1]] = np.rint(waste * UNIT)
    return np.append(np.int32(TOO_LARGE), costs.reshape(-1))


def _waste(lengths: np.ndarray, num_tiles: np.ndarray, row_length: int, tiles_per_row: int) -> np.ndarray:
    """Expected waste in tokens of a room of so many tiles and tokens, [tiles_per_row + 1, row_length + 1].

    All processes must plan the same rows: only operations that give the same result on every machine, and rounded ones.
    """
    bins = min(BINS, row_length)
    unit = row_length / bins
    kinds, counts = np.unique(
        np.stack([np.maximum(np.rint(lengths / unit), 1), num_tiles]).astype(np.int64), axis=1, return_counts=True
    )
    size, slots = kinds  # [k] in bins, in tiles
    share = counts / counts.sum()
    tiles_left = np.arange(tiles_per_row + 1)[:, None] - slots  # [tiles_per_row + 1, k] by each sample
    waste = np.zeros((tiles_per_row + 1, bins + 1))
    for room in range(1, bins + 1):
        fits = (tiles_left >= 0) & (size <= room)
        after = np.where(fits, waste[np.maximum(tiles_left, 0), np.maximum(room - size, 0)], room * unit)
        order = after.argsort(1, kind="stable")  # the samples from the best to the worst
        worse = np.maximum(1.0 - np.cumsum(share[order], axis=1), 0.0)  # P(a draw is worse than this one)
        for _ in range(round(math.log2(DRAWS))):  # P(all draws are)
            worse = worse * worse
        best = -np.diff(worse, prepend=1.0)  # P(this one is the best of the draws)
        expected = np.cumsum(np.take_along_axis(after, order, 1) * best, axis=1)[:, -1]
        waste[:, room] = np.rint(expected * 1024) / 1024
    tokens = np.arange(row_length + 1)
    return np.stack([np.interp(tokens, np.arange(bins + 1) * unit, one) for one in waste])


def slots_needed(lengths: np.ndarray, num_tiles: np.ndarray, row_length: int) -> int:
    """Tile slots for rows of packed samples: for the sample with most tiles, and for the mean of a row full of tokens.

    A fiftieth more than that mean: empty slots cost a vision tower's pass, too few of them whole rows.
    """
    mean = row_length * float(np.sum(num_tiles)) / max(float(np.sum(lengths)), 1.0)
    return max(int(np.max(num_tiles, initial=0)), math.ceil(1.02 * mean), 1)


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
