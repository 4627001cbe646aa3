"""Conversations as token ids with labels.

A template renders a conversation to one text and knows which characters of it the model must write. The text
is tokenised once, chunk by chunk between images as LLaVA does, and the labels follow from the tokens'
character offsets; nothing is tokenised a second time to find them, so they cannot disagree (recipes §1.2 P1,
P4-P7).

What is supervised: everything that inference would have to generate, which is the answer with the space in
front of it and the template's end of turn. The prompt of inference is therefore exactly the start of the
training text.

What users write stays text: a `</s>` or `<|im_start|>` inside a message is tokenised as plain characters and
never becomes a special token. `<image>` in a human turn always stands for an image of the record. A record with
another number of images, or with an `<image>` in an answer or a system prompt, is an error; in a chat, what a model
has answered stays text.

There is no further mode for LLaVA's own labels: with a Vicuna tokenizer, `vicuna_v1` gives LLaVA's ids and mask for
every sample that LLaVA can label, and keeps the labels of those for which it prints "tokenization mismatch".
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxvlm.data import DataError
from jaxvlm.data.tokenizer import Tokenizer, stripped
from jaxvlm.templates import IMAGE_MARK, OWN, TEMPLATES, Template

IMAGE_TOKEN = -200  # stands where an image's tokens go, as in LLaVA
IMAGES_IN_FRONT = ("prismatic", "images_first")  # layouts that take the images out of the text

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Rendered(NamedTuple):
    text: str
    spans: list[tuple[int, int]]  # supervised characters, end of turn included
    image_marks: list[int]  # character index of each `<image>` that stands for an image
    content: list[tuple[int, int]]  # characters that users wrote
    adds_bos: bool = True  # whether the tokenizer puts its BOS in front, if it does so


class Encoded(NamedTuple):
    tokens: np.ndarray  # int32 [n], IMAGE_TOKEN where an image stands
    weights: np.ndarray  # float32 [n], 1 where the token is supervised


class _Writer:
    """Collects pieces of text and remembers what each was."""

    def __init__(self):
        self.pieces: list[str] = []
        self.length = 0
        self.spans: list[tuple[int, int]] = []
        self.marks: list[int] = []
        self.content: list[tuple[int, int]] = []

    def frame(self, text: str) -> None:
        self.pieces.append(text)
        self.length += len(text)

    def written(self, text: str) -> None:
        if text:
            self.content.append((self.length, self.length + len(text)))
            self.frame(text)

    def image(self) -> None:
        self.marks.append(self.length)
        self.frame(IMAGE_MARK)


def render(
    conversations: Sequence[dict],
    template: str,
    *,
    layout: str = "llava",
    tokenizer: Tokenizer | None = None,
    name: str = "conversation",
) -> Rendered:
    """Renders a conversation: LLaVA's `[{"from": "human"|"gpt", "value": str}]` or chat messages.

    A first turn of role `system` takes the place of the template's own system prompt. A first turn by the
    assistant is left out, as LLaVA does. With a layout of IMAGES_IN_FRONT the images stand at the very start. A
    conversation that ends with a question is rendered up to where the answer begins. `tokenizer` gives the end of
    sequence ("</s>" without one), or the template itself where that is 'tokenizer'. `name` is used in errors.

    Raises `DataError` for roles that do not alternate, an empty conversation, and turns the template cannot
    hold.
    """
    system, turns = _turns(conversations, name)
    if template == OWN and tokenizer:
        return _render_own(tokenizer, system or "", turns, layout, name)
    style = get_template(template)
    if system is not None and style.system_format is None:
        raise DataError(f"{name}: the template {template!r} has no place for a system prompt; remove that turn.")
    if style.style == "plain" and len(turns) > 2:
        raise DataError(
            f"{name}: the template {template!r} holds one caption, not {len(turns)} turns; use another template."
        )
    system = style.system if system is None else system
    out = _Writer()
    out.frame(style.start)
    if layout in IMAGES_IN_FRONT:
        for role, text in turns:
            for _ in range(text.count(IMAGE_MARK) if role == "user" else 0):
                out.image()
        turns = [(role, (text.replace(IMAGE_MARK, "") if role == "user" else text).strip()) for role, text in turns]
    if system and not style.system_inside:
        _system(out, style, system)
    for i, (role, text) in enumerate(turns):
        text = text.strip() if role in style.strip else text
        if role == "assistant":
            start = out.length
            out.frame(style.lead)
            out.written(text)
            out.frame(style.end.format(eos=(tokenizer and tokenizer.eos) or "</s>"))
            out.spans.append((start, out.length))
            out.frame(style.after)
            continue
        out.frame(style.between if i else "")
        _user(out, style, text, system if i == 0 and style.system_inside else "")
        out.frame(style.ask)
    return Rendered("".join(out.pieces), out.spans, out.marks, out.content)


def _render_own(tokenizer: Tokenizer, system: str, turns: list[tuple[str, str]], layout: str, name: str) -> Rendered:
    own, in_front = _own_template(tokenizer), layout in IMAGES_IN_FRONT
    if not in_front:
        turns = [(role, _image_moved(text) if role == "user" else text) for role, text in turns]
    # Of text templates transformers adds no BOS to what they write; those of image processors leave it to the tokenizer.
    return Rendered(*own.render(system, turns, name, in_front), adds_bos=own.parts)


@functools.lru_cache(maxsize=4)
def _own_template(tokenizer: Tokenizer):
    from jaxvlm.data.chat_template import ChatTemplate  # brings Jinja along, which no named template needs

    return ChatTemplate(tokenizer)


def _image_moved(text: str) -> str:
    """A human turn whose single image is in front, as LLaVA moves it; several keep their places."""
    if text.count(IMAGE_MARK) != 1:
        return text
    return f"{IMAGE_MARK}\n{text.replace(IMAGE_MARK, '').strip()}".strip()


def _user(out: _Writer, style: Template, text: str, system: str) -> None:
    if style.style != "instruct":
        for _ in range(text.count(IMAGE_MARK)):
            out.image()
        out.frame(style.user)
        if style.style == "bare":
            out.written(text.replace(IMAGE_MARK, "").strip())
        return
    out.frame(style.user)
    if system:
        _system(out, style, system)
    for i, part in enumerate(_image_moved(text).split(IMAGE_MARK)):
        if i:
            out.image()
        out.written(part)


def _system(out: _Writer, style: Template, system: str) -> None:
    before, after = style.system_format.split("{}")
    out.frame(before)
    out.written(system)
    out.frame(after)


def _turns(conversations: Sequence[dict], name: str) -> tuple[str | None, list[tuple[str, str]]]:
    """The system prompt, if the conversation has its own, and the (role, text) turns, checked."""
    if not isinstance(conversations, (list, tuple)) or not conversations:
        raise DataError(f"{name}: the conversation is empty; it must be a list of turns.")
    turns = []
    for i, turn in enumerate(conversations):
        role = text = None
        if isinstance(turn, dict):
            role, text = _said(turn)
        if role not in _ROLES or not isinstance(text, str):
            want = "{'from': 'human' | 'gpt', 'value': TEXT}"
            raise DataError(f"{name}: turn {i} must be {want}, not {str(turn)[:80]!r}.")
        turns.append((_ROLES[role], text))
    system = None
    if turns[0][0] == "system":
        system, turns = turns[0][1], turns[1:]
    if turns and turns[0][0] == "assistant":
        turns = turns[1:]
    if not turns:
        raise DataError(f"{name}: the conversation has no human turn.")
    for i, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[i % 2]:
            said = " ".join({"user": "human", "assistant": "gpt"}.get(r, r) for r, _ in turns[:6])
            raise DataError(
                f"{name}: roles must alternate human, gpt, human, gpt; these are {said}"
                f"{' …' if turns[6:] else ''}. Merge the turns that follow each other."
            )
    return system, turns


def get_template(name: str) -> Template:
    """The template of this name. Raises `DataError` listing the names."""
    if name == OWN:
        raise DataError(f"Template {OWN!r} is the one that comes with a tokenizer: name its folder too.")
    if name not in TEMPLATES:
        names = ", ".join([*TEMPLATES, OWN])
        raise DataError(f"There is no template {name!r}; the templates are {names} ({OWN!r} is the tokenizer's own).")
    return TEMPLATES[name]


def check_template(tokenizer: Tokenizer, template: str) -> None:
    """Raises `DataError` if the tokenizer lacks a special token that the template ends its turns with, or has no chat
    template of its own that can be trained with (see `data.chat_template`) where that is asked for.
    """
    if template == OWN:
        _own_template(tokenizer)
        return
    for token in get_template(template).specials:
        token = tokenizer.eos if token == "{eos}" else token
        if token not in tokenizer.special_tokens:
            fits = [
                n for n, t in TEMPLATES.items() if all(s in {*tokenizer.special_tokens, "{eos}"} for s in t.specials)
            ]
            fits += [OWN] if tokenizer.chat_template else []
            what = f"special token {token!r}" if token else "end-of-sequence token"
            raise DataError(
                f"The template {template!r} needs the {what}, which {tokenizer.path} does not have."
                f" Templates that fit it: {', '.join(fits)}."
            )


def stop_ids(tokenizer: Tokenizer, template: str) -> tuple[int, ...]:
    """The ids that end an answer: the template's end of turn, and the tokenizer's end of sequence."""
    end = (
        _own_template(tokenizer).end if template == OWN else get_template(template).end.format(eos=tokenizer.eos or "")
    )
    ids = tokenizer.encode(end.strip(" "))[-1:] if end else []
    return tuple(dict.fromkeys([*ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]))


def record_images(record: dict) -> list[str]:
    """The image names of a record: none, one, or a list."""
    images = record.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise DataError(f"record {record.get('id')!r}: 'image' must be a file name or a list of them, not {images!r}.")
    return images


def image_instructions(conversations: Sequence[dict]) -> list[str]:
    """Of each `<image>` of a conversation that `render` takes, the text of the human turn it stands in."""
    turns = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in conversations]
    asked = [text for role, text in turns if _ROLES[role] == "user"]
    return [text.replace(IMAGE_MARK, "").strip() for text in asked for _ in range(text.count(IMAGE_MARK))]


def encode(record: dict, tokenizer: Tokenizer, template: str, layout: str = "llava") -> Encoded:
    """One LLaVA record as tokens int32 [n] (IMAGE_TOKEN for each image) and weights float32 [n].

    Raises `DataError` naming the record: bad turns, `<image>` count other than the number of images, no
    answer at the end, nothing supervised.
    """
    (encoded,) = encode_all([record], tokenizer, template, layout)
    if isinstance(encoded, DataError):
        raise encoded
    return encoded


def encode_all(
    records: Sequence[dict], tokenizer: Tokenizer, template: str, layout: str = "llava"
) -> list[Encoded | DataError]:
    """`encode` of each record, tokenised on all cores; the error itself for a record that cannot be used."""
    check_template(tokenizer, template)
    results: list[Encoded | DataError | None] = [None] * len(records)
    rendered = []
    for i, record in enumerate(records):
        try:
            rendered.append((i, render_record(record, template, layout, tokenizer)))
        except DataError as error:
            results[i] = error
    for (i, _), (encoded, joined) in zip(rendered, _tokenize([r for _, r in rendered], tokenizer), strict=True):
        name = f"record {records[i].get('id')!r}"
        if joined:
            results[i] = DataError(
                f"{name}: the tokenizer makes one token of the end of the prompt and the start of the answer ({joined!r}),"
                f" so a model trained on it could not be prompted; template {template!r} does not fit this tokenizer."
            )
        else:
            results[i] = encoded if encoded.weights.any() else DataError(f"{name} has no supervised token; remove it.")
    return results


def render_record(record: dict, template: str, layout: str = "llava", tokenizer: Tokenizer | None = None) -> Rendered:
    """`render` of a LLaVA record, checked against its images. Raises `DataError` naming the record, as `encode` does."""
    if not isinstance(record, dict):
        raise DataError(f"a record must be an object with 'conversations', not {str(record)[:60]!r}.")
    name = f"record {record.get('id')!r}"
    if "conversations" not in record:
        raise DataError(f"{name} has no 'conversations'; its keys are {', '.join(map(repr, record)) or 'none'}.")
    rendered = render(record["conversations"], template, layout=layout, tokenizer=tokenizer, name=name)
    for i, turn in enumerate(record["conversations"]):
        role, text = _said(turn)
        if _ROLES[role] != "user" and IMAGE_MARK in text:
            raise DataError(
                f"{name}: turn {i}, by {role!r}, has {IMAGE_MARK}, which stands for an image and belongs in a human turn;"
                " move it there, or write it in another way."
            )
    images, marks = len(record_images(record)), len(rendered.image_marks)
    if marks != images:
        raise DataError(
            f"{name} has {images} image{'s' * (images != 1)} but {marks} {IMAGE_MARK} in its human turns;"
            f" add or remove {IMAGE_MARK}, or correct its 'image'."
        )
    if len(rendered.spans) == 0 or _ROLES[_said(record["conversations"][-1])[0]] != "assistant":
        raise DataError(f"{name} ends with a human turn; add the answer or remove that turn.")
    return rendered


def _said(turn: dict) -> tuple:
    """Role and text of a turn, in LLaVA's words or in those of chat messages."""
    return turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))


