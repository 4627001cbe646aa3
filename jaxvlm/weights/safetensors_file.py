"""Tensors out of a `.safetensors` file, by plain reads: memory mapping would count the file into the process's memory.

Layout: https://github.com/huggingface/safetensors#format: the length of a JSON header, the header, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxvlm.weights.readers import Index, WeightsError

DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
CODES = {np.dtype(kind): code for code, kind in DTYPES.items()}


class SafetensorsFile:
    """One `.safetensors` file. Raises `WeightsError` if it is damaged or cut short."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                size = path.stat().st_size - 8 - length
                if size < 0:
                    raise ValueError(f"its header is {length} bytes long, the file has {size + length}")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            self._start = 8 + length
            self._tensors = {name: _checked(name, entry, size) for name, entry in header.items()}
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            why = error if isinstance(error, ValueError) else "its header is none"
            raise WeightsError(f"{path} is not a complete safetensors file ({why}). Download it again.") from error

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1]

    def dtype(self, name: str) -> np.dtype:
        kind = self._tensors[name][0]
        if kind not in DTYPES:
            raise WeightsError(f"{self.path}: '{name}' is stored as {kind}, which is not supported.")
        return np.dtype(DTYPES[kind])

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        dtype, (_, shape, start) = self.dtype(name), self._tensors[name]
        bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=False)]
        bounds += [(0, size) for size in shape[len(bounds) :]]
        if bounds[1:] != [(0, size) for size in shape[1:]]:  # not in one piece: let the system read what is touched
            mapped = np.memmap(self.path, dtype, "r", self._start + start, shape)
            return np.array(mapped[tuple(slice(*pair) for pair in bounds)])
        first, last = bounds[0] if bounds else (0, 1)
        result = np.empty([stop - begin for begin, stop in bounds], dtype)
        row = math.prod(shape[1:]) * dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start + start + first * row)
            view, done = memoryview(result.reshape(-1).view(np.uint8)), 0
            while done < (last - first) * row:
                count = file.readinto(view[done:])
                if not count:
                    raise WeightsError(f"{self.path} is cut short: '{name}' is not all there. Download it again.")
                done += count
        return result


def _checked(name: str, entry: dict, size: int) -> tuple[str, tuple[int, ...], int]:
    """(dtype, shape, first byte) of a tensor whose bytes lie within the file."""
    kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    whole = all(isinstance(number, int) for number in (*shape, start, stop))
    if not whole or not 0 <= start <= stop or min(shape, default=0) < 0:
        raise ValueError(f"the header describes '{name}' in a form that safetensors does not write")
    if stop > size:
        raise ValueError(f"'{name}' ends {stop - size} bytes after the file")
    if kind in DTYPES and stop - start != math.prod(shape) * np.dtype(DTYPES[kind]).itemsize:
        raise ValueError(f"'{name}' is {list(shape)} of {kind} in {stop - start} bytes")
    return kind, shape, start
