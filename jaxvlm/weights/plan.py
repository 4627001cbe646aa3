"""What of a checkpoint goes where: every tensor and every parameter accounted for, from names and shapes alone."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from jaxvlm.weights import axes as layout
from jaxvlm.weights.families.base import Family, Rule
from jaxvlm.weights.readers import Index, TensorSource, WeightsError

FLOATS = {np.dtype(kind) for kind in ("f2", "f4", "f8", ml_dtypes.bfloat16)}


@dataclass
class ImportReport:
    """What became of every tensor of the files and every parameter of the model; prints as a summary, or a `table`."""

    path: str = ""
    mapped: list[tuple[str, str, str]] = field(
        default_factory=list
    )  # file tensor, parameter, its layout in axes' words
    unused: list[tuple[str, str]] = field(default_factory=list)  # file tensor, why
    initialised: list[tuple[str, str]] = field(default_factory=list)  # parameter, how
    missing: list[tuple[str, str]] = field(default_factory=list)  # file tensor, the parameter that needs it
    unmapped: list[str] = field(default_factory=list)  # file tensor that nothing is known of
    notes: list[str] = field(default_factory=list)  # what was taken for granted

    def __str__(self) -> str:
        tensors, parameters = ({entry[i] for entry in self.mapped} for i in (0, 1))
        reasons = Counter(why for _, why in self.unused)
        lines = [f"{self.path}: {len(tensors)} tensors into {len(parameters)} parameters"]
        lines += [f"  unused, {count}: {why}" for why, count in reasons.items()]
        lines += [f"  initialised: {parameter} ({how})" for parameter, how in self.initialised]
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    def table(self) -> str:
        """Every tensor and parameter, a line each; the layers of a stack share one."""

        def transformed(how: str) -> bool:
            return how.partition(" ->")[0].strip() != how.partition("-> ")[2].strip()

        rows = [(name, parameter, how if transformed(how) else "") for name, parameter, how in self.mapped]
        blocks = {
            "Mapped": [(name, parameter) for name, parameter, how in rows if not how],
            "Transformed": [row for row in rows if row[2]],
            "Left at initialisation": self.initialised,
            "Unused": self.unused,
            "Missing": self.missing,
            "Unmapped": [(name,) for name in self.unmapped],
        }
        lines = [self.path]
        for title, entries in blocks.items():
            lines += [f"{title}, {len(entries)}:", *_columns(_by_layer(entries))] if entries else [f"{title}: none"]
        return "\n".join(lines + self.notes)


@dataclass(frozen=True)
class Leaf:
    """One parameter: its shape and a function that reads any part of it.

    A `stacked` one is best read layer by layer, and parts along its axis `rows` lie in the file one after the other.
    `dtype` is the file's.
    """

    path: str
    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]
    stacked: bool = False
    dtype: np.dtype = np.dtype(np.float32)
    rows: int | None = None


@dataclass(frozen=True)
class Piece:
    """One table's share of a model: the tensors it has to answer for, and where in the tree its parameters stand."""

    path: str  # 'vision', 'vision/towers_0', 'connector', 'llm'
    family: Family
    config: Any  # what the family's functions read
    source: TensorSource
    names: dict[str, str]  # name in the family's table: name in the source
    resized: Any = None  # the model's own configuration of the part, where it is for another image size


@dataclass
class _Faults:
    missing: dict[str, str] = field(default_factory=dict)  # name in the table: parameter
    unknown: list[str] = field(default_factory=list)  # names in the table's spelling
    misshapen: list[str] = field(default_factory=list)
    mistyped: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unknown or self.misshapen or self.mistyped)


def plan(pieces: Sequence[Piece], report: ImportReport | None = None) -> list[list[Leaf]]:
    """Each piece's parameters and how to read them; the paths of leaves are within their piece.

    Raises `WeightsError` listing every missing, unknown and misshapen tensor of all pieces; the report is filled in
    all the same.
    """
    report = ImportReport() if report is None else report
    report.path = ", ".join(dict.fromkeys(str(piece.source.path) for piece in pieces))
    leaves, complaints = [], []
    for piece in pieces:
        found, takes, faults = _plan_piece(piece, report)
        leaves.append(found)
        if faults:
            complaints.append(_complaint(piece, takes, faults))
    if complaints:
        raise WeightsError("\n".join(complaints))
    return leaves


