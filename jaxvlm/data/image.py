"""Image files as RGB, and the named transforms to the square that a vision tower reads.

What becomes of each kind of file is listed in docs/data.md, and tested line by line. The transforms are saved with
every model by name, and are pixel for pixel those of LLaVA, CLIP and SigLIP (recipes §1.3 D10). A change of pixels
needs a new version number. Normalisation happens on the device; here all is uint8.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from jaxvlm.data import DataError
from jaxvlm.templates import TRANSFORM_VERSIONS

MAX_PIXELS = (
    89_478_485  # what PIL warns of, a quarter of a gigabyte of RGB: no photograph, but a small file that says so
)
MAX_SIDE = 65_535  # the longest that a JPEG can have; padded to a square, a longer one would never be done
_BICUBIC = Image.Resampling.BICUBIC

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray


def load_image(source: ImageSource, name: str | None = None) -> Image.Image:
    """An RGB image of a path, the bytes of a file, a PIL image or a uint8 array [H, W], [H, W, 3] or [H, W,
    4].

    The first picture of a file with several; turned as its EXIF orientation says; transparency composited on white;
    16-bit values reduced to their high byte; colour profiles not applied. The type is read from the content, not from
    the file's name. Raises `DataError` naming the file (or `name`) if it is missing, empty, truncated, not an image, or
    too large, which its header tells.
    """
    name = name or _name(source)
    with _explained(name):
        if isinstance(source, np.ndarray):
            return to_rgb(Image.fromarray(_checked_array(source, name)))
        if isinstance(source, Image.Image):
            return to_rgb(source)
        with _open(source, name) as image:
            return to_rgb(image)


def image_size(source: ImageSource, name: str | None = None) -> tuple[int, int]:
    """(width, height) of `load_image` of the same source, from the file's header alone.

    Raises `DataError` naming the file if its header cannot be read.
    """
    name = name or _name(source)
    if isinstance(source, np.ndarray):
        return _checked_array(source, name).shape[1::-1]
    if isinstance(source, Image.Image):
        return _upright_size(source)
    with _explained(name), _open(source, name) as image:
        return _upright_size(image)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what PIL raises into `DataError`s that name the image."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name} does not exist.") from error
    except Image.DecompressionBombError as error:
        raise DataError(_too_large(name, "")) from error
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error and more
        raise DataError(_unreadable(name, error)) from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # as in `to_rgb`
        turned = False
    return image.size[::-1] if turned else image.size


def _name(source: ImageSource) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else f"image given as {type(source).__name__}"


def _open(source: str | os.PathLike | bytes, name: str) -> Image.Image:
    if not isinstance(source, bytes) and os.path.isdir(source):
        raise DataError(f"{name} is a folder, not an image. Give the file in it.")
    if not (len(source) if isinstance(source, bytes) else os.stat(source).st_size):
        raise DataError(f"{name} is empty (0 bytes). Download the file again.")
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except UnidentifiedImageError as error:
        raise DataError(_unreadable(name, f"it begins with {_head(source)!r}")) from error
    if image.width * image.height > MAX_PIXELS:
        raise DataError(_too_large(name, f" ({image.width} x {image.height})"))
    if max(image.size) > MAX_SIDE:
        raise DataError(f"{name} ({image.width} x {image.height}) has a side of more than {MAX_SIDE:,} pixels. Cut it.")
    return image


def _head(source: str | os.PathLike | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:24]
    with open(source, "rb") as file:
        return file.read(24)


def _too_large(name: str, size: str) -> str:
    limit = f"{MAX_PIXELS:,} pixels"
    return f"{name}{size} has more than {limit}, which is refused as a decompression bomb. Shrink the file."


def _unreadable(name: str, error: Exception | str) -> str:
    return f"{name} cannot be read as an image: {error}. Replace the file or leave its records out."


def _checked_array(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise DataError(f"{name} must be uint8 [H, W, 3], not {array.dtype} {list(array.shape)}.")
    return array


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB: upright, transparency on white, 16 bits to 8. One that is all this already is given back."""
    image.load()
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except Exception:  # malformed EXIF is common in photographs that are fine otherwise: they stay as they are
        pass
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")  # PIL copies one that needs no conversion


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of 16 bits (or stored as 32-bit integers or floats) to uint8; PIL itself would clip them at
    255.
    """
    if values.dtype.kind == "f":
        values = np.nan_to_num(values)
        scaled = values * 255.0 if values.max(initial=0.0) <= 1.0 else values
        return np.clip(np.round(scaled), 0, 255).astype(np.uint8)
    if values.dtype.itemsize == 2 or values.max(initial=0) > 255:
        values = values >> 8
    return np.clip(values, 0, 255).astype(np.uint8)


def naive(image: Image.Image, size: int, mean: Sequence[float]) -> Image.Image:
    """Resizes to the square, whatever the aspect ratio (SigLIP's processor, Prismatic's resize-naive)."""
    return image.resize((size, size), _BICUBIC)


def crop(image: Image.Image, size: int, mean: Sequence[float]) -> Image.Image:
    """Resizes the shorter edge to `size`, then takes the middle (CLIP's processor)."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    long = int(size * long / short)
    new_width, new_height = (size, long) if width <= height else (long, size)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    if (
        new_width * new_height > MAX_PIXELS
    ):  # too thin to resize as a whole: the middle alone, row by row, then by columns
        x, y = width / new_width, height / new_height
        rows = image.resize((size, height), _BICUBIC, box=(left * x, 0, (left + size) * x, height))
        return rows.resize((size, size), _BICUBIC, box=(0, top * y, size, (top + size) * y))
    return image.resize((new_width, new_height), _BICUBIC).crop((left, top, left + size, top + size))


def letterbox(image: Image.Image, size: int, mean: Sequence[float]) -> Image.Image:
    """Pads to a square with the tower's mean colour, then resizes (LLaVA's `expand2square`).

    PIL resizes along the rows first and then along the columns. One after the other, that gives the same pixels of a wide
    image without its square, which of a panorama would be gigabytes. Of a tall one it has to be made; where that is too
    large, columns come first, which is the same but for what PIL clips in between.
    """
    width, height = image.size
    side = max(width, height)
    corner = ((side - width) // 2, (side - height) // 2)
    shape, first = (size, side), (size, height)
    if width < height:
        shape, first = ((side, side), (width, height)) if side**2 <= MAX_PIXELS else ((side, size), (width, size))
    padded = Image.new("RGB", shape, tuple(int(value * 255) for value in mean))
    padded.paste(image.resize(first, _BICUBIC), corner)
    return padded.resize((size, size), _BICUBIC)


# Those that give one square, and what makes the whole view of those that cut tiles (see `data.tiles`).
TRANSFORMS = {"naive": naive, "crop": crop, "letterbox": letterbox, "letterbox_unpad": letterbox}
TILED = {"anyres": naive, "anyres_max_9": naive, "hd": letterbox, "hd224": letterbox}


def transform_version(name: str) -> str:
    """`name/version`, which changes whenever the pixels do. Raises `DataError` for an unknown name."""
    if name not in TRANSFORM_VERSIONS:
        known = ", ".join(TRANSFORM_VERSIONS)
        raise DataError(f"There is no image transform {name!r}; the transforms are {known}.")
    return f"{name}/{TRANSFORM_VERSIONS[name]}"


def transform(image: Image.Image, name: str, size: int, mean: Sequence[float]) -> np.ndarray:
    """An RGB image as uint8 [size, size, 3] by the named transform; `mean` (0 to 1) colours the letterbox."""
    transform_version(name)
    return np.asarray(TRANSFORMS[name](image, size, mean), np.uint8)  # [H, W, 3]


def fit(width: int, height: int, grid: tuple[int, int], size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The (width, height) of an image enlarged or shrunk into `grid` (rows, columns) of tiles, and its corner there.

    The aspect ratio stays, up to rounding up (LLaVA-NeXT's `resize_and_pad_image`).
    """
    high, wide = (count * size for count in grid)
    by_width, by_height = wide / width, high / height
    if by_width < by_height:
        new = (wide, min(math.ceil(height * by_width), high))
    else:
        new = (min(math.ceil(width * by_height), wide), high)
    return new, ((wide - new[0]) // 2, (high - new[1]) // 2)


def tiles(image: Image.Image, name: str, size: int, mean: Sequence[float], grid: tuple[int, int]) -> np.ndarray:
    """An RGB image as uint8 [1 + rows * columns, size, size, 3]: the whole view, then the tiles of `grid` row by row.

    They are cut from the image resized to fit the grid, centred on black.
    """
    rows, columns = grid
    new, corner = fit(*image.size, grid, size)
    canvas = Image.new("RGB", (columns * size, rows * size))
    canvas.paste(image.resize(new, _BICUBIC), corner)
    pieces = np.asarray(canvas, np.uint8).reshape(rows, size, columns, size, 3).swapaxes(1, 2)
    whole = np.asarray(TILED[name](image, size, mean), np.uint8)
    return np.concatenate([whole[None], pieces.reshape(-1, size, size, 3)])
