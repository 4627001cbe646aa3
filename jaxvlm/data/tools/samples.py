"""`jaxvlm data inspect`: what the model sees of a record, and which of it is supervised, in colours.

The text is decoded from the tokens of the training row, after the images were put in and what is too long was cut off, so
that it shows what is trained on and not what was meant.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxvlm.config import SourceConfig
from jaxvlm.data import DataError
from jaxvlm.data.boxes import with_boxes
from jaxvlm.data.conversation import IMAGE_MARK, encode, record_images, render_record
from jaxvlm.data.layout import Spliced, splice
from jaxvlm.data.mixture import prepared
from jaxvlm.data.sources import Source
from jaxvlm.data.table import Splicing
from jaxvlm.data.tiles import ImagePlan, image_plans
from jaxvlm.data.tokenizer import Tokenizer
from jaxvlm.data.tools.images import Look, look

CONTEXT = 4  # tokens in front of a run, with which it is decoded: a tokenizer's first token loses its space


class Run(NamedTuple):
    """A piece of the text that is all of one kind: text | special (a token of its own, as `</s>`) | image (its number)."""

    kind: str
    text: str
    supervised: bool


class Picture(NamedTuple):
    """An image of a sample."""

    name: str  # by which its source gives it
    title: str  # what it is called
    seen: Look
    tokens: int = 0


@dataclass
class Sample:
    """One record as it is trained on. Without a tokenizer the runs are the rendered text, and there are no counts."""

    source: str
    number: int
    identity: object
    runs: list[Run] = field(default_factory=list)
    images: list[Picture] = field(default_factory=list)
    length: int | None = None  # tokens, visual ones included
    visual: int = 0
    supervised: int = 0
    notes: list[str] = field(default_factory=list)
    error: str = ""  # why it cannot be used; the runs are then the record as it was written

    @property
    def title(self) -> str:
        return f"{self.source}, record {self.number}, id {self.identity}"


@dataclass(frozen=True)
class Viewer:
    """Reads samples of sources; `tokenizer` and `splicing` are None where only the rendered text can be shown."""

    template: str
    layout: str = "llava"
    tokenizer: Tokenizer | None = None
    splicing: Splicing | None = None

    def sample(self, config: SourceConfig, source: Source, number: int) -> Sample:
        """Record `number` of a source; what is wrong with it is part of the sample, and no error is raised."""
        made = Sample(config.name or config.path, number, None)
        record = None
        try:
            record = prepared(source[number], config)
            made.identity = record.get("id") if isinstance(record, dict) else None
            if isinstance(record, dict):
                names = record_images(record)
                titles = record_images(record | {"image": record["image_file"]}) if "image_file" in record else names
                made.images = [Picture(*both, look(source, both[0])) for both in zip(names, titles, strict=True)]
            if self.splicing and not any(one.seen.fault for one in made.images):
                record = with_boxes(record, source, config, self.splicing.tiling.transform)
            if self.tokenizer:
                self._tokens(record, made)
            else:
                rendered = render_record(record, self.template, self.layout)
                made.runs = list(_rendered_runs(rendered))
            made.error = made.error or next((one.seen.reason for one in made.images if one.seen.fault), "")
        except DataError as error:
            made.error, made.runs = str(error), [Run("text", _written(record), False)]
        return made

    def _tokens(self, record: dict, made: Sample) -> None:
        encoded = encode(record, self.tokenizer, self.template, self.layout)
        tiling, settings = self.splicing.tiling, self.splicing.settings
        plans = image_plans(tiling, [(1, 1) if one.seen.fault else one.seen.size for one in made.images])
        made.images = [one._replace(tokens=len(plan.index)) for one, plan in zip(made.images, plans, strict=True)]
        whole = splice(encoded, plans, **settings | {"length": None})
        spliced = splice(encoded, plans, **settings)
        if spliced is None:
            raise DataError(f"It has {len(whole.tokens):,} tokens, more than `length`, and `truncation` is 'drop'.")
        made.runs = list(_token_runs(spliced, plans, self.tokenizer))
        made.length, made.visual = len(spliced.tokens), int((spliced.visual_index != -1).sum())
        made.supervised = int((spliced.weights > 0).sum())
        if spliced.truncated:
            lost = f"{len(whole.tokens) - made.length:,} of {len(whole.tokens):,} tokens"
            images = f", {spliced.dropped_images} images among them," if spliced.dropped_images else ""
            made.notes.append(f"cut to length {settings['length']:,}: {lost}{images} are lost")
        if not made.supervised:
            made.error = f"no supervised token is left within length {settings['length']:,}"


def _token_runs(spliced: Spliced, plans: list[ImagePlan], tokenizer: Tokenizer) -> Iterator[Run]:
    """The sequence in runs, each image one of them."""
    supervised = np.concatenate([[False], spliced.weights[:-1] > 0])  # a weight belongs to the token before
    special_ids = {tokenizer.id(token) for token in tokenizer.special_tokens}
    is_special = np.isin(spliced.tokens, list(special_ids))
    is_text = spliced.visual_index == -1
    start = image = 0
    while start < len(is_text):
        if not is_text[start]:
            yield Run("image", str(image + 1), False)
            start, image = start + len(plans[image].index), image + 1
            continue
        end = start + 1
        kind = (is_special[start], supervised[start])
        while end < len(is_text) and is_text[end] and (is_special[end], supervised[end]) == kind:
            end += 1
        ids = spliced.tokens[is_text][: is_text[:end].sum()]
        yield Run("special" if kind[0] else "text", _decoded(ids, end - start, tokenizer), bool(kind[1]))
        start = end


def _decoded(ids: np.ndarray, count: int, tokenizer: Tokenizer) -> str:
    """What the last `count` of these ids add to the text of the ones before them."""
    before = ids[max(0, len(ids) - count - CONTEXT) : len(ids) - count]
    known = tokenizer.decode(before, skip_special=False)
    return tokenizer.decode([*before, *ids[len(ids) - count :]], skip_special=False)[len(known) :]


def _rendered_runs(rendered) -> Iterator[Run]:
    """The rendered text in runs, for want of a tokenizer."""
    text, marks = rendered.text, set(rendered.image_marks)
    edges = {0, len(text), *itertools.chain(*rendered.spans), *marks, *(mark + len(IMAGE_MARK) for mark in marks)}
    image = 0
    for start, end in itertools.pairwise(sorted(edges)):
        if start in marks:
            image += 1
            yield Run("image", str(image), False)
        else:
            yield Run("text", text[start:end], any(a <= start < b for a, b in rendered.spans))


def _written(record: Any) -> str:
    """A record that cannot be rendered, turn by turn as far as it has turns."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return "" if record is None else str(record)[:2000]
    return "\n".join(
        f"{turn.get('from', turn.get('role'))}: {turn.get('value', turn.get('content'))}" for turn in turns
    )


