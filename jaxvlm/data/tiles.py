"""Images of any size: which grid of tiles an image gets, and where its visual tokens stand.

A transform that tiles shows an image to the tower several times: once whole, and once in pieces that are cut from an
enlarged copy. `anyres` is LLaVA-NeXT's (v1.6) as Hugging Face computes it, `anyres_max_9` is `anyres` with
OneVision's grids, at most nine tiles' tokens of them, and one tile for each of several images. `hd` is LLaVA-1.5-HD's
(Liu et al. 2024, App. A.1; recipes §1.1 A4); its tower has 224 pixels there, which `hd224` insists on. The pieces'
tokens are put together to one large map, what shows only padding is taken out, and each row may end with a learned
token. `letterbox_unpad` (Cambrian, recipes §1.1 A7) takes padding out of a single tile, and hides it from an
aggregator. All of that is indices, computed here on the host from the image's size alone: `image_plan` is what the
packer, the splice and the engine count with.

Where the sources differ:
- `anyres` keeps int(round(x, 7)) cells of the short side; LLaVA's own code int(x), two rows fewer now and then.
- The whole view is `naive` in `anyres` (both codes squash it) and `letterbox` in `hd`, whose paper does not say.
- `hd` takes out the cells that show padding alone, as the paper says; `anyres` rounds.
- A single tile's rows all end with the token in Cambrian, only its last one in LLaVA-NeXT: the transform decides.
- `letterbox_unpad` keeps int(x) cells of the short side, as Cambrian in training (there by attention masks) and in answers.
  Of an image so thin that this is none its code fails; here the middle stays.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxvlm.config import ModelConfig, PromptConfig, VisionConfig
from jaxvlm.data import DataError
from jaxvlm.data.image import TILED, fit, tiles, transform, transform_version

ROW_END = -2  # in a visual index: the learned row-end token
UNPADDED = "letterbox_unpad"
WHOLE = np.float32([1, 0, 0, 0])  # the shares of a token that is no mean

# The grids of tiles, (rows, columns), in the order in which ties are decided.
GRIDS = {
    "anyres": ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),  # LLaVA-1.6's pinpoints, in tiles
    "anyres_max_9": tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7)),
    "hd": ((1, 1), *((1, n) for n in range(2, 7)), *((n, 1) for n in range(2, 7)), (2, 2), (2, 3), (3, 2)),
}
GRIDS["hd224"] = GRIDS["hd"]


class ImagePlan(NamedTuple):
    """An image as tiles and visual tokens; n tokens. The arrays are shared: do not write to them."""

    tiles: int
    grid: tuple[int, int] | None  # rows and columns of tiles after the whole view; None for a single tile
    size: tuple[int, int] | None  # (width, height) of the image, if the plan depends on it
    index: np.ndarray  # int32 [n], tile * P + patch, counted from the image's first tile; ROW_END
    # Where a map is scaled down, a token is a mean of four: their indices, and weights that sum to 1.
    corners: np.ndarray | None = None  # int32 [n, 4]
    shares: np.ndarray | None = None  # float32 [n, 4]
    regions: np.ndarray | None = None  # int32 [tiles, towers, 4], what an aggregator may look at: see `Tiling.cells`


@dataclass(frozen=True)
class Tiling:
    """All that decides an image's tiles and visual tokens, apart from its size."""

    transform: str
    views: tuple[tuple[int, tuple[float, ...]], ...]  # (pixels on a side, colour of bars) of each array of pixels
    tile_tokens: int  # P
    side: int  # cells on a side of a tile's grid of tokens; 0: the tokens are no grid
    row_end: bool = False
    grids: tuple[tuple[int, int], ...] = ()
    max_tiles: int = 0
    tile_several: bool = True
    # Cells on a side of each tower's grid of which an aggregator may see the image's region alone, its rows and columns
    # (top, bottom, left, right); (): all of it may be seen.
    cells: tuple[int, ...] = ()

    @property
    def tiled(self) -> bool:
        """Whether an image may become several tiles."""
        return self.transform in TILED

    @property
    def sized(self) -> bool:
        """Whether an image's plan depends on its size."""
        return self.tiled or self.transform == UNPADDED

    @property
    def blends(self) -> bool:
        """Whether tokens may be means of others, so that batches hold corners and shares."""
        return self.tiled and self.max_tiles > 0


