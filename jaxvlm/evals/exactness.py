"""What the fast mode changes: some of a benchmark's questions asked once more in the exact mode, and the texts compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxvlm.evals.statistics import wilson_interval
from jaxvlm.infer.answers import answer_requests, merged
from jaxvlm.infer.engine import Engine

FEWEST, SHARE = 16, 0.02  # asked again where nobody says how many: the larger of the two


def exact_check(
    engine: Engine,
    requests: Sequence[dict],
    answers: Sequence[dict],
    out: Path,
    *,
    count: int | None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any] | None:
    """Asks `count` of the requests, drawn by the seed, in the exact mode and says how many texts differ from `answers`.

    Answers go to the JSONL file `out`, which a second call goes on with; `options` are those of `answer_requests`. None if
    nothing is to be checked: `count` is 0, or the engine is exact.

    Returns `asked`, `differ`, the `share` in per cent with its 95 % `interval` (Wilson's), and each difference.
    """
    if engine.exact or count == 0:
        return None
    count = max(FEWEST, round(SHARE * len(requests))) if count is None else count
    places = sorted(np.random.default_rng(seed).permutation(len(requests))[:count].tolist())
    engine.exact = True
    try:
        answer_requests(engine, [requests[i] for i in places], out, label="exact check", **options)
    finally:
        engine.exact = False
    again = merged(out, [str(requests[i]["id"]) for i in places])
    pairs = [(answers[i], other) for i, other in zip(places, again, strict=True)]
    different = [
        {"question_id": one["question_id"], "fast": one["text"], "exact": other["text"]}
        for one, other in pairs
        if one["text"] != other["text"]
    ]
    share, interval = len(different) / len(pairs), wilson_interval(len(different), len(pairs))
    return {
        "asked": len(pairs),
        "differ": len(different),
        "share": 100 * share,
        "interval": [100 * bound for bound in interval],
        "different": different,
    }


def check_in_words(check: dict[str, Any] | None) -> str:
    """The check on one line; empty where there was none."""
    if not check:
        return ""
    low, high = check["interval"]
    return f"{check['differ']:,} of {check['asked']:,} texts differ ({low:.1f} to {high:.1f} %)"
