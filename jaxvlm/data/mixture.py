"""The mixture of a stage: which records of each source are used, how often, and what that comes to."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxvlm.config import SourceConfig
from jaxvlm.data import DataError, llava_mix
from jaxvlm.data.boxes import FRAMES

HELD_OUT_SEED = 20_231_127  # not the run's: in every stage and every run a source holds out the same records


def check_sources(sources: Sequence[SourceConfig]) -> None:
    """Raises `DataError` for settings of sources that cannot be used."""
    for source in sources:
        where = f"Source {source.name or source.path!r}"
        if source.mix not in ("", llava_mix.MIX):
            raise DataError(f"{where}: there is no mix {source.mix!r}; the only one known is {llava_mix.MIX!r}.")
        if source.keep and not source.mix:
            raise DataError(
                f"{where}: `keep` chooses among the sources inside a file, so `mix` must be {llava_mix.MIX!r}."
            )
        if source.boxes not in ("", *FRAMES, "mix") or (source.boxes == "mix" and not source.mix):
            raise DataError(
                f"{where}: `boxes` is the frame that its boxes are given in, {' or '.join(FRAMES)}, or 'mix' where `mix` tells"
                f" its sources apart; it is {source.boxes!r}."
            )
        for name in source.keep:
            if name not in llava_mix.PARTS:
                near = difflib.get_close_matches(name, llava_mix.COUNTS, n=1, cutoff=0.4) or [
                    ", ".join(llava_mix.COUNTS)
                ]
                raise DataError(f"{where}: `keep` has {name!r}, which {source.mix} does not. It has {near[0]}.")
        if source.held_out < 0:
            raise DataError(f"{where}: `held_out` is a number of records; it is {source.held_out}.")
    weights = [source.weight for source in sources]
    if any(weight is not None for weight in weights) and not all(
        weight is not None and weight > 0 for weight in weights
    ):
        raise DataError(f"Give every source a positive `weight`, or none of them: they are {weights}.")


def prepared(record: Any, source: SourceConfig) -> Any:
    """The record as it is trained on."""
    return record if source.format_prompts else llava_mix.without_format_prompts(record)


def choose(records: Sequence, source: SourceConfig, seed: int, held_out: bool = False) -> np.ndarray:
    """How often training uses each of the source's records, int64 [n]; with `held_out`, 1 for those that it never uses.

    A fraction of 0.1 takes a tenth of the records that the source's rules let through, 2.5 takes each twice and half of them
    a third time. Which ones follows from the seed and the number of records alone: what a smaller fraction takes, a larger
    one takes too, and neither the other sources nor a file's place, name or format change it. Records that cannot be read
    pass every rule, to be found later.

    `source.held_out` of the records that pass are kept out, and a fraction is of the rest. They are the last ones of a random
    order of their own, so a smaller number of them is among a larger one, whatever the fraction and the seed. Raises
    `DataError` if none is left.
    """
    passing = np.ones(len(records), bool)
    if source.keep or not source.text_only:
        passing = np.fromiter((_passes(records, i, source) for i in range(len(records))), bool, len(records))
    copies = np.zeros(len(records), np.int64)
    if source.held_out:
        kept_out = np.random.default_rng(HELD_OUT_SEED).permutation(len(records))
        kept_out = kept_out[passing[kept_out]][-source.held_out :]
        if source.held_out >= passing.sum():
            raise DataError(
                f"held_out {source.held_out} of the {passing.sum()} records of {source.path} leaves none to train on; hold out"
                " fewer."
            )
        if held_out:
            copies[kept_out] = 1
            return copies
        passing[kept_out] = False
    order = np.random.default_rng(seed).permutation(len(records))
    order = order[passing[order]]
    whole, part = divmod(source.fraction, 1.0)
    copies[order] += int(max(whole, 0))
    copies[order[: round(part * len(order))]] += 1
    if source.fraction <= 0 or not copies.any():
        chosen = " that `keep`, `text_only` and `held_out` let through" if len(order) < len(records) else ""
        raise DataError(
            f"fraction {source.fraction} of the {len(order)} records of {source.path}{chosen} leaves none; it must be positive"
            " and large enough."
        )
    return copies


def _passes(records: Sequence, i: int, source: SourceConfig) -> bool:
    try:
        record = records[i]
    except DataError:
        return True
    if not isinstance(record, dict):
        return True
    if not source.text_only and not record.get("image"):
        return False
    return not source.keep or llava_mix.source_of(record) in source.keep


def epoch_samples(source: np.ndarray, weights: Sequence[float | None], seed: int, epoch: int) -> np.ndarray:
    """The samples of an epoch in random order, as indices; `source` int [n] says which source each sample is of.

    Without weights each of them once. With weights as many in all, and of each source its share: it is gone through again
    and again in new random orders, where the last epoch stopped, so that no record is seen a second time before all of its
    source have been seen once.
    """
    shuffle = np.random.default_rng([seed, epoch])
    if all(weight is None for weight in weights):
        return shuffle.permutation(len(source))
    counts = np.bincount(source, minlength=len(weights))
    chosen = []
    for i, size in enumerate(shares(counts, weights)):
        own, start = np.flatnonzero(source == i), epoch * size
        for turn in range(start // max(len(own), 1), -(-(start + size) // max(len(own), 1))):
            order = np.random.default_rng([seed, i, turn]).permutation(len(own))
            first = turn * len(own)
            chosen.append(own[order[max(start - first, 0) : start + size - first]])
    together = np.concatenate(chosen)
    return together[shuffle.permutation(len(together))]


def shares(counts: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many samples of each source make an epoch as large as all of them, in the ratio of the weights."""
    wanted = np.asarray(weights) * (np.asarray(counts) > 0)
    exact = wanted / wanted.sum() * np.sum(counts)
    sizes = np.floor(exact).astype(int)
    missing = int(np.sum(counts)) - sizes.sum()
    sizes[np.argsort(sizes - exact, kind="stable")[:missing]] += 1  # those that lost most by rounding down
    return sizes.tolist()


def mixture_table(stats: Mapping[str, Any]) -> str:
    """`Loader.stats()` as a table of the sources, and below it what was left out and why."""
    heads = ("source", "samples", "tokens", "supervised", "images", "truncated", "images cut", "left out")
    keys = ("samples", "tokens", "supervised_tokens", "images", "truncated", "dropped_images")
    lines = [
        (name, *(one[key] for key in keys), one["lost"] + one["dropped"]) for name, one in stats["sources"].items()
    ]
    if len(lines) > 1:
        lines.append(("all", *(sum(line[k] for line in lines) for k in range(1, len(heads)))))
    cells = [heads, *([line[0], *(f"{value:,}" for value in line[1:])] for line in lines)]
    for cell, line in zip(cells[1:], lines, strict=True):
        cell[3] += f" ({line[3] / max(line[2], 1):.0%})"
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]
    for name, one in stats["sources"].items():
        text += [f"{name}: {count:,} left out: {reason}" for reason, count in one["skipped"].items()]
        if one["quarantined"]:
            text.append(f"{name}: {one['quarantined']:,} left out by the quarantine list")
        if one["dropped"]:
            text.append(f"{name}: {one['dropped']:,} left out: longer than `length`, where `truncation` is 'drop'")
    return "\n".join(text)
