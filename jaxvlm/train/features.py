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

FeatureTable = tuple[np.ndarray, dict[str, int]]  # [tiles, tokens, width] on disk; the row of each image's first tile


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
    key = [to_dict(config.vision), config.dtype, how, _checksum(vision_params), files]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]

    def planned(path: str) -> ImagePlan:
        return image_plan(cut, *(image_size(image_at(path), path) if cut.sized else (0, 0)))

    with ThreadPoolExecutor(16) as pool:
        plans = list(pool.map(planned, images))
    ends = np.cumsum([plan.tiles for plan in plans]).tolist()
    shape = (max(ends, default=1), config.vision.num_tokens, config.vision.feature_width)
    dtype = jnp.dtype(config.dtype)
    data, done = directory / f"features-{digest}.bin", directory / f"features-{digest}.json"
    if not done.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        table = np.memmap(data, dtype, "w+", shape=shape)
        start = 0
        for rows in _compute(config, vision_params, zip(images, plans, strict=True), cut, batch_size):
            table[start : start + len(rows)] = rows
            start += len(rows)
            if on_progress:
                on_progress(bisect.bisect_right(ends, start), len(images))
        table.flush()
        write_json(done, {"shape": shape, "dtype": config.dtype, "transform": prompt.transform})
    return np.memmap(data, dtype, "r", shape=shape), dict(zip(images, [0, *ends], strict=False))


def _cacheable(config: ModelConfig, prompt: PromptConfig) -> Tiling:
    cut = tiling(config, prompt)
    if config.connector.kind == "sva":
        raise ConfigError(
            "cache_features keeps one array of features, but 'sva' takes one of each tower; set it False."
        )
    if cut.sized and not cut.tile_several:
        raise ConfigError(
            "cache_features keeps one set of tiles of an image, but with prompt.tile_several = False that depends on the "
            "conversation; set one of them otherwise."
        )
    return cut


def _compute(config, vision_params, images: Iterator[tuple[str, ImagePlan]], cut: Tiling, batch_size: int):
    """Features [n, N, Dv] of the images' tiles in order, some at a time."""
    model = VLM(config)

    @jax.jit
    def encode(params, views):  # [B, s, s, 3] each -> [B, N, Dv]
        views = [view[:, None] for view in views]
        return model.apply({"params": {"vision": params}}, *views, method="encode")[:, 0]

    def cut_up(pair):
        path, plan = pair
        return list(
            zip(*image_tiles(load_image(image_at(path), path), cut, plan, path), strict=True)
        )  # of each tile, its views

    def run(tiles):
        views = [np.stack(view) for view in zip(*tiles, strict=True)]
        extra = batch_size - len(tiles)  # one shape, one compilation
        return np.asarray(encode(vision_params, [np.pad(view, [(0, extra), *[(0, 0)] * 3]) for view in views]))[
            : len(tiles)
        ]

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
