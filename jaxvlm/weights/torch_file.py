"""Tensors out of a `torch.save` file, without torch and without running what the pickle inside it asks for.

Such a file holds a pickle that says how tensors are cut out of storages, and the storages as raw bytes. Only the
handful of names that a plain state dict needs are understood; any other makes the file unreadable here.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxvlm.weights.readers import Index, WeightsError

STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
WRAPPERS = ("state_dict", "model_state_dict", "model")  # what training scripts put their weights under


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    size: int  # elements


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements


def _rebuild_tensor(storage, offset, shape, strides, *_):
    """Stands in for `torch._utils._rebuild_tensor_v2`; the rest of its arguments concern gradients."""
    if not isinstance(storage, _Storage) or len(shape) != len(strides) or min((*shape, *strides, offset)) < 0:
        raise pickle.UnpicklingError("a tensor is described in a form that torch does not write")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor, *_):
    return tensor


class _Unpickler(pickle.Unpickler):
    ALLOWED = {
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("collections", "OrderedDict"): collections.OrderedDict,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return self.ALLOWED[module, name]
        if module == "torch" and name in STORAGES:
            return name
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def __init__(self, file):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def persistent_load(self, reference: Any) -> _Storage:
        kind, storage, key, _, size, *view = reference
        if any(view) or kind != "storage" or storage not in STORAGES or not str(key).isalnum():
            raise pickle.UnpicklingError(f"it refers to {reference!r}")
        return self.storages.setdefault(str(key), _Storage(str(key), np.dtype(STORAGES[storage]), int(size)))


class TorchFile:
    """One `.pth`, `.pt` or `.bin` file of `torch.save`, old format or new; nested dicts read as dotted names.

    Raises `WeightsError` if the file is no such thing, or if its pickle asks for anything but tensors and dicts.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            loaded, self._offsets = (_open_zip if zipfile.is_zipfile(path) else _open_legacy)(path)
        except WeightsError:
            raise
        except Exception as error:  # a hostile or damaged pickle may fail in any way; none of them may pass
            raise WeightsError(
                f"{path} was not read: it is damaged, or its pickle holds more than tensors ({error}). Loading such a "
                "file could run code. If you trust it, save its state dict alone, or as safetensors."
            ) from error
        self._tensors = dict(_flatten(loaded))
        if not self._tensors:
            raise WeightsError(f"{path} holds no tensors.")

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._tensors[name].storage.dtype

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        tensor = self._tensors[name]
        storage, sizes = tensor.storage, tensor.shape
        last = tensor.offset + sum((n - 1) * stride for n, stride in zip(sizes, tensor.strides, strict=True))
        start = self._offsets.get(storage.key)
        end = None if start is None else start + storage.size * storage.dtype.itemsize
        if end is None or end > self.path.stat().st_size or (0 not in sizes and last >= storage.size):
            raise WeightsError(f"{self.path} is cut short: '{name}' is not all there. Get the file again.")
        if 0 in sizes:
            return np.empty(sizes, storage.dtype)[index]
        flat = np.memmap(self.path, storage.dtype, "r", start, (storage.size,))[tensor.offset :]
        strides = [stride * flat.itemsize for stride in tensor.strides]
        return np.array(np.lib.stride_tricks.as_strided(flat, sizes, strides, writeable=False)[index])


def _open_zip(path: Path) -> tuple[Any, dict[str, int]]:
    """(the object, {storage: its first byte in the file}) of the format since torch 1.6."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("data.pkl")]
        if len(pickles) != 1:
            raise WeightsError(f"{path} is a zip without the data.pkl of a torch file.")
        root = pickles[0].removesuffix("data.pkl")
        if root + "byteorder" in names and archive.read(root + "byteorder") != b"little":
            raise WeightsError(f"{path} was written on a big-endian machine. Save it again as safetensors.")
        offsets = {}
        for member in archive.infolist():
            if member.filename.startswith(root + "data/"):
                if member.compress_type != zipfile.ZIP_STORED:
                    raise WeightsError(f"{path} was compressed after torch wrote it. Save it again.")
                file.seek(member.header_offset + 26)  # lengths in the local header may differ from the directory's
                name, extra = struct.unpack("<HH", file.read(4))
                offsets[member.filename.removeprefix(root + "data/")] = member.header_offset + 30 + name + extra
        return _Unpickler(io.BytesIO(archive.read(pickles[0]))).load(), offsets


def _open_legacy(path: Path) -> tuple[Any, dict[str, int]]:
    """The same of the format before: pickles in a row, then each storage as its length and its bytes."""
    with path.open("rb") as file:
        if _Unpickler(file).load() != LEGACY_MAGIC:
            raise WeightsError(f"{path} is not a file of torch.save.")
        _, system = _Unpickler(file).load(), _Unpickler(file).load()
        if not system["little_endian"]:
            raise WeightsError(f"{path} was written on a big-endian machine. Save it again as safetensors.")
        unpickler = _Unpickler(file)
        loaded = unpickler.load()
        offsets = {}
        for key in _Unpickler(file).load():
            (size,) = struct.unpack("<q", file.read(8))
            if size < unpickler.storages[key].size:
                raise WeightsError(f"{path} is cut short at storage {key}. Get the file again.")
            offsets[key] = file.tell()
            file.seek(size * unpickler.storages[key].dtype.itemsize, io.SEEK_CUR)
        return loaded, offsets


def _flatten(value: Any, prefix: str = ""):
    if isinstance(value, _Tensor):
        yield prefix, value
    elif isinstance(value, dict):
        if not prefix:
            value = next((value[key] for key in WRAPPERS if isinstance(value.get(key), dict)), value)
        for key, entry in value.items():
            yield from _flatten(entry, f"{prefix}.{key}" if prefix else str(key))