def tiling(model: ModelConfig, prompt: PromptConfig) -> Tiling:
    """The tiling of a model under a prompt. Raises `DataError` if they do not go together."""
    transform_version(prompt.transform)
    vision, row_end, tiled = model.vision, model.connector.row_end, prompt.transform in TILED
    sized = tiled or prompt.transform == UNPADDED
    side = math.isqrt(model.tile_tokens)
    if model.connector.kind in ("qformer", "resampler") or side**2 != model.tile_tokens:
        side = 0  # queries, or a class token beside the grid
    if not side and (sized or row_end):
        what = f"transform '{prompt.transform}'" if sized else "model.connector.row_end"
        raise DataError(
            f"{what} needs visual tokens in a square grid, but connector '{model.connector.kind}' with "
            f"vision.feature_tokens = '{vision.feature_tokens}' gives {model.tile_tokens} a tile that are none."
        )
    grids = prompt.grids or GRIDS.get(prompt.transform, ())
    if any(rows < 1 or columns < 1 for rows, columns in grids):
        raise DataError(f"prompt.grids are (rows, columns) of tiles, at least (1, 1), not {grids}.")
    if prompt.truncation == "before_splice" and sized:
        raise DataError(
            "truncation 'before_splice' keeps room for a fixed number of visual tokens, but with transform "
            f"'{prompt.transform}' it depends on the image; choose 'after_splice'."
        )
    if prompt.transform == "hd224" and any(size != 224 for size, _ in views(vision)):
        raise DataError(
            "transform 'hd224' cuts tiles of 224 pixels, but the tower's have another size; 'hd' takes any."
        )
    onevision = prompt.transform == "anyres_max_9"
    most = prompt.max_tiles or (9 if onevision else 0)
    rest = (grids if tiled else (), most if tiled else 0, prompt.tile_several and not onevision)
    unpadded_sva = model.connector.kind == "sva" and prompt.transform == UNPADDED
    cells = tuple(part.grid for part in vision.parts) if unpadded_sva else ()
    return Tiling(prompt.transform, views(vision), model.tile_tokens, side, row_end, *rest, cells)


def views(vision: VisionConfig) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """(pixels on a side, colour of bars) of each array of pixels: one, unless the towers' differ; then one a tower."""
    found = tuple((part.input_size, part.fill or part.mean) for part in vision.parts)
    return found if len(set(found)) > 1 else found[:1]


def tower_names(what: str, count: int) -> list[str]:
    """The entries of a batch that hold `count` views ('pixels') or features: 'pixels', 'pixels_1', 'pixels_2', ..."""
    return [what, *(f"{what}_{i}" for i in range(1, count))]


# ------------------------------------------------------------------------------------------------------------ planning


def image_plans(tiling: Tiling, sizes: Sequence[tuple[int, int]]) -> list[ImagePlan]:
    """The plans of a conversation's images, whose upright sizes are (width, height)."""
    one = len(sizes) == 1
    return [image_plan(tiling, int(width), int(height), one) for width, height in sizes]


def image_plan(tiling: Tiling, width: int, height: int, alone: bool = True) -> ImagePlan:
    """The tiles and visual tokens of an image of this upright size, in pixels.

    `alone`: it is its conversation's only image. The size matters only if the tiling is `sized`.
    """
    if tiling.transform == UNPADDED:
        shown = np.asarray([[_shown(width, height, cells) for cells in tiling.cells]], np.int32)
        return _unpadded(tiling, _shown(width, height, tiling.side))._replace(size=(width, height), regions=shown)
    if not tiling.tiled or not (alone or tiling.tile_several):
        return _single(tiling)
    size = tiling.views[0][0]
    grid = best_grid(width, height, tiling.grids, size)
    kept = _rounded if tiling.transform.startswith("anyres") else _touched
    region = kept(width, height, (grid[0] * tiling.side, grid[1] * tiling.side), grid, size)
    return ImagePlan(1 + math.prod(grid), grid, (width, height), *_merged(tiling, grid, region))


