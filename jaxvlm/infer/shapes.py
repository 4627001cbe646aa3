"""The few static shapes that prompts and answers are padded to, so that few programs are compiled."""

from __future__ import annotations

from jaxvlm.infer.answers import RequestError


def bucket(length: int) -> int:
    """The padded length of a prompt: a multiple of 8 up to 64, then four sizes to every doubling.

    So few programs are compiled, and padding costs a tenth on average.
    """
    return _round_up(length, 8)


def tile_slots(tiles: int) -> int:
    """Places for a prompt's image tiles: none, or a power of two."""
    return tiles and 1 << (tiles - 1).bit_length()


def capacity(max_new_tokens: int) -> int:
    """Slots for the answer: a power of two from 16, so that a few more tokens do not compile anew."""
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    return max(16, 1 << (max_new_tokens - 1).bit_length())


def slots(length: int) -> int:
    """Slots of a cache for `length` tokens: a multiple of 32 up to 256, then as `bucket`; several of its sizes share one."""
    return _round_up(length, 32)


def _round_up(length: int, least: int) -> int:
    step = max(least, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step
