"""What of a checkpoint goes where: every tensor and every parameter accounted for, from names and shapes alone."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxvlm.weights import axes as layout
from jaxvlm.weights.families.base import Family, Rule
from jaxvlm.weights.readers import Index, TensorSource, WeightsError


@dataclass
class ImportReport:
    """What became of every tensor of a file and every parameter of a part; prints as a summary."""

    path: str = ""
    mapped: list[tuple[str, str, str]] = field(default_factory=list)  # file tensor, parameter, how
    unused: list[tuple[str, str]] = field(default_factory=list)  # file tensor, why
    initialised: list[tuple[str, str]] = field(default_factory=list)  # parameter, how

    def __str__(self) -> str:
        parameters = {parameter for _, parameter, _ in self.mapped}
        reasons = Counter(why for _, why in self.unused)
        lines = [f"{self.path}: {len(self.mapped)} tensors into {len(parameters)} parameters"]
        lines += [f"  unused, {count}: {why}" for why, count in reasons.items()]
        lines += [f"  initialised: {parameter} ({how})" for parameter, how in self.initialised]
        return "\n".join(lines)


@dataclass(frozen=True)
class Leaf:
    """One parameter: its shape and a function that reads any part of it."""

    path: str
    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]


def plan_part(
    source: TensorSource, names: dict[str, str], family: Family, config: Any, report: ImportReport | None = None
) -> list[Leaf]:
    """The parameters of one part and how to read them.

    `names` maps names in the family's table to names in the file, and holds every tensor that the part has to answer
    for. Raises `WeightsError` listing every missing, unknown and misshapen tensor.
    """
    leaves, takes, missing, misshapen = [], {}, {}, []
    for rule in family.active(config):
        for path, instances in _instances(rule, family.layers(config)):
            keys = [key for instance in instances for key in instance]
            takes |= {key: (path, rule.axes) for key in keys}
            absent = {key: path for key in keys if key not in names}
            missing |= absent
            if not absent:
                files = [tuple(names[key] for key in instance) for instance in instances]
                sizes, wrong = _bind(source, rule, files, family.sizes(config))
                misshapen += [f"{name} is {shape}, {family.part}/{path} {needs}" for name, shape, needs in wrong]
                if not wrong:
                    leaves.append(_leaf(source, rule, path, files, sizes))
    left = [key for key in names if key not in takes]
    reasons = {key: _reason(key, family, config) for key in left}
    unknown = [key for key in left if reasons[key] is None]
    if missing or unknown or misshapen:
        known = [key for key in takes if key in missing] or list(takes)
        raise WeightsError(_complaint(source, family, names, known, missing, unknown, misshapen))
    if report is not None:
        report.path = str(source.path)
        report.mapped += [(names[key], f"{family.part}/{path}", how) for key, (path, how) in takes.items()]
        report.unused += [(names[key], why) for key, why in reasons.items()]
    return leaves


def _instances(rule: Rule, layers: range) -> list[tuple[str, list[tuple[str, ...]]]]:
    """[(parameter, [the names of layer 0, of layer 1, ...])]; a parameter of one layer has one entry."""
    if "{i}" not in rule.names[0]:
        return [(rule.path, [rule.names])]
    numbers = [str(i) for i in layers if i >= rule.first]
    numbered = [tuple(name.replace("{i}", i) for name in rule.names) for i in numbers]
    if rule.stacked:
        return [(rule.path, numbered)]
    return [(rule.path.replace("{i}", i), [keys]) for i, keys in zip(numbers, numbered, strict=True)]


def _bind(
    source: TensorSource, rule: Rule, files: list[tuple[str, ...]], sizes: dict[str, int]
) -> tuple[dict[str, int], list[tuple[str, list[int], str]]]:
    """The sizes of the rule's axes, with what the configuration leaves open read off the file; and what does not fit."""
    wrong = []
    for name, *_ in files:
        shape = source.shape(name)
        bound = layout.bind(rule.axes, shape, sizes)
        if bound is None:
            groups = layout.parse(rule.axes)[0]
            known = all(axis in sizes for group in groups for axis in group)
            needs = f"needs {list(layout.shape(groups, sizes))}" if known else f"needs '{rule.axes.split(' ->')[0]}'"
            wrong.append((name, list(shape), needs))
        else:
            sizes = bound
    return sizes, wrong


def _leaf(source: TensorSource, rule: Rule, path: str, files: list[tuple[str, ...]], sizes: dict[str, int]) -> Leaf:
    shape = layout.shape(layout.parse(rule.axes)[1], sizes)

    def one(names: tuple[str, ...], index: Index) -> np.ndarray:
        if rule.combine is None:
            return layout.convert_slice(rule.axes, sizes, index, lambda part: source.read(names[0], part))
        whole = rule.combine(*(source.read(name).astype(np.float32) for name in names))
        return layout.convert(whole, rule.axes, sizes)[index]

    if rule.stacked:
        shape = (len(files), *shape)
        return Leaf(path, shape, lambda index: np.stack([one(names, index[1:]) for names in files[index[0]]]))
    return Leaf(path, shape, lambda index: one(files[0], index))


def _reason(key: str, family: Family, config: Any) -> str | None:
    """Why a tensor that no rule takes is not needed, or None if nothing is known of it."""
    for pattern, why in family.unused:
        if re.fullmatch(pattern, key):
            return why
    for rule in family.rules:
        for name in rule.names:
            found = re.fullmatch(re.escape(name).replace(r"\{i\}", r"(\d+)"), key) if "{i}" in name else None
            if found and len(family.layers(config)) <= int(found[1]) < config.depth:
                return "layers after the selected features"
    return None


def _complaint(
    source: TensorSource,
    family: Family,
    names: dict[str, str],
    known: list[str],
    missing: dict[str, str],
    unknown: list[str],
    misshapen: list[str],
) -> str:
    def near(name: str, others: list[str], number: int) -> str:
        found = difflib.get_close_matches(name, others, n=1, cutoff=0.6) if number < 20 else []  # slow in long lists
        return f" (nearest: {found[0]})" if found else ""

    def block(title: str, entries: Iterable[str]) -> list[str]:
        entries = [f"  {entry}" for entry in entries]
        return [f"{title}, {len(entries)}:", *entries] if entries else []

    strays = [names[key] for key in unknown]
    absent = [
        f"{key}, for {family.part}/{path}" + near(key, strays, n) for n, (key, path) in enumerate(missing.items())
    ]
    lines = [
        f"{source.path} does not fit the configured {family.part} part (read as {family.name}).",
        *block("Missing from the file", absent),
        *block("In the file but unknown", [names[key] + near(key, known, n) for n, key in enumerate(unknown)]),
        *block("Of another shape", misshapen),
    ]
    if missing.keys() & {"lm_head.weight", "output.weight"}:
        lines.append("If the model uses its embedding as the head, set tie_embeddings = True.")
    return "\n".join(lines)
