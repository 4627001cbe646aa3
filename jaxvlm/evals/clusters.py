"""Which benchmarks measure the same: correlations, clusters and principal components of a table of models x benchmarks.

Cambrian-1 (Tong et al. 2024, §3.1) asks it of 23 models and 16 benchmarks and sees four groups. Models are drawn anew to say
how much of an answer rests on which models happened to be in the table.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxvlm.evals.question_file import EvalError

FEWEST, FEW = 5, 10  # models: below the first nothing is computed, below the second a warning is given


class Table(NamedTuple):
    """Scores [models, benchmarks], and what was left out of the file and why."""

    models: list[str]
    benchmarks: list[str]
    values: np.ndarray
    left_out: list[str]


def read_table(path: str | Path) -> Table:
    """A CSV with a model a row and a benchmark a column (`jaxvlm eval compare --csv` writes one).

    Models with an empty cell and benchmarks on which all models are alike are left out, and `left_out` says so. Raises
    `EvalError` for a cell that is no number, doubled names, and fewer than five models or three benchmarks.
    """
    path = Path(path)
    if not path.is_file():
        raise EvalError(f"{path} is not a file; a CSV with a model a row and a benchmark a column is needed.")
    with path.open(newline="", encoding="utf-8-sig") as file:
        heads, *rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)] or [[]]
    for names in (heads[1:], [row[0] for row in rows]):
        if len(set(names)) < len(names):
            raise EvalError(f"{path}: a name occurs twice in the first row or column; names must be unique.")
    kept, left_out = [], []
    for row in rows:
        if len(row) > len(heads):
            raise EvalError(f"{path}: the row of {row[0]} has {len(row)} cells, the first row {len(heads)}.")
        cells = [cell.strip() for cell in row[1:]] + [""] * (len(heads) - len(row))
        empty = [name for name, cell in zip(heads[1:], cells, strict=True) if not cell]
        if empty:
            left_out.append(f"{row[0]}: no score of {', '.join(empty)}")
            continue
        kept.append((row[0], [_number(cell, f"{path}: {row[0]}") for cell in cells]))
    if len(kept) < FEWEST:
        why = f" (left out: {'; '.join(left_out)})" if left_out else ""
        raise EvalError(f"{path} has {len(kept)} whole rows; correlations take {FEWEST} models or more{why}.")
    values = np.array([row for _, row in kept])
    varied = np.ptp(values, axis=0) > 0
    left_out += [f"{name}: all models are alike" for name, v in zip(heads[1:], varied, strict=True) if not v]
    if varied.sum() < 3:
        raise EvalError(f"{path} has {varied.sum()} benchmarks on which models differ; clusters take 3 or more.")
    benchmarks = [name for name, v in zip(heads[1:], varied, strict=True) if v]
    return Table([name for name, _ in kept], benchmarks, values[:, varied], left_out)


def _number(cell: str, where: str) -> float:
    try:
        value = float(cell.replace(",", ""))  # 1,419.43
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise EvalError(f"{where}: {cell!r} is no number. Leave the cell empty where there is no score.")
    return value


def read_groups(path: str | Path, benchmarks: Sequence[str]) -> list[str]:
    """Each benchmark's group from a CSV of `benchmark,group`. Raises `EvalError` for a benchmark that it lacks."""
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        found = {row[0]: row[1] for row in csv.reader(file) if len(row) == 2}
    lacking = [name for name in benchmarks if name not in found]
    if lacking:
        raise EvalError(f"{path} names no group of {', '.join(lacking)}; it needs a row `benchmark,group` for each.")
    return [found[name] for name in benchmarks]


