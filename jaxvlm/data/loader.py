"""The loader: planned rows of packed conversations, as batches that any step of any run can ask for.

Everything that can go wrong with a record is found before the first step, and every row is planned then:
which records share it, and where it stands. So the batch of a step is a function of (settings, step) alone.
Resume needs that one number, and the hosts and workers that share the work cannot change the order.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxvlm.config import DataConfig, ModelConfig, PromptConfig
from jaxvlm.data import DataError, bad
from jaxvlm.data.columns import cache_folder
from jaxvlm.data.conversation import check_template
from jaxvlm.data.image import transform_version
from jaxvlm.data.instruction import instruction_tokenizer
from jaxvlm.data.mixture import check_sources, epoch_samples
from jaxvlm.data.packing import Rows, plan, slots_needed
from jaxvlm.data.rows import Plan, RowReader, saved_plan
from jaxvlm.data.samples import Samples, usable
from jaxvlm.data.sources import image_address, open_source
from jaxvlm.data.table import Splicing, cached_table, open_table, splicing_for, table_images, table_text
from jaxvlm.data.tiles import tiling
from jaxvlm.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


class Loader:
    """Batches of one training stage, for process `process_index` of `process_count`.

    `batch_size` rows make a global batch; this process gets rows `p * B / n` to `(p + 1) * B / n` of each.
    The run ends after `steps`, or after `epochs` (a fraction is the first part of an epoch; default 1).
    `features` are arrays [n, N, Dv] (memmaps for choice), one or one for each tower, with a mapping from absolute
    image paths to the row of their first tile; batches then carry 'features' [B, T, N, Dv], 'features_1', ... in
    place of 'pixels' uint8 [B, T, H, W, 3]. Where the connector reads the instruction they also carry 'qformer_tokens'
    int32 and 'qformer_mask' bool [B, T, L]. If no record has an image, all of these and 'tile_mask' are left out.

    With `held_out` they are of the records that training never uses (`SourceConfig.held_out`), each once; `steps` and
    `epochs` do not count then.

    Raises `DataError` for records that cannot be used, unless `data.bad_records` is 'skip': they are then listed in the
    file `skipped_path`, one JSON line each with the reason, and images that turn out to be broken later in `broken_path`.
    """

    def __init__(
        self,
        data: DataConfig,
        prompt: PromptConfig,
        model: ModelConfig,
        *,
        batch_size: int,
        seed: int,
        steps: int | None = None,
        epochs: float | None = None,
        process_index: int = 0,
        process_count: int = 1,
        features: tuple[Sequence[np.ndarray], Mapping[str, int]] | None = None,
        tokenizer: Tokenizer | None = None,
        cache_dir: str | os.PathLike | None = None,
        skipped_path: str | os.PathLike | None = None,
        log: Callable[[str], Any] = lambda message: None,
        held_out: bool = False,
    ):
        _check(data, batch_size, steps, epochs, process_index, process_count)
        listed = bad.read_quarantine(data.quarantine, data.sources) if data.quarantine else [{} for _ in data.sources]
        if held_out:
            listed = [entries for entries, source in zip(listed, data.sources, strict=True) if source.held_out]
            data = _held_out(data)
        overrides = {key: getattr(data, key) for key in ("template", "transform", "length")}
        self.prompt = prompt = replace(prompt, **{k: v for k, v in overrides.items() if v is not None})
        self.data, self.batch_size, self.seed, self.held_out = data, batch_size, seed, held_out
        self.process_index, self.process_count = process_index, process_count
        self.tokenizer = tokenizer = tokenizer or Tokenizer(prompt.tokenizer)
        check_template(tokenizer, prompt.template)
        splicing = splicing_for(prompt, tokenizer, tiling(model, prompt), data.tiles_per_row)
        instructions = instruction_tokenizer(model, prompt)
        cache = cache_folder(cache_dir) / "tables"
        self._plans = cache.with_name("plans")
        self._sources = [open_source(config, cache_dir, log) for config in data.sources]
        make = functools.partial(
            cached_table,
            template=prompt.template,
            splicing=splicing,
            tokenizer=tokenizer,
            seed=seed,
            cache=cache,
            log=log,
            instructions=instructions,
            processes=data.num_workers,
            held_out=held_out,
        )
        self._tables = [make(*pair) for pair in zip(self._sources, data.sources, strict=True)]
        self._usable = found = usable(data, self._sources, self._tables, features, listed)
        self._samples, self.source_names = samples, _ = found[:2]
        default = cache / f"skipped-{hashlib.sha256(str(self._tables).encode()).hexdigest()[:16]}.jsonl"
        skipped_path = Path(skipped_path or default)
        self.skipped_path = self._report(skipped_path)
        self.tiles_per_row = data.tiles_per_row or self._slots_needed()
        self._rows, first_epoch = self._plan(steps, epochs)
        self.num_rows = len(self._rows)
        self.num_steps = -(-self.num_rows // batch_size)
        self.fingerprint = self._fingerprint(splicing, first_epoch)
        part = f"_{process_index}" if process_count > 1 else ""
        self.broken_path = str(skipped_path.with_name(f"{skipped_path.stem}_images{part}.jsonl"))
        used = self._rows.samples
        columns = (samples.source[used].astype(np.int16), samples.row[used], samples.name[used].astype(np.int16))
        self._reader = RowReader(
            tables=self._tables,
            plan=Plan(*columns, self._rows.offsets),
            has_images=bool(samples.images.any()),
            configs=data.sources,
            sources=self._sources,
            splicing=splicing._replace(tiles_per_row=self.tiles_per_row),
            broken=bad.BrokenImages(self.broken_path) if data.bad_records == "skip" else None,
            features=features,
            qformer_length=prompt.qformer_length if instructions else 0,
        )

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """This process's batches from `start_step` to the end, made ahead of time by threads or workers."""
        import grain  # here, because it brings jax along and takes over a second; inference needs neither

        rows = self.batch_size // self.process_count
        first = self.process_index * rows
        if start_step >= self.num_steps:
            return
        reader = self._reader
        if self.data.num_workers:
            reader = copy.copy(reader)  # not made anew: it knows already where its features lie
            reader.plan = saved_plan(reader.plan, self._plans)
        make = functools.partial(_step_batch, reader, self.batch_size, first, rows)
        data = grain.MapDataset.range(start_step, self.num_steps).map(make)
        threads = max(1, self.data.num_threads)
        stream = data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
        if self.data.num_workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # grain's workers need parsed absl flags, which only absl.app.run gives
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.data.num_workers))
        iterator = iter(stream)
        try:
            for batch in iterator:
                # A worker's arrays live in shared memory that it takes back.
                yield {k: np.array(v) for k, v in batch.items()} if self.data.num_workers else batch
        finally:
            iterator.close()

    def image_paths(self) -> list[str]:
        """The addresses of all images that the rows use (absolute paths, of files; see `image_at`), sorted, each once."""
        paths = set()
        for i, (source, folder) in enumerate(zip(self._sources, self._tables, strict=True)):
            table = open_table(folder)
            used = {
                int(n) for row in self._samples.row[self._samples.source == i] for n in table_images(table, int(row))
            }
            paths |= {image_address(source, table.image_names[n]) for n in used}
        return sorted(paths)

    def sample(self, i: int) -> dict:
        """Usable sample `i` for inspection: its record, image paths, and `text` as runs of (text,
        supervised).
        """
        source, row = int(self._samples.source[i]), int(self._samples.row[i])
        table, config = open_table(self._tables[source]), self.data.sources[source]
        number = int(table.record[row])
        names = [table.image_names[n] for n in table_images(table, row).tolist()]
        return {
            "id": table.ids[row],
            "source": config.name or config.path,
            "record": number,
            "images": [image_address(self._sources[source], name) for name in names],
            "text": table_text(table, row, self.tokenizer),
            "tokens": int(table.lengths[row]),
        }

    def stats(self) -> dict:
        """Counts over the planned rows, in all and of each source by its name (those inside a mix apart).

        `tokens` are those that are not padding, `fill` is their share of the rows, `tile_fill` that of the filled tile
        slots. `records` can be used; `lost` ones cannot, `skipped` by reason, and `quarantined`, which somebody has listed.
        `dropped` are left out because of their length.
        """
        samples, used, found = self._samples, self._rows.samples, self._usable
        counted = {"tokens": "length", "supervised_tokens": "supervised", "images": "images", "tiles": "tiles"}
        counted |= {"truncated": "truncated", "dropped_images": "dropped_images"}
        names = samples.name[used]
        totals = {"samples": np.bincount(names, minlength=len(self.source_names))}
        for key, column in counted.items():
            values = getattr(samples, column)[used]
            totals[key] = np.bincount(names, weights=values, minlength=len(self.source_names)).astype(np.int64)
        sources = {
            name: {"records": found.records[name], "lost": self._lost(name)}
            | {key: int(values[k]) for key, values in totals.items()}
            | {"skipped": bad.reasons(found.skipped[name]), "quarantined": len(found.quarantined[name])}
            | {"dropped": len(found.dropped[name])}
            for k, name in enumerate(self.source_names)
        }
        sums = {key: int(values.sum()) for key, values in totals.items()}
        return {
            "rows": self.num_rows,
            "steps": self.num_steps,
            "tiles_per_row": self.tiles_per_row,
            "fill": sums["tokens"] / (self.num_rows * self.prompt.length),
            "tile_fill": sums["tiles"] / (self.num_rows * self.tiles_per_row),
            "records": sum(found.records.values()),
            "skipped": sum(map(len, found.skipped.values())),
            "quarantined": sum(map(len, found.quarantined.values())),
            "dropped": sum(map(len, found.dropped.values())),
            **sums,
            "sources": sources,
        }

    def _lost(self, name: str) -> int:
        return len(self._usable.skipped[name]) + len(self._usable.quarantined[name])

    def _report(self, path: Path) -> str | None:
        """Lists the skipped records in a file, and raises if there are too many, or none may be skipped."""
        found = self._usable
        entries = [entry for name in self.source_names for entry in found.skipped[name]]
        written = bad.report(entries, self.data, path, write=self.process_index == 0)
        for name in self.source_names:
            why = bad.reasons(found.skipped[name] + found.quarantined[name])
            if not self.held_out:  # too few to tell a share by
                bad.check_share(name, self._lost(name), self._lost(name) + found.records[name], self.data, why)
        if not len(found.samples.source):
            kind = "held-out record" if self.held_out else "record"
            raise DataError(f"No usable {kind} is left in {', '.join(source.path for source in self.data.sources)}.")
        return written

    def _slots_needed(self) -> int:
        samples = self._samples
        if not self.data.packing:
            return max(int(samples.tiles.max()), 1)
        return slots_needed(samples.length, samples.tiles, self.prompt.length)

    def _plan(self, steps: int | None, epochs: float | None) -> tuple[Rows, Rows]:
        """The run's rows, and those of its first epoch."""
        if self.held_out:
            every = np.arange(len(self._samples.source))
            rows = rows_of(every, self._samples, self.data, self.prompt.length, self.tiles_per_row)
            return rows, rows
        epochs = 1.0 if steps is None and epochs is None else epochs
        make = functools.partial(
            epoch_rows, self._samples, self.data, self.prompt.length, self.tiles_per_row, self.seed
        )
        first = make(0)
        parts: list[Rows] = []
        while sum(map(len, parts)) < steps * self.batch_size if epochs is None else len(parts) < epochs:
            rows = make(len(parts)) if parts else first
            part = 1.0 if epochs is None else min(1.0, epochs - len(parts))
            parts.append(rows.first(max(1, round(part * len(rows)))))
        rows = Rows.joined(parts)
        return (rows if epochs is not None else rows.first(steps * self.batch_size)), first

    def _fingerprint(self, splicing: Splicing, first_epoch: Rows) -> str:
        """A hash of all that decides the batches, but not of how many of them the run takes."""
        samples = self._samples
        order = hashlib.sha256(first_epoch.offsets)
        for column in (samples.source, samples.row):
            order.update(np.ascontiguousarray(column[first_epoch.samples]))
        settings = [splicing.settings, asdict(splicing.tiling), transform_version(self.prompt.transform)]
        digests = [open_table(table).digest for table in self._tables]
        weights = [source.weight for source in self.data.sources]
        shape = [self.data.packing, self.tiles_per_row, self.batch_size, self.seed, weights]
        return hashlib.sha256(json.dumps([settings, digests, shape, order.hexdigest()]).encode()).hexdigest()[:16]


