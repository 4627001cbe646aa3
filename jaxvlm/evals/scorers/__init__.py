"""Scorers, one file per family: plain functions of (prediction, reference), usable without a model.

A prediction is a record with `text`, what the model wrote, or `probabilities`, one number per candidate answer. A
reference is a record in the official file's fields. Every scorer keeps the quirks of the official code that its docstring
names; where that code would raise, the score is 0.0 and `note` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Record = Mapping[str, Any]


class Scored(NamedTuple):
    """One answer's score: what it was understood as, its values (1 is best), and whether it could be understood."""

    parsed: Any
    values: dict[str, float]
    valid: bool = True
    note: str = ""


def accuracy(parsed: Any, right: float | bool, valid: bool = True, note: str = "") -> Scored:
    """The usual case: one value, named accuracy."""
    return Scored(parsed, {"accuracy": float(right)}, valid, note)