def analyse(
    table: Table, count: int, *, groups: Sequence[str] | None = None, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Everything about a table, as plain values.

    Args:
        count: how many clusters the dendrogram is cut into.
        groups: a grouping by others, to compare with.

    Returns:
        `pearson`, `spearman` [B, B]; `pearson_interval` [B, B, 2], 95 %, over draws of models; `linkage`, by average
        linkage of 1 - r, rows as scipy's (first, second, height, size); `clusters`, numbers by benchmark; `together`
        [B, B], in how many draws two benchmarks were in one cluster; `pca`: shares of variance, and coordinates of
        benchmarks (their correlations with the components) and models (in standard deviations); `agreement` with `groups`.

    Raises `EvalError` for a count that the table cannot give.
    """
    if not 2 <= count < len(table.benchmarks):
        raise EvalError(
            f"--clusters {count}: between 2 and {len(table.benchmarks) - 1} of {len(table.benchmarks)} benchmarks."
        )
    found = pearson(table.values)
    tree = average_linkage(1 - found)
    labels = cut(tree, count)
    draws, together = [], np.zeros_like(found)
    for values in _drawn(table.values, resamples, seed):
        drawn = pearson(values)
        draws.append(drawn)
        members = np.array(cut(average_linkage(1 - drawn), count))
        together += members[:, None] == members[None]
    result = {
        "models": table.models,
        "benchmarks": table.benchmarks,
        "left_out": table.left_out,
        "resamples": resamples,
        "seed": seed,
        "pearson": found.tolist(),
        "spearman": pearson(ranks(table.values)).tolist(),
        "pearson_interval": np.moveaxis(np.quantile(draws, [0.025, 0.975], axis=0), 0, -1).tolist(),
        "linkage": tree.tolist(),
        "clusters": dict(zip(table.benchmarks, labels, strict=True)),
        "together": (together / resamples).tolist(),
        "pca": components(table.values),
    }
    return result | ({"agreement": _agreement(found, labels, groups, seed)} if groups else {})


# --------------------------------------------------------------------------------------------------------- the numbers


def pearson(values: np.ndarray) -> np.ndarray:
    """Correlations [B, B] of the columns of [M, B]; a column without variation, as a draw may have, correlates with none."""
    centred = values - values.mean(0)
    norms = np.sqrt((centred**2).sum(0))
    flat = norms <= 1e-9 * np.abs(values).max(0)
    scaled = centred / np.where(flat, np.inf, norms)
    found = np.clip(scaled.T @ scaled, -1, 1)
    np.fill_diagonal(found, 1.0)
    return found


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks within each column of [M, B], the mean of their places for ties: `pearson` of them is Spearman's."""
    below = (values[None] < values[:, None]).sum(1)
    return below + ((values[None] == values[:, None]).sum(1) + 1) / 2


def average_linkage(distances: np.ndarray) -> np.ndarray:
    """The tree [B - 1, 4] that joins the two nearest clusters again and again: first, second, height, size.

    A cluster's distance is the mean over all pairs of members (UPGMA; Sokal and Michener 1958). New clusters are numbered on
    from B, as in scipy.
    """
    count = len(distances)
    near = distances.astype(np.float64).copy()
    np.fill_diagonal(near, np.inf)
    names, sizes, tree = list(range(count)), np.ones(count), np.empty((count - 1, 4))
    for step in range(count - 1):
        a, b = sorted(divmod(int(near.argmin()), count))
        tree[step] = (*sorted((names[a], names[b])), near[a, b], sizes[a] + sizes[b])
        merged = (sizes[a] * near[a] + sizes[b] * near[b]) / (sizes[a] + sizes[b])
        merged[[a, b]] = np.inf
        near[a], near[:, a] = merged, merged
        near[b], near[:, b] = np.inf, np.inf
        names[a], sizes[a] = count + step, sizes[a] + sizes[b]
    return tree


def cut(tree: np.ndarray, count: int) -> list[int]:
    """Each leaf's cluster, 0, 1, ... in order of first appearance, when the tree's last `count` - 1 joins are undone."""
    leaves = len(tree) + 1
    members = {leaf: [leaf] for leaf in range(leaves)}
    for step in range(leaves - count):
        first, second = (int(name) for name in tree[step, :2])
        members[leaves + step] = members.pop(first) + members.pop(second)
    found = np.empty(leaves, int)
    for number, part in enumerate(sorted(members.values(), key=min)):
        found[part] = number
    return found.tolist()


def components(values: np.ndarray) -> dict[str, list]:
    """The first two principal components of standardised scores [M, B]; signs such that the mean loading is positive."""
    scores = (values - values.mean(0)) / values.std(0)
    left, singular, right = np.linalg.svd(scores, full_matrices=False)
    signs = np.where(right.sum(1) < 0, -1.0, 1.0)[:2]
    root = np.sqrt(len(values))
    return {
        "shares": (singular**2 / (singular**2).sum()).tolist(),
        "benchmarks": (right[:2].T * singular[:2] / root * signs).tolist(),
        "models": (left[:, :2] * root * signs).tolist(),
    }


def adjusted_rand(first: Sequence[Any], second: Sequence[Any]) -> float:
    """How far two groupings agree: 1 the same, 0 as far as chance would have it (Hubert and Arabie 1985)."""

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    a, b = (np.unique(list(map(str, labels)), return_inverse=True)[1] for labels in (first, second))
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1)
    both, one, other = pairs(joint), pairs(joint.sum(1)), pairs(joint.sum(0))
    expected = one * other / pairs(np.array([len(a)]))
    most = (one + other) / 2
    return (both - expected) / (most - expected) if most != expected else 1.0


def _agreement(correlations: np.ndarray, labels: Sequence[int], groups: Sequence[str], seed: int) -> dict[str, Any]:
    """Do the groups show in the correlations? Means within and between, and p by shuffling the benchmarks' groups."""
    upper = np.triu_indices(len(groups), 1)
    pairs = correlations[upper]

    def inside_and_across(names: np.ndarray) -> tuple[float, float]:
        same = (names[:, None] == names[None])[upper]
        return float(pairs[same].mean()), float(pairs[~same].mean())

    names = np.array(groups)
    if not 1 < len(set(groups)) < len(groups):
        raise EvalError("The groups put all benchmarks in one group, or each in its own.")
    within, between = inside_and_across(names)
    rng = np.random.default_rng(seed)
    rand = adjusted_rand(labels, groups)
    shuffled = [rng.permutation(names) for _ in range(10_000)]
    higher = sum(np.subtract(*inside_and_across(one)) >= within - between - 1e-12 for one in shuffled)
    luckier = sum(adjusted_rand(labels, one) >= rand - 1e-12 for one in shuffled[:2000])
    return {
        "groups": list(groups),
        "within": within,
        "between": between,
        "p": float(higher + 1) / 10_001,
        "adjusted_rand": rand,
        "adjusted_rand_p": float(luckier + 1) / 2001,
    }


def _drawn(values: np.ndarray, count: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield values[rng.integers(0, len(values), len(values))]


def stability(found: Mapping[str, Any]) -> dict[int, float]:
    """Of each cluster, in how many draws two of its members were together, averaged; 1 for a cluster of one."""
    labels, together = np.array(list(found["clusters"].values())), np.array(found["together"])
    shares = {}
    for number in sorted(set(labels.tolist())):
        part = np.flatnonzero(labels == number)
        inside = together[np.ix_(part, part)][np.triu_indices(len(part), 1)]
        shares[number] = float(inside.mean()) if inside.size else 1.0
    return shares
