"""The collectives of a compiled program, read out of its HLO text: what kind, over which mesh axes, how large, in a loop?

What the compiler made of the sharding rules shows here and nowhere else: a missing constraint is an all-gather too many.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64} | {
    f"{s}{n}": n for s in "su" for n in (4, 8, 16, 32, 64)
}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COLLECTIVE = re.compile(rf"^(\(?.*?\)?) ({'|'.join(KINDS)})(?:-start)?\((.*?)\)")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Collective(NamedTuple):
    """One instruction. `axes` are the mesh axes along which the devices that talk to each other differ.

    An all-reduce of which every reader takes its own slice counts as the reduce-scatter that it is: XLA fuses the two
    for TPUs and GPUs and not for CPUs.
    """

    kind: str
    axes: tuple[str, ...]
    shapes: tuple[str, ...]  # of the results on one device, e.g. 'f32[4,128]'
    bytes: int  # of the results on one device
    in_loop: bool
    op_name: str  # the path of modules and transformations that jax recorded


def collectives(hlo: str, mesh: Mesh) -> list[Collective]:
    """Every collective of `compiled.as_text()`, in the order of the text. Groups of one device are left out."""
    bodies = _computations(hlo)
    loops = _in_loops(bodies)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            text = _INSTRUCTION.match(line)
            match = text and _COLLECTIVE.match(text[2])
            if not match:
                continue
            axes = _axes(text[2], mesh)
            if not axes:
                continue
            shapes = tuple(re.findall(r"\w+\[[\d,]*\]", match[1]))
            kind = match[2]
            if kind == "all-reduce" and _only_sliced(text[1], lines):
                kind = "reduce-scatter"
            op_name = re.search(r'op_name="([^"]*)"', text[2])
            size = sum(map(_bytes, shapes))
            found.append(Collective(kind, axes, shapes, size, name in loops, op_name[1] if op_name else ""))
    return found


def _computations(hlo: str) -> dict[str, list[str]]:
    bodies, current = {}, None
    for line in hlo.splitlines():
        if start := _COMPUTATION.match(line):
            current = bodies.setdefault(start[1], [])
        elif current is not None and line.startswith(" "):
            current.append(line)
    return bodies


def _called(line: str) -> list[str]:
    branches = _BRANCHES.search(line)
    return _CALLED.findall(line) + (re.findall(r"[\w.\-]+", branches[1]) if branches else [])


def _in_loops(bodies: dict[str, list[str]]) -> set[str]:
    """The computations that run inside a while loop."""
    todo = [name for lines in bodies.values() for line in lines if " while(" in line for name in _called(line)]
    inside: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in inside:
            inside.add(name)
            todo += [called for line in bodies.get(name, ()) for called in _called(line)]
    return inside


def _axes(text: str, mesh: Mesh) -> tuple[str, ...]:
    groups = _groups(text, mesh.size)
    places = np.stack(np.unravel_index(groups, mesh.devices.shape), axis=-1)  # [groups, devices, axes]
    moves = (places != places[:, :1]).any((0, 1))
    return tuple(axis for axis, differs in zip(mesh.axis_names, moves, strict=True) if differs)


def _groups(text: str, devices: int) -> np.ndarray:
    """The devices of each group, int [groups, devices], as positions in the mesh."""
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
        numbers = np.arange(math.prod(dims)).reshape(dims)
        return (numbers if order is None else numbers.transpose(order)).reshape(shape)
    pairs = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", text)
    groups = [[int(n) for n in part.split(",")] for part in re.findall(r"\{([\d,]+)\}", pairs[1])] if pairs else []
    return np.array(groups or [range(devices)])


def _only_sliced(name: str, lines: list[str]) -> bool:
    used = re.compile(rf"%?{re.escape(name)}(?![\w.\-])")
    readers = [
        line
        for line in lines
        if used.search(line.split(" = ", 1)[-1]) and not line.split("=")[0].strip().endswith(name)
    ]
    return bool(readers) and all("dynamic-slice" in line for line in readers)


def _bytes(shape: str) -> int:
    dtype, dims = shape.rstrip("]").split("[")
    bits = BITS.get(dtype, 8)
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8