@functools.lru_cache(maxsize=64)
def _single(tiling: Tiling) -> ImagePlan:
    index = np.arange(tiling.tile_tokens, dtype=np.int32)
    if tiling.row_end and tiling.tiled:
        index = np.append(index, np.int32(ROW_END))
    elif tiling.row_end:
        index = _end_rows(index.reshape(tiling.side, tiling.side))
    return ImagePlan(1, None, None, *_flat(tiling, index))


@functools.lru_cache(maxsize=512)
def _unpadded(tiling: Tiling, region: tuple[int, int, int, int]) -> ImagePlan:
    top, bottom, left, right = region
    index = np.arange(tiling.tile_tokens, dtype=np.int32).reshape(tiling.side, tiling.side)[top:bottom, left:right]
    return ImagePlan(1, None, None, *_flat(tiling, _end_rows(index) if tiling.row_end else index))


@functools.lru_cache(maxsize=512)
def _merged(tiling: Tiling, grid: tuple[int, int], region: tuple[int, int, int, int]) -> tuple:
    """The last fields of an image's plan: of the grid's map of tokens, only `region` (top, bottom, left, right)."""
    side, tokens, (rows, columns) = tiling.side, tiling.tile_tokens, grid
    y, x = np.indices((rows * side, columns * side), np.int32)
    tile = 1 + (y // side) * columns + x // side  # after the whole view
    top, bottom, left, right = region
    cells = (tile * tokens + (y % side) * side + x % side)[top:bottom, left:right]  # [h, w]
    corners = shares = None
    ratio = math.sqrt(cells.size / (tiling.max_tiles * side**2)) if tiling.max_tiles else 0.0
    if ratio > 1.1:
        corners, shares = _scaled_down(cells, int(cells.shape[0] // ratio), int(cells.shape[1] // ratio))
        cells = corners[..., 0]
    return _flat(tiling, np.arange(tokens), (cells, corners, shares))


def _flat(tiling: Tiling, lead: np.ndarray, cells: tuple | None = None) -> tuple:
    """`index`, `corners` and `shares` of the tokens `lead`, and of the map `cells` (the three of them) after them."""
    map_index, corners, shares = cells or (np.zeros((0, 0), np.int32), None, None)
    if tiling.row_end and cells:
        map_index = _end_rows(map_index)
    index = np.concatenate([lead.reshape(-1), map_index.reshape(-1)]).astype(np.int32)
    arrays = (index, None, None)
    if tiling.blends:
        arrays = (index, np.maximum(index, 0)[:, None].repeat(4, 1), np.tile(WHOLE, (len(index), 1)))
    if shares is not None:
        blended = lead.size + np.flatnonzero(map_index.reshape(-1) >= 0)
        arrays[1][blended], arrays[2][blended] = corners.reshape(-1, 4), shares.reshape(-1, 4)
    for array in filter(lambda array: array is not None, arrays):
        array.flags.writeable = False
    return arrays


def best_grid(width: int, height: int, grids: Sequence[tuple[int, int]], size: int) -> tuple[int, int]:
    """The (rows, columns) of `size`-pixel tiles that keep most of the image's pixels, then waste the fewest."""
    best, most, least = grids[0], 0, math.inf
    for rows, columns in grids:
        scale = min(columns * size / width, rows * size / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        waste = rows * columns * size**2 - shown
        if shown > most or (shown == most and waste < least):
            best, most, least = (rows, columns), shown, waste
    return best


def _shown(width: int, height: int, cells: int) -> tuple[int, int, int, int]:
    """The cells of a letterboxed image that Cambrian keeps, of cells x cells: bars halved downwards on both sides."""
    wide = high = cells
    if width > height:
        high = max(1, int(height * (cells / width)))
    else:
        wide = max(1, int(width * (cells / height)))
    top, left = (cells - high) // 2, (cells - wide) // 2
    return top, cells - top, left, cells - left


def _rounded(width: int, height: int, shape: tuple[int, int], grid, size) -> tuple[int, int, int, int]:
    """The cells that LLaVA-NeXT keeps: the image's rounded extent in cells, padding halved downwards on both sides."""
    rows, columns = shape
    cut_rows = cut_columns = 0
    if width / height > columns / rows:
        cut_rows = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        cut_columns = (columns - int(round(width * (rows / height), 7))) // 2
    return cut_rows, rows - cut_rows, cut_columns, columns - cut_columns


def _touched(width: int, height: int, shape, grid: tuple[int, int], size: int) -> tuple[int, int, int, int]:
    """The cells that show at least one row or column of the image's pixels."""

    def kept(start: int, length: int, cells: int, pixels: int) -> tuple[int, int]:
        return start * cells // pixels, -(-(start + length) * cells // pixels)

    (wide, high), (left, top) = fit(width, height, grid, size)
    return *kept(top, high, shape[0], grid[0] * size), *kept(left, wide, shape[1], grid[1] * size)


def _end_rows(cells: np.ndarray) -> np.ndarray:
    """[rows, columns] with a column of ROW_END."""
    return np.concatenate([cells, np.full((len(cells), 1), ROW_END, np.int32)], axis=1)


def _scaled_down(cells: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear resizing of a map [h, w] as indices and weights, [rows, columns, 4].

    As torch's `interpolate` with half-pixel centres and no antialiasing, which `anyres_max_N` uses.
    """
    (y0, y1, fy), (x0, x1, fx) = (_neighbours(*pair) for pair in zip(cells.shape, (rows, columns), strict=True))
    corners = [cells[np.ix_(y, x)] for y in (y0, y1) for x in (x0, x1)]
    shares = [np.outer(v, u) for v in (1 - fy, fy) for u in (1 - fx, fx)]
    return np.stack(corners, -1), np.stack(shares, -1).astype(np.float32)


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `new` places along an axis of `old` cells: the two cells beside it, and the second one's weight."""
    place = np.maximum((np.arange(new, dtype=np.float32) + 0.5) * np.float32(old / new) - 0.5, 0).astype(np.float32)
    low = place.astype(np.int64)
    return low, np.minimum(low + 1, old - 1), place - low.astype(np.float32)


# -------------------------------------------------------------------------------------------------------------- pixels


def image_tiles(image: Image.Image, tiling: Tiling, plan: ImagePlan, name: str = "image") -> list[np.ndarray]:
    """The tiles of an RGB image for each of the tiling's views: uint8 [t, s, s, 3], the whole view first.

    Raises `DataError` naming it if its size is not the one that it was planned with.
    """
    if plan.size and image.size != plan.size:
        raise DataError(f"{name} has {image.size} pixels, but its header said {plan.size}. Save it anew.")
    if plan.grid:
        return [tiles(image, tiling.transform, size, mean, plan.grid) for size, mean in tiling.views]
    way = "letterbox" if tiling.tiled else tiling.transform
    return [transform(image, way, size, mean)[None] for size, mean in tiling.views]


def tile_regions(tiling: Tiling, plans: Sequence[ImagePlan], slots: int) -> dict[str, np.ndarray]:
    """The entry 'tile_regions' of a row with these images in its tile slots, int32 [slots, towers, 4]; nothing if an
    aggregator may look at everything. See `Tiling.cells`.
    """
    if not tiling.cells:
        return {}
    regions = np.zeros((slots, len(tiling.cells), 4), np.int32)
    if plans:
        filled = np.concatenate([plan.regions for plan in plans])
        regions[: len(filled)] = filled
    return {"tile_regions": regions}
