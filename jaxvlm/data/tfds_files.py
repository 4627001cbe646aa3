"""What TFDS prepared with file_format='array_record', as a source, without TFDS and without TensorFlow.

An entry is a tf.train.Example, a map from the features' names to lists of bytes, floats or integers, and images in it are the
bytes of their files. So a data set is read if its features look like a LLaVA record: `conversations` (a sequence of {"from",
"value"}) or `texts` ({"user", "assistant"}), `image` or `images` (Image, or Text that holds bytes or file names), `id`.
"""

from __future__ import annotations

import bisect
import itertools
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxvlm.data import DataError
from jaxvlm.data.array_records import Entries, array_record_module
from jaxvlm.data.saved_datasets import llava_record
from jaxvlm.data.sources import file_fingerprint, held, held_place, read_about

Value = bytes | int | float


def open_prepared(folder: str, split: str, images: str) -> TfdsSource:
    """The source of one split of a prepared data set: the only one, or 'train', unless named."""
    info = read_about(Path(folder) / "dataset_info.json", "fileFormat", "splits")
    if info["fileFormat"] != "array_record":
        raise DataError(
            f"{folder} is stored as {info['fileFormat']!r}, which has no random access; prepare it with "
            "tfds.builder(..., file_format='array_record')."
        )
    lengths = {one["name"]: [int(length) for length in one["shardLengths"]] for one in info["splits"]}
    split = split or (next(iter(lengths)) if len(lengths) == 1 else "train")
    if split not in lengths:
        raise DataError(
            f"{folder} has the splits {', '.join(lengths)}. Give one as the source's `path`: {folder}/SPLIT."
        )
    files = sorted(str(file) for file in Path(folder).glob(f"*-{split}.array_record*"))
    if len(files) != len(lengths[split]):
        raise DataError(
            f"{folder} has {len(files)} of the {len(lengths[split])} files of split '{split}'. Copy it again."
        )
    return TfdsSource(folder, files, lengths[split], images)


def open_examples(path: str, files: Sequence[str], images: str) -> TfdsSource:
    """The source of such files without the folder that TFDS puts them in."""
    return TfdsSource(path, files, [len(Entries(file)) for file in files], images)


class TfdsSource:
    """Files of Examples; image names that are no bytes are files of the folder `images`."""

    def __init__(self, path: str, files: Sequence[str], counts: Sequence[int], images: str):
        array_record_module()  # where it is missing, that is said at once
        self.path, self.images = path, images
        self._shards = [Entries(file) for file in files]
        self._starts = list(itertools.accumulate(counts, initial=0))
        self._fingerprint = file_fingerprint(files)
        found = self._features(0)
        if not {"conversations/value", "texts/user"} & set(found):
            raise DataError(
                f"{path} holds no conversations: it needs features `conversations` with `from` and `value`, or `texts` with "
                f"`user` and `assistant`; its features are {', '.join(sorted(found))}."
            )

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> dict:
        i = range(len(self))[i]
        features = self._features(i)
        names = [_file_name(value) or f"{i}:{k}" for k, value in enumerate(_images(features))]
        row = {name: _plain(values[0]) for name, values in features.items() if len(values) == 1 and "/" not in name}
        row = {name: value for name, value in row.items() if not isinstance(value, bytes)}
        for name, parts in {"conversations": ("from", "value"), "texts": ("user", "assistant")}.items():
            if f"{name}/{parts[1]}" in features:
                row[name] = {part: [_plain(value) for value in features.get(f"{name}/{part}", [])] for part in parts}
        return llava_record(row, names, i)

    def image(self, name: str) -> str | bytes:
        if (path := self.image_file(name)) is not None:
            return path
        record, position = held_place(self, name)
        images = _images(self._features(record))
        if position >= len(images):
            raise DataError(f"{self.path} has no image {name!r}: its record has {len(images)}.")
        return bytes(images[position])

    def image_file(self, name: str) -> str | None:
        return None if held(name) else os.path.abspath(os.path.join(self.images, name))

    def fingerprint(self) -> list:
        return self._fingerprint

    def _features(self, i: int) -> dict[str, list[Value]]:
        shard = bisect.bisect_right(self._starts, i) - 1
        entry = self._shards[shard][i - self._starts[shard]]
        try:
            return parse_example(entry)
        except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
            raise DataError(
                f"{self._shards[shard].path}, entry {i - self._starts[shard]} is no tf.train.Example."
            ) from error


def _images(features: dict[str, list[Value]]) -> list[Value]:
    return [value for value in features.get("images") or features.get("image") or [] if value]


def _file_name(value: bytes) -> str | None:
    """A value that is a text names a file; the bytes of an image are no UTF-8."""
    name = _plain(value[:4096])
    return name if isinstance(name, str) and len(value) < 4096 else None


def _plain(value: Value) -> str | Value:
    """Bytes as the text that they are, or as they are."""
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


# ------------------------------------------------------------------------------------- tf.train.Example, by its wire form


def parse_example(data: bytes) -> dict[str, list[Value]]:
    """The features of a serialised tf.train.Example (protocol buffers' wire format; tensorflow/core/example/*.proto)."""
    features = {}
    for number, part in _fields(data):
        for _, entry in _fields(part) if number == 1 else ():
            fields = dict(_fields(entry))
            features[fields[1].decode("utf-8")] = _values(fields.get(2, b""))
    return features


def _values(feature: bytes) -> list[Value]:
    """A Feature: bytes_list = 1, float_list = 2, int64_list = 3, each with its values in field 1."""
    values: list[Value] = []
    for kind, part in _fields(feature):
        for _, value in _fields(part):
            if kind == 1:
                values.append(value)
            elif kind == 2:
                values += struct.unpack(f"<{len(value) // 4}f", value)
            else:
                values += [
                    whole - (whole >> 63 << 64) for whole in (_varints(value) if isinstance(value, bytes) else [value])
                ]
    return values


def _varints(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a message by number: bytes where a field has a length, else its number."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
        else:
            size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            value, at = data[at : at + size], at + size
            if len(value) < size:
                raise ValueError("a field ends too early")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
