"""`jaxvlm data convert`: any source as ArrayRecord shards with the images inside, written by several processes.

The shards are written in the folder OUT.unfinished, which becomes OUT when it is whole. A shard holds a range of the source's
records and gets its name when it is whole, with a note beside it of what was left out. So a conversion that was stopped goes on
where it was, and one that met bad records keeps all the shards without them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxvlm.config import SourceConfig
from jaxvlm.data import DataError
from jaxvlm.data.array_records import MANIFEST, SUFFIX, write_manifest, write_shard
from jaxvlm.data.bad import check_identity, read_quarantine
from jaxvlm.data.conversation import record_images, render_record
from jaxvlm.data.image import image_size
from jaxvlm.data.sources import Source, image_address, open_source
from jaxvlm.data.tools.verify import TEMPLATE
from jaxvlm.progress import Progress

SHARD = 8192  # records: about 1 GB with photographs
PLAN = "plan.json"  # what an unfinished conversion is of
LEFT_OUT = "left_out.jsonl"


class BadRecords(DataError):
    """Records that cannot be converted; `entries` are lines of a quarantine list."""

    def __init__(self, entries: list[dict], out: Path):
        self.entries = entries
        lines = [f"{len(entries):,} records cannot be converted, the first:"]
        lines += [f"  record {entry['record']}: {entry['reason']}" for entry in entries[:5]]
        lines.append(
            "Repair them (`jaxvlm data verify` says how), or leave them out with --skip-bad, or name the list of"
            f" `jaxvlm data verify --quarantine`. The shards without them stay in {out}, and the next try goes on from there."
        )
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Job:
    """What a worker needs to write a shard: the range of records, and those in it to leave out."""

    config: SourceConfig
    path: Path
    first: int
    end: int
    quarantine: dict[int, dict]  # by record number
    skip_bad: bool

    @property
    def note(self) -> Path:
        return self.path.with_name(f".{self.path.name}.json")


def convert(
    config: SourceConfig,
    out: Path,
    *,
    shards: int | None = None,
    workers: int | None = None,
    quarantine: str = "",
    skip_bad: bool = False,
) -> dict:
    """Converts all records of a source and returns the manifest; goes on with what an earlier call has left.

    Raises `BadRecords`, and `DataError` if `out` holds something else.
    """
    source = open_source(config, log=print)
    fingerprint = json.loads(json.dumps(source.fingerprint()))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _finished(out, fingerprint)
    work = out.with_name(f"{out.name}.unfinished")
    listed = read_quarantine(quarantine, [config])[0] if quarantine else {}
    for number, entry in listed.items():
        check_identity(entry, _identity(source, number), quarantine)
    count = shards or -(-len(source) // SHARD)
    if not 0 < count <= len(source):
        raise DataError(f"{len(source):,} records do not make {count:,} shards.")
    _claim(work, {"source": config.path, "fingerprint": fingerprint, "shards": count})
    jobs = list(_jobs(config, len(source), work, count, listed, skip_bad))
    open_jobs = [job for job in jobs if not _is_done(job)]
    if len(open_jobs) < len(jobs):
        print(f"{len(jobs) - len(open_jobs):,} of {len(jobs):,} shards are there already.")
    bad = _run(open_jobs, source, min(workers or os.cpu_count() or 1, len(open_jobs)))
    if bad:
        raise BadRecords(sorted(bad, key=lambda entry: entry["record"]), work)
    return _finish(source, work, out, jobs)


def _jobs(config: SourceConfig, records: int, out: Path, count: int, listed: dict, skip_bad: bool) -> Iterator[Job]:
    for k in range(count):
        first, end = k * records // count, (k + 1) * records // count
        inside = {number: entry for number, entry in listed.items() if first <= number < end}
        yield Job(config, out / f"{k:05d}-of-{count:05d}{SUFFIX}", first, end, inside, skip_bad)


def _identity(source: Source, number: int) -> object:
    try:
        record = source[number]
    except (DataError, IndexError):
        return None
    return record.get("id") if isinstance(record, dict) else None


def _finished(out: Path, fingerprint: list) -> dict:
    """The manifest of a set that is there already. Raises `DataError` if it is not of this source."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{out} is there already, and no set of shards. Give a new folder.") from error
    if manifest.get("source", {}).get("fingerprint") != fingerprint:
        raise DataError(f"{out} holds the shards of another source, or of an older state of it. Give another folder.")
    print(f"{out} is there already; remove it to convert anew.")
    return manifest


def _claim(work: Path, plan: dict) -> None:
    """Makes the folder this conversion's own, or goes on with it. Raises `DataError` if it is of another."""
    file = work / PLAN
    if file.is_file():
        old = json.loads(file.read_text(encoding="utf-8"))
        if old != plan:
            what = (
                "number of shards" if old["fingerprint"] == plan["fingerprint"] else "source, or an older state of it"
            )
            raise DataError(
                f"{work} holds a part of a conversion with another {what} ({old['source']}, {old['shards']} shards)."
                " Remove it, or give another folder."
            )
    else:
        work.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(plan), encoding="utf-8")
    for left in work.glob(".unfinished-*"):
        left.unlink()


