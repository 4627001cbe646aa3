"""Intervals and tests between runs: against closed forms, scipy's, simulations, and a benchmark that is no mean."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
from eval_files import official_files, questions
from scipy import stats
from test_evals_verbs import run

from jaxvlm.evals import compare as comparing
from jaxvlm.evals import score, tasks
from jaxvlm.evals.question_file import EvalError


def vsr(right):
    """References and a result of VSR (one question an image) in which the answers marked are right."""
    references = [{"image": f"{i}.jpg", "caption": f"thing {i} is left", "label": i % 2} for i in range(len(right))]
    words = [("True", "False")[bool(r) ^ bool(i % 2)] for i, r in enumerate(right)]
    records = tasks.readers.completed(references, tasks.find_task("vsr").complete)
    answers = [{"id": record["id"], "text": word} for record, word in zip(records, words, strict=True)]
    return references, score("vsr", "jaxvlm", answers, references)


def draw(rng, count, share):
    return rng.random(count) < share


def test_the_interval_of_a_mean_is_the_normal_one():
    right = draw(np.random.default_rng(0), 800, 0.7)
    references, result = vsr(right)
    assert result["value"] == pytest.approx(100 * right.mean())
    low, high = comparing.intervals(result, references)["accuracy"]
    error = 100 * right.std() / np.sqrt(800)
    np.testing.assert_allclose([low, high], result["value"] + np.array([-1.96, 1.96]) * error, atol=0.25 * error)


def test_intervals_hold_what_they_promise():
    """Of 60 samples about nineteen in twenty intervals hold the true value: at least 50 (p < 0.002 to have fewer)."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(60):
        references, result = vsr(draw(rng, 120, 0.6))
        low, high = comparing.intervals(result, references, resamples=200)["accuracy"]
        held += low <= 60.0 <= high
    assert held >= 50


def test_questions_of_one_image_are_drawn_together():
    """Every image counted ten times: as wide as the images alone, not narrower by the square root of ten."""
    right = draw(np.random.default_rng(2), 60, 0.5)
    references = [
        {"questionId": f"{i}-{k}", "imageId": str(i), "question": "q", "answer": "a", "isBalanced": True}
        for i in range(60)
        for k in range(10)
    ]
    answers = [
        {"questionId": r["questionId"], "prediction": "a" if right[int(r["imageId"])] else "b"} for r in references
    ]
    result = score("gqa", "official", answers, references)
    low, high = comparing.intervals(result, references)["accuracy"]
    error = 100 * right.std() / np.sqrt(60)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.2)


def test_pairs_stay_pairs_when_drawn_twice():
    """MMVP counts pairs; a pair that is drawn twice is two pairs and not one of four answers."""
    rows = [
        comparing.Row(f"{pair}{half}", str(pair), "a", {"accuracy": float(half < 1 or pair % 2)}, True, {})
        for pair in range(40)
        for half in range(2)
    ]
    seen = [tasks.TASKS["mmvp"].aggregate(drawn)["pair_accuracy"] for (drawn,) in comparing._resampled([rows], 400, 0)]
    assert np.mean(seen) == pytest.approx(50.0, abs=1.5) and np.std(seen) == pytest.approx(50 / np.sqrt(40), rel=0.15)


@pytest.mark.parametrize(("better", "noise"), [(0.0, True), (0.12, False)])
def test_a_real_difference_is_told_from_noise(better, noise):
    rng = np.random.default_rng(3)
    hard = rng.random(600)
    ours, theirs = hard < 0.6 + better, hard < 0.6
    flips = rng.random((2, 600)) < 0.05  # what the runs do not share
    references, first = vsr(ours ^ flips[0])
    _, second = vsr(theirs ^ flips[1])
    made = comparing.compare({"ours": [first], "theirs": [second]}, references)
    (pair,) = made["pairs"]
    assert pair["noise"] is noise
    assert pair["difference"] == pytest.approx(first["value"] - second["value"])
    discordant = (ours ^ flips[0]).astype(int) - (theirs ^ flips[1])
    gained, lost = int((discordant > 0).sum()), int((discordant < 0).sum())
    assert pair["mcnemar"] == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)
    assert pair["p"] == pytest.approx(pair["mcnemar"], abs=0.05)
    paired = 100 * discordant.std() / np.sqrt(600)  # much narrower than of two independent runs
    assert np.diff(pair["interval"])[0] == pytest.approx(2 * 1.96 * paired, rel=0.15)


