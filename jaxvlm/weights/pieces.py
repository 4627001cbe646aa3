"""Which table reads which tensors: what is at one or several paths, sorted into pieces of our tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxvlm.config import ConnectorConfig, LLMConfig, ModelConfig, VisionConfig
from jaxvlm.weights.configs import FORMATS, Found, identify
from jaxvlm.weights.families.base import Family, Format
from jaxvlm.weights.families.connectors import connector_family, mlp_name
from jaxvlm.weights.families.known import local
from jaxvlm.weights.plan import ImportReport, Piece
from jaxvlm.weights.readers import TensorSource, WeightsError, open_source

# Where a run may differ from what a checkpoint says of itself: which features are taken, and what changes no weight.
FREE = {
    "vision": {"feature_layers", "feature_norm", "feature_tokens", "pool", "mean", "std", "image_size", "activation"}
    | {"resized_grid", "scales", "fill", "lora"},
    "llm": {"max_positions", "sliding_window", "lora"},
}
# All that describes a convolutional tower.
OF_A_CONV_TOWER = {
    "efficientnet_lite": {"kind", "width"},
    "convnext": {"kind", "stage_depths", "stage_widths", "layer_scale", "norm_eps"},
}

Names = dict[str, str]  # name in a family's table: name in the file


def model_pieces(
    found: Found, elsewhere: dict[str, str], source: TensorSource, report: ImportReport | None = None
) -> list[Piece]:
    """The pieces of a whole model. `elsewhere` has the paths of parts ('vision', 'llm') that lie apart from it."""
    form, model = found.format, found.config
    names, strays = _by_place(source, form.split_name)
    outside = form.outside(found.given)
    pieces = []
    for place, family in tables(found).items():
        part = place.partition("/")[0]
        given = elsewhere.get(part, "")
        if part in outside and (given or not names.get(place)):
            if report is not None:
                report.unused += [
                    (name, f"the one in {given} is used instead") for name in names.get(place, {}).values()
                ]
            if place in (part, f"{part}/towers_0"):  # the towers of a fused one are given together
                where = given or _named(found, part, outside[part])
                pieces += part_pieces(where, part, getattr(model, part))
            continue
        mine = names.get(place, {}) | (strays if place == "llm" else {})
        pieces.append(Piece(place, family, config_at(model, place), source, _canonical(source, family, mine)))
    return pieces


def part_pieces(path: str | Path, part: str, config: Any = None) -> list[Piece]:
    """The pieces of one part, from a checkpoint of it or of a whole model. See `importer.import_part`."""
    wanted = getattr(config, part) if isinstance(config, ModelConfig) and part != "connector" else config
    if part == "connector":
        return [connector_piece(path, wanted)]
    paths = [one.strip() for one in str(path).split(",")]
    fused = getattr(wanted, "kind", "") == "fused"
    if fused and (len(paths) > 1 or identify(path).part == part):
        if len(paths) != len(wanted.towers):
            raise WeightsError(
                f"'{path}' gives {len(paths)} towers, and the model has {len(wanted.towers)}. Give the path of each, in "
                "the model's order, with commas between them."
            )
        towers = [part_pieces(one, part, tower)[0] for one, tower in zip(paths, wanted.towers, strict=True)]
        return [dataclasses.replace(piece, path=f"{part}/towers_{i}") for i, piece in enumerate(towers)]
    found = identify(path)
    if found.part not in (part, "model"):
        raise WeightsError(f"{path} holds a '{found.part}' part, not '{part}'.")
    source = open_source(found.path)
    if found.part == part:
        names = _canonical(source, found.families[part], {name: name for name in source.names()})
        return [_checked(path, Piece(part, found.families[part], found.config, source, names), wanted)]
    names = _by_place(source, found.format.split_name)[0]
    pieces = []
    for place, family in found.families.items():
        if place.partition("/")[0] == part:
            mine = _canonical(source, family, names.get(place, {}))
            piece = Piece(place, family, config_at(found.config, place), source, mine)
            pieces.append(_checked(path, piece, None if wanted is None else config_at(wanted, place, part)))
    return pieces


def tables(found: Found) -> dict[str, Family]:
    """The table of every place of a whole model."""
    vision = {place: family for place, family in found.families.items() if place.startswith("vision")}
    return vision | {"connector": connector_family(found.config), "llm": found.families["llm"]}


def config_at(config: Any, place: str, start: str = "") -> Any:
    """What the table at a place reads: the part's configuration, or for a connector the whole model's.

    `config` is that of the whole model, or of the part `start`.
    """
    if place == "connector":
        return config
    part, _, tower = place.partition("/towers_")
    config = config if start else getattr(config, part)
    return config.towers[int(tower)] if tower else config


def connector_piece(path: str | Path, model: ModelConfig | None) -> Piece:
    """A projector by itself, or a whole model's."""
    model = identify(path).config if model is None else model
    if model.connector.input_norm:
        raise WeightsError(f"{path}: no checkpoint format holds an input norm. Set connector.input_norm = False.")
    source, family = open_source(path), connector_family(model)

    def fitting(form: Format) -> int:
        return len(_keys(family) & _by_place(source, form.split_name)[0].get("connector", {}).keys())

    best, own = max(FORMATS, key=fitting), _canonical(source, family, {name: name for name in source.names()})
    if not fitting(best) and _keys(family) & own.keys():  # of a model that is not supported as a whole (Qwen-VL)
        return Piece("connector", family, model, source, own)
    names, strays = _by_place(source, best.split_name)
    alone = set(names) <= {"connector"}
    mine = _canonical(source, family, names.get("connector", {}) | (strays if alone else {}))
    return Piece("connector", family, model, source, mine)