def _is_done(job: Job) -> bool:
    """Whether the shard is there, and with the same records left out."""
    if not (job.path.is_file() and job.note.is_file()):
        return False
    note = json.loads(job.note.read_text(encoding="utf-8"))
    return note["quarantined"] == sorted(job.quarantine) and (job.skip_bad or not note["skipped"])


def _finish(source: Source, work: Path, out: Path, jobs: list[Job]) -> dict:
    """Lists what was left out, writes the manifest, takes away what only an unfinished conversion needs, and renames it."""
    left_out = []
    for job in jobs:
        left_out += [*job.quarantine.values(), *json.loads(job.note.read_text(encoding="utf-8"))["skipped"]]
    if left_out:
        lines = (json.dumps(entry, ensure_ascii=False) for entry in sorted(left_out, key=lambda entry: entry["record"]))
        (work / LEFT_OUT).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    manifest = write_manifest(work, [job.path.name for job in jobs], source)
    for job in jobs:
        job.note.unlink()
    (work / PLAN).unlink()
    work.rename(out)
    return manifest


# ------------------------------------------------------------------------------------------------------------- a shard


class _Stopped(Exception):
    """The conversion was interrupted while this process wrote a shard."""


def _write(job: Job, source: Source, count: Any, stop: Any) -> list[dict]:
    """Writes a shard and its note, and returns the bad records that keep it from being written.

    `count.value` grows by the records that are done; once `stop.value` is set, the shard is given up.
    """
    bad: list[dict] = []

    def records() -> Iterable[tuple[dict, list[bytes]]]:
        for number in range(job.first, job.end):
            if stop.value:
                raise _Stopped
            if number not in job.quarantine:
                try:
                    yield _with_images(source, number)
                except _Bad as error:
                    place = {"source": job.config.name, "file": job.config.path, "record": number}
                    bad.append(place | error.args[0])
            with count.get_lock():
                count.value += 1
        if bad and not job.skip_bad:
            raise _Refused

    job.note.unlink(missing_ok=True)
    try:
        write_shard(job.path, records())
    except _Refused:
        return bad
    part = job.note.with_name(f".unfinished-{os.getpid()}{job.note.name}")  # whole or not there, as the shard
    part.write_text(json.dumps({"quarantined": sorted(job.quarantine), "skipped": bad}), encoding="utf-8")
    part.replace(job.note)
    return []


class _Refused(Exception):
    """The shard has bad records."""


class _Bad(Exception):
    """A record that cannot be converted: its id, the reason, and the image if that is what is wrong."""


def _with_images(source: Source, number: int) -> tuple[dict, list[bytes]]:
    """A record and the bytes of its images, whose headers have been read. Raises `_Bad`."""
    identity = address = None
    try:
        record = source[number]
        identity = record.get("id") if isinstance(record, dict) else None
        render_record(record, TEMPLATE)
        images = []
        for name in record_images(record):
            address = image_address(source, name)
            content = source.image(name)
            if isinstance(content, str):
                with open(content, "rb") as file:
                    content = file.read()
            image_size(content, address)
            images.append(content)
    except (DataError, OSError) as error:
        reason = str(error) if isinstance(error, DataError) else f"image file {address} is missing or empty"
        raise _Bad({"id": identity, "reason": reason} | ({"image": address} if address else {})) from error
    return record, images


# ------------------------------------------------------------------------------------------------------- the processes

_shared: dict[str, Any] = {}  # `source`, `count` and `stop` of the process that writes


def _run(jobs: list[Job], source: Source, workers: int) -> list[dict]:
    """Writes the shards and returns the bad records that were met. An interrupt gives up those that are not whole."""
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks
    shared = {"source": source, "count": context.Value("q", 0), "stop": context.Value("b", 0)}
    if workers > 1:
        pool: Executor = ProcessPoolExecutor(workers, context, _start, (shared,))
    else:
        pool = ThreadPoolExecutor(1, initializer=_shared.update, initargs=(shared,))
    bad: list[dict] = []
    with Progress("records", sum(job.end - job.first for job in jobs), "converted") as progress:
        try:
            waiting: set[Future] = {pool.submit(_work, job) for job in jobs}
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    bad += future.result()
                progress.add(shared["count"].value - progress.done)
        except BrokenProcessPool as error:
            raise DataError(
                "A process that wrote a shard died; perhaps the memory was full. Run the same command again, with fewer"
                " --workers: what is written is kept."
            ) from error
        finally:
            shared["stop"].value = 1
            pool.shutdown(cancel_futures=True)
    return bad


def _start(shared: dict) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _shared.update(shared)


def _work(job: Job) -> list[dict]:
    return _write(job, **_shared)