def _plan_piece(piece: Piece, report: ImportReport) -> tuple[list[Leaf], list[str], _Faults]:
    """(parameters, the names that rules take, what is wrong)."""
    source, names, config = piece.source, piece.names, piece.config
    family = piece.family.at(config)
    leaves, faults = [], _Faults()
    takes: dict[str, list[tuple[str, str]]] = {}
    for rule in family.active(config):
        for path, instances in _instances(rule, family.layers(config)):
            keys = [key for instance in instances for key in instance]
            for key in keys:
                takes.setdefault(key, []).append((f"{piece.path}/{path}", rule.axes))
            absent = {key: f"{piece.path}/{path}" for key in keys if key not in names}
            faults.missing |= absent
            if absent:
                continue
            files = [tuple(names[key] for key in instance) for instance in instances]
            sizes, wrong = _bind(source, rule, files, family.sizes(config))
            faults.misshapen += [f"{name} is {shape}, {piece.path}/{path} {needs}" for name, shape, needs in wrong]
            faults.mistyped += [
                f"{name} is {source.dtype(name)}, for {piece.path}/{path}"
                for instance in files
                for name in instance
                if source.dtype(name) not in FLOATS
            ]
            if not wrong:
                leaves.append(_leaf(source, rule, path, files, sizes))
    left = [key for key in names if key not in takes]
    reasons = {key: _reason(key, family, config) for key in left}
    faults.unknown = [key for key in left if reasons[key] is None]
    report.mapped += [(names[key], *entry) for key, entries in takes.items() if key in names for entry in entries]
    report.unused += [(names[key], why) for key, why in reasons.items() if why is not None]
    report.missing += list(faults.missing.items())
    report.unmapped += [names[key] for key in faults.unknown]
    return leaves, list(takes), faults


def _instances(rule: Rule, layers: range) -> list[tuple[str, list[tuple[str, ...]]]]:
    """[(parameter, [the names of layer 0, of layer 1, ...])]; a parameter of one layer has one entry."""
    if "{i}" not in rule.names[0]:
        return [(rule.path, [rule.names])]
    numbers = [str(i) for i in (layers if rule.layers is None else rule.layers) if i >= rule.first]
    numbered = [tuple(name.replace("{i}", i) for name in rule.names) for i in numbers]
    if rule.stacked:
        return [(rule.path, numbered)]
    return [(rule.path.replace("{i}", i), [keys]) for i, keys in zip(numbers, numbered, strict=True)]


def slot_rows(rule: Rule, sizes: dict[str, int]) -> list[int]:
    """Where each of a joined tensor's parts starts along the first axis, and where the last one ends."""
    lengths = [math.prod(sizes[name] for name in slot.split()) for slot in rule.slots]
    return [sum(lengths[:n]) for n in range(len(lengths) + 1)]


def _bind(
    source: TensorSource, rule: Rule, files: list[tuple[str, ...]], sizes: dict[str, int]
) -> tuple[dict[str, int], list[tuple[str, list[int], str]]]:
    """The sizes of the rule's axes, with what the configuration leaves open read off the file; and what does not fit."""
    wrong = []
    axes = f"{rule.file} -> {rule.file}" if rule.file else rule.axes
    for name, *_ in files:
        shape = source.shape(name)
        if rule.slots:
            rows = slot_rows(rule, sizes)
            if shape[:1] != (rows[-1],):
                wrong.append((name, list(shape), f"and its neighbours need {rows[-1]} rows"))
                continue
            shape = (rows[rule.slot + 1] - rows[rule.slot], *shape[1:])
        bound = layout.bind(axes, shape, sizes)
        if bound is None:
            groups = layout.parse(axes)[0]
            known = all(axis in sizes for group in groups for axis in group)
            needs = f"needs {list(layout.shape(groups, sizes))}" if known else f"needs '{axes.split(' ->')[0]}'"
            wrong.append((name, list(shape), needs))
        else:
            sizes = bound
    return sizes, wrong


