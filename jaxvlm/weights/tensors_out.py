"""Parameters as a checkpoint's tensors: the families' tables read backwards, and safetensors files written one by one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxvlm.weights import axes as layout
from jaxvlm.weights.families.base import Family, Rule
from jaxvlm.weights.plan import slot_rows
from jaxvlm.weights.readers import WeightsError
from jaxvlm.weights.safetensors_file import CODES

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: its name, size, and how to make it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def with_rows(self, rows: int) -> Tensor:
        """More rows of a vocabulary, all the mean of the present ones: near no word, and never the likeliest token."""

        def make() -> np.ndarray:
            table = self.make()
            mean = table.mean(0, keepdims=True, dtype=np.float32).astype(table.dtype)
            return np.concatenate([table, np.repeat(mean, rows - len(table), 0)])

        return replace(self, shape=(rows, *self.shape[1:]), make=make)

    def cast(self, dtype: np.dtype) -> Tensor:
        return replace(self, dtype=dtype, make=lambda: self.make().astype(dtype))


def part_tensors(leaves: dict[str, Any], family: Family, config: Any) -> Iterator[Tensor]:
    """The tensors of a part, by the names of the family's table. `leaves`: {path within the part: array}.

    Layers after the selected features, which this package does not keep, are zeros: whoever loads them computes and
    discards them. Raises `WeightsError` if the parameters are not those of the configuration.
    """
    family, sizes = family.at(config), family.sizes(config)
    tensors: dict[str, list[Rule]] = {}  # several rules of one tensor are its slots
    for rule in family.active(config):
        if rule.path not in leaves:
            raise WeightsError(f"The parameters lack {family.part}/{rule.path}, which the configuration asks for.")
        shape = (len(family.layers(config)),) * rule.stacked + layout.shape(layout.parse(rule.axes)[1], sizes)
        if leaves[rule.path].shape != shape:
            raise WeightsError(
                f"{family.part}/{rule.path} is {list(leaves[rule.path].shape)}, the configuration says {list(shape)}."
            )
        tensors.setdefault(rule.names[0], []).append(rule)
    for name, rules in tensors.items():
        shape, kind = _file_shape(rules[0], sizes), np.dtype(leaves[rules[0].path].dtype)
        if not rules[0].stacked:
            yield Tensor(name, shape, kind, partial(_file_value, rules, leaves, sizes))
            continue
        for layer in range(config.depth):
            kept = layer in family.layers(config)
            build = partial(_file_value, rules, leaves, sizes, layer) if kept else partial(np.zeros, shape, kind)
            yield Tensor(name.replace("{i}", str(layer)), shape, kind, build)
    for rule in family.rules:  # the norm after the discarded layers
        if family.part == "vision" and rule.when == "feature_norm" and not config.feature_norm:
            value, kind = float(rule.path.endswith("scale")), np.dtype(leaves["pos_embed"].dtype)
            shape = layout.shape(layout.parse(rule.axes)[0], sizes)
            yield Tensor(rule.names[0], shape, kind, partial(np.full, shape, value, kind))
    if extra := sorted(set(leaves) - {rule.path for rules in tensors.values() for rule in rules}):
        raise WeightsError(f"These parameters have no place in the export: {', '.join(extra)} (in {family.part}).")


def _file_shape(rule: Rule, sizes: dict[str, int]) -> tuple[int, ...]:
    shape = layout.shape(layout.parse(rule.axes)[0], sizes)
    return (slot_rows(rule, sizes)[-1], *shape[1:]) if rule.slots else shape


def _file_value(rules: list[Rule], leaves: dict[str, Any], sizes: dict[str, int], layer: int | None = None):
    """A tensor in the file's layout; of a joined one all slots, and zeros for those that no parameter has."""
    values = {}
    for rule in rules:
        value = _gathered(leaves[rule.path] if layer is None else leaves[rule.path][layer])
        values[rule.slot] = layout.convert(value, layout.reverse(rule.axes), sizes)
    if not rules[0].slots:
        return np.ascontiguousarray(values[0])
    rows = slot_rows(rules[0], sizes)
    whole = np.zeros(_file_shape(rules[0], sizes), next(iter(values.values())).dtype)
    for slot, value in values.items():
        whole[rows[slot] : rows[slot + 1]] = value
    return whole


def _gathered(value: Any) -> np.ndarray:
    """The whole array on this host, also when its shards live on several."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


def write_shards(tensors: Sequence[Tensor], folder: Path, shard_bytes: int = SHARD_BYTES, stem: str = "model") -> None:
    """Safetensors files of at most `shard_bytes` (one tensor at least), and their index when there are several."""
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    index = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(shard, folder / name)
        index |= dict.fromkeys((tensor.name for tensor in shard), name)
    if len(shards) > 1:
        total = {"total_size": sum(tensor.nbytes for tensor in tensors)}
        text = json.dumps({"metadata": total, "weight_map": dict(sorted(index.items()))}, indent=2)
        (folder / f"{stem}.safetensors.index.json").write_text(text + "\n")


def _write_file(tensors: Sequence[Tensor], path: Path) -> None:
    """One safetensors file. Each tensor is made when it is its turn; all processes do, and the first writes."""
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # each begins at a multiple of its type's size
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path if jax.process_index() == 0 else os.devnull, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            value = np.ascontiguousarray(tensor.make())
            assert (value.shape, value.dtype) == (tensor.shape, tensor.dtype), tensor.name
            file.write(value.reshape(-1).view(np.uint8))
