"""Tokens to text as they come, without broken characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character


def cut_at(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops`."""
    found = [text.find(stop) for stop in stops if stop in text]
    return text[: min(found)] if found else text


class Detokenizer:
    """Gives out the text of a growing list of tokens; all pieces joined are the stripped, cut text of all tokens.

    Held back: an unfinished character, white space that may turn out to be trailing, and what may be the beginning of a
    stop text. The whole list is decoded anew for each token, because a decoder may join or strip at any token border.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
        self.decode, self.stops = decode, stops
        self.ids: list[int] = []
        self.given = 0  # characters of the stripped text already given out
        self.stopped = False

    def add(self, token: int) -> str:
        """Takes a token and returns the text that is now certain."""
        self.ids.append(token)
        text = self.decode(self.ids).rstrip(BROKEN)
        cut = cut_at(text, self.stops)
        self.stopped = len(cut) < len(text)
        if not self.stopped:
            held = max((_overlap(cut, stop) for stop in self.stops), default=0)
            cut = cut[: len(cut) - held]
        return self._give(cut)

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        return self._give(cut_at(self.decode(self.ids), self.stops))

    def _give(self, text: str) -> str:
        text = text.strip()
        piece = text[self.given :]
        self.given = max(self.given, len(text))
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
