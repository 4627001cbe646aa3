"""Which difference is real: intervals of a benchmark's numbers, and tests between runs that answered the same questions.

A benchmark's number is rarely a mean of its answers (F1, sums over tasks, circles, ratios), so everything is drawn anew and
the benchmark's own aggregate computed again (evaluation §5). What is drawn are groups, the questions about one image or the
parts of one circle, which stand or fall together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from jaxvlm.evals import tasks
from jaxvlm.evals.aggregates import Aggregate, Row, by
from jaxvlm.evals.question_file import EvalError
from jaxvlm.evals.readers import collector_paused, completed
from jaxvlm.evals.scorers import Record

RESAMPLES = 1000
LEVEL = 0.95


def intervals(
    result: Mapping[str, Any], references: Sequence[Record], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The 95 % percentile interval of every number in a result of `score`, from its `per_sample` and the references."""
    return row_intervals(rows_of(result, references), aggregate_of(result), resamples=resamples, seed=seed)


@collector_paused()
def row_intervals(
    rows: Sequence[Row], aggregate: Aggregate, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The same of every number that `aggregate` gives for `rows`."""
    found: dict[str, list[float]] = {name: [] for name in aggregate(rows)}
    for (drawn,) in _resampled([rows], resamples, seed):
        numbers = aggregate(drawn)
        for name, values in found.items():
            if name in numbers:  # a category may be missing from a draw
                values.append(numbers[name])
    return {name: _interval(values) for name, values in found.items() if values}


@collector_paused()
def compare(
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    references: Sequence[Record],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares runs on one benchmark by the number that papers print.

    Args:
        results: by each run's name its results of `score`; several are the same recipe with other seeds, whose mean counts.
        references: the benchmark's, as `tasks.read_references` gives them.

    Returns:
        `runs`: value, interval, seeds, and their standard deviation (None for one); `pairs`: of each two runs the difference, its
        interval, p by the paired bootstrap, the same after Holm's correction for the number of pairs, exact McNemar's p
        where each question is right or wrong and a group of its own (else None), and `noise`, whether the corrected p is
        0.05 or more. Seeds in results are part of a difference, but a p speaks of other questions, not of other seeds.

    Raises `EvalError` for fewer than two runs, and results of different benchmarks, protocols or questions.
    """
    everything = [result for several in results.values() for result in several]
    if len(results) < 2:
        raise EvalError("Comparing takes two runs or more.")
    _require_alike(results)
    aggregate, headline = aggregate_of(everything[0]), everything[0]["headline"]
    rows = {name: [rows_of(result, references) for result in several] for name, several in results.items()}

    def values(drawn: Mapping[str, Sequence[Sequence[Row]]]) -> dict[str, float]:
        return {name: float(np.mean([aggregate(part)[headline] for part in parts])) for name, parts in drawn.items()}

    flat = [part for parts in rows.values() for part in parts]
    draws = []
    for drawn in _resampled(flat, resamples, seed):
        rest = iter(drawn)
        draws.append(values({name: [next(rest) for _ in parts] for name, parts in rows.items()}))
    known = values(rows)
    runs = {}
    for name, several in results.items():
        each = [result["value"] for result in several]
        runs[name] = {
            "value": known[name],
            "interval": _interval([draw[name] for draw in draws]),
            "seeds": len(each),
            "deviation": float(np.std(each, ddof=1)) if len(each) > 1 else None,
        }
    pairs = []
    for first, second in combinations(results, 2):
        differences = np.array([draw[first] - draw[second] for draw in draws])
        pairs.append(
            {
                "first": first,
                "second": second,
                "difference": known[first] - known[second],
                "interval": _interval(differences),
                "p": _two_sided(differences),
                "mcnemar": _mcnemar(rows[first], rows[second]),
            }
        )
    for pair, corrected in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        pair |= {"p_holm": corrected, "noise": corrected >= 1 - LEVEL}
    about = {name: everything[0][name] for name in ("task", "protocol", "split", "n", "headline")}
    return about | {"resamples": resamples, "seed": seed, "runs": runs, "pairs": pairs}


def z_scores(table: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Of values by benchmark and run: (value - mean) / standard deviation over the runs, and their `mean` over benchmarks.

    Prismatic averages benchmarks of different scales so (Karamcheti et al. 2024, §4); the deviation is the population's. A
    benchmark on which all are alike gives zeros.
    """
    found: dict[str, dict[str, float]] = {}
    for benchmark, values in table.items():
        mean, deviation = np.mean(list(values.values())), np.std(list(values.values()))
        for run, value in values.items():
            found.setdefault(run, {})[benchmark] = float((value - mean) / deviation) if deviation else 0.0
    return {run: scores | {"mean": float(np.mean(list(scores.values())))} for run, scores in found.items()}


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): what each p is when so many tests are made at once."""
    order, highest = np.argsort(p, kind="stable"), 0.0
    corrected = [0.0] * len(p)
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = highest
    return corrected


# --------------------------------------------------------------------------------------------------------------- pieces


def rows_of(result: Mapping[str, Any], references: Sequence[Record]) -> list[Row]:
    """The scored answers of a result, with their references again. Raises `EvalError` for a question that is not there."""
    found = {record["id"]: record for record in completed(references, tasks.find_task(result["task"]).complete)}
    lacking = next((sample["id"] for sample in result["per_sample"] if sample["id"] not in found), None)
    if lacking is not None:
        raise EvalError(f"A result of {result['task']} has the question {lacking!r}, which the references have not.")
    return [
        Row(sample["id"], sample["group"], sample["parsed"], sample["scores"], sample["valid"], found[sample["id"]])
        for sample in result["per_sample"]
    ]


def aggregate_of(result: Mapping[str, Any]) -> Aggregate:
    about, how = tasks.find(result["task"], result["protocol"])
    return how.aggregate or about.aggregate


def _resampled(sets: Sequence[Sequence[Row]], count: int, seed: int) -> Iterator[list[list[Row]]]:
    """Draws as many groups as there are, with replacement, the same ones from every set of rows.

    A group that is drawn twice is two groups, so that pairs and circles stay what they are.
    """
    parts = [by(rows, lambda row: row.group) for rows in sets]
    names, rng = list(parts[0]), np.random.default_rng(seed)
    for _ in range(count):
        picks, times = np.unique(rng.integers(0, len(names), len(names)), return_counts=True)
        drawn: list[list[Row]] = []
        for groups in parts:
            rows: list[Row] = []
            for pick, often in zip(picks.tolist(), times.tolist(), strict=True):
                rows += groups[names[pick]]
                for copy in range(1, often):
                    rows += [row._replace(group=f"{row.group}#{copy}") for row in groups[names[pick]]]
            drawn.append(rows)
        yield drawn


def _interval(values: Sequence[float]) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _two_sided(differences: np.ndarray) -> float:
    """Twice the smaller share of draws on the other side of zero, ties on both; never 0, as draws are finite."""
    below, above = ((differences <= 0).sum() + 1, (differences >= 0).sum() + 1)
    return float(min(1.0, 2 * min(below, above) / (len(differences) + 1)))


def _mcnemar(first: Sequence[Sequence[Row]], second: Sequence[Sequence[Row]]) -> float | None:
    if len(first) > 1 or len(second) > 1:
        return None
    one, other = ({row.id: row.values.get("accuracy") for row in rows} for rows in (first[0], second[0]))
    groups = {row.group for row in first[0]}
    if len(groups) < len(one) or not set(one.values()) | set(other.values()) <= {0.0, 1.0}:
        return None
    gained = sum(one[name] > other[name] for name in one)
    lost = sum(one[name] < other[name] for name in one)
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1)) / 2**changed
    return min(1.0, 2 * tail)


def _require_alike(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    base_name, (base, *_) = next(iter(results.items()))
    asked = {sample["id"] for sample in base["per_sample"]}
    for name, several in results.items():
        for result in several:
            for field in ("task", "protocol", "headline"):
                if result[field] != base[field]:
                    raise EvalError(
                        f"{name} is a result of {field} {result[field]!r}, {base_name} of {base[field]!r}: they cannot be compared."
                    )
            if {sample["id"] for sample in result["per_sample"]} != asked:
                raise EvalError(
                    f"{name} and {base_name} answered different questions of {base['task']}. Score both on the same "
                    "ones (the same --limit and --seed, or the whole split)."
                )
            if result["value"] is None:
                raise EvalError(f"{name} has no {base['headline']}: it is not among these questions.")
            if result["prompt"] != base["prompt"]:
                raise EvalError(f"{name} and {base_name} were scored with other prompts of {base['task']}.")