def _leaf(source: TensorSource, rule: Rule, path: str, files: list[tuple[str, ...]], sizes: dict[str, int]) -> Leaf:
    shape = layout.shape(layout.parse(rule.axes)[1], sizes)
    start = slot_rows(rule, sizes)[rule.slot] if rule.slots else 0

    def one(names: tuple[str, ...], index: Index) -> np.ndarray:
        if rule.combine is not None:
            whole = rule.combine(*(source.read(name).astype(np.float32) for name in names))
            return layout.convert(whole, rule.axes, sizes)[index]
        if not start:
            return layout.convert_slice(rule.axes, sizes, index, lambda part: source.read(names[0], part))

        def shifted(part: Index) -> np.ndarray:
            return source.read(names[0], (slice(part[0].start + start, part[0].stop + start), *part[1:]))

        return layout.convert_slice(rule.axes, sizes, index, shifted)

    def layers(index: Index) -> np.ndarray:
        chosen = files[index[0]]
        return one(chosen[0], index[1:])[None] if len(chosen) == 1 else np.stack([one(c, index[1:]) for c in chosen])

    file, ours = layout.parse(rule.axes)
    rows = ours.index(file[0][:1]) if file[0][:1] in ours and rule.combine is None else None
    dtype = np.dtype(np.float32) if rule.combine is not None else source.dtype(files[0][0])
    if rule.stacked:
        return Leaf(path, (len(files), *shape), layers, True, dtype, None if rows is None else rows + 1)
    return Leaf(path, shape, lambda index: one(files[0], index), False, dtype, rows)


def _reason(key: str, family: Family, config: Any) -> str | None:
    """Why a tensor that no rule takes is not needed, or None if nothing is known of it."""
    for pattern, why in family.unused:
        if re.fullmatch(pattern, key):
            return why
    for rule in family.rules if family.part == "vision" else ():
        for name in rule.names if rule.layers is None else ():
            found = re.fullmatch(re.escape(name).replace(r"\{i\}", r"(\d+)"), key) if "{i}" in name else None
            if found and len(family.layers(config)) <= int(found[1]) < config.depth:
                return "layers after the selected features"
    return None


# --------------------------------------------------------------------------------------------------------------- words


def _complaint(piece: Piece, takes: list[str], faults: _Faults) -> str:
    def near(name: str, others: list[str], number: int) -> str:
        found = difflib.get_close_matches(name, others, n=1, cutoff=0.6) if number < 20 else []  # slow in long lists
        return f" (nearest: {found[0]})" if found else ""

    def block(title: str, entries: Iterable[str]) -> list[str]:
        entries = [f"  {entry}" for entry in entries]
        return [f"{title}, {len(entries)}:", *entries] if entries else []

    names, missing = piece.names, faults.missing
    strays = [names[key] for key in faults.unknown]
    known = [key for key in takes if key in missing] or takes
    absent = [f"{key}, for {path}" + near(key, strays, n) for n, (key, path) in enumerate(missing.items())]
    lines = [
        f"{piece.source.path} does not fit the configured {piece.path} part (read as {piece.family.name}).",
        *block("Missing from the file", absent),
        *block("In the file but unknown", [names[key] + near(key, known, n) for n, key in enumerate(faults.unknown)]),
        *block("Of another shape", faults.misshapen),
        *block("Not stored as float16, bfloat16, float32 or float64", faults.mistyped),
    ]
    if faults.mistyped:
        lines.append("Quantised weights are not read (but for GGUF). Get the checkpoint that this one was made from.")
    if any(f"{piece.path}/embed/embedding" in entry for entry in faults.misshapen):
        lines.append("If the number of rows is right, correct vocab_size in config.json.")
    if piece.family.name == "peft" and missing:
        lines.append("Adapters on some of the layers only can be merged: --merge (merge=True).")
    if missing.keys() & {"lm_head.weight", "output.weight"}:
        lines.append("If the model uses its embedding as the head, set tie_embeddings = True.")
    return "\n".join(lines)


def _by_layer(entries: Sequence[tuple[str, ...]]) -> list[list[str]]:
    """The entries with those that differ in one number only made one: 'layers.{0-31}.norm.weight'."""
    groups: dict[tuple, list[str]] = {}
    for name, *rest in entries:
        key = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name, count=1)
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        groups.setdefault((key, *rest), []).append(number.group() if number else "")
    rows = []
    for (key, *rest), numbers in groups.items():
        span = numbers[0] if len(numbers) == 1 else f"{{{numbers[0]}-{numbers[-1]}}}"
        rows.append([key.replace("{}", span), *rest])
    return rows


def _columns(rows: list[list[str]]) -> list[str]:
    width = max(len(row[0]) for row in rows)
    return ["  " + "  ".join([row[0].ljust(width), *row[1:]]).rstrip() for row in rows]
