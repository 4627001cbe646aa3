"""How many bytes a compiled step sends over each mesh axis, read out of its HLO text, with the trips of its loops."""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64} | {
    f"{s}{n}": n for s in "su" for n in (4, 8, 16, 32, 64)
}


class Traffic(NamedTuple):
    """One array that devices exchange."""

    kind: str
    axes: tuple[str, ...]  # mesh axes along which the devices of a group differ
    group: int  # devices of a group
    shape: str  # of the result on one device, e.g. 'bf16[4096,11008]'
    times: int  # a step
    wire_bytes: int  # that one device sends each time, by the ring algorithm: the least there can be
    op_name: str  # the path of modules and transformations that jax recorded


class _Op(NamedTuple):
    name: str
    shapes: list[str]
    opcode: str
    arguments: str
    rest: str


def traffic(hlo: str, mesh: Mesh, data_trips: int = 1) -> list[Traffic]:
    """Every array exchanged in a step of `compiled.as_text()`. Groups of one device are left out.

    A loop's body counts once a trip. An all-reduce of which every reader takes a slice counts as the reduce-scatter that it
    is: XLA:TPU writes it so. `data_trips` are those of a loop whose bound depends on the data, as in the loss, which goes
    through the supervised tokens alone. Raises `ValueError` for groups of devices written in a way that is not known.
    """
    program = _computations(hlo)
    times, found, seen = _times(program, data_trips), [], set()
    fused = {name for body in program.values() for op in body if op.opcode == "fusion" for name in _called(op)}
    for computation, body in program.items():
        for op in body:
            kind = op.opcode.removesuffix("-start")
            if kind not in KINDS or not (axes := _axes(op.rest, mesh)):
                continue
            name = re.search(r'op_name="([^"]*)"', op.rest)
            # XLA:TPU writes an asynchronous one into the fusion that starts it, those that run beside it and that which ends it.
            if computation in fused:
                same = (re.search(r"channel_id=\d*|$", op.rest)[0], name and name[1], *op.shapes)
                if same in seen:
                    continue
                seen.add(same)
            group = math.prod(mesh.shape[axis] for axis in axes)
            # The start of an asynchronous one has its operands before its results, an all-reduce apart.
            asynchronous = kind != op.opcode and kind != "all-reduce"
            results = op.shapes[op.arguments.count("%") :] if asynchronous else op.shapes
            results = [shape for shape in results if not re.fullmatch(r"[su]32\[\]", shape)]  # contexts of a permute
            for number, shape in enumerate(results):
                element = number if len(results) > 1 else None
                scattered = kind == "all-reduce" and _only_sliced(program, body, op.name, element)
                sent = _wire_bytes("reduce-scatter" if scattered else kind, _bytes(shape), group, scattered)
                what = "reduce-scatter" if scattered else kind
                found.append(Traffic(what, axes, group, shape, times[computation], sent, name[1] if name else ""))
    return found


def _wire_bytes(kind: str, result: int, group: int, whole: bool) -> int:
    """What a device sends for a result of so many bytes; `whole`: a reduce-scatter's given before it is scattered."""
    if kind == "collective-permute":
        return result
    if kind == "reduce-scatter" and not whole:
        result *= group
    return (2 if kind == "all-reduce" else 1) * result * (group - 1) // group


def _computations(hlo: str) -> dict[str, list[_Op]]:
    program: dict[str, list[_Op]] = {}
    body: list[_Op] = []
    for line in hlo.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            body = program.setdefault(start[1], [])
        elif text := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            opcode = re.search(r" ([a-z][a-z\-]*)\(", text[2])
            end = text[2].find(")", opcode.end())
            shapes = re.findall(r"\b[a-z]\w*\[[\d,]*\]", text[2][: opcode.start()])
            body.append(_Op(text[1], shapes, opcode[1], text[2][opcode.end() : end], text[2][end:]))
    return program


