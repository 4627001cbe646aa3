"""Who answers, the language model or the whole? A sighted run beside a blind one of the same model, and both beside chance.

Cambrian-1 (Tong et al. 2024, §3.1) calls a benchmark language-centric where seeing is worth less than 5 %, and names those on which
a blind model is about 40 % above chance as ones with a language bias; it gives no threshold for that, so `BIAS` is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxvlm.evals.baselines import guessed
from jaxvlm.evals.compare import compare
from jaxvlm.evals.scorers import Record

CENTRIC, BIAS = 5.0, 30.0  # points of 100
FULL = {("mme", "perception"): 2000.0, ("ocrbench", "points"): 1000.0}  # the best that a headline can be, where not 100


def seeing(
    sighted: Mapping[str, Any], blind: Mapping[str, Any], references: Sequence[Record], *, resamples: int, seed: int = 0
) -> dict[str, Any]:
    """What seeing is worth by the headline number, what language alone is worth over chance, and the labels.

    Returns `gap` and its 95 % `gap_interval` (paired bootstrap over groups), `chance` and `prior` (None where chance has no
    simple form) and `prior_interval`, and `labels`: 'language-centric' and 'language bias' to True, False, or None where the
    interval does not tell.
    """
    about = compare({"sighted": [sighted], "blind": [blind]}, references, resamples=resamples, seed=seed)
    (pair,) = about["pairs"]
    point = FULL.get((sighted["task"], sighted["headline"]), 100.0) / 100
    found = {"blind": blind["blind"], "gap": pair["difference"], "gap_interval": pair["interval"]}
    found["labels"] = {"language-centric": _told(*(bound / point for bound in pair["interval"]), below=CENTRIC)}
    found["chance"] = chance = guessed(sighted["task"], sighted["protocol"], references)
    found["prior"] = found["prior_interval"] = None
    if chance is not None:
        found["prior"] = blind["value"] - chance
        found["prior_interval"] = [bound - chance for bound in about["runs"]["blind"]["interval"]]
        above = _told(*(bound / point for bound in found["prior_interval"]), below=BIAS)
        found["labels"]["language bias"] = None if above is None else not above
    return found


def labels_in_words(labels: Mapping[str, bool | None]) -> str:
    """The labels that hold, those that may with a question mark; a dash where none does."""
    shown = [name + "?" * (told is None) for name, told in labels.items() if told is not False]
    return ", ".join(shown) or "–"


def seeing_in_words(found: Mapping[str, Any]) -> str:
    """A line for the terminal."""

    def shown(name: str) -> str:
        low, high = found[f"{name}_interval"]
        return f"{found[name]:.2f} ({low:.2f} to {high:.2f})"

    prior = f"; language alone is worth {shown('prior')} over chance" if found["prior"] is not None else ""
    return (
        f"Seeing is worth {shown('gap')}, beside {found['blind']}{prior}. Labels: {labels_in_words(found['labels'])}."
    )


def _told(low: float, high: float, *, below: float) -> bool | None:
    """Whether an interval lies below a bound; None if the bound is inside."""
    return True if high < below else False if low >= below else None
