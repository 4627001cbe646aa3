"""Checkpoint files as named tensors that are read by slices: safetensors, GGUF and torch zip files, without torch.

`open_source(path)` looks at what is there. Nothing is read before it is asked for, and never more than asked for
(a quantised GGUF tensor is dequantised by whole rows).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from jaxvlm.config import UserError

Index = tuple[slice, ...]


class WeightsError(UserError):
    """Weights that cannot be used; the message names the file, the tensors and the fix."""


class TensorSource(Protocol):
    """Named tensors in a file or folder; `read` gives a part of one as a numpy array in the file's own dtype."""

    path: Path

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> np.dtype: ...
    def read(self, name: str, index: Index = ()) -> np.ndarray: ...


def open_source(path: str | Path) -> TensorSource:
    """Opens a checkpoint: a `.safetensors`, `.gguf`, `.pth`/`.pt`/`.bin` file, or a folder that holds one checkpoint.

    In a folder an index file (`*.index.json`) decides which files belong together; without one, all files of the first
    kind found do, safetensors before torch before GGUF. Raises `WeightsError` if there is nothing to read.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return _open_file(path)
    if not path.is_dir():
        raise WeightsError(f"{path} does not exist. Give a checkpoint file or the folder that holds it.")
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (path / index).is_file():
            return Shards(path, indexed=json.loads((path / index).read_text())["weight_map"])
    for pattern in ("*.safetensors", "pytorch_model*.bin", "*.pth", "*.pt", "*.bin", "*.gguf"):
        files = sorted(path.glob(pattern))
        if len(files) == 1:
            return _open_file(files[0])
        if files and pattern != "*.gguf":
            return Shards(path, files=files)
        if files:
            listed = ", ".join(file.name for file in files)
            raise WeightsError(f"{path} holds several GGUF files ({listed}). Give the path of the one to use.")
    held = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
    raise WeightsError(
        f"{path} holds no weights (looked for *.safetensors, *.bin, *.pth, *.pt, *.gguf; found {held}). "
        "If it was cloned from a model hub, the large files may not have been downloaded."
    )


def _open_file(path: Path) -> TensorSource:
    with path.open("rb") as file:
        head = file.read(40)
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer, not the weights. Run 'git lfs pull' in its folder.")
    if head.startswith(b"GGUF"):
        from jaxvlm.weights.gguf_file import GGUFFile

        return GGUFFile(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        from jaxvlm.weights.torch_file import TorchFile

        return TorchFile(path)
    raise WeightsError(f"{path}: '{path.suffix}' is not a known format. Use .safetensors, .gguf, .pth, .pt or .bin.")


class SafetensorsFile:
    """One `.safetensors` file."""

    DTYPES = {
        "F64": "f8",
        "F32": "f4",
        "F16": "f2",
        "BF16": ml_dtypes.bfloat16,
        "I64": "i8",
        "I32": "i4",
        "I16": "i2",
    }
    DTYPES |= {
        "I8": "i1",
        "U8": "u1",
        "BOOL": "?",
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
    }

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._file = safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise WeightsError(f"{path} is not a complete safetensors file ({error}). Download it again.") from error
        self._names = list(self._file.keys())

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self.DTYPES[self._file.get_slice(name).get_dtype()])

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        return np.asarray(self._file.get_slice(name)[index or ...])


class Shards:
    """Several files as one: those of an index file, or a plain list whose tensor names do not overlap."""

    def __init__(self, path: Path, indexed: dict[str, str] | None = None, files: Iterable[Path] = ()):
        self.path = path
        files = sorted({path / file for file in indexed.values()}) if indexed is not None else list(files)
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise WeightsError(
                f"{path}: the index names files that are not there: {', '.join(missing)}. Download them."
            )
        opened = {file.name: _open_file(file) for file in files}
        if indexed is None:
            self._where = {name: source for source in opened.values() for name in source.names()}
            if len(self._where) != sum(len(source.names()) for source in opened.values()):
                listed = ", ".join(opened)
                raise WeightsError(f"{path}: several files ({listed}) hold the same tensors. Give the path of one.")
        else:
            self._where = {name: opened[file] for name, file in indexed.items()}
            held = {file: set(source.names()) for file, source in opened.items()}
            lost = [f"{name} ({file})" for name, file in indexed.items() if name not in held[file]]
            extra = [f"{name} ({file})" for file in held for name in held[file] if name not in indexed]
            if lost or extra:
                raise WeightsError(
                    f"{path}: the index does not describe its files. Named in the index but not in the file: "
                    f"{', '.join(lost) or 'none'}. In a file but not in the index: {', '.join(extra) or 'none'}."
                )

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._where[name].dtype(name)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        return self._where[name].read(name, index)
