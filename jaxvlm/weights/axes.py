"""One-line descriptions of how a tensor is laid out in a file and in our tree, usable in both directions.

`"(H h) D -> D H h"` reads: the file holds a matrix whose rows are H heads of h; ours is `[D, H, h]`. The names carry
sizes, so the same line also says which shape the file must have. A `1` stands for an axis of size one that ours does
not have.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import numpy as np

Groups = tuple[tuple[str, ...], ...]


@functools.cache
def parse(axes: str) -> tuple[Groups, Groups]:
    """`"(H h) D -> D H h"` as `((("H", "h"), ("D",)), (("D",), ("H",), ("h",)))`; a `1` is an empty group."""
    left, right = (
        tuple(
            tuple(name for name in part.strip("()").split() if name != "1")
            for part in re.findall(r"\([^)]*\)|\S+", side)
        )
        for side in axes.split("->")
    )
    assert sorted(sum(left, ())) == sorted(sum(right, ())), axes
    return left, right


def reverse(axes: str) -> str:
    """The same description read from our tree to the file."""
    left, right = axes.split("->")
    return f"{right.strip()} -> {left.strip()}"


def shape(groups: Groups, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[name] for name in group) for group in groups)


def bind(axes: str, actual: tuple[int, ...], sizes: dict[str, int]) -> dict[str, int] | None:
    """`sizes` with the names that it lacks read off the file's `actual` shape, or None if that shape does not fit."""
    groups = parse(axes)[0]
    if len(groups) != len(actual):
        return None
    bound = dict(sizes)
    for group, size in zip(groups, actual, strict=True):
        unknown = [name for name in group if name not in bound]
        if len(unknown) > 1:
            return None
        known = math.prod(bound[name] for name in group if name in bound)
        if unknown and size % known == 0:
            bound[unknown[0]] = size // known
        elif unknown or size != known:
            return None
    return bound


def convert(array: np.ndarray, axes: str, sizes: dict[str, int]) -> np.ndarray:
    """A whole tensor from the left layout to the right one."""
    left, right = parse(axes)
    full = tuple(slice(0, size) for size in shape(right, sizes))
    return convert_slice(axes, sizes, full, lambda index: array[index])


def convert_slice(
    axes: str,
    sizes: dict[str, int],
    index: tuple[slice, ...],
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> np.ndarray:
    """The part `index` of the right layout, asking `read` for no more of the left layout than one box around it.

    A part of a merged axis can be asked for only along its first name; anything else is read whole and cut here.
    """
    left, right = parse(axes)
    wanted, cut_after = {}, []
    for group, size, part in zip(right, shape(right, sizes), index, strict=True):
        start, stop, step = part.indices(size)
        assert step == 1, "shards are contiguous"
        if len(group) == 1:
            wanted[group[0]] = (start, stop)
            cut_after.append(slice(None))
        else:
            wanted |= {name: (0, sizes[name]) for name in group}
            cut_after.append(slice(start, stop))

    box, have = [], {}
    for group in left:
        rest = math.prod(sizes[name] for name in group[1:])
        if group and all(wanted[name] == (0, sizes[name]) for name in group[1:]):
            start, stop = wanted[group[0]]
            box.append(slice(start * rest, stop * rest))
            have |= {name: (0, sizes[name]) for name in group[1:]} | {group[0]: (start, stop)}
        else:
            box.append(slice(0, math.prod(sizes[name] for name in group)))
            have |= {name: (0, sizes[name]) for name in group}

    order = [name for group in left for name in group]
    array = read(tuple(box)).reshape([have[name][1] - have[name][0] for name in order])
    array = array[tuple(slice(wanted[n][0] - have[n][0], wanted[n][1] - have[n][0]) for n in order)]
    array = array.transpose([order.index(name) for group in right for name in group])
    array = array.reshape([math.prod(wanted[n][1] - wanted[n][0] for n in group) for group in right])
    return array[tuple(cut_after)]
