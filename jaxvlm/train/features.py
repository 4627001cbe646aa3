"""Features of a frozen vision tower, computed once per image tile and kept on disk for every later epoch and stage."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxvlm.config import ConfigError, ModelConfig, PromptConfig, to_dict
from jaxvlm.data.image import image_size, load_image, transform_version
from jaxvlm.data.sources import addresses_fingerprint, image_at
from jaxvlm.data.tiles import ImagePlan, Tiling, image_plan, image_tiles, tiling
from jaxvlm.models.vlm import VLM
from jaxvlm.weights.saved import write_json

# Arrays [tiles, tokens, width] on disk, one, or one for each tower of an SVA; the row of each image's first tile.
FeatureTable = tuple[tuple[np.ndarray, ...], dict[str, int]]


def cached_features(
    config: ModelConfig,
    vision_params: dict,
    images: list[str],
    prompt: PromptConfig,
    directory: Path,
    batch_size: int = 8,  # what fits a CPU's cache is fastest; raise it for an accelerator
    on_progress: Callable[[int, int], None] | None = None,
) -> FeatureTable:
    """The vision features of `images` under the prompt's transform, read from `directory` or computed and written there.

    An image is given by its address (`image_at`). The file's name is a digest of all that decides its content: tower
    config and weights, transform, images. Raises `ConfigError` where an image has no single set of features.
    """
    cut = _cacheable(config, prompt)
    files = addresses_fingerprint(images)
    how = [transform_version(prompt.transform), cut.grids]
    kept = config.vision.parts if config.connector.kind == "sva" else (config.vision,)
    kinds = [(part.num_tokens, part.feature_width) for part in kept]
    key = [to_dict(config.vision), kinds, config.dtype, how, _checksum(vision_params), files]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]

    def planned(path: str) -> ImagePlan:
        return image_plan(cut, *(image_size(image_at(path), path) if cut.sized else (0, 0)))

    with ThreadPoolExecutor(16) as pool:
        plans = list(pool.map(planned, images))
    ends = np.cumsum([plan.tiles for plan in plans]).tolist()
    shapes, dtype = [(max(ends, default=1), *kind) for kind in kinds], jnp.dtype(config.dtype)
    data = [directory / f"features-{digest}-{i}.bin" for i in range(len(kinds))]
    done = directory / f"features-{digest}.json"

    def tables(mode: str) -> tuple[np.memmap, ...]:
        return tuple(np.memmap(path, dtype, mode, shape=shape) for path, shape in zip(data, shapes, strict=True))

    if not done.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        writing, start = tables("w+"), 0
        for found in _compute(config, vision_params, zip(images, plans, strict=True), cut, batch_size):
            end = start + len(found[0])
            for table, rows in zip(writing, found, strict=True):
                table[start:end] = rows
            start = end
            if on_progress:
                on_progress(bisect.bisect_right(ends, start), len(images))
        for table in writing:
            table.flush()
        write_json(done, {"shapes": shapes, "dtype": config.dtype, "transform": prompt.transform})
    return tables("r"), dict(zip(images, [0, *ends], strict=False))


def _cacheable(config: ModelConfig, prompt: PromptConfig) -> Tiling:
    cut = tiling(config, prompt)
    if cut.tiled and not cut.tile_several:
        raise ConfigError(
            "cache_features keeps one set of tiles of an image, but with prompt.tile_several = False that depends on the "
            "conversation; set one of them otherwise."
        )
    return cut


def _compute(config, vision_params, images: Iterator[tuple[str, ImagePlan]], cut: Tiling, batch_size: int):
    """Features of the images' tiles in order, some at a time: tuples of arrays [n, N, Dv] as in a `FeatureTable`."""
    model = VLM(config)

    @jax.jit
    def encode(params, views):  # [B, s, s, 3] each -> [B, N, Dv] each
        found = model.apply({"params": {"vision": params}}, *(view[:, None] for view in views), method="encode")
        return tuple(x[:, 0] for x in (found if isinstance(found, tuple) else (found,)))

    def cut_up(pair):
        path, plan = pair
        return list(
            zip(*image_tiles(load_image(image_at(path), path), cut, plan, path), strict=True)
        )  # of each tile, its views

    def run(tiles):
        views = [np.stack(view) for view in zip(*tiles, strict=True)]
        extra = batch_size - len(tiles)  # one shape, one compilation
        padded = [np.pad(view, [(0, extra), *[(0, 0)] * 3]) for view in views]
        return tuple(np.asarray(x)[: len(tiles)] for x in encode(vision_params, padded))

    waiting = []
    with ThreadPoolExecutor(2) as pool:
        while part := list(itertools.islice(images, batch_size)):
            for tiles in pool.map(cut_up, part):
                waiting += tiles
            while len(waiting) >= batch_size:
                yield run(waiting[:batch_size])
                del waiting[:batch_size]
        if waiting:
            yield run(waiting)


def _checksum(params: dict) -> int:
    value = 0
    for leaf in jax.tree.leaves(params):
        value = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), value)
    return value
