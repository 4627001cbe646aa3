"""A tokenizer's own chat template: the Jinja text that comes with it, rendered as transformers does.

What each message says is marked before it is rendered, and found by its marks afterwards; a rendering without marks
proves that they change nothing. An answer's supervised characters begin where the prompt of inference ends, which is a
rendering of its own, and end with the first special token after the answer; where the template has `{% generation %}`
blocks, they are what is inside them.

Templates are programs from elsewhere: they run in Jinja's sandbox. `strftime_now` tells them one fixed day, so that the
same records give the same tokens tomorrow; it is the day that Llama 3.1's template takes where it is told none.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxvlm.data import DataError
from jaxvlm.data.tokenizer import Tokenizer, stripped
from jaxvlm.templates import IMAGE_MARK

TODAY = datetime.datetime(2024, 7, 26)

# Noncharacters of Unicode, which no text holds: around what a message says, and around `{% generation %}` blocks.
_SAID, _SAID_END, _MADE, _MADE_END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MARKS = re.compile(f"([{_SAID}-{_MADE_END}])")

Turn = tuple[str, str]  # role and text
Spans = list[tuple[int, int]]


class _Generation(Extension):
    """`{% generation %}`: marks what is rendered inside."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller) -> str:
        return _MADE + caller() + _MADE_END


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": TODAY.strftime}
    return environment.from_string(source)