def projector_config(path: str | Path) -> ConnectorConfig:
    """What a projector by itself is, by its tensors: `linear` or an `mlp{N}x_gelu`."""
    source = open_source(path)
    keys = {name: mlp_name(name) for name in source.names()}
    layers = {key.split(".")[0] for key in keys.values() if key and key.endswith(".weight")}
    if strange := [name for name, key in keys.items() if key is None]:
        raise WeightsError(f"{path} is no projector of linear layers; it holds {', '.join(sorted(strange)[:3])}.")
    kind = "linear" if len(layers) == 1 else f"mlp{len(layers)}x_gelu"
    return ConnectorConfig(kind, bias="linear_1.bias" in keys.values(), row_end="newline" in keys.values())


def _keys(family: Family) -> set[str]:
    return {name for rule in family.rules for name in rule.names}


def _by_place(source: TensorSource, split: Callable[[str], tuple[str, str] | None]) -> tuple[dict[str, Names], Names]:
    """({place: {name there: name in the file}}, the names of no place)."""
    places: dict[str, Names] = {}
    strays: Names = {}
    for name in source.names():
        place, key = split(name) or ("", name)
        _add(source, places.setdefault(place, {}) if place else strays, key, name)
    return places, strays


def _canonical(source: TensorSource, family: Family, names: Names) -> Names:
    """The names as the family's table has them."""
    result: Names = {}
    for key, name in names.items():
        _add(source, result, family.canonical(key), name)
    return result


def _add(source: TensorSource, names: Names, key: str, name: str) -> None:
    if key in names:
        raise WeightsError(f"{source.path}: '{name}' and '{names[key]}' are two names of one tensor. Keep one.")
    names[key] = name


def _named(found: Found, part: str, name: str) -> str:
    """The path of a part that the checkpoint only names, if the name is a path."""
    if (path := local(name, found.folder)) is not None:
        return str(path)
    what = {"vision": "vision tower", "llm": "language model"}[part]
    raise WeightsError(
        f"{found.path} does not hold its {what} but names it: '{name}'. Download that and give its folder: "
        f"jaxvlm import --{part} FOLDER ..., {part}=FOLDER in Python, init.{part} in a config."
    )


def _checked(path: str | Path, piece: Piece, wanted: VisionConfig | LLMConfig | None) -> Piece:
    """The piece for the configuration that the run has, which may differ from the checkpoint's where that is harmless."""
    found = piece.config
    if wanted is None:
        return piece
    _require_same_kind(path, piece.family.part, found, wanted)
    if piece.family.part != "vision":
        return dataclasses.replace(piece, config=wanted)
    if found.kind == "efficientnet_lite":
        return piece
    fits = wanted.image_size // wanted.patch_size == found.image_size // found.patch_size
    config = dataclasses.replace(wanted, image_size=found.image_size)
    resized = None if fits or found.kind != "vit" else wanted
    return dataclasses.replace(piece, config=config, resized=resized)


def _require_same_kind(path: str | Path, part: str, found: Any, wanted: Any) -> None:
    """Compares the settings that the weights were trained with; a wrong one would load and compute something else."""
    fields: Iterable[str] = {item.name for item in dataclasses.fields(found)} - FREE[part]
    if part == "vision":
        fields = OF_A_CONV_TOWER.get(found.kind, fields)
    changed = []
    for name in sorted(fields):
        theirs, ours = getattr(found, name), getattr(wanted, name)
        numbers = isinstance(theirs, float) and isinstance(ours, float)
        if not (np.isclose(theirs, ours, rtol=1e-6) if numbers else theirs == ours):
            changed.append(f"\n  {part}.{name} is {ours}, the checkpoint's is {theirs}")
    if changed:
        raise WeightsError(f"{path} is not the model that the configuration describes:{''.join(changed)}")
