"""Hugging Face datasets that `save_to_disk` wrote, as sources.

Rows are LLaVA's (`conversations`, `image` or `images`), or those of FineVision and the Cauldron: `texts`, a list of {"user",
"assistant"}, beside `images`. They are read as Arrow, so that no image is decoded and text is read without images. Needs the
package datasets (`pip install jaxvlm[data]`), which brings neither torch nor TensorFlow.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxvlm.data import DataError
from jaxvlm.data.sources import file_fingerprint, held, held_place, read_about

IMAGE_MARK = "<image>"


def llava_record(row: dict, images: Sequence[str], number: int) -> dict:
    """A row of another format as a LLaVA record, its `images` called by these names.

    `texts` become turns. Where no question says where the images stand, they stand in front of the first, as these data sets
    mean it. Lists that came apart ({"from": [...], "value": [...]}) are put together.
    """
    record = {key: value for key, value in row.items() if key not in ("image", "images", "texts", "conversations")}
    record.setdefault("id", number)
    if images:
        record["image"] = images[0] if len(images) == 1 else list(images)
    turns, texts = _joined(row.get("conversations")), _joined(row.get("texts"))
    if turns is None and isinstance(texts, list):
        marked = any(IMAGE_MARK in (pair["user"] or "") for pair in texts)
        lead = "" if marked else f"{IMAGE_MARK}\n" * len(images)
        turns = []
        for pair in texts:
            turns.append({"from": "human", "value": lead + (pair["user"] or "")})
            turns.append({"from": "gpt", "value": pair["assistant"] or ""})
            lead = ""
    return record if turns is None else record | {"conversations": turns}


def _joined(turns: Any) -> Any:
    """A dict of lists as the list of dicts that it was."""
    if not isinstance(turns, dict):
        return turns
    return [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]


def open_saved(folder: str, images: str) -> SavedDataset:
    """The source of a saved dataset, or of the only split of a saved dict of them."""
    splits = Path(folder) / "dataset_dict.json"
    if not splits.is_file():
        return SavedDataset(folder, images)
    names = read_about(splits, "splits")["splits"]
    if len(names) != 1:
        raise DataError(
            f"{folder} holds the splits {', '.join(names)}. Give one as the source's `path`: {folder}/{names[0]}."
        )
    return SavedDataset(os.path.join(folder, names[0]), images)


class SavedDataset:
    """A dataset on disk; images whose bytes it does not hold are files of the folder `images`."""

    def __init__(self, path: str, images: str):
        self.path, self.images = path, images
        files = (os.path.join(at, name) for at, _, names in os.walk(path) for name in names)
        self._fingerprint = file_fingerprint(sorted(file for file in files if file.endswith((".arrow", ".json"))))
        self._open: tuple | None = None
        self._count = len(self._tables()[0])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> dict:
        i = range(self._count)[i]
        texts, _ = self._tables()
        names = [self._name(i, k, cell) for k, cell in enumerate(self._cells(i))]
        return llava_record(texts[i].to_pylist()[0], [name for name in names if name], i)

    def image(self, name: str) -> str | bytes:
        if (path := self.image_file(name)) is not None:
            return path
        record, position = held_place(self, name)
        cells = self._cells(record)
        if position >= len(cells):
            raise DataError(f"{self.path} has no image {name!r}: its record has {len(cells)}.")
        cell = cells[position]
        return (cell["bytes"] if _is_struct(cell) else cell).as_py()

    def image_file(self, name: str) -> str | None:
        return None if held(name) else os.path.abspath(os.path.join(self.images, name))

    def fingerprint(self) -> list:
        return self._fingerprint

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": None}

    def _tables(self) -> tuple[Any, Any]:
        """The columns of text, and that of images or None, as rows of Arrow."""
        if self._open is None:
            rows = _load(self.path)
            names = rows.column_names
            if not {"conversations", "texts"} & set(names):
                raise DataError(
                    f"{self.path} has no column 'conversations' or 'texts'; its columns are {', '.join(names)}."
                )
            images = next((name for name in ("images", "image") if name in names), None)
            parts = [[name for name in names if name not in ("images", "image")], [images] if images else []]
            tables = [rows.select_columns(part).with_format("arrow") if part else None for part in parts]
            self._open = tuple(tables)
        return self._open

    def _cells(self, i: int) -> list:
        """The images of a row, as Arrow values: nothing is read yet."""
        images = self._tables()[1]
        if images is None:
            return []
        cell = images[i].column(0)[0]
        if not cell.is_valid:
            return []
        return list(cell.values) if hasattr(cell, "values") and not _is_struct(cell) else [cell]

    def _name(self, i: int, k: int, cell: Any) -> str | None:
        """What a row's image is called: its file where the row holds no bytes, as its bytes otherwise."""
        if _is_struct(cell):
            return f"{i}:{k}" if cell["bytes"].is_valid else cell["path"].as_py()
        if not cell.is_valid:
            return None
        return f"{i}:{k}" if "binary" in str(cell.type) else cell.as_py()


def _is_struct(cell: Any) -> bool:
    return hasattr(cell, "keys")


def _load(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{path} needs a package that is not installed: pip install jaxvlm[data] ({error}).") from error
    try:
        return datasets.load_from_disk(path)
    except Exception as error:  # of Arrow, of the package, or missing files
        raise DataError(f"{path} cannot be read as a dataset saved to disk: {error}") from error