class ChatTemplate:
    """The chat template of a tokenizer, tried out on a conversation of two rounds.

    Attributes: `end` is the special token after an answer, None where there is none; `parts` says whether messages are
    lists of parts (the templates of image processors) and not texts.

    Raises `DataError` naming the tokenizer if it has none, or one that a model cannot be both trained and prompted with:
    it must write every message as it is, and a rendering must not change what was rendered of earlier turns.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.name = f"the chat template of {tokenizer.path}"
        if tokenizer.chat_template is None:
            raise DataError(
                f"template 'tokenizer' is the tokenizer's own, but {tokenizer.path} has no chat_template.jinja beside it "
                "and no 'chat_template' in its tokenizer_config.json. Name a template."
            )
        self._special = tokenizer.special_pattern
        self._bos = tokenizer.bos or ""
        named = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
        named |= {"pad_token": tokenizer.pad, "unk_token": tokenizer.unk}
        self._tokens = {key: value for key, value in named.items() if value is not None}
        try:
            self._template = _compiled(tokenizer.chat_template)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"{self.name} is not Jinja: line {error.lineno}: {error.message}.") from error
        probe = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
        self.parts = self._takes_parts(probe[:1])
        self.end = self._check(probe)

    def _takes_parts(self, question: list[Turn]) -> bool:
        self.parts = False
        try:
            return _SAID not in self._text("", question, marked=True)
        except jinja2.TemplateError:  # said again where it is rendered
            return True

    def _check(self, probe: list[Turn]) -> str | None:
        text, spans, _, content = self.render("", probe, "a conversation of two rounds")
        early, first, _, _ = self.render("", probe[:2], "a conversation of one round")
        if first != spans[:1] or early[: first[0][1]] != text[: first[0][1]]:
            raise DataError(
                f"{self.name} writes an answer differently once more has been said, so a model would be trained on one "
                "text and prompted with another. Choose a named template instead."
            )
        found = self._special.search(text, content[-1][1])
        return found and found[0].strip()

    def render(
        self, system: str, turns: Sequence[Turn], name: str, in_front: bool = False
    ) -> tuple[str, Spans, list[int], Spans]:
        """A conversation as text, its supervised spans, the places of its images, and the spans that users wrote.

        `system` '' leaves the template its own system prompt. `in_front` puts all images first, after BOS, and strips the
        messages. A conversation that ends with a question is rendered up to where the answer begins. Raises `DataError`
        naming it (`name`).
        """
        if any(_MARKS.search(text) for text in (system, *(text for _, text in turns))):
            raise DataError(f"{name} contains a noncharacter (U+FDD0 to U+FDD3); take it out.")
        images = 0
        if in_front:
            images = sum(text.count(IMAGE_MARK) for role, text in turns if role == "user")
            turns = [(role, (text.replace(IMAGE_MARK, "") if role == "user" else text).strip()) for role, text in turns]
        try:
            text, content, made = _unmarked(self._text(system, turns, marked=True))
            self._check_content(text, content, system, turns, name)
            spans = self._answers(text, content, made, system, turns, name)
        except jinja2.TemplateError as error:
            raise DataError(f"{name}: {self.name} refuses it: {error}") from error
        marks = [found.start() for found in re.finditer(IMAGE_MARK, text) if not _inside(found.start(), content)]
        return _in_front(text, spans, marks, content, images, self._bos) if images else (text, spans, marks, content)

    def _text(self, system: str, turns: Sequence[Turn], marked: bool = False) -> str:
        messages = [*([("system", system)] if system else []), *turns]
        values: dict[str, Any] = {"messages": [self._message(*message, marked) for message in messages]}
        values |= {"tools": None, "documents": None, "add_generation_prompt": turns[-1][0] == "user"}
        try:
            text = self._template.render(**values, **self._tokens)
        except (TypeError, AttributeError, KeyError, IndexError, ValueError) as error:  # of the template's own making
            raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from error
        return text if marked else text.replace(_MADE, "").replace(_MADE_END, "")

    def _message(self, role: str, text: str, marked: bool) -> dict:
        """One message. The marks are inside the white space around the text, which templates may take off."""

        def said(text: str) -> str:
            core = text.strip()
            if not marked or not core:
                return text
            start = len(text) - len(text.lstrip())
            return text[:start] + _SAID + core + _SAID_END + text[start + len(core) :]

        pieces = text.split(IMAGE_MARK) if role == "user" else [text]
        if not self.parts:
            return {"role": role, "content": IMAGE_MARK.join(map(said, pieces))}
        parts: list[dict] = []
        for i, piece in enumerate(pieces):
            parts += [{"type": "image"}] if i else []
            if len(pieces) == 1 or piece.strip():  # the white space between a text and an image is the template's
                parts.append({"type": "text", "text": said(piece if len(pieces) == 1 else piece.strip())})
        return {"role": role, "content": parts}

    def _check_content(self, text: str, content: Spans, system: str, turns: Sequence[Turn], name: str) -> None:
        said = [piece for role, one in turns for piece in (one.split(IMAGE_MARK) if role == "user" else [one])]
        said = [piece.strip() for piece in ([system] if system else []) + said]
        found = [text[start:end] for start, end in content]
        if [piece for piece in said if piece] != found:
            raise DataError(f"{name}: {self.name} leaves out or changes what a message says. Choose a named template.")
        if text != self._text(system, turns):
            raise DataError(f"{name}: {self.name} depends on what a message says. Choose a named template.")

    def _answers(self, text: str, content: Spans, made: Spans, system: str, turns: Sequence[Turn], name: str) -> Spans:
        """From where each prompt of inference ends to the end of the turn; or what was in `{% generation %}` blocks."""
        spans = []
        for i, (role, said) in enumerate(turns):
            if role != "assistant":
                continue
            prompt = self._text(system, turns[:i])
            if not text.startswith(prompt):
                raise DataError(
                    f"{name}: what {self.name} writes as a prompt is not how the whole conversation begins, so a model "
                    "would be prompted with another text than it was trained on. Choose a named template."
                )
            if made:
                continue
            after = next(end for start, end in content if start >= len(prompt)) if said.strip() else len(prompt)
            end = self._special.search(text, after)
            if not end:
                raise DataError(
                    f"{name}: {self.name} writes no special token after an answer, so a model would not learn to stop. "
                    "Choose a named template."
                )
            spans.append((len(prompt), stripped(end)[1]))
        return made or spans


def _unmarked(text: str) -> tuple[str, Spans, Spans]:
    """A text without its marks, and what was between them."""
    pieces, spans, begun, length = [], {_SAID_END: [], _MADE_END: []}, {}, 0
    for piece in _MARKS.split(text):
        if piece in (_SAID, _MADE):
            begun[piece] = length
        elif piece in spans:
            spans[piece].append((begun.get(chr(ord(piece) - 1), length), length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans[_SAID_END], spans[_MADE_END]


def _inside(place: int, spans: Spans) -> bool:
    return any(start <= place < end for start, end in spans)


def _in_front(text: str, spans: Spans, marks: list[int], content: Spans, images: int, bos: str) -> tuple:
    at = len(bos) if bos and text.startswith(bos) else 0
    size = images * len(IMAGE_MARK)
    moved = [[(start + size, end + size) for start, end in part] for part in (spans, content)]
    marks = [at + i * len(IMAGE_MARK) for i in range(images)]
    return text[:at] + images * IMAGE_MARK + text[at:], moved[0], marks, moved[1]
