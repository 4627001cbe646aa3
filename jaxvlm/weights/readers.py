"""Checkpoint files as named tensors that are read by slices: safetensors, GGUF and torch zip files, without torch.

`open_source(path)` looks at what is there. Nothing is read before it is asked for, and never more than asked for
(a quantised GGUF tensor is dequantised by whole rows).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

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


PATTERNS = ("*.safetensors", "pytorch_model*.bin", "*.pth", "*.pt", "*.bin", "*.gguf")
PATTERNS += ("checkpoints/latest-checkpoint.pt",)  # Prismatic
# What trainers leave beside a model and is none of it.
ASIDE = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "rng_state.pth"}
ASIDE |= {"adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin"}

TWIN = "open_clip_"  # the same model by OpenCLIP's names; it stands beside other forms, or alone


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
            return Shards(path, indexed=_weight_map(path / index))
    for pattern, twin in [(pattern, False) for pattern in PATTERNS] + [(pattern, True) for pattern in PATTERNS]:
        files = sorted(file for file in path.glob(pattern) if file.name not in ASIDE)
        files = [file for file in files if twin or not file.name.startswith(TWIN)]
        _require_all_shards(files)
        if len(files) == 1:
            return _open_file(files[0])
        if files and pattern != "*.gguf":
            return Shards(path, files=files)
        if files:
            listed = ", ".join(file.name for file in files)
            raise WeightsError(f"{path} holds several GGUF files ({listed}). Give the path of the one to use.")
    held = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing, it is empty"
    raise WeightsError(
        f"{path} holds no weights (looked for *.safetensors, *.bin, *.pth, *.pt, *.gguf; found {held}), "
        "and it holds no jaxvlm model. If it was cloned from a hub, the large files may not have been downloaded."
    )


def _require_all_shards(files: list[Path]) -> None:
    """Files that count themselves, 'model-00001-of-00003', must all be there."""
    for file in files:
        if found := re.search(r"-(\d+)-of-(\d+)(?=\.)", file.name):
            width, count = len(found[1]), int(found[2])
            wanted = [file.name.replace(found[0], f"-{n:0{width}d}-of-{found[2]}") for n in range(1, count + 1)]
            lost = [name for name in wanted if not (file.parent / name).is_file()]
            if lost:
                raise WeightsError(
                    f"{file.parent}: {len(lost)} of {count} files are missing: {', '.join(lost)}. Download them."
                )


def _weight_map(index: Path) -> dict[str, str]:
    """{tensor: the file it is in} of an index file."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in weight_map.values()):
            raise ValueError("a file in it is not in this folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is not an index of weight files ({error!r}). Download it again.") from error
    return weight_map


def require_content(path: Path) -> bytes:
    """The first bytes of a file. Raises `WeightsError` for one whose content git has not fetched."""
    with path.open("rb") as file:
        head = file.read(40)
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer, not the file itself. Run 'git lfs pull' in its folder.")
    return head


def _open_file(path: Path) -> TensorSource:
    head = require_content(path)
    if head.startswith(b"GGUF"):
        from jaxvlm.weights.gguf_file import GGUFFile

        return GGUFFile(path)
    if path.suffix == ".safetensors":
        from jaxvlm.weights.safetensors_file import SafetensorsFile

        return SafetensorsFile(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        from jaxvlm.weights.torch_file import TorchFile

        return TorchFile(path)
    raise WeightsError(f"{path}: '{path.suffix}' is not a known format. Use .safetensors, .gguf, .pth, .pt or .bin.")


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
