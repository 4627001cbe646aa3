"""`jaxvlm data verify`: reads every record and decodes every image of a source before a run depends on them.

Records first, then each image once however many records share it, then what that means for the records. Per record only
hashes are kept, so that ten million of them fit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from jaxvlm.config import DataConfig, ModelConfig, PromptConfig, SourceConfig
from jaxvlm.data import DataError, llava_mix
from jaxvlm.data.bad import reasons
from jaxvlm.data.columns import cache_folder
from jaxvlm.data.conversation import check_template, record_images, render_record
from jaxvlm.data.image import MAX_PIXELS
from jaxvlm.data.mixture import check_sources
from jaxvlm.data.samples import usable
from jaxvlm.data.sources import Source, image_address, open_source
from jaxvlm.data.table import cached_table, splicing_for
from jaxvlm.data.tiles import tiling
from jaxvlm.data.tokenizer import Tokenizer
from jaxvlm.data.tools import repair
from jaxvlm.data.tools.findings import Finding, show, some, text_table
from jaxvlm.data.tools.images import FAULTS, Look, in_threads, look, misnamed
from jaxvlm.progress import Progress

TEMPLATE = "vicuna_v1"  # with which the form of a conversation is checked: it has a place for everything
SMALL = 14  # pixels on a side: less than one patch
LARGE = 25_000_000  # pixels: decoding one takes most of a second
FOLDERS_SHOWN = 8
LONG = 20  # times longer than wide: little is left of it in a square


@dataclass
class Verified:
    """What was found. `bad` are the records that cannot be used, as lines of a quarantine list; `fetch` names images."""

    records: int
    bad: list[dict] = field(default_factory=list)
    fetch: list[str] = field(default_factory=list)
    findings: list[tuple[str, list[Finding]]] = field(default_factory=list)

    def show(self, out: Callable[[str], Any]) -> None:
        for title, findings in self.findings:
            show(title, findings, out)

    @property
    def problems(self) -> list[Finding]:
        return [finding for _, findings in self.findings for finding in findings if finding.mark == "problem"]


def verify(
    config: SourceConfig,
    *,
    quick: bool = False,
    workers: int | None = None,
    out: Callable[[str], Any] = print,
) -> Verified:
    """Checks a source and prints what was found. With `quick` only the images' headers are read.

    Raises `DataError` if the source itself cannot be opened.
    """
    source = open_source(config, log=out)
    out(f"{config.path}: {len(source):,} records")
    records = _read_records(source)
    with warnings.catch_warnings():  # PIL's warnings of odd but readable files
        warnings.simplefilter("ignore")
        images = _Images(source, records, quick, workers or os.cpu_count() or 1)
    why = dict(records.bad)
    for number, reason, path in images.bad_records():
        why.setdefault(number, (reason, path))
    found = Verified(len(source), fetch=images.fetch)
    for number, (reason, path) in sorted(why.items()):
        place = {"source": config.name, "file": config.path, "record": number, "id": _identity(source, number)}
        found.bad.append(place | {"reason": reason} | ({"image": path} if path else {}))
    found.findings = [("Records", _record_findings(source, records))]
    if images.count:
        found.findings.append(("Images", images.findings(config.images)))
    _show_mix(records, found, out)
    found.show(out)
    return found


def verify_stage(
    name: str, data: DataConfig, prompt: PromptConfig, model: ModelConfig, seed: int, known: set[tuple[str, int]]
) -> Verified:
    """Tokenises and measures a stage's records as its training will, which keeps them for it, and finds what it would refuse.

    `known` are (file, record) of records that are known to be bad. Raises `DataError` for settings that do not go together.
    """
    tokenizer = Tokenizer(prompt.tokenizer)
    check_template(tokenizer, prompt.template)
    check_sources(data.sources)
    splicing = splicing_for(prompt, tokenizer, tiling(model, prompt), data.tiles_per_row)
    sources = [open_source(config, log=print) for config in data.sources]
    made_with = (prompt.template, splicing, tokenizer, seed, cache_folder() / "tables", print)
    pairs = list(zip(sources, data.sources, strict=True))
    found = usable(data, sources, [cached_table(*pair, *made_with) for pair in pairs])
    bad = [entry for entries in found.skipped.values() for entry in entries]
    if pairs := [pair for pair in pairs if pair[1].held_out]:
        sources, configs = zip(*pairs, strict=True)
        tables = [cached_table(*pair, *made_with, held_out=True) for pair in pairs]
        held_out = usable(dataclasses.replace(data, sources=configs), sources, tables)
        bad += [entry for entries in held_out.skipped.values() for entry in entries]
    new = [entry for entry in bad if (entry["file"], entry["record"]) not in known]
    finding = Finding("ok", "records", f"{sum(found.records.values()):,} to train on")
    if new:
        advice = [f"{count:,} x {reason}" for reason, count in list(reasons(new).items())[:5]]
        finding = Finding(
            "problem", "records", f"{len(new):,} that training refuses, beside those above", tuple(advice)
        )
    findings = [finding]
    dropped = sum(map(len, found.dropped.values()))
    if dropped:
        findings.append(Finding("note", "dropped", f"longer than a row, as `truncation` asks: {dropped:,}"))
    made = Verified(sum(found.records.values()), new, findings=[(f"As trained on in {name}", findings)])
    made.show(print)
    return made


# ------------------------------------------------------------------------------------------------------------- records


class _Records:
    """What is kept of the records: hashes [n], and for each use of an image [m] its hash, record and place."""

    def __init__(self):
        self.ids, self.contents, self.mix = array("Q"), array("Q"), Counter()
        self.images, self.owner, self.place = array("Q"), array("q"), array("l")
        self.bad: dict[int, tuple[str, str]] = {}  # record -> reason, image
        self.text_only = self.empty_answers = 0


def _read_records(source: Source) -> _Records:
    kept = _Records()
    with Progress("records", len(source), "read") as progress:
        for number in range(len(source)):
            try:
                _read_record(source[number], number, kept)
            except DataError as error:
                kept.bad[number] = (str(error), "")
            if number % 256 == 255 or number == len(source) - 1:
                progress.add(number + 1 - progress.done)
    return kept


def _read_record(record: Any, number: int, kept: _Records) -> None:
    """Notes one record. Raises `DataError` if it cannot be used whatever its images are."""
    if isinstance(record, dict):
        images = record_images(record)
        kept.mix[llava_mix.source_of(record)] += 1
        kept.text_only += not images
        if record.get("id") is not None:
            kept.ids.append(_hash(repr(record["id"])))
        kept.contents.append(_hash(repr((record.get("image_file", images), record.get("conversations")))))
        for place, name in enumerate(images):
            kept.images.append(_hash(name))
            kept.owner.append(number)
            kept.place.append(place)
    rendered = render_record(record, TEMPLATE)
    answers = [turn.get("value", turn.get("content")) for turn in record["conversations"][1::2]]
    kept.empty_answers += not all(answers) and bool(rendered.spans)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _identity(source: Source, number: int) -> object:
    try:
        record = source[number]
    except DataError:
        return None
    return record.get("id") if isinstance(record, dict) else None


def _record_findings(source: Source, kept: _Records) -> list[Finding]:
    usable = len(source) - len(kept.bad)
    findings = [Finding("ok", "conversations", f"{usable:,} well formed, {kept.text_only:,} of all without an image")]
    if kept.bad:
        shown = [f"record {number}: {reason}" for number, (reason, _) in list(kept.bad.items())[:5]]
        more = [f"... and {len(kept.bad) - 5:,} more, in the quarantine list"] if len(kept.bad) > 5 else []
        findings[0] = Finding("problem", "conversations", f"{len(kept.bad):,} malformed", (*shown, *more))
    twice = _repeated(kept.contents)
    if twice:
        value = f"repeat another record, image and text: {twice:,}"
        findings.append(Finding("note", "duplicates", value, ("Harmless, unless it is more than you meant.",)))
    same = _repeated(kept.ids) - twice
    if same > 0:
        value = f"share their id with another record: {same:,}"
        findings.append(Finding("note", "ids", value, ("Harmless: records are told apart by their number.",)))
    if kept.empty_answers:
        findings.append(Finding("note", "empty answers", f"teach to say nothing: {kept.empty_answers:,} records"))
    return findings


def _repeated(hashes: array) -> int:
    return len(hashes) - len(np.unique(np.frombuffer(hashes, np.uint64))) if len(hashes) else 0


def _show_mix(kept: _Records, found: Verified, out: Callable[[str], Any]) -> None:
    """The counts per source beside those of LLaVA's 665K file, if this looks like it."""
    if not llava_mix.looks_like(kept.mix):
        return
    published = llava_mix.COUNTS
    rows = [(name, f"{kept.mix[name]:,}", f"{count:,}") for name, count in published.items()]
    rows.append(("all", f"{found.records:,}", f"{sum(published.values()):,}"))
    out("\nThe sources of LLaVA's 665K mixture")
    for line in text_table(("", "here", "published"), rows):
        out(f"  {line}")
    wrong = [name for name, count in published.items() if kept.mix[name] != count]
    if not wrong:
        finding = Finding("ok", "mixture", "every source has its published count")
    elif abs(found.records / sum(published.values()) - 1) < 0.05:
        advice = "The file is not the published one. If you did not change it, download it again."
        finding = Finding("problem", "mixture", f"other counts than published: {', '.join(wrong)}", (advice,))
    else:
        finding = Finding("note", "mixture", "a part or a variant of it, by its counts")
    found.findings[0][1].append(finding)