def _step_batch(reader: RowReader, batch_size: int, first: int, rows: int, step: int) -> Batch:
    """`rows` rows of the batch of `step`, from its row `first` on."""
    start = int(step) * batch_size + first
    return reader.batch(range(start, start + rows))


def epoch_rows(samples: Samples, data: DataConfig, length: int, tiles_per_row: int, seed: int, epoch: int) -> Rows:
    """One epoch's rows of sample indices, in random order: one sample each, or packed."""
    order = epoch_samples(samples.source, [source.weight for source in data.sources], seed, epoch)
    return rows_of(order, samples, data, length, tiles_per_row)


def rows_of(order: np.ndarray, samples: Samples, data: DataConfig, length: int, tiles_per_row: int) -> Rows:
    """Rows of the samples with the indices `order`, in about that order: one sample each, or packed."""
    if not data.packing:
        return Rows(order, np.arange(len(order) + 1))
    rows = plan(samples.length[order], samples.tiles[order], length, tiles_per_row)
    return Rows(order[rows.samples], rows.offsets)


def _held_out(data: DataConfig) -> DataConfig:
    """The sources that hold records out. They are few, and read again and again: not worth starting workers for."""
    sources = tuple(source for source in data.sources if source.held_out)
    if not sources:
        raise DataError("None of the stage's sources has records `held_out`.")
    return replace(data, sources=sources, num_workers=0)


def _check(data: DataConfig, batch_size: int, steps, epochs, process_index: int, process_count: int) -> None:
    if not data.sources:
        raise DataError("The stage has no data: `data.sources` is empty.")
    check_sources(data.sources)
    bad.check_policy(data)
    if steps is not None and epochs is not None:
        raise DataError("Set `steps` or `epochs`, not both.")
    if (steps is not None and steps < 1) or (epochs is not None and epochs <= 0):
        raise DataError(f"steps ({steps}) and epochs ({epochs}) must be positive.")
    if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
        raise DataError(f"batch_size {batch_size} must be a multiple of the {process_count} processes.")
