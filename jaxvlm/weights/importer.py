"""Checkpoint files to parameters: strict about names, frugal with memory.

A plan is made first (`plan.py`), so nothing is read before everything is known to fit. Then each parameter is built
on its own: with shardings, from the slices that this process owns; without, as one array.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxvlm.config import LLMConfig, ModelConfig, VisionConfig
from jaxvlm.weights.configs import identify
from jaxvlm.weights.families import CONNECTOR, FAMILIES, LLAMA, Family
from jaxvlm.weights.families.llava import split_llava_name
from jaxvlm.weights.plan import ImportReport, Leaf, plan_part
from jaxvlm.weights.readers import Index, TensorSource, WeightsError, open_source

Dtype = Any  # a dtype, or a function from a parameter's path to one

# Where a run may differ from what a checkpoint says of itself: which features are taken, and what changes no weight.
FREE = {"feature_layers", "feature_norm", "feature_tokens", "pool", "mean", "std", "image_size", "activation"}
FREE |= {"max_positions", "sliding_window", "lora"}
OF_A_CONV_TOWER = {"kind", "width"}  # all that describes one; the rest is in its weights


def import_part(
    path: str | Path,
    part: str,
    config: ModelConfig | VisionConfig | LLMConfig | None = None,
    *,
    dtype: Dtype = jnp.float32,
    shardings: Any = None,
    report: ImportReport | None = None,
) -> dict:
    """The parameters of one `part` ('vision', 'connector' or 'llm') from a checkpoint of it, or of a whole LLaVA.

    `config` is the model's (or the part's) configuration, by default the checkpoint's own. `dtype` is one dtype or a
    function of the parameter's path. With `shardings` (a tree like the result) each leaf is read and placed shard by
    shard. A `report` given here is filled in. Position embeddings of another image size are resampled as DINOv2 does
    (bicubic). Adapters (`llm.lora`) are not in checkpoints and not in the result. Raises `WeightsError` listing every
    missing, unknown or misshapen tensor.
    """
    source, names, family, config, found = _open_part(path, part, config)
    leaves = _plan(source, names, family, config, found, report)
    return _build(leaves, part, dtype, shardings)


def import_model(
    path: str | Path,
    *,
    dtype: Dtype = jnp.float32,
    shardings: Any = None,
    report: ImportReport | None = None,
) -> tuple[ModelConfig, dict]:
    """(configuration, parameters) of a llava-hf folder, under any of the names it has had over the years.

    `shardings` is a tree like the parameters, or a function from the configuration to one. Raises `WeightsError`.
    """
    _, part, config = identify(path)
    if part != "model":
        raise WeightsError(
            f"{path} holds a '{part}' part, not a whole model. Use import_part, or init.{part} in a config."
        )
    source = open_source(path)
    shardings = shardings(config) if callable(shardings) else shardings
    families = {part: _llava_family(part, config) for part in ("vision", "connector", "llm")}
    plans = {
        part: plan_part(source, _llava_names(source, part), family, part_config, report)
        for part, (family, part_config) in families.items()
    }
    params = {
        part: _build(leaves, part, dtype, None if shardings is None else shardings[part])
        for part, leaves in plans.items()
    }
    return config, params


# ------------------------------------------------------------------------------------------------ what belongs together


def _open_part(path: str | Path, part: str, config: Any) -> tuple[TensorSource, dict[str, str], Family, Any, Any]:
    """The file, its names in the family's table, the family, and the wanted and the file's own configuration."""
    if part == "connector":
        model = config if isinstance(config, ModelConfig) else identify(path)[2]
        if model.connector.input_norm:
            raise WeightsError(f"{path}: no checkpoint format holds an input norm. Set connector.input_norm = False.")
        source = open_source(path)
        return source, _llava_names(source, part), CONNECTOR, model, model
    family_name, holds, found = identify(path)
    if holds == "model":
        family, found = _llava_family(part, found)
    elif holds == part:
        family = FAMILIES[family_name]
    else:
        raise WeightsError(f"{path} holds a '{holds}' part, not '{part}'.")
    wanted = found if config is None else getattr(config, part) if isinstance(config, ModelConfig) else config
    _require_same_kind(path, part, found, wanted)
    source = open_source(path)
    names = _llava_names(source, part) if holds == "model" else _names(source, family.canonical)
    return source, names, family, wanted, found


def _llava_family(part: str, config: ModelConfig) -> tuple[Family, Any]:
    if part == "connector":
        return CONNECTOR, config
    if part == "llm":
        return LLAMA, config.llm
    name = "dinov2" if config.vision.layer_scale else "clip" if config.vision.class_token else "siglip"
    return FAMILIES[name], config.vision


def _llava_names(source: TensorSource, part: str) -> dict[str, str]:
    """{name in the part's table: name in the file}; a tensor of no part goes to the llm, whose plan will reject it."""

    def canonical(name: str) -> str | None:
        owner, key = split_llava_name(name) or ("llm", name)
        return key if owner == part else None

    return _names(source, canonical)


def _names(source: TensorSource, canonical: Callable[[str], str | None]) -> dict[str, str]:
    names: dict[str, str] = {}
    for name in source.names():
        key = canonical(name)
        if key in names:
            raise WeightsError(f"{source.path}: '{name}' and '{names[key]}' are two names of one tensor. Keep one.")
        if key is not None:
            names[key] = name
    return names


def _require_same_kind(path: str | Path, part: str, found: Any, wanted: Any) -> None:
    """Compares the settings that the weights were trained with; a wrong one would load and compute something else."""
    fields = {item.name for item in dataclasses.fields(found)} - FREE
    if part == "vision" and found.kind != "vit":
        fields = OF_A_CONV_TOWER
    changed = []
    for name in sorted(fields):
        theirs, ours = getattr(found, name), getattr(wanted, name)
        if not (np.isclose(theirs, ours, rtol=1e-6) if isinstance(theirs, float) else theirs == ours):
            changed.append(f"\n  {part}.{name} is {ours}, the checkpoint's is {theirs}")
    if changed:
        raise WeightsError(f"{path} is not the model that the configuration describes:{''.join(changed)}")


def _plan(
    source: TensorSource,
    names: dict[str, str],
    family: Family,
    config: Any,
    found: Any,
    report: ImportReport | None,
) -> list[Leaf]:
    if family.part != "vision":
        leaves = plan_part(source, names, family, config, report)
        if report is not None and family.part == "llm" and config.lora.rank:
            targets = ", ".join(config.lora.targets)
            report.initialised.append((f"llm/layers/*/{{{targets}}}/lora_*", "adapters, not in the checkpoint"))
        return leaves
    if found.kind != "vit":
        return plan_part(source, names, family, found, report)
    leaves = plan_part(source, names, family, dataclasses.replace(config, image_size=found.image_size), report)
    if config.image_size // config.patch_size == found.image_size // found.patch_size:
        return leaves
    return [_resampled(leaf, found, config) if leaf.path == "pos_embed" else leaf for leaf in leaves]


# ------------------------------------------------------------------------------------------------------------- building


def _build(leaves: list[Leaf], part: str, dtype: Dtype, shardings: Any) -> dict:
    placed = None if shardings is None else flatten_dict(shardings, sep="/")
    built = {}
    for leaf in leaves:
        is_function = callable(dtype) and not isinstance(dtype, type)
        kind = jnp.dtype(dtype(f"{part}/{leaf.path}") if is_function else dtype)
        if placed is None:
            built[leaf.path] = jnp.asarray(leaf.read(tuple(slice(0, n) for n in leaf.shape)).astype(kind, copy=False))
        elif leaf.path not in placed:
            raise WeightsError(f"No sharding was given for {part}/{leaf.path}.")
        else:
            built[leaf.path] = _sharded(leaf, kind, placed[leaf.path])
    return unflatten_dict(built, sep="/")


def _sharded(leaf: Leaf, dtype: np.dtype, sharding: jax.sharding.Sharding) -> jax.Array:
    shards: dict[tuple, np.ndarray] = {}  # a shard that several devices hold is read once

    def shard(index: Index) -> np.ndarray:
        key = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        if key not in shards:
            shards[key] = leaf.read(tuple(slice(*bounds) for bounds in key)).astype(dtype, copy=False)
        return shards[key]

    return jax.make_array_from_callback(leaf.shape, sharding, shard)


def _resampled(leaf: Leaf, found: VisionConfig, wanted: VisionConfig) -> Leaf:
    """Position embeddings for another image size: bicubic over the grid, the class token's kept (HF's DINOv2)."""
    old, new = (c.image_size // c.patch_size for c in (found, wanted))
    special, width = int(found.class_token), leaf.shape[-1]
    taps = _bicubic(old, new)

    def read(index: Index) -> np.ndarray:
        table = leaf.read((slice(0, leaf.shape[0]), slice(0, width))).astype(np.float32)
        grid = table[special:].reshape(old, old, width)
        grid = np.einsum("ia,jb,abd->ijd", taps, taps, grid, optimize=True).reshape(new * new, width)
        return np.concatenate([table[:special], grid])[index]

    return Leaf(leaf.path, (new * new + special, width), read)


def _bicubic(old: int, new: int) -> np.ndarray:
    """[new, old] weights of bicubic interpolation: half-pixel centres, a = -0.75, clamped borders (torch's choices)."""
    a, weights = -0.75, np.zeros((new, old), np.float32)
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            t = abs(centre - tap)
            inner, outer = ((a + 2) * t - (a + 3)) * t * t + 1, ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
            weights[row, min(max(tap, 0), old - 1)] += inner if t <= 1 else outer
    return weights
