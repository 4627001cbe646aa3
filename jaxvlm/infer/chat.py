"""`jaxvlm chat`: a conversation about images in the terminal."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from jaxvlm.data import DataError
from jaxvlm.data.image import load_image
from jaxvlm.infer.answers import IMAGE_MARK, RequestError
from jaxvlm.infer.engine import Engine

HELP = """\
  /image PATH   show the model an image with your next message
  /clear        forget the conversation and its images
  /save FILE    write the conversation as LLaVA JSON
  /help         this list
  /quit         leave (Ctrl-D does too)
  Ctrl-C stops an answer and keeps what is there."""


@dataclass
class Conversation:
    """The turns so far; `images` belong to the `<image>` marks in order, `waiting` go with the next message."""

    messages: list[dict] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": f"{IMAGE_MARK}\n" * len(self.waiting) + text})
        self.images += self.waiting

    def record(self) -> dict:
        """The conversation as one LLaVA training record."""
        names = {"user": "human", "assistant": "gpt"}
        turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in self.messages]
        record = {"id": "chat", "conversations": turns}
        if self.images:
            record["image"] = self.images[0] if len(self.images) == 1 else self.images
        return record


def chat(
    engine: Engine,
    *,
    image: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    source: TextIO | None = None,
    out: TextIO | None = None,
) -> Conversation:
    """Talks until `/quit` or the end of input, and returns the conversation.

    Reads from `source` (the terminal, with line editing, by default) and writes to `out` (standard output).
    """
    out = out or sys.stdout
    read = _reader(source, out)
    talk = Conversation()

    def say(text: str) -> None:
        out.write(text + "\n")
        out.flush()

    say("Talk to the model; /image PATH shows it an image, /help lists the commands.")
    if image:
        _image(talk, image, say)
    while True:
        try:
            line = read()
        except EOFError:
            say("")
            return talk
        except KeyboardInterrupt:
            say("\n(/quit or Ctrl-D leaves)")
            continue
        line = line.strip()
        if line in ("/quit", "/exit"):
            return talk
        if line.startswith("/"):
            talk = _command(talk, line, say)
        elif line:
            options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
            _answer(engine, talk, line.replace(IMAGE_MARK, ""), options, out)


def _reader(source: TextIO | None, out: TextIO) -> Callable[[], str]:
    """A function that asks for a line and raises EOFError at the end of input."""
    if source is None and sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (its import gives `input` line editing and history)
        return lambda: input("\nyou> ")
    stream = source or sys.stdin

    def read() -> str:
        out.write("\nyou> ")
        out.flush()
        line = stream.readline()
        if not line:
            raise EOFError
        return line

    return read


def _answer(engine: Engine, talk: Conversation, text: str, options: dict, out: TextIO) -> None:
    """Streams the answer to `text`. Without a single token of it (an error, an early Ctrl-C) the turn is undone."""
    messages, images = list(talk.messages), list(talk.images)
    talk.ask(text)
    pieces: list[str] = []
    out.write("model> ")
    out.flush()
    try:
        for piece in engine.stream(talk.messages, talk.images, **options):
            pieces.append(piece)
            out.write(piece)
            out.flush()
        out.write("\n" if pieces else "(nothing)\n")
    except KeyboardInterrupt:
        out.write(" (stopped)\n")
        if not pieces:
            talk.messages, talk.images = messages, images
            return
    except (RequestError, DataError) as error:
        out.write(f"\n{error}\n")
        talk.messages, talk.images = messages, images
        return
    talk.waiting = []
    talk.messages.append({"role": "assistant", "content": "".join(pieces)})


def _command(talk: Conversation, line: str, say: Callable[[str], None]) -> Conversation:
    name, _, argument = line.partition(" ")
    with contextlib.suppress(ValueError):  # a path with one quotation mark is taken as it stands
        argument = " ".join(shlex.split(argument))
    if name == "/clear":
        say("Forgotten.")
        return Conversation()
    if name == "/image":
        _image(talk, argument, say)
    elif name == "/save":
        _save(talk, argument, say)
    elif name == "/help":
        say(HELP)
    else:
        say(f"There is no {name}.\n{HELP}")
    return talk


def _image(talk: Conversation, path: str, say: Callable[[str], None]) -> None:
    if not path:
        say("Say which: /image PATH")
        return
    path = str(Path(path).expanduser())
    try:
        picture = load_image(path)
    except DataError as error:
        say(str(error))
        return
    talk.waiting.append(path)
    count = f" ({len(talk.waiting)} images)" if len(talk.waiting) > 1 else ""
    say(f"{path}, {picture.width} x {picture.height}, goes with your next message{count}.")


def _save(talk: Conversation, path: str, say: Callable[[str], None]) -> None:
    if not path or not talk.messages:
        say("There is nothing to save yet." if path else "Say where: /save FILE")
        return
    file = Path(path).expanduser()
    try:
        file.write_text(json.dumps([talk.record()], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        say(f"{file} could not be written: {error.strerror}.")
        return
    say(f"Saved {len(talk.messages) // 2} turn(s) to {file}.")
