"""From scored answers to a benchmark's numbers, in per cent. A row is one scored answer with its reference.

Each aggregate is a function of rows, so that a bootstrap can call it on resampled ones; none is a mean of means by
accident. A ratio whose denominator is zero is 0.0: the official scripts stop there (evaluation §3), and `undefined`
in the result counts such ratios.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxvlm.evals.scorers.choice import LETTERS


class Row(NamedTuple):
    """One scored answer: values in [0, 1] by name, and what the aggregate needs of its question."""

    id: str
    group: str
    parsed: Any
    values: dict[str, float]
    valid: bool
    reference: dict


Aggregate = Callable[[Sequence[Row]], dict[str, float]]


def mean(rows: Sequence[Row], name: str = "accuracy") -> float:
    """100 x the mean of a value; 0.0 without rows."""
    return 100.0 * sum(row.values[name] for row in rows) / len(rows) if rows else 0.0


def by(rows: Iterable[Any], key: Callable[[Any], Hashable]) -> dict[Any, list]:
    """Rows by a key, in order of first appearance; rows whose key is None are left out."""
    parts: dict[Any, list] = {}
    for row in rows:
        if (name := key(row)) is not None:
            parts.setdefault(name, []).append(row)
    return parts


def overall(*fields: str, value: str = "accuracy") -> Aggregate:
    """The mean over all rows, and for every official field in `fields` the mean by its values."""

    def aggregate(rows: Sequence[Row]) -> dict[str, float]:
        result = {value: mean(rows, value)}
        for field in fields:
            for name, part in by(rows, lambda row, field=field: row.reference.get(field)).items():
                result[f"{value}/{field}={name}"] = mean(part, value)
        return result

    return aggregate


def all_right(rows: Sequence[Row]) -> float:
    """The share of groups whose answers are all right: MME's acc+, MMVP's pairs, MMBench's circles."""
    return 100.0 * _share(
        all(row.values["accuracy"] == 1.0 for row in part) for part in by(rows, lambda r: r.group).values()
    )


def _share(flags: Any) -> float:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else 0.0


# -------------------------------------------------------------------------------------------------------------- yes/no


