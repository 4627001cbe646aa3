"""Features of a frozen vision tower, computed once per image and kept on disk for every later epoch and stage."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxvlm.config import ModelConfig, to_dict
from jaxvlm.data.image import load_image, transform
from jaxvlm.models.vlm import VLM
from jaxvlm.weights.saved import write_json

FeatureTable = tuple[np.ndarray, dict[str, int]]  # [images, tokens, width] on disk, and each image path's row


def cached_features(
    config: ModelConfig,
    vision_params: dict,
    images: list[str],
    transform_name: str,
    directory: Path,
    batch_size: int = 8,  # what fits a CPU's cache is fastest; raise it for an accelerator
    on_progress: Callable[[int, int], None] | None = None,
) -> FeatureTable:
    """The vision features of `images`, read from `directory` or computed and written there.

    The file's name is a digest of all that decides its content: tower config and weights, transform, image files.
    """
    stats = [(path, (stat := Path(path).stat()).st_size, stat.st_mtime_ns) for path in images]
    key = [to_dict(config.vision), config.dtype, transform_name, _checksum(vision_params), stats]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    shape = (len(images), config.vision.num_tokens, config.vision.feature_width)
    dtype = jnp.dtype(config.dtype)
    data, done = directory / f"features-{digest}.bin", directory / f"features-{digest}.json"
    if not done.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        table = np.memmap(data, dtype, "w+", shape=shape)
        for start, rows in _compute(config, vision_params, images, transform_name, batch_size):
            table[start : start + len(rows)] = rows
            if on_progress:
                on_progress(start + len(rows), len(images))
        table.flush()
        write_json(done, {"shape": shape, "dtype": config.dtype, "transform": transform_name})
    return np.memmap(data, dtype, "r", shape=shape), {path: row for row, path in enumerate(images)}


def _compute(config, vision_params, images, transform_name, batch_size):
    model, vision = VLM(config), config.vision

    @jax.jit
    def encode(params, pixels):  # [B, H, W, 3] -> [B, N, Dv]
        return model.apply({"params": {"vision": params}}, pixels[:, None], method="encode")[:, 0]

    def pixels(path):
        return transform(load_image(path), transform_name, vision.image_size, vision.mean)

    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(images), batch_size):
            batch = np.stack(list(pool.map(pixels, images[start : start + batch_size])))
            filled = len(batch)
            batch = np.pad(batch, [(0, batch_size - filled), (0, 0), (0, 0), (0, 0)])  # one shape, one compilation
            yield start, np.asarray(encode(vision_params, batch))[:filled]


def _checksum(params: dict) -> int:
    value = 0
    for leaf in jax.tree.leaves(params):
        value = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), value)
    return value