def _called(op: _Op) -> list[str]:
    names = re.findall(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", op.rest)
    branches = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
    return names + (re.findall(r"[\w.\-]+", branches[1]) if branches else [])


def _times(program: dict[str, list[_Op]], data_trips: int) -> dict[str, int]:
    """How often a step runs each computation. One that several places call counts as from the busiest of them."""
    callers: dict[str, list[tuple[str, int]]] = {}
    for computation, body in program.items():
        for op in body:
            trips = (_trips(program, op) or data_trips) if op.opcode == "while" else 1
            for name in _called(op):
                callers.setdefault(name, []).append((computation, trips))

    @functools.cache
    def times(computation: str) -> int:
        return max((times(caller) * trips for caller, trips in callers.get(computation, ())), default=1)

    return {computation: times(computation) for computation in program}


def _trips(program: dict[str, list[_Op]], loop: _Op) -> int | None:
    """XLA:GPU writes them down; of XLA:TPU's loops the bound stands in the condition, and they count from 0.

    None where the bound depends on the data.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]
    bodies = [condition, *(name for op in program[condition] for name in _called(op))]
    bounds = {
        op.arguments for body in bodies for op in program[body] if op.opcode == "constant" and op.arguments.isdigit()
    }
    return int(bounds.pop()) if len(bounds) == 1 else None


def _only_sliced(program: dict[str, list[_Op]], body: list[_Op], name: str, element: int | None = None) -> bool:
    """Whether all that reads a value of `body`, or one element of a tuple, takes a slice of it."""
    readers = [op for op in body if name in _operands(op)]
    if element is not None:
        readers = [op for op in readers if re.search(rf"index={element}\b", op.rest)]
    return bool(readers) and all(_slices(program, body, op, name) for op in readers)


def _slices(program: dict[str, list[_Op]], body: list[_Op], reader: _Op, name: str) -> bool:
    if reader.opcode == "dynamic-slice":
        return _operands(reader)[0] == name
    if reader.opcode in ("get-tuple-element", "bitcast", "copy", "reshape", "transpose", "convert"):
        return _only_sliced(program, body, reader.name)
    if reader.opcode != "fusion":
        return False
    (fused,) = _called(reader)
    places = {str(i) for i, operand in enumerate(_operands(reader)) if operand == name}
    inside = [op.name for op in program[fused] if op.opcode == "parameter" and op.arguments in places]
    return all(_only_sliced(program, program[fused], parameter) for parameter in inside)


def _operands(op: _Op) -> list[str]:
    return re.findall(r"%([\w.\-]+)", op.arguments)


def _axes(attributes: str, mesh: Mesh) -> tuple[str, ...]:
    places = np.stack(
        np.unravel_index(_groups(attributes, mesh.size), mesh.devices.shape), axis=-1
    )  # [groups, n, axes]
    moves = (places != places[:, :1]).any((0, 1))
    return tuple(axis for axis, differs in zip(mesh.axis_names, moves, strict=True) if differs)


def _groups(attributes: str, devices: int) -> np.ndarray:
    """The devices of each group, int [groups, n], as positions in the mesh; in any of the four ways XLA writes them."""
    iota = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={iota}", attributes):
        return _iota(found[2], found[3]).reshape(_ints(found[1]))
    if found := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({iota}\))? \{{([^}}]*)\}}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        order = _iota(found[2], found[3]) if found[2] else np.arange(devices)
        order = order.reshape(list(sizes.values()))
        chosen = [list(sizes).index(axis) for axis in re.findall(r"'(\w+)'", found[4])]
        if "(" in found[4]:
            raise ValueError(f"Groups over parts of axes are not read: {found[0]}")
        last = list(range(order.ndim))[-len(chosen) :]
        return np.moveaxis(order, chosen, last).reshape(-1, math.prod(order.shape[axis] for axis in chosen))
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", attributes):
        groups = [_ints(part) for part in re.findall(r"\{([\d,]+)\}", found[1])]
        return np.array(groups or [range(devices)])
    raise ValueError(f"No groups of devices in: {attributes[:200]}")


def _iota(dims: str, order: str | None) -> np.ndarray:
    numbers = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return numbers.transpose(_ints(order)) if order else numbers


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _bytes(shape: str) -> int:
    dtype, dims = shape.rstrip("]").split("[")
    return math.prod(_ints(dims)) * BITS.get(dtype, 8) // 8
