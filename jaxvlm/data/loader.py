"""The loader: planned rows of packed conversations, as batches that any step of any run can ask for.

Everything that can go wrong with a record is found before the first step, and every row is planned then:
which records share it, and where it stands. So the batch of a step is a function of (settings, step) alone.
Resume needs that one number, and the hosts and workers that share the work cannot change the order.
"""

from __future__ import annotations

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
from jaxvlm.data import DataError
from jaxvlm.data.conversation import check_template
from jaxvlm.data.image import transform_version
from jaxvlm.data.packing import plan
from jaxvlm.data.rows import RowReader, Samples
from jaxvlm.data.sources import image_path, missing_files
from jaxvlm.data.table import cached_table, open_table, splicing_for, table_images, table_text
from jaxvlm.data.tiles import tiling
from jaxvlm.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


class Loader:
    """Batches of one training stage, for process `process_index` of `process_count`.

    `batch_size` rows make a global batch; this process gets rows `p * B / n` to `(p + 1) * B / n` of each.
    The run ends after `steps`, or after `epochs` (a fraction is the first part of an epoch; default 1).
    `features` are arrays [n, N, Dv] (memmaps for choice), one or one for each tower, with a mapping from absolute
    image paths to the row of their first tile; batches then carry 'features' [B, T, N, Dv], 'features_1', ... in
    place of 'pixels' uint8 [B, T, H, W, 3]. If no record has an image, both and 'tile_mask' are left out.

    Raises `DataError` for records that cannot be used, unless `data.bad_records` is 'skip': they are then
    listed in the file `skipped_path`, one JSON line each with the reason.
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
    ):
        _check(data, batch_size, steps, epochs, process_index, process_count)
        overrides = {key: getattr(data, key) for key in ("template", "transform", "length")}
        self.prompt = prompt = replace(prompt, **{k: v for k, v in overrides.items() if v is not None})
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.process_index, self.process_count = process_index, process_count
        self.tokenizer = tokenizer = tokenizer or Tokenizer(prompt.tokenizer)
        check_template(tokenizer, prompt.template)
        splicing = splicing_for(prompt, tokenizer, tiling(model, prompt), data.tiles_per_row)
        cache = cache_folder(cache_dir) / "tables"
        self._tables = [
            cached_table(source, prompt.template, splicing, tokenizer, (seed, i), cache, log)
            for i, source in enumerate(data.sources)
        ]
        self._samples, skipped = _usable_samples(data, self._tables, features)
        default = cache / f"skipped-{hashlib.sha256(str(self._tables).encode()).hexdigest()[:16]}.jsonl"
        self.skipped_path = _report(skipped, data, skipped_path or default, write=process_index == 0)
        self._skipped = skipped
        if not len(self._samples.source):
            raise DataError(f"No usable record is left in {', '.join(source.path for source in data.sources)}.")

        packing = [data.packing, data.virtual_shards, data.tiles_per_row]
        pixels = transform_version(prompt.transform)
        settings = [packing, splicing.settings, asdict(splicing.tiling), pixels]
        self._rows, self._row_offsets, first = self._plan(steps, epochs)
        self.num_rows = len(self._row_offsets) - 1
        self.num_steps = -(-self.num_rows // batch_size)
        digests = [open_table(table).digest for table in self._tables]
        key = json.dumps([settings, digests, batch_size, seed, hashlib.sha256(first).hexdigest()])
        self.fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]
        self._reader = RowReader(
            tables=self._tables,
            samples=self._samples,
            rows=self._rows,
            row_offsets=self._row_offsets,
            folders=[source.images for source in data.sources],
            splicing=splicing,
            skip_bad_images=data.bad_records == "skip",
            features=features,
        )

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """This process's batches from `start_step` to the end, made ahead of time by threads or workers."""
        import grain  # here, because it brings jax along and takes over a second; inference needs neither

        rows = self.batch_size // self.process_count
        first = self.process_index * rows
        if start_step >= self.num_steps:
            return
        make = functools.partial(_step_batch, self._reader, self.batch_size, first, rows)
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
        """The absolute paths of all images that the rows use, sorted, each once."""
        paths = set()
        for i, folder in enumerate(self._tables):
            table = open_table(folder)
            used = {
                int(n) for row in self._samples.row[self._samples.source == i] for n in table_images(table, int(row))
            }
            paths |= {image_path(self.data.sources[i].images, table.image_names[n]) for n in used}
        return sorted(paths)

    def sample(self, i: int) -> dict:
        """Usable sample `i` for inspection: its record, image paths, and `text` as runs of (text,
        supervised).
        """
        source, row = int(self._samples.source[i]), int(self._samples.row[i])
        table, config = open_table(self._tables[source]), self.data.sources[source]
        number = int(table.record[row])
        return {
            "id": table.ids[row],
            "source": config.name or config.path,
            "record": number,
            "images": [image_path(config.images, table.image_names[int(n)]) for n in table_images(table, row)],
            "text": table_text(table, row, self.tokenizer),
            "tokens": int(table.lengths[row]),
        }

    def stats(self) -> dict:
        """Counts over the planned rows: tokens are those that are not padding, `fill` is their share of the
        rows.
        """
        samples, used = self._samples, self._rows
        tokens = int(samples.length[used].sum())
        sources = {}
        for i, source in enumerate(self.data.sources):
            mine, rows = samples.source == i, used[samples.source[used] == i]
            sources[source.name or source.path] = {
                "records": int(mine.sum()),
                "tokens": int(samples.length[rows].sum()),
                "supervised_tokens": int(samples.supervised[rows].sum()),
            }
        return {
            "records": len(samples.source),
            "rows": self.num_rows,
            "steps": self.num_steps,
            "tokens": tokens,
            "supervised_tokens": int(samples.supervised[used].sum()),
            "images": int(samples.images[used].sum()),
            "fill": tokens / (self.num_rows * self.prompt.length),
            "tiles": int(samples.tiles[used].sum()),
            "tile_fill": float(samples.tiles[used].sum() / (self.num_rows * self.data.tiles_per_row)),
            "skipped": len(self._skipped),
            "truncated": int(samples.truncated.sum()),
            "dropped_images": int(samples.dropped_images.sum()),
            "sources": sources,
        }

    def _plan(self, steps: int | None, epochs: float | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The run's rows as flat sample indices with offsets, and the flat indices of its first epoch."""
        epochs = 1.0 if steps is None and epochs is None else epochs
        rows: list[np.ndarray] = []
        first, epoch = np.zeros(0, np.int64), 0
        while len(rows) < steps * self.batch_size if epochs is None else epoch < epochs:
            new = epoch_rows(self._samples, self.data, self.prompt.length, self.seed, epoch)
            first = first if epoch else np.concatenate(new)
            part = 1.0 if epochs is None else min(1.0, epochs - epoch)
            rows += new[: max(1, round(part * len(new)))]
            epoch += 1
        rows = rows if epochs is not None else rows[: steps * self.batch_size]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        return np.concatenate(rows), offsets, first


def _step_batch(reader: RowReader, batch_size: int, first: int, rows: int, step: int) -> Batch:
    """`rows` rows of the batch of `step`, from its row `first` on."""
    start = int(step) * batch_size + first
    return reader.batch(range(start, start + rows))


def epoch_rows(samples: Samples, data: DataConfig, length: int, seed: int, epoch: int) -> list[np.ndarray]:
    """One epoch's rows of sample indices: a permutation dealt to virtual shards, each packed by itself.

    Row g of the epoch is row g // V of shard g % V (ecosystem §1.4). A shard needs samples to pack well, so
    there are fewer of them for few samples.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(samples.source))
    if not data.packing:
        return list(order[:, None])
    shards = max(1, min(data.virtual_shards, len(order) // 64))
    queues = []
    for v in range(shards):
        mine = order[v::shards]
        planned = plan(samples.length[mine], samples.tiles[mine], length, data.tiles_per_row, [seed, epoch, v])
        queues.append([mine[row] for row in planned])
    return [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)]


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """`cache_dir`, or $JAXVLM_CACHE, or ~/.cache/jaxvlm."""
    return Path(cache_dir or os.environ.get("JAXVLM_CACHE") or Path.home() / ".cache" / "jaxvlm")


def _check(data: DataConfig, batch_size: int, steps, epochs, process_index: int, process_count: int) -> None:
    if not data.sources:
        raise DataError("The stage has no data: `data.sources` is empty.")
    if data.bad_records not in ("error", "skip"):
        raise DataError(f"bad_records must be 'error' or 'skip', not {data.bad_records!r}.")
    if steps is not None and epochs is not None:
        raise DataError("Set `steps` or `epochs`, not both.")
    if (steps is not None and steps < 1) or (epochs is not None and epochs <= 0):
        raise DataError(f"steps ({steps}) and epochs ({epochs}) must be positive.")
    if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
        raise DataError(f"batch_size {batch_size} must be a multiple of the {process_count} processes.")


def _usable_samples(data: DataConfig, tables: list[str], features) -> tuple[Samples, list[dict]]:
    """All samples whose images are there, and every record that is left out, with its reason."""
    parts, skipped = [], []
    for i, (config, folder) in enumerate(zip(data.sources, tables, strict=True)):
        table = open_table(folder)
        skipped += table.bad
        paths = [image_path(config.images, name) for name in table.image_names]
        if features is None:
            missing = set(missing_files(paths))
        else:
            missing = {n for n, path in enumerate(paths) if path not in features[1]}
        counts = table.used_images
        bad_rows = _rows_with(table, missing)
        for row in bad_rows:
            path = next(paths[n] for n in table_images(table, row) if n in missing)
            why = {"reason": f"image file {path} is missing or empty", "image": path}
            place = {"source": config.name, "file": config.path, "record": int(table.record[row])}
            skipped.append(place | {"id": table.ids[row]} | why)
        copies = np.array(table.copies)
        copies[bad_rows] = 0
        rows = np.repeat(np.arange(len(counts)), copies)
        columns = (table.lengths, counts, table.tiles, table.supervised_tokens, table.dropped_images, table.truncated)
        parts.append((np.full(len(rows), i), rows, *(column[rows] for column in columns)))
    return Samples(*(np.concatenate(column).astype(np.int64) for column in zip(*parts, strict=True))), skipped


def _rows_with(table, names: set[int]) -> np.ndarray:
    """The table's rows that use one of these images."""
    totals = np.diff(table.image_offsets)
    owner = np.repeat(np.arange(len(totals)), totals)
    used = np.arange(len(owner)) - np.asarray(table.image_offsets)[owner] < table.used_images[owner]
    return np.unique(owner[np.isin(table.images, list(names)) & used])


def _report(skipped: list[dict], data: DataConfig, path: str | os.PathLike, write: bool) -> str | None:
    """Writes the skipped records, or raises when they are errors."""
    if not skipped:
        return None
    if data.bad_records == "skip":
        if write:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(record) + "\n" for record in skipped)
            Path(path).write_text("".join(lines), encoding="utf-8")
        return str(path)
    lines = []
    images = list(dict.fromkeys(record["image"] for record in skipped if "image" in record))
    if images:
        folders = ", ".join(dict.fromkeys(repr(source.images) for source in data.sources))
        lines.append(f"{len(images)} image files are missing or empty, the first: {', '.join(images[:5])}.")
        lines.append(f"  Check the sources' `images` folder ({folders}) or complete the download.")
    others = [record for record in skipped if "image" not in record]
    if others:
        lines.append(f"{len(others)} records cannot be used, the first:")
        lines += [f"  {record['file']}, record number {record['record']}: {record['reason']}" for record in others[:5]]
    lines.append("bad_records = 'skip' in the stage's data leaves such records out and lists them in a file.")
    raise DataError("\n".join(lines))
