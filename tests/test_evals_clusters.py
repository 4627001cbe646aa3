"""Clusters of benchmarks: against scipy, a table made of known factors, and the table that Cambrian-1 publishes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from test_evals_verbs import run

from jaxvlm.evals import clusters

TABLES = Path(__file__).parent / "tables"
MEANS = """48.37 38.78 36.79 45.84 48.80 47.57 47.38 39.02 41.83 41.18 40.60 34.94 34.70 37.69 38.58 38.88 31.74 32.37 35.65 35.44
36.59 40.13 37.45"""  # of each model, as the paper prints them
MEANS = [float(mean) for mean in MEANS.split()]


def factors(models, seed=0):
    """Six benchmarks of two abilities, three of each, with a little noise."""
    rng = np.random.default_rng(seed)
    abilities = rng.normal(size=(models, 2))
    return abilities[:, [0, 1, 0, 1, 0, 1]] + 0.3 * rng.normal(size=(models, 6))


def table(values):
    names = [f"b{i}" for i in range(values.shape[1])]
    return clusters.Table([f"m{i}" for i in range(len(values))], names, values, [])


@pytest.mark.parametrize("seed", range(5))
def test_the_numbers_are_scipys(seed):
    rng = np.random.default_rng(seed)
    values = np.round(rng.normal(size=(12, 9)), 1)  # with ties
    np.testing.assert_allclose(clusters.pearson(values), np.corrcoef(values.T), atol=1e-12)
    np.testing.assert_allclose(clusters.pearson(clusters.ranks(values)), stats.spearmanr(values).statistic, atol=1e-12)
    distances = 1 - np.corrcoef(rng.normal(size=(9, 12)))
    np.fill_diagonal(distances, 0)
    theirs = hierarchy.linkage(squareform(distances, checks=False), "average")
    tree = clusters.average_linkage(distances)
    np.testing.assert_allclose(tree, theirs, atol=1e-12)
    for count in (2, 4, 7):
        other = hierarchy.fcluster(theirs, count, "maxclust")
        assert clusters.adjusted_rand(clusters.cut(tree, count), other) == pytest.approx(1.0)


def test_components():
    """Variances are the correlation matrix's eigenvalues; coordinates are correlations with the model's scores."""
    values = factors(30)
    found = clusters.components(values)
    eigen = np.sort(np.linalg.eigvalsh(np.corrcoef(values.T)))[::-1]
    np.testing.assert_allclose(found["shares"], eigen / eigen.sum(), atol=1e-12)
    scores = np.array(found["models"])
    for b in range(6):
        for c in range(2):
            assert found["benchmarks"][b][c] == pytest.approx(np.corrcoef(values[:, b], scores[:, c])[0, 1])


def test_adjusted_rand():
    """The worked example of Hubert and Arabie's index, and chance."""
    assert clusters.adjusted_rand([0, 0, 1, 1], [1, 1, 0, 0]) == 1.0
    assert clusters.adjusted_rand([0, 0, 1, 2], [0, 0, 1, 1]) == pytest.approx(0.5714285714)
    rng = np.random.default_rng(0)
    chance = [clusters.adjusted_rand(rng.integers(0, 3, 20), rng.integers(0, 3, 20)) for _ in range(500)]
    assert abs(np.mean(chance)) < 0.02


def test_known_factors_are_found_and_stable():
    groups = list("ababab")
    found = clusters.analyse(table(factors(40)), 2, groups=groups, resamples=200)
    assert list(found["clusters"].values()) == [0, 1, 0, 1, 0, 1]
    assert min(clusters.stability(found).values()) > 0.95
    assert found["agreement"]["adjusted_rand"] == 1.0 and found["agreement"]["within"] > 0.8
    noise = np.random.default_rng(1).normal(size=(40, 6))
    found = clusters.analyse(table(noise), 2, groups=groups, resamples=200)
    assert min(clusters.stability(found).values()) < 0.8 and found["agreement"]["p"] > 0.05


def test_intervals_of_correlations_are_fishers():
    """For two normal columns the bootstrap's interval is near Fisher's."""
    rng = np.random.default_rng(2)
    common = rng.normal(size=200)
    values = np.stack([common + rng.normal(size=200) for _ in range(3)], 1)
    found = clusters.analyse(table(values), 2, resamples=1000)
    r, interval = found["pearson"][0][1], found["pearson_interval"][0][1]
    expected = np.tanh(np.arctanh(r) + np.array([-1.96, 1.96]) / np.sqrt(197))
    np.testing.assert_allclose(interval, expected, atol=0.03)


def test_cambrians_table(tmp_path, capsys):
    """Of the paper's 23 x 16 table. Its mean column (MME / 20 with the rest) guards against slips in copying."""
    found = clusters.read_table(TABLES / "cambrian.csv")
    assert found.values.shape == (23, 16)
    values = found.values / np.where(np.array(found.benchmarks) == "MME", 20, 1)
    np.testing.assert_allclose(values.mean(1), MEANS, atol=0.011)
    out = tmp_path / "clusters"
    groups = ["--groups", TABLES / "cambrian_groups.csv"]
    code, shown, _ = run(capsys, "clusters", TABLES / "cambrian.csv", *groups, "--out", out, "--resamples", 200)
    assert code == 0 and "23 models, 16 benchmarks. First component: 64 %" in shown
    result = json.loads((out / "clusters.json").read_text())
    names = result["benchmarks"]
    r = np.array(result["pearson"])[names.index("MMMU")]
    assert np.sort(r)[-2] < 0.5  # "MMMU [is] largely uncorrelated with the others"
    assert result["agreement"]["p"] < 0.02 and result["agreement"]["within"] > result["agreement"]["between"]
    second = dict(zip(names, np.array(result["pca"]["benchmarks"])[:, 1], strict=True))
    charts = [second[name] for name in ("ChartQA", "OCRBench", "TextVQA", "DocVQA")]
    assert max(charts) < -0.2 < min(second[name] for name in ("MME", "MMB", "SEED", "GQA"))
    rows = list(csv.reader((out / "pairs.csv").open()))
    assert len(rows) == 1 + 16 * 15 // 2 and float(rows[1][2]) == pytest.approx(result["pearson"][0][1], abs=1e-4)
    page = (out / "clusters.html").read_text()
    assert page.count("<svg") == 3 and page.count("<rect") == 256 and "http" not in page.split("<style>")[1]


def test_what_is_wrong_with_a_table_is_said(tmp_path, capsys):
    path = tmp_path / "t.csv"

    def wrong(text, message, *more):
        path.write_text(text)
        code, _, error = run(capsys, "clusters", path, "--out", tmp_path / "o", *more)
        assert code == 1 and message in error

    good = "\n".join(f"m{i},{i},{i * i % 7},{-i % 5},1" for i in range(6))
    wrong(f"model,a,b,c,d\n{good}\nm0,1,2,3,1", "a name occurs twice")
    wrong(f"model,a,b,c,d\n{good}\nm9,1,x,3,1", "m9: 'x' is no number")
    wrong("model,a,b,c\nm1,1,2,3\nm2,,2,3", "m2: no score of a")
    wrong(f"model,a,b,c,d\n{good}", "between 2 and 2 of 3 benchmarks", "--clusters", "3")
    wrong("", "0 whole rows")
    path.write_text(f"model,a,b,c,d\n{good}\nm9,1,2,3")
    code, shown, _ = run(capsys, "clusters", path, "--out", tmp_path / "o", "--clusters", "2", "--resamples", "100")
    assert code == 0 and "m9: no score of d" in shown and "d: all models are alike" in shown and "say little" in shown
