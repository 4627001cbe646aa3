"""Tensors out of a GGUF file, dequantised to float32 by the `gguf` package.

The header is read here: that package's reader builds an object per token of the vocabulary, which takes seconds.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxvlm.weights.readers import Index, WeightsError

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MAX_LENGTH = 1 << 31  # of a string or a list; more means that the file is damaged


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]  # as numpy counts axes; ggml starts from the innermost
    kind: int  # ggml's tensor type
    offset: int  # from the start of the data


class GGUFFile:
    """One `.gguf` file (version 2 or 3, little-endian); every tensor reads as float32.

    `metadata` is the header's key-value list; long lists (the token tables) are left out.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self._read_header(file)
        except (struct.error, UnicodeDecodeError, OverflowError, KeyError) as error:
            raise WeightsError(f"{path} is not a complete GGUF file ({error!r}). Download it again.") from error

    def _read_header(self, file: BinaryIO) -> None:
        magic, version, tensors, pairs = struct.unpack("<4sIQQ", file.read(24))
        if magic != b"GGUF" or version not in (2, 3):
            raise WeightsError(f"{self.path} is not a little-endian GGUF file of version 2 or 3.")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key, kind = _string(file), _scalar(file, "<I")
            value = _value(file, kind)
            if value is not None:
                self.metadata[key] = value
        self._tensors: dict[str, _Tensor] = {}
        for _ in range(tensors):
            name = _string(file)
            shape = [_scalar(file, "<Q") for _ in range(_scalar(file, "<I"))]
            self._tensors[name] = _Tensor(tuple(shape[::-1]), _scalar(file, "<I"), _scalar(file, "<Q"))
        alignment = self.metadata.get("general.alignment", 32)
        self._start = -(-file.tell() // alignment) * alignment

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        try:
            from gguf import GGMLQuantizationType
            from gguf.quants import dequantize, quant_shape_to_byte_shape
        except ImportError as error:
            raise WeightsError(f"Reading {self.path} needs the gguf package: pip install gguf") from error
        tensor = self._tensors[name]
        try:
            kind = GGMLQuantizationType(tensor.kind)
            shape = quant_shape_to_byte_shape(tensor.shape, kind)
            stored = np.memmap(self.path, np.uint8, "r", self._start + tensor.offset, shape)
        except (ValueError, OverflowError) as error:
            raise WeightsError(
                f"{self.path}: tensor '{name}' cannot be read ({error}). Download the file again."
            ) from error
        # Quantisation blocks lie along the last axis, so a part is cut there only after dequantising.
        outer = tuple(index[: len(shape) - 1])
        try:
            values = dequantize(np.ascontiguousarray(stored[outer]), kind).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise WeightsError(
                f"{self.path}: '{name}' is stored as {kind.name}, which gguf cannot dequantise."
            ) from error
        return values[(..., *index[len(shape) - 1 :])]


def _scalar(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _length(file: BinaryIO) -> int:
    length = _scalar(file, "<Q")
    if length > MAX_LENGTH:
        raise OverflowError(f"a length of {length}")
    return length


def _string(file: BinaryIO) -> str:
    return file.read(_length(file)).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    """A value, or None after stepping over a list of strings or a long list."""
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        return _scalar(file, SCALARS[kind])
    item, count = _scalar(file, "<I"), _length(file)
    if item in SCALARS:
        data = file.read(count * struct.calcsize(SCALARS[item]))
        return list(struct.unpack(f"<{count}{SCALARS[item][1]}", data)) if count <= 1024 else None
    if item != STRING:
        raise KeyError(f"a list of type {item}")
    for _ in range(count):
        file.seek(_length(file), 1)
    return None
