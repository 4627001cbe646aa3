"""How far a long command has come: one line that rewrites itself. Every room may import this leaf."""

from __future__ import annotations

import math
import sys
import time
from typing import TextIO


class StatusLine:
    """A line that rewrites itself on a terminal, and is printed every ten seconds where there is none."""

    def __init__(self, out: TextIO | None = None, every_seconds: float = 10.0):
        self.out = out or sys.stdout
        self.live = self.out.isatty()
        self.every, self.shown, self.text, self.width = every_seconds, -math.inf, "", 0

    def show(self, text: str) -> None:
        self.text = text
        if self.live:
            self.out.write("\r" + text.ljust(self.width))
            self.width = len(text)
        elif time.monotonic() - self.shown >= self.every:
            self._print()
        self.out.flush()

    def end(self) -> None:
        """Leaves the last text standing."""
        if self.live and self.text:
            self.out.write("\n")
        elif self.text:
            self._print()
        self.out.flush()
        self.text, self.width = "", 0

    def _print(self) -> None:
        self.out.write(self.text + "\n")
        self.text, self.shown = "", time.monotonic()


def duration(seconds: float) -> str:
    """'45 s', '3 min 05 s', '2 h 10 min'."""
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Progress:
    """A status line that counts towards `total`: `VERB 1,200/5,000 UNIT  340/s  11 s left`. Use it with `with`."""

    def __init__(self, verb: str, total: int, unit: str, out: TextIO | None = None):
        self.verb, self.total, self.unit = verb, total, unit
        self.done, self.start, self.line = 0, time.monotonic(), StatusLine(out or sys.stderr)
        self.shown = self.line.shown = (
            self.start
        )  # what is done in seconds needs no line but the last, where none rewrites itself

    def add(self, count: int = 1) -> None:
        """`count` more are done."""
        self.done += count
        now = time.monotonic()
        if now - self.shown < 0.1 or self.done >= self.total:  # the last line is that of the end
            return
        self.shown, seconds = now, now - self.start
        left = duration((self.total - self.done) * seconds / self.done) if self.done else "?"
        rate = self.done / seconds
        self.line.show(f"{self.verb} {self.done:,}/{self.total:,} {self.unit}  {rate:,.0f}/s  {left} left")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if not kind:
            self.line.show(f"{self.verb} {self.done:,} {self.unit}: {duration(time.monotonic() - self.start)}")
        self.line.end()