def test_under_no_difference_few_tests_are_significant():
    """Of 60 comparisons of two coins at most 8 have p < 0.05 (3 expected; p < 0.01 to have more)."""
    rng, significant = np.random.default_rng(4), 0
    for _ in range(60):
        references, first = vsr(draw(rng, 100, 0.5))
        _, second = vsr(draw(rng, 100, 0.5))
        pair = comparing.compare({"a": [first], "b": [second]}, references, resamples=200)["pairs"][0]
        significant += pair["p"] < 0.05
    assert significant <= 8


def test_seeds_of_a_run_are_averaged():
    rng = np.random.default_rng(5)
    several = [vsr(draw(rng, 100, share)) for share in (0.5, 0.6, 0.7)]
    references = several[0][0]
    results = [result for _, result in several]
    made = comparing.compare({"three": results, "one": results[:1]}, references, resamples=100)
    values = [result["value"] for result in results]
    assert made["runs"]["three"]["value"] == pytest.approx(np.mean(values))
    assert made["runs"]["three"]["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert made["runs"]["one"]["deviation"] is None and made["pairs"][0]["mcnemar"] is None


def test_holm_and_z_scores():
    p = [0.01, 0.04, 0.03, 0.005]
    np.testing.assert_allclose(comparing.holm(p), [0.03, 0.06, 0.06, 0.02])
    table = {"gqa": {"a": 60.0, "b": 62.0, "c": 67.0}, "pope": {"a": 1.0, "b": 1.0, "c": 1.0}}
    found = comparing.z_scores(table)
    np.testing.assert_allclose([found[name]["gqa"] for name in "abc"], stats.zscore([60.0, 62.0, 67.0]))
    assert found["c"]["mean"] == pytest.approx(found["c"]["gqa"] / 2)


def test_what_cannot_be_compared_is_said():
    references, one = vsr([True] * 4)
    _, other = vsr([True] * 5)
    with pytest.raises(EvalError, match="two runs"):
        comparing.compare({"a": [one]}, references)
    with pytest.raises(EvalError, match="b and a answered different questions of vsr"):
        comparing.compare({"a": [one], "b": [other]}, references)
    with pytest.raises(EvalError, match="b is a result of protocol 'prismatic', a of 'jaxvlm'"):
        comparing.compare({"a": [one], "b": [one | {"protocol": "prismatic"}]}, references)
    with pytest.raises(EvalError, match="which the references have not"):
        comparing.intervals(other, references)


def test_the_verb(tmp_path, capsys):
    references = official_files("gqa", tmp_path / "gqa")
    found = questions("gqa")
    for name, wrong in (("good", 2), ("bad", 20)):
        words = [q["answer"] if i >= wrong else "nothing" for i, q in enumerate(found)]
        made = [{"question_id": q["questionId"], "text": word} for q, word in zip(found, words, strict=True)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made))
        options = ["--task", "gqa", "--protocol", "llava15", "--references", str(references)]
        files = ["--answers", f"{tmp_path}/{name}.jsonl", "--out", f"{tmp_path}/{name}.json", "--intervals", "200"]
        code, shown, _ = run(capsys, "score", *options, *files)
        assert code == 0 and re.search(r"accuracy  +\d+\.\d\d  +\d+\.\d\d to \d+\.\d\d\n", shown)
    assert set(json.loads((tmp_path / "good.json").read_text())["intervals"]) >= {"accuracy"}
    runs = [f"--run={name}={tmp_path}/{name}.json" for name in ("good", "bad")]
    out, table = tmp_path / "compared.json", tmp_path / "table.csv"
    code, shown, _ = run(capsys, "compare", *runs, f"--references={references}", f"--out={out}", f"--csv={table}")
    assert code == 0 and "good - bad" in shown and "+75.00" in shown and "real" in shown
    assert json.loads(out.read_text())["benchmarks"][0]["pairs"][0]["difference"] == pytest.approx(75.0)
    assert list(csv.reader(table.open()))[0] == ["run", "gqa llava15"]
    for wrong, said in (
        ([runs[0], runs[0]], "two are called"),
        ([f"--run=x={references}"], "is no result"),
        ([runs[0]], "two runs or more"),
    ):
        code, _, error = run(capsys, "compare", *wrong, f"--references={references}")
        assert code != 0 and said in error
