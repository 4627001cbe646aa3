"""Tensors out of a `torch.save` file, without torch and without running what the pickle inside it asks for.

Such a file holds a pickle that says how tensors are cut out of storages, and the storages as raw bytes. Only the
handful of names that a plain state dict needs are understood; any other makes the file unreadable here.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxvlm.weights.readers import Index, WeightsError, require_content

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
MAX_DEPTH, MAX_ENTRIES = 16, 1_000_000  # of dicts in dicts; more is no checkpoint but a trap


# Tuples, so that a pickle cannot change what has been checked: its instruction to set attributes finds none.
class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int  # elements


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements


class _Dict(dict):
    """Stands in for `collections.OrderedDict`, without attributes of its own (a state dict's `_metadata`)."""

    def __setstate__(self, state):
        pass


def _rebuild_tensor(storage, offset, shape, strides, *_):
    """Stands in for `torch._utils._rebuild_tensor_v2`; the rest of its arguments concern gradients."""
    numbers = (*shape, *strides, offset)
    whole = all(isinstance(number, int) and number >= 0 for number in numbers)
    if not isinstance(storage, _Storage) or len(shape) != len(strides) or not whole:
        raise pickle.UnpicklingError("a tensor is described in a form that torch does not write")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor, *_):
    return tensor


class _Unpickler(pickle._Unpickler):  # the one in Python: in C, one byte can ask for a table of 16 GB
    ALLOWED = {
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("collections", "OrderedDict"): _Dict,
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
        sound = kind == "storage" and storage in STORAGES and str(key).isalnum() and isinstance(size, int)
        if any(view) or not sound or size < 0:
            raise pickle.UnpicklingError(f"it refers to {reference!r:.100}")
        return self.storages.setdefault(str(key), _Storage(str(key), np.dtype(STORAGES[storage]), size))


class TorchFile:
    """One `.pth`, `.pt` or `.bin` file of `torch.save`, old format or new; nested dicts read as dotted names.

    Raises `WeightsError` if the file is no such thing, or if its pickle asks for anything but tensors and dicts.
    """

    def __init__(self, path: Path):
        self.path = path
        whole = zipfile.is_zipfile(path)
        if not whole and require_content(path).startswith(b"PK\x03\x04"):
            raise WeightsError(f"{path} is cut short: a zip, without the table at its end. Get the file again.")
        try:
            loaded, self._places = (_open_zip if whole else _open_legacy)(path)
            self._tensors = _flatten(loaded)
        except WeightsError:
            raise
        except Exception as error:  # a hostile or damaged pickle may fail in any way; none of them may pass
            raise WeightsError(
                f"{path} was not read: it is damaged, or its pickle holds more than tensors "
                f"({str(error) or type(error).__name__}). Loading such a file could run code. If you trust it, save its "
                "state dict alone, or as safetensors."
            ) from error
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
        start, stop = self._places.get(storage.key, (0, -1))
        end = start + storage.size * storage.dtype.itemsize
        if end > min(stop, self.path.stat().st_size) or (0 not in sizes and last >= storage.size):
            raise WeightsError(f"{self.path} is cut short: '{name}' is not all there. Get the file again.")
        if 0 in sizes:
            return np.empty(sizes, storage.dtype)[index]
        flat = np.memmap(self.path, storage.dtype, "r", start, (storage.size,))[tensor.offset :]
        strides = [stride * flat.itemsize for stride in tensor.strides]
        return np.array(np.lib.stride_tricks.as_strided(flat, sizes, strides, writeable=False)[index])


def _open_zip(path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """(the object, {storage: its first byte in the file and that after its last}) of the format since torch 1.6."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("data.pkl")]
        if len(pickles) != 1:
            raise WeightsError(f"{path} is a zip without the data.pkl of a torch file.")
        root = pickles[0].removesuffix("data.pkl")
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise WeightsError(f"{path} was compressed after torch wrote it. Save it again.")
        if root + "byteorder" in names and archive.read(root + "byteorder") != b"little":
            raise WeightsError(f"{path} was written on a big-endian machine. Save it again as safetensors.")
        places = {}
        for member in archive.infolist():
            if member.filename.startswith(root + "data/"):
                file.seek(member.header_offset + 26)  # lengths in the local header may differ from the directory's
                name, extra = struct.unpack("<HH", file.read(4))
                start = member.header_offset + 30 + name + extra
                places[member.filename.removeprefix(root + "data/")] = start, start + member.file_size
        return _Unpickler(io.BytesIO(archive.read(pickles[0]))).load(), places


def _open_legacy(path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The same of the format before: pickles in a row, then each storage as its length and its bytes."""
    with path.open("rb") as file:
        if _Unpickler(file).load() != LEGACY_MAGIC:
            raise WeightsError(f"{path} is not a file of torch.save.")
        _, system = _Unpickler(file).load(), _Unpickler(file).load()
        if not system["little_endian"]:
            raise WeightsError(f"{path} was written on a big-endian machine. Save it again as safetensors.")
        unpickler = _Unpickler(file)
        loaded = unpickler.load()
        places = {}
        for key in _Unpickler(file).load():
            (size,) = struct.unpack("<q", file.read(8))
            if size < unpickler.storages[key].size:
                raise WeightsError(f"{path} is cut short at storage {key}. Get the file again.")
            start = file.tell()
            places[key] = start, file.seek(size * unpickler.storages[key].dtype.itemsize, io.SEEK_CUR)
        return loaded, places


def _flatten(loaded: Any) -> dict[str, _Tensor]:
    """The tensors in nested dicts, by dotted names."""
    if isinstance(loaded, dict):
        loaded = next((loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), dict)), loaded)
    tensors, waiting = {}, [((), loaded)]
    for _ in range(MAX_ENTRIES):
        if not waiting:
            return tensors
        name, value = waiting.pop()
        if isinstance(value, _Tensor):
            tensors[".".join(name)] = value
        elif isinstance(value, dict) and len(name) < MAX_DEPTH:
            waiting += [((*name, str(key)), entry) for key, entry in reversed(value.items())]
        elif isinstance(value, dict):
            break
    raise pickle.UnpicklingError("its dicts lie too deep in each other, or are too many")