def prompt(messages: Sequence[dict], tokenizer: Tokenizer, template: str, layout: str = "llava") -> np.ndarray:
    """Chat messages as int32 tokens (IMAGE_TOKEN for each image), ending where the assistant's answer begins.

    `messages` are `{"role": "user" | "assistant", "content": str}`, the last by the user; a first one by
    `system` takes the place of the template's system prompt. The result is a prefix of `encode` of the same
    conversation answered.
    """
    check_template(tokenizer, template)
    if not messages or not isinstance(messages[-1], dict) or _ROLES.get(_said(messages[-1])[0]) != "user":
        raise DataError("The last message must be by the user: it is the one to be answered.")
    rendered = render(messages, template, layout=layout, tokenizer=tokenizer, name="messages")
    return _tokenize([rendered], tokenizer)[0][0].tokens


def _tokenize(rendered: Sequence[Rendered], tokenizer: Tokenizer) -> list[tuple[Encoded, str]]:
    """Tokenises the chunks between images of every text in one call, and labels them by their offsets.

    With each the text of the first token that begins before a supervised span and ends inside; mostly there is none.
    """
    kept = [_template_specials(one, tokenizer) for one in rendered]
    chunks = [
        (start, one.text[start:end], None if spans is None else _within(spans, start, end))
        for one, spans in zip(rendered, kept, strict=True)
        for start, end in _between_images(one)
    ]
    tokenized = iter(tokenizer.encode_batch([(text, specials) for _, text, specials in chunks]))
    starts = iter([start for start, _, _ in chunks])
    return [_labelled(one, tokenizer, tokenized, starts) for one in rendered]