def binary_scores(rows: Sequence[Row]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 (of yes) and the share of yes, as in POPE's script; and specificity, no where it is no."""
    yes = [row.parsed == "yes" for row in rows]
    truth = [row.reference["label"] != "no" for row in rows]
    both = sum(a and b for a, b in zip(yes, truth, strict=True))
    precision = both / sum(yes) if sum(yes) else 0.0
    recall = both / sum(truth) if sum(truth) else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    absent = len(rows) - sum(truth)
    specificity = (absent - sum(yes) + both) / absent if absent else 0.0
    scores = {"accuracy": mean(rows), "precision": precision, "recall": recall, "f1": f1, "yes_ratio": _share(yes)}
    scores["specificity"] = specificity
    return scores | {name: 100.0 * scores[name] for name in scores if name != "accuracy"}


SUMMED = ("f1", "accuracy", "yes_ratio", "specificity")


def pope(rows: Sequence[Row]) -> dict[str, float]:
    """Each split's scores and their means; LLaVA's headline is the mean of the F1s."""
    parts = {name: binary_scores(part) for name, part in by(rows, lambda row: row.reference["category"]).items()}
    result = {name: float(np.mean([part[name] for part in parts.values()])) for name in SUMMED}
    result["undefined"] = float(sum(part["yes_ratio"] == 0.0 for part in parts.values()))
    return result | {f"{name}/{split}": value for split, part in parts.items() for name, value in part.items()}


def pope_prismatic(rows: Sequence[Row]) -> dict[str, float]:
    """The mean of the splits' accuracies; areas under the curves by split and pooled."""
    parts = by(rows, lambda row: row.reference["category"])
    result = {"accuracy": float(np.mean([mean(part) for part in parts.values()]))}
    for name, part in [*parts.items(), ("", rows)]:
        end = f"/{name}" if name else ""
        truth = [row.reference["label"] == "yes" for row in part]
        result[f"accuracy{end}"] = result.get(f"accuracy{end}", mean(part))
        result |= areas([row.values.get("positive", 0.0) for row in part], truth, end)
    return result


def vsr(rows: Sequence[Row]) -> dict[str, float]:
    """Accuracy, the areas where there are probabilities, and Prismatic's baseline of always saying True."""
    truth = [bool(int(row.reference["label"])) for row in rows]
    result = {"accuracy": mean(rows), "always_true": 100.0 * _share(truth)}
    if rows and "positive" in rows[0].values:
        result |= areas([row.values.get("positive", 0.0) for row in rows], truth)
    return result


def areas(shares: Sequence[float], truth: Sequence[bool], end: str = "") -> dict[str, float]:
    """Areas under the ROC curve and (as average precision) the precision-recall curve, in per cent."""
    return {f"roc_auc{end}": 100.0 * roc_auc(shares, truth), f"pr_auc{end}": 100.0 * average_precision(shares, truth)}


def roc_auc(shares: Sequence[float], truth: Sequence[bool]) -> float:
    """The chance that a true one has the higher share, ties counting half; 0.0 if all are true or none is."""
    shares, truth = np.asarray(shares, np.float64), np.asarray(truth, bool)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return 0.0
    _, where, counts = np.unique(shares, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # the mean rank of each distinct share
    return float((ranks[where][truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(shares: Sequence[float], truth: Sequence[bool]) -> float:
    """Sum over distinct thresholds of the gain in recall x precision there (scikit-learn's); 0.0 if none is true."""
    shares, truth = np.asarray(shares, np.float64), np.asarray(truth, bool)
    if not truth.any():
        return 0.0
    order = np.argsort(-shares, kind="stable")
    hits = np.cumsum(truth[order])
    last = np.append(np.flatnonzero(np.diff(shares[order])), truth.size - 1)  # where the share changes
    precision, recall = hits[last] / (last + 1), hits[last] / truth.sum()
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


# ----------------------------------------------------------------------------------------------------------------- MME

PERCEPTION = tuple("existence count position color posters celebrity scene landmark artwork OCR".split())
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme(rows: Sequence[Row]) -> dict[str, float]:
    """A task's score is accuracy + accuracy of images with both questions right; sums over 10 and 4 tasks (2000, 800)."""
    tasks = {
        name: mean(part) + all_right(part) for name, part in by(rows, lambda row: row.reference["category"]).items()
    }
    result = {
        "perception": sum(tasks.get(name, 0.0) for name in PERCEPTION),
        "cognition": sum(tasks.get(name, 0.0) for name in COGNITION),
    }
    return result | {"total": sum(result.values())} | {f"score/{name}": value for name, value in tasks.items()}


# -------------------------------------------------------------------------------------------------------------- others


def gqa(rows: Sequence[Row]) -> dict[str, float]:
    """GQA's numbers over the balanced questions: overall, binary and open, by type, and the distribution (lower is better)."""
    rows = [row for row in rows if row.reference.get("isBalanced", True)]
    result = {"accuracy": mean(rows)}
    typed = [row for row in rows if "types" in row.reference]
    kinds = by(typed, lambda row: "open" if row.reference["types"]["structural"] == "query" else "binary")
    result |= {name: mean(part) for name, part in kinds.items()}
    for kind in ("structural", "semantic"):
        parts = by(typed, lambda row, kind=kind: row.reference["types"][kind])
        result |= {f"accuracy/{kind}={name}": mean(part) for name, part in parts.items()}
    grouped = by(rows, lambda row: row.reference.get("groups", {}).get("global"))
    return result | ({"distribution": _distribution(grouped)} if grouped else {})


def _distribution(groups: dict[str, list[Row]]) -> float:
    """Chi-square of the answers given against the true ones, weighted by group size, / 100."""
    total, count = 0.0, 0
    for rows in groups.values():
        truth, found = Counter(row.reference["answer"] for row in rows), Counter(row.parsed for row in rows)
        total += sum((found[answer] - number) ** 2 / number for answer, number in truth.items()) * len(rows)
        count += len(rows)
    return total / count / 100


def vizwiz(rows: Sequence[Row]) -> dict[str, float]:
    """Accuracy, overall and by answerability, and average precision and F1 of saying unanswerable."""
    result = {"accuracy": mean(rows)}
    known = [row for row in rows if "answerable" in row.reference]
    if known:
        truth = [not int(row.reference["answerable"]) for row in known]
        said = [row.values["unanswerable"] for row in known]
        both, total = sum(s and t for s, t in zip(said, truth, strict=True)), sum(said) + sum(truth)
        for name, part in by(
            known, lambda row: ("unanswerable", "answerable")[int(row.reference["answerable"])]
        ).items():
            result[f"accuracy/{name}"] = mean(part)
        result["unanswerable_ap"] = 100.0 * average_precision(said, truth)
        result["unanswerable_f1"] = 100.0 * 2 * both / total if total else 0.0
    return result


def scienceqa(rows: Sequence[Row]) -> dict[str, float]:
    """`image_accuracy`, over questions with an image, is the number that papers print as SQA-I."""
    result = {"image_accuracy": mean([row for row in rows if row.reference.get("image")]), "accuracy": mean(rows)}
    return result | {k: v for k, v in overall("subject", "grade")(rows).items() if k != "accuracy"}


def circular(rows: Sequence[Row]) -> dict[str, float]:
    """MMBench: a question is right if it is in every rotation; `vanilla` counts the unrotated ones alone."""
    first = [row for row in rows if row.reference.get("rotation", 0) == 0]
    result = {"circular": all_right(rows), "vanilla": mean(first)}
    for field in ("l2-category", "category"):
        for name, part in by(rows, lambda row, field=field: row.reference.get(field)).items():
            result[f"circular/{field}={name}"] = all_right(part)
    return result


def seed(rows: Sequence[Row]) -> dict[str, float]:
    """Micro averages: all, image, video, and by question type."""
    result = {"accuracy": mean(rows)}
    for name, part in by(rows, lambda row: row.reference.get("data_type")).items():
        result[f"accuracy/{name}"] = mean(part)
    for name, part in by(rows, lambda row: row.reference.get("question_type_id")).items():
        result[f"accuracy/type={name}"] = mean(part)
    return result


def pairs(rows: Sequence[Row]) -> dict[str, float]:
    """MMVP: both questions of a pair right; single questions beside it."""
    return {"pair_accuracy": all_right(rows), "accuracy": mean(rows)}


def cvbench(rows: Sequence[Row]) -> dict[str, float]:
    """CV-Bench: the mean of 2D (the mean of ADE20K and COCO) and 3D (Omni3D)."""
    parts = {name: mean(part) for name, part in by(rows, lambda row: row.reference["source"]).items()}
    flat = (parts.get("ADE20K", 0.0) + parts.get("COCO", 0.0)) / 2
    result = {"accuracy": (flat + parts.get("Omni3D", 0.0)) / 2, "2D": flat, "3D": parts.get("Omni3D", 0.0)}
    return result | {k: v for k, v in overall("source", "task")(rows).items() if k != "accuracy"}


def ocrbench(rows: Sequence[Row]) -> dict[str, float]:
    """OCRBench: points (one a right answer, 1000 in all), and per cent by type."""
    return {"points": sum(row.values["accuracy"] for row in rows)} | overall("type")(rows)


def chair(rows: Sequence[Row]) -> dict[str, float]:
    """CHAIRs, captions with a hallucinated object, and CHAIRi, hallucinated among all mentions: lower is better.

    `coverage`, the share of the images' objects that captions name, is what hallucinating less may cost.
    """
    mentions, false = (sum(row.values[name] for row in rows) for name in ("mentions", "hallucinated"))
    result = {"chair_s": 100.0 - mean(rows, "clean"), "chair_i": 100.0 * false / mentions if mentions else 0.0}
    present = sum(row.values["objects"] for row in rows)
    result["coverage"] = 100.0 * sum(row.values["covered"] for row in rows) / present if present else 0.0
    return result | {"mentions_per_caption": mentions / len(rows) if rows else 0.0, "undefined": float(not mentions)}


MMMU_SEED = 42  # of the official code


def mmmu(rows: Sequence[Row]) -> dict[str, float]:
    """MMMU's: a choice that cannot be read is drawn, all of them from one stream in the order of the questions."""
    stream, guessed, counted = random.Random(MMMU_SEED), 0, []
    for row in rows:
        if not row.valid:
            letters = LETTERS[: len(row.reference["choices"])]
            right = bool(letters) and stream.choice(letters) in row.reference["answer"]
            guessed, row = guessed + 1, row._replace(values={"accuracy": float(right)})
        counted.append(row)
    return overall("subject")(counted) | {"guessed": float(guessed)}


def mmvet(rows: Sequence[Row]) -> dict[str, float]:
    """MM-Vet: the mean of the judge's scores, by capability and by their combinations."""
    result = {"total": mean(rows, "score")}
    capabilities = sorted({name for row in rows for name in row.reference.get("capability", ())})
    for name in capabilities:
        result[f"capability={name}"] = mean([row for row in rows if name in row.reference["capability"]], "score")
    for name, part in by(rows, lambda row: "+".join(sorted(row.reference.get("capability", ()))) or None).items():
        result[f"integration={name}"] = mean(part, "score")
    return result


def llava_bench(rows: Sequence[Row]) -> dict[str, float]:
    """LLaVA-Bench: the ratio of the mean ratings, each rounded to three decimals first; failures (-1, -1) count in."""
    result = {}
    for name, part in [("all", rows), *by(rows, lambda row: row.reference.get("category")).items()]:
        reference, model = (round(float(np.mean([row.values[k] for row in part])), 3) for k in ("reference", "model"))
        end = "" if name == "all" else f"/{name}"
        result[f"relative{end}"] = round(model / reference * 100, 1) if reference else 0.0
        result[f"reference{end}"], result[f"model{end}"] = round(reference * 10, 1), round(model * 10, 1)
    return result