# -------------------------------------------------------------------------------------------------------------- images


class _Images:
    """A look at each image once: sizes [n, 2], and the faults. `uses` [m] says which image each use is of."""

    def __init__(self, source: Source, records: _Records, quick: bool, workers: int):
        self.source, self.records, self.quick = source, records, quick
        hashes = np.frombuffer(records.images, np.uint64) if len(records.images) else np.zeros(0, np.uint64)
        _, self.first, self.uses = np.unique(hashes, return_index=True, return_inverse=True)
        self.count = len(self.first)
        self.sizes = np.zeros((self.count, 2), np.int32)
        self.reasons: dict[int, str] = {}  # of images with a fault
        self.faults: dict[str, list[int]] = {fault: [] for fault in FAULTS}
        self.other_types: dict[str, list[str]] = {}
        order = np.argsort(self.first)  # as the records use them, which is about as they lie on the disk
        with Progress("images", self.count, "headers read" if quick else "decoded") as progress:
            for i, seen in in_threads(lambda i: (int(i), look(source, self.name(i), quick)), order, workers):
                self._note(i, seen)
                progress.add()
        self.fetch = [self.name(i) for fault, some in self.faults.items() if fault != "too large" for i in some]

    def _note(self, i: int, seen: Look) -> None:
        if seen.fault:
            self.faults[seen.fault].append(i)
            self.reasons[i] = seen.reason
            return
        self.sizes[i] = seen.size
        odd = misnamed(self.name(i), seen.kind)
        if odd:
            self.other_types.setdefault(odd, []).append(self.name(i))

    def name(self, i: int) -> str:
        return self._name_of(self.first[i])

    def _name_of(self, use: int) -> str:
        return record_images(self.source[self.records.owner[use]])[self.records.place[use]]

    def bad_records(self) -> Iterator[tuple[int, str, str]]:
        """(record, reason, image) of every use of an image that has a fault."""
        for use in np.flatnonzero(np.isin(self.uses, list(self.reasons))):
            reason = self.reasons[int(self.uses[use])]
            yield self.records.owner[use], reason, image_address(self.source, self._name_of(use))

    def findings(self, folder: str) -> list[Finding]:
        """What is wrong, fault by fault, and what is merely odd."""
        what = "have a readable header" if self.quick else "decode"
        good = f"{self.count - len(self.reasons):,} of {self.count:,} {what}"
        findings = [Finding("problem" if self.reasons else "ok", "images", good)]
        missing = self.faults["missing"]
        if len(missing) == self.count and self.source.image_file(self.name(0)) is not None:
            advice = repair.images_folder(folder, self.source.path, [self.name(i) for i in missing])
            if advice:
                return [*findings, Finding("problem", "missing", "all of them", tuple(advice))]
        for fault, numbers in self.faults.items():
            if numbers:
                findings += self._fault(fault, [self.name(i) for i in numbers], folder)
        for odd, names in self.other_types.items():
            value = f"{odd}: {len(names):,}, as {some(names)}"
            findings.append(
                Finding("note", "other type", value, ("Fine as they are: the type is read from the content.",))
            )
        return findings + self._sizes()

    def _fault(self, fault: str, names: list[str], folder: str) -> list[Finding]:
        """A finding for each of the fullest folders of the images that have this fault."""
        findings = []
        groups = list(repair.by_folder(names).items())
        for home, inside in groups[:FOLDERS_SHOWN]:
            if fault == "too large":
                advice = ["Shrink them, or leave their records out."]
            elif self.source.image_file(inside[0]) is None:
                advice = ["The images are inside the data set: mend what it was made from and convert that again."]
            elif fault == "missing":
                advice = repair.missing_advice(folder, home, inside)
            else:
                advice = [f"Fetch {repair.what_to_fetch(folder, home)}."]
            where = home if home != "." else folder or self.source.path
            value = f"{len(inside):,} in {where}{FAULTS[fault]}: {some([PurePosixPath(name).name for name in inside])}"
            findings.append(Finding("problem", fault, value, tuple(advice)))
        rest = groups[FOLDERS_SHOWN:]
        if rest:
            more = f"{sum(len(inside) for _, inside in rest):,} more in {len(rest):,} other folders"
            findings.append(Finding("problem", fault, more))
        return findings

    def _sizes(self) -> list[Finding]:
        good = np.flatnonzero(self.sizes.any(1))
        sizes = self.sizes[good].astype(np.int64)
        long, short, area = sizes.max(1, initial=1), sizes.min(1, initial=MAX_PIXELS), sizes.prod(1)
        kinds = {
            "tiny": (short < SMALL, f"under {SMALL} pixels wide or high"),
            "huge": (area > LARGE, f"over {LARGE // 10**6} megapixels, which shrunk would load faster"),
            "very long": (long > LONG * short, f"over {LONG} times as long as wide"),
        }
        return [
            Finding(
                "note",
                name,
                f"{what}: {chosen.sum():,}, as {some([self.name(good[k]) for k in np.flatnonzero(chosen)])}",
            )
            for name, (chosen, what) in kinds.items()
            if chosen.any()
        ]