def _labelled(
    rendered: Rendered, tokenizer: Tokenizer, tokenized: Iterator, starts: Iterator[int]
) -> tuple[Encoded, str]:
    """Takes the text's chunks from the iterators and joins them: BOS once, IMAGE_TOKEN between chunks."""
    ids: list[int] = []
    joined = ""
    unsupervised = np.zeros(1, np.float32)
    weights = []
    for i in range(len(rendered.image_marks) + 1):
        chunk, offsets = next(tokenized)
        start = next(starts)
        if i or (rendered.adds_bos and tokenizer.adds_bos and chunk[:1] != [tokenizer.bos_id]):
            ids.append(IMAGE_TOKEN if i else tokenizer.bos_id)
            weights.append(unsupervised)
        ids += chunk
        offsets = offsets + start
        weights.append(_covered(offsets, rendered.spans))
        joined = joined or _across(offsets, rendered)
    return Encoded(np.asarray(ids, np.int32), np.concatenate(weights)), joined


def _between_images(rendered: Rendered) -> list[tuple[int, int]]:
    starts = [0, *(mark + len(IMAGE_MARK) for mark in rendered.image_marks)]
    return list(zip(starts, [*rendered.image_marks, len(rendered.text)], strict=True))


def _template_specials(rendered: Rendered, tokenizer: Tokenizer) -> list[tuple[int, int]] | None:
    """Where the template's special tokens stand, if a user wrote something that looks like one too (rare)."""
    found = list(tokenizer.special_pattern.finditer(rendered.text))
    kept = [match.span() for match in found if not _overlaps(stripped(match), rendered.content)]
    return kept if len(kept) < len(found) else None


def _within(spans: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    return [(a - start, b - start) for a, b in spans if start <= a and b <= end]


def _overlaps(span: tuple[int, int], spans: list[tuple[int, int]]) -> bool:
    i = bisect.bisect_left(spans, (span[1], 0))  # the spans before i begin before this one ends
    return i > 0 and spans[i - 1][1] > span[0]


def _covered(offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """1.0 for the tokens that share a character with a span, float32 [n]."""
    if not spans:
        return np.zeros(len(offsets), np.float32)
    starts, ends = np.asarray(spans).T
    last = np.searchsorted(starts, np.maximum(offsets[:, 1], offsets[:, 0] + 1), side="left") - 1
    return ((last >= 0) & (ends[np.maximum(last, 0)] > offsets[:, 0])).astype(np.float32)


def _across(offsets: np.ndarray, rendered: Rendered) -> str:
    """What the first token says that holds the last character before a span and the first one of it."""
    for start, _ in rendered.spans:
        token = np.searchsorted(offsets[:, 1], start, side="right")  # the first that ends after it
        if token < len(offsets) and offsets[token, 0] < start:
            return rendered.text[slice(*offsets[token])]
    return ""