# ---------------------------------------------------------------------------------------------------------- in a terminal

INKS = {"supervised": "1;32", "image": "7", "special": "4", "quiet": "2", "error": "31"}  # of ANSI terminals


def show_sample(sample: Sample, out: Callable[[str], Any], colour: bool) -> None:
    """Prints a sample: its counts, then the text with what is supervised in colour, or between [[ and ]]."""
    out(_ink(f"--- {visible(sample.title)}", "quiet", colour))
    for i, image in enumerate(sample.images, start=1):
        out(f"    image {i}   {visible(image.title)}: {image_facts(image)}")
    if sample.length is not None:
        out(f"    {counts(sample)}")
    for note in sample.notes:
        out(f"    note      {note}")
    if sample.error:
        out(f"    {_ink('unusable', 'error', colour)}  {visible(sample.error)}")
    out("\n" + _text(sample.runs, colour).rstrip("\n") + "\n")


def legend(colour: bool) -> str:
    """What the marks mean."""
    shown = [Run("text", "supervised", True), Run("text", "given", False), Run("image", "1", False)]
    shown += [Run("special", "special token", False)] * colour
    return "   ".join(_text([run], colour) for run in shown) + "   \u21b5 new line"


def _text(runs: list[Run], colour: bool) -> str:
    pieces = []
    for supervised, group in itertools.groupby(runs, key=lambda run: run.supervised):
        marked = [(f"<image {run.text}>" if run.kind == "image" else visible(run.text), run.kind) for run in group]
        if colour:
            pieces += [_ink(_ink(text, kind, True), "supervised" * supervised, True) for text, kind in marked]
        else:
            text = "".join(text for text, _ in marked)
            pieces.append(f"[[{text}]]" if supervised else text)
    return "".join(pieces)


def _ink(text: str, ink: str, colour: bool) -> str:
    """Text in a colour, line by line, because pagers and terminals forget it at a line's end."""
    if not colour or ink not in INKS:
        return text
    return "\n".join(f"\x1b[{INKS[ink]}m{line}\x1b[0m" if line else "" for line in text.split("\n"))


def visible(text: str) -> str:
    """Text for a terminal: a mark at each new line, and no control characters that the terminal would obey."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda found: repr(found[0])[1:-1], text)
    return text.replace("\n", "\u21b5\n")


def image_facts(image: Picture) -> str:
    """'640 x 480, JPEG, 576 tokens'."""
    seen = image.seen
    if seen.fault:
        return seen.fault
    return f"{seen.size[0]} x {seen.size[1]}, {seen.kind}" + (f", {image.tokens:,} tokens" if image.tokens else "")


def counts(sample: Sample) -> str:
    """'812 tokens: 576 visual, 236 of text, 121 supervised (14.9 %)'."""
    share = 100 * sample.supervised / max(sample.length, 1)
    text = sample.length - sample.visual
    visual = f"{sample.visual:,} visual, " if sample.visual else ""
    return f"{sample.length:,} tokens: {visual}{text:,} of text; {sample.supervised:,} supervised ({share:.1f} %)"
