"""Checkpoint files to parameters: strict about names, frugal with memory.

What is at a path becomes a list of pieces, one for each table that reads a share of its tensors (`pieces.py`); the
pieces become a plan (`plan.py`), so nothing is read before everything is known to fit; the plan becomes arrays
(`build.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxvlm.config import ConnectorConfig, LLMConfig, ModelConfig, PromptConfig, VisionConfig
from jaxvlm.models.vlm import abstract_params, init_params
from jaxvlm.weights import adapters as lora
from jaxvlm.weights.build import Dtype, build
from jaxvlm.weights.configs import Found, config_folder, identify, is_run, prompt_of
from jaxvlm.weights.hf_config import template_of
from jaxvlm.weights.pieces import connector_piece, model_pieces, part_pieces, projector_config
from jaxvlm.weights.plan import ImportReport, Leaf, Piece, plan
from jaxvlm.weights.readers import WeightsError, open_source
from jaxvlm.weights.resample import resampled
from jaxvlm.weights.saved import load_model, run_folder


class Opened(NamedTuple):
    """A model whose files are open and of which no tensor has been read."""

    config: ModelConfig
    prompt: PromptConfig
    pieces: list[Piece]
    new: bool = False  # what no piece has is initialised


def import_part(
    path: str | Path,
    part: str,
    config: ModelConfig | VisionConfig | LLMConfig | None = None,
    *,
    dtype: Dtype = jnp.float32,
    shardings: Any = None,
    report: ImportReport | None = None,
) -> dict:
    """The parameters of one `part` ('vision', 'connector' or 'llm') from a checkpoint of it, or of a whole model.

    `config` is the model's (or the part's) configuration, by default the checkpoint's own. `dtype` is one dtype, a
    function of the parameter's path, or None for the file's. With `shardings` (a tree like the result) each leaf is read
    and placed shard by shard. A `report` given here is filled in. Position embeddings of another image size are
    resampled as the tower's own code does it. The towers of a fused one are given by several paths with commas between
    them. Adapters (`lora`) are not in checkpoints and not in the result. Raises `WeightsError` listing every
    missing, unknown or misshapen tensor.
    """
    placed = None if shardings is None else {part: shardings}
    if (run := run_folder(Path(path).expanduser())) is not None:
        return load_model(run, placed and (lambda config: placed), dtype, part)[0][part]
    pieces = part_pieces(path, part, config)
    if report is not None and part != "connector" and pieces[0].config.lora.rank:
        targets = ", ".join(pieces[0].config.lora.targets)
        report.initialised.append((f"{part}/layers/*/{{{targets}}}/lora_*", "adapters, not in the checkpoint"))
    return build(planned(pieces, report), dtype, placed)[part]


def import_model(
    path: str | Path,
    *,
    dtype: Dtype = jnp.float32,
    shardings: Any = None,
    report: ImportReport | None = None,
    **where: Any,
) -> tuple[ModelConfig, dict]:
    """(configuration, parameters) of a whole model; see `load_any`."""
    config, _, params = load_any(path, dtype=dtype, shardings=shardings, report=report, **where)
    return config, params


def load_any(
    path: str | Path,
    *,
    dtype: Dtype = jnp.float32,
    shardings: Any = None,
    report: ImportReport | None = None,
    **where: Any,
) -> tuple[ModelConfig, PromptConfig, dict]:
    """(configuration, prompt, parameters) of a whole model in any format, or of a jaxvlm run.

    `shardings` is a tree like the parameters, or a function from the configuration to one. `where` is `open_model`'s.
    Raises `WeightsError`, or `CheckpointError` for a run that cannot be read.
    """
    if is_run(Path(path).expanduser()):
        place = shardings if shardings is None or callable(shardings) else lambda config: shardings
        params, config, prompt, _ = load_model(Path(path).expanduser(), place, dtype)
        return config, prompt, params
    opened = open_model(path, report=report, **where)
    return opened.config, opened.prompt, read_model(opened, dtype=dtype, shardings=shardings, report=report)


# ------------------------------------------------------------------------------------------------------------- opening


def open_model(
    path: str | Path,
    *,
    vision: str = "",
    llm: str = "",
    base: str = "",
    merge: bool = False,
    report: ImportReport | None = None,
) -> Opened:
    """A whole model, or adapters with the model they belong to.

    Args:
        vision, llm: where the parts are that the checkpoint only names (LLaVA's own format, Prismatic, Cambrian).
        base: the model that the adapters at `path` belong to.
        merge: adds the adapters to the weights they adapt, where they would be leaves of their own.
    """
    path = Path(path).expanduser()
    if (path / lora.CONFIG).is_file():
        return _open_adapted(path, {"vision": vision, "llm": llm}, base, merge, report)
    found = identify(path, vision)
    if found.part != "model":
        raise WeightsError(_not_whole(path, found.part))
    pieces = model_pieces(found, {"vision": vision, "llm": llm}, open_source(found.path), report)
    return Opened(found.config, _prompt(found, found.folder, llm), pieces)


def open_parts(vision: str, llm: str, connector: str = "", report: ImportReport | None = None) -> Opened:
    """A new model of a tower (or several, with commas between their paths), a language model and, if there is one, the
    projector between them; without one it is initialised: an MLP, for several towers Prismatic's."""
    towers = tuple(_part(one.strip(), "vision") for one in vision.split(","))
    fused = len(towers) > 1
    config = ModelConfig(
        vision=VisionConfig(kind="fused", towers=towers) if fused else towers[0],
        connector=projector_config(connector) if connector else ConnectorConfig("fused_mlp" if fused else "mlp2x_gelu"),
        llm=_part(llm, "llm"),
    )
    pieces = part_pieces(vision, "vision", config)
    pieces += [connector_piece(connector, config)] if connector else []
    if report is not None and not connector:
        report.initialised.append(("connector/*", f"{config.connector.kind}, from the seed"))
    folder = identify(llm).folder
    prompt = PromptConfig(tokenizer=str(folder), template=template_of(folder) or "vicuna_v1")
    return Opened(config, prompt, [*pieces, *part_pieces(llm, "llm", config)], new=True)


def _part(path: str, part: str) -> Any:
    """The configuration of a part, from a checkpoint of it or of a whole model."""
    found = identify(path)
    if found.part not in (part, "model"):
        raise WeightsError(f"--{part} {path} holds a '{found.part}' part, not '{part}'.")
    return found.config if found.part == part else getattr(found.config, part)


def _open_adapted(
    folder: Path, elsewhere: dict[str, str], base: str, merge: bool, report: ImportReport | None
) -> Opened:
    """Adapters, LLaVA's folders with their own config.json and projector included, on the model they belong to."""
    adapters = lora.read_adapters(folder)
    if not base and not (adapters.base and Path(adapters.base).expanduser().is_dir()):
        raise WeightsError(
            f"{folder} holds adapters; they were trained on '{adapters.base or 'a model that it does not name'}'. "
            "Get that model and give its folder: --base PATH (base=PATH in Python)."
        )
    under = identify(base or adapters.base, elsewhere["vision"])
    found = identify(folder, elsewhere["vision"]) if config_folder(folder) == folder else under
    if found.part != "model":
        raise WeightsError(_not_whole(under.path, under.part))
    if under.part == "model" and under.format is not found.format:
        raise WeightsError(
            f"{folder} is of the format {found.format.name}, its base {under.path} of {under.format.name}."
        )

    if found.config.llm.tie_embeddings:
        lora.require_untied(adapters)

    def key(name: str) -> tuple[str, str]:
        """By which differently spelt names are told to be one tensor's: its place, and the name in the table there."""
        place, rest = found.format.split_name(name) or ("", name)
        return place, found.families[place].canonical(rest) if place in found.families else rest

    source = lora.Overlay(key, *adapters.others, open_source(under.path))
    prompt = _prompt(found, folder, str(under.folder))
    if merge:
        source = lora.merged(source, adapters, key)
        return Opened(found.config, prompt, model_pieces(found, elsewhere, source, report))
    found, piece = _own_leaves(found, adapters, key)
    return Opened(found.config, prompt, [*model_pieces(found, elsewhere, source, report), piece])


def _own_leaves(found: Found, adapters: lora.Adapters, key: Callable[[str], tuple[str, str]]) -> tuple[Found, Piece]:
    """The model with adapters in its configuration, and the piece that reads them."""
    family, keys = found.families["llm"], {}
    for module in adapters.modules:
        place, name = key(f"{module}.weight")
        keys[name.removesuffix(".weight") if place == "llm" else module] = module
    llm = dataclasses.replace(found.config.llm, lora=lora.lora_config(adapters, family, found.config.llm, set(keys)))
    names = {
        f"{name}.lora_{half}.weight": tensor
        for name, module in keys.items()
        for half, tensor in zip("AB", adapters.modules[module], strict=True)
    }
    piece = Piece("llm", lora.lora_family(family, llm), llm, adapters.source, names)
    return found._replace(config=dataclasses.replace(found.config, llm=llm)), piece


def _not_whole(path: Path, part: str) -> str:
    alone = {"llm": "a language model alone", "vision": "a vision tower alone"}[part]
    return (
        f"{path} holds {alone} (a '{part}' part), not a whole model. Join it with the other part: "
        f"jaxvlm import --vision FOLDER --llm FOLDER OUT, or init.{part} in a config."
    )


def _prompt(found: Found, *folders: str | Path) -> PromptConfig:
    """What the format says; the tokenizer of the first folder that has one."""
    prompt = prompt_of(found.format, found.given, found.folder)
    held = [str(folder) for folder in folders if folder and (Path(folder).expanduser() / "tokenizer.json").is_file()]
    return dataclasses.replace(prompt, tokenizer=held[0]) if held else prompt


# ------------------------------------------------------------------------------------------------------------- reading


def read_model(
    opened: Opened,
    *,
    dtype: Dtype = jnp.float32,
    shardings: Any = None,
    seed: int = 0,
    report: ImportReport | None = None,
) -> dict:
    """The parameters of an opened model. Raises `WeightsError` listing every tensor that does not fit."""
    leaves = planned(opened.pieces, report)
    shardings = shardings(opened.config) if callable(shardings) else shardings
    params = build(leaves, dtype, shardings)
    return with_initial(opened.config, params, seed) if opened.new else params


def planned(pieces: list[Piece], report: ImportReport | None = None) -> list[Leaf]:
    """Every parameter of the pieces. Raises `WeightsError` listing every tensor that does not fit."""
    return [leaf for piece, leaves in zip(pieces, plan(pieces, report), strict=True) for leaf in _fitted(leaves, piece)]


def _fitted(leaves: list[Leaf], piece: Piece) -> list[Leaf]:
    """The leaves under their whole paths, position embeddings resampled to the wanted image size."""
    result = []
    for leaf in leaves:
        if leaf.path == "pos_embed" and piece.resized is not None:
            leaf = resampled(leaf, piece.config, piece.resized, piece.family.resample)
        result.append(dataclasses.replace(leaf, path=f"{piece.path}/{leaf.path}"))
    return result


def with_initial(config: ModelConfig, params: dict, seed: int, shardings: dict | None = None) -> dict:
    """The parameters with what is missing initialised from the seed, in the model's order; placed by `shardings`, a tree
    like the result.
    """
    loaded = flatten_dict(params, sep="/")
    wanted = flatten_dict(abstract_params(config), sep="/")
    placed = dict.fromkeys(wanted) if shardings is None else flatten_dict(shardings, sep="/")
    missing = {path: placed[path] for path in wanted if path not in loaded}

    def fill(rng: jax.Array) -> dict:  # only what is missing is ever computed
        leaves = flatten_dict(init_params(config, rng), sep="/")
        return {path: leaves[path] for path in missing}

    fresh = jax.jit(fill, out_shardings=None if shardings is None else missing)(jax.random.key(seed))
    return unflatten_dict({path: loaded.get(path, fresh.get(path)) for path in wanted}, sep="/")
