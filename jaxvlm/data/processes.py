"""Work shared by worker processes, in order."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def in_order(function: Callable[[Any], Any], items: Iterable, processes: int) -> Iterator[Any]:
    """`function` of each item, in the items' order: in this process, or in so many others.

    Those are started afresh, as the loader's workers are: a fork of a process with threads, as one with jax is, may hang. They
    get `function` once and look a few items ahead, so that it may be large and the items many.
    """
    if not processes:
        yield from map(function, items)
        return
    spawn, waiting = multiprocessing.get_context("spawn"), deque()
    with ProcessPoolExecutor(processes, spawn, initializer=_start, initargs=(function,)) as pool:
        for item in items:
            waiting.append(pool.submit(_call, item))
            if len(waiting) > 4 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    _function = function


def _call(item: Any) -> Any:
    return _function(item)
