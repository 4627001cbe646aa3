"""Blind runs: the question stays and the picture goes. The difference to the sighted score is what seeing was worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from jaxvlm.data.image import image_size
from jaxvlm.evals.question_file import EvalError

BLIND_MODES = ("", "noimage", "gray", "shuffle")
GRAY = (127, 127, 127)


def picture_of(
    blind: str, pictures: Iterable[str], seed: int, images: Path, made: Path
) -> Callable[[str | None], str | None]:
    """What is shown in place of a picture: itself (''), none, a grey one, or another of `pictures`.

    Names are relative to the folder `images`; grey pictures are written into the folder `made`. Raises `EvalError` for
    an unknown mode, and for `shuffle` with fewer than two pictures.
    """
    if blind not in BLIND_MODES:
        raise EvalError(f"Blind '{blind}' is not one of {', '.join(map(repr, BLIND_MODES))}.")
    if blind == "noimage":
        return lambda name: None
    if blind == "gray":
        return lambda name: name and str(gray_picture(images / name, made).absolute())
    if blind == "shuffle":
        return shuffled(pictures, seed).get
    return lambda name: name


def gray_picture(path: Path, folder: Path) -> Path:
    """A grey picture of the same size: the prompt keeps its length, and an image its number of tiles."""
    width, height = image_size(path)
    gray = folder / f"gray-{width}x{height}.png"
    if not gray.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, height), GRAY).save(gray)
    return gray


def shuffled(pictures: Iterable[str], seed: int) -> dict[str, str]:
    """Maps each picture to another one: a single cycle through all of them, fixed by the seed."""
    names = sorted(set(pictures))
    if len(names) < 2:
        raise EvalError("Blind 'shuffle' needs at least two different images; use 'noimage'.")
    order = np.random.default_rng(seed).permutation(len(names))
    return {names[a]: names[b] for a, b in zip(order, np.roll(order, -1), strict=True)}
