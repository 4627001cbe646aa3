"""The samples of a stage: every record that can be used, as often as the mixture says, and those that are left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxvlm.config import DataConfig, SourceConfig
from jaxvlm.data import bad
from jaxvlm.data.layout import DROPPED
from jaxvlm.data.llava_mix import PARTS
from jaxvlm.data.sources import Source, image_address, image_stats
from jaxvlm.data.table import missing_image, open_table, record_place, table_images

MANY = 100_000  # records without their image


class Samples(NamedTuple):
    """Columns, int32 [n]."""

    source: np.ndarray  # in the config
    row: np.ndarray  # in the source's table
    name: np.ndarray  # in `Usable.names`
    length: np.ndarray  # tokens, visual ones included
    images: np.ndarray
    tiles: np.ndarray
    supervised: np.ndarray
    dropped_images: np.ndarray
    truncated: np.ndarray


class Usable(NamedTuple):
    """What there is to train on."""

    samples: Samples
    names: tuple[str, ...]  # of sources, those inside a mix apart
    records: dict[str, int]  # usable records of each name, however often they are used
    skipped: dict[str, list[dict]]  # of each name, entries as `bad` describes them
    quarantined: dict[str, list[dict]]
    dropped: dict[str, list[dict]]  # for their length, as the truncation asks


def usable(
    data: DataConfig,
    sources: Sequence[Source],
    tables: Sequence[str],
    features: tuple[Any, Mapping[str, int]] | None = None,
    listed: Sequence[Mapping[int, dict]] | None = None,
) -> Usable:
    """The samples whose images are there (or have features), and what is left out, with the reasons.

    `listed` are the entries of a quarantine list that are about each source.
    """
    listed = listed or [{} for _ in tables]
    names = list(dict.fromkeys(name for source in data.sources for name in _names(source)))
    records = dict.fromkeys(names, 0)
    skipped, quarantined, dropped = ({name: [] for name in names} for _ in range(3))
    columns = []
    for i, (config, source, folder) in enumerate(zip(data.sources, sources, tables, strict=True)):
        table, mine = open_table(folder), _names(config)
        entries = _left_out(table, config, source, features, listed[i], data)
        for number, entry in sorted(entries.items()):
            name = mine[PARTS.index(entry["part"])] if config.mix else mine[0]
            too_long = dropped if entry["reason"].endswith(DROPPED) else skipped
            (quarantined if number in listed[i] else too_long)[name].append(entry)
        copies = np.where(np.isin(table.record, list(entries)), 0, table.copies)
        number_of = np.asarray([names.index(name) for name in mine], np.int32)[table.parts]
        for k, count in zip(*np.unique(number_of[copies > 0], return_counts=True), strict=True):
            records[names[k]] += int(count)
        rows = np.repeat(np.arange(len(copies), dtype=np.int32), copies)
        found = (
            table.lengths,
            table.used_images,
            table.tiles,
            table.supervised_tokens,
            table.dropped_images,
            table.truncated,
        )
        columns.append((np.full(len(rows), i, np.int32), rows, number_of[rows], *(column[rows] for column in found)))

    kept = [name for name in names if records[name] or skipped[name] or quarantined[name] or dropped[name]]
    samples = Samples(*(np.concatenate(column) for column in zip(*columns, strict=True)))
    place = np.asarray([kept.index(name) if name in kept else -1 for name in names], np.int32)
    pick = [{name: one[name] for name in kept} for one in (records, skipped, quarantined, dropped)]
    return Usable(samples._replace(name=place[samples.name]), tuple(kept), *pick)


def _left_out(
    table: Any, config: SourceConfig, source: Source, features: Any, listed: Mapping[int, dict], data: DataConfig
) -> dict[int, dict]:
    """The entries of a table's records that are not used, by number; `listed` are those in the quarantine list."""
    entries = {entry["record"]: entry | {"source": config.name, "file": config.path} for entry in table.bad}
    entries |= {entry["record"]: entry for entry in _without_image(table, config, source, features, data)}
    for row in np.flatnonzero(np.isin(table.record, list(listed))):
        entry = _entry(table, row, config)
        entries.setdefault(entry["record"], entry | {"reason": listed[entry["record"]].get("reason", "")})
    for number, entry in listed.items():
        if number in entries:  # otherwise the mixture does not use it
            bad.check_identity(entry, entries[number]["id"], data.quarantine)
    return entries


def _names(source: SourceConfig) -> Sequence[str]:
    return PARTS if source.mix else (source.name or source.path,)


def _entry(table: Any, row: int, config: SourceConfig) -> dict:
    return record_place(config, int(table.record[row]), table.ids[row], table.parts[row])


def _without_image(
    table: Any,
    config: SourceConfig,
    source: Source,
    features: tuple[Any, Mapping[str, int]] | None,
    data: DataConfig,
) -> Iterator[dict]:
    """Entries of the table's records that use an image that is not there.

    Where they are MANY, and more than may be lost, a wrong folder is likelier than so long a list is of use.
    """
    if features is None:
        missing = image_stats(source, table.image_names)[:, 0] < 0
    else:
        missing = np.asarray([image_address(source, name) not in features[1] for name in table.image_names], bool)
    lost = _rows_with(table, missing)
    if len(lost) > MANY:
        first = table.image_names[int(np.flatnonzero(missing)[0])]
        why = {f"{bad.kind(missing_image(source, first))}, the first: {image_address(source, first)}": len(lost)}
        bad.check_share(config.name or config.path, len(lost), len(table.record), data, why)
    for row in lost:
        name = table.image_names[next(n for n in table_images(table, row) if missing[n])]
        yield _entry(table, row, config) | missing_image(source, name)


def _rows_with(table: Any, names: np.ndarray) -> np.ndarray:
    """The table's rows that use one of the images that `names` bool [n] marks."""
    found = np.flatnonzero(names[table.images])
    owner = np.searchsorted(table.image_offsets, found, side="right") - 1
    return np.unique(owner[found - table.image_offsets[owner] < table.used_images[owner]])
