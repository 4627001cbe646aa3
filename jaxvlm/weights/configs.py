"""What is at a path, a part or a whole model: told by `config.json`, GGUF metadata or tensor names, never by a folder's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jaxvlm.config import LLMConfig, ModelConfig, PromptConfig, VisionConfig
from jaxvlm.weights.families import BY_MODEL_TYPE, EFFICIENTNET_LITE, HINTS
from jaxvlm.weights.families.base import Family, Format
from jaxvlm.weights.families.blip2 import BLIP2
from jaxvlm.weights.families.cambrian import CAMBRIAN, CAMBRIAN_MLP
from jaxvlm.weights.families.efficientnet import efficientnet_config
from jaxvlm.weights.families.gguf import gguf_config, gguf_family
from jaxvlm.weights.families.known import tower_given
from jaxvlm.weights.families.llava import LLAVA_HF
from jaxvlm.weights.families.llava_original import LLAVA_ORIGINAL
from jaxvlm.weights.families.open_clip import EVA_LAVIS, EVA_NAMES, eva_config
from jaxvlm.weights.families.prismatic import PRISMATIC
from jaxvlm.weights.gguf_file import GGUFFile
from jaxvlm.weights.hf_config import checked, config_file, explained, read_json
from jaxvlm.weights.readers import WeightsError, open_source
from jaxvlm.weights.saved import run_folder

FORMATS: tuple[Format, ...] = (LLAVA_HF, LLAVA_ORIGINAL, BLIP2, PRISMATIC, CAMBRIAN, CAMBRIAN_MLP)


class Found(NamedTuple):
    """What is at a path: the configuration of a part ('vision', 'llm') or of a 'model', and the tables to read it by."""

    path: Path  # of the weights
    folder: Path  # of the files beside them
    part: str
    config: Any
    families: dict[str, Family]  # by place; a connector's follows from the configuration
    format: Format | None = None
    given: dict = {}


def config_from(path: str | Path) -> tuple[str, VisionConfig | LLMConfig | ModelConfig]:
    """(part, its configuration) of the checkpoint at `path`; part is 'vision', 'llm' or 'model' (a whole VLM).

    A tower alone gets LLaVA's choice of features (the patches of the last layer but one); use `dataclasses.replace`
    for another. Raises `WeightsError` for a model that the package does not have, naming what about it.
    """
    found = identify(path)
    return found.part, found.config


def identify(path: str | Path, vision: str = "") -> Found:
    """What is at `path`; `vision` is the folder of a tower that the checkpoint only names. See `config_from`."""
    path = Path(path).expanduser()
    if not path.exists():
        raise WeightsError(f"{path} does not exist, so it holds no jaxvlm model and no checkpoint. Correct the path.")
    if run_folder(path):
        raise WeightsError(f"{path} is a model saved by jaxvlm; open it with jaxvlm.load.")
    folder = config_folder(path)
    if folder is not None:
        return _from_config(path, folder, vision)
    if path.is_dir() and (path / "adapter_config.json").is_file():
        raise WeightsError(f"{path} holds adapters alone. Give the model they belong to: --base PATH.")
    source = open_source(path)
    folder = path if path.is_dir() else path.parent
    if isinstance(source, GGUFFile):
        return Found(path, folder, "llm", gguf_config(source), {"llm": gguf_family(source)})
    names = source.names()
    if "_conv_stem.weight" in names and "_conv_head.weight" in names:
        depth = len({name.split(".")[1] for name in names if name.startswith("_blocks.")})
        config = efficientnet_config(source.shape("_conv_head.weight")[0], depth)
        return Found(path, folder, "vision", config, {"vision": EFFICIENTNET_LITE})
    if set(EVA_NAMES) <= set(names):
        with explained(path):
            return Found(path, folder, "vision", eva_config(source), {"vision": EVA_LAVIS})
    raise WeightsError(
        f"{path} has no config.json beside it and its tensors are of no known kind (they start with "
        f"{', '.join(sorted(names)[:3])}). Put the config.json of the checkpoint into the same folder."
    )


def is_run(path: Path) -> bool:
    """Whether `path` is a model that jaxvlm saved, or a run of jaxvlm's that has none yet."""
    if run_folder(path):
        return True
    file = path / "config.json"
    return file.is_file() and {"model", "prompt", "stages", "checkpoint"} <= read_json(file).keys()


def config_folder(path: Path) -> Path | None:
    """The folder of the config.json that describes what is at `path`: its own, or that above a folder of checkpoints."""
    if path.suffix == ".gguf":
        return None
    folders = (path,) if path.is_dir() else (path.parent, path.parent.parent)
    return next((folder for folder in folders if config_file(folder)), None)


def _from_config(path: Path, folder: Path, vision: str) -> Found:
    file = config_file(folder)
    given = read_json(file)
    for part in ("text_config", "vision_config"):
        if not isinstance(given.get(part), dict | None):
            raise WeightsError(f"{file}: {part} is {given[part]!r:.60}, and has to be an object. Get the file again.")
    with explained(file):
        for form in FORMATS:
            if form.recognise(given):
                if vision and form.tower_key:
                    given = given | {form.tower_key: str(vision)}
                families = form.families(given, folder)  # first, so that what is not supported is said to be that
                return Found(path, folder, "model", form.configure(checked(given, file), folder), families, form, given)
        kind = given.get("model_type")
        given = tower_given(given)
        family = BY_MODEL_TYPE.get(given.get("model_type"))
        if family is not None:
            config = family.configure(checked(given, file), folder)
            return Found(path, folder, family.part, config, {family.part: family}, None, given)
    known = ", ".join(["llava", "llava_next", "llava_onevision", "clip", "siglip", *BY_MODEL_TYPE])
    hint = HINTS.get(kind, "")
    raise WeightsError(f"{file}: model_type '{kind}' is not supported.{hint} Known: {known}.")


def prompt_from(path: str | Path) -> PromptConfig:
    """How the model at `path` is prompted: what its format says, and otherwise LLaVA-1.5's settings."""
    folder = config_folder(Path(path).expanduser())
    given = read_json(config_file(folder)) if folder else {}
    with explained(folder and config_file(folder)):
        form = next((form for form in FORMATS if form.recognise(given)), None)
    if form is None:
        raise WeightsError(f"{path} is no vision-language model, so it does not say how one is prompted.")
    return prompt_of(form, given, folder)


def prompt_of(form: Format, given: dict, folder: Path) -> PromptConfig:
    with explained(config_file(folder)):
        return PromptConfig(**{"tokenizer": str(folder), **form.prompt(given, folder)})
