"""What a checkpoint says about the model inside it: `config.json` of Hugging Face, GGUF metadata, or its tensor names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxvlm.config import LLMConfig, ModelConfig, PromptConfig, VisionConfig
from jaxvlm.weights.families import BY_MODEL_TYPE, llava
from jaxvlm.weights.families.efficientnet import efficientnet_config
from jaxvlm.weights.families.gguf import gguf_config
from jaxvlm.weights.gguf_file import GGUFFile
from jaxvlm.weights.hf_config import image_processor, read_json
from jaxvlm.weights.readers import WeightsError, open_source


def config_from(path: str | Path) -> tuple[str, VisionConfig | LLMConfig | ModelConfig]:
    """(part, its configuration) of the checkpoint at `path`; part is 'vision', 'llm' or 'model' (a whole VLM).

    A tower alone gets LLaVA's choice of features (the patches of the last layer but one); use `dataclasses.replace`
    for another. Raises `WeightsError` for a model that the package does not have, naming what about it.
    """
    return identify(path)[1:]


def identify(path: str | Path) -> tuple[str, str, VisionConfig | LLMConfig | ModelConfig]:
    """(family, part, configuration) of the checkpoint at `path`; see `config_from`."""
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    if (folder / "manifest.json").is_file():
        raise WeightsError(f"{folder} is a model saved by jaxvlm; open it with jaxvlm.load.")
    if path.suffix != ".gguf" and (folder / "config.json").is_file():
        return _from_hf(folder)
    source = open_source(path)
    if isinstance(source, GGUFFile):
        return "gguf-llama", "llm", gguf_config(source)
    names = source.names()
    if "_conv_stem.weight" in names and "_conv_head.weight" in names:
        depth = len({name.split(".")[1] for name in names if name.startswith("_blocks.")})
        return "efficientnet-lite", "vision", efficientnet_config(source.shape("_conv_head.weight")[0], depth)
    raise WeightsError(
        f"{path} has no config.json beside it and its tensors are of no known kind (they start with "
        f"{', '.join(sorted(names)[:3])}). Put the config.json of the checkpoint into the same folder."
    )


def _from_hf(folder: Path) -> tuple[str, str, Any]:
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind == "llava" and not any(key.startswith("mm_") for key in config):
        return "llava-hf", "model", llava.configure(config, folder)
    if any(key.startswith("mm_") for key in config):
        raise WeightsError(
            f"{folder}: this is a checkpoint in LLaVA's original format. Use its llava-hf conversion (on the hub under "
            "llava-hf/), or give the parts: a CLIP folder, the projector file and the language model."
        )
    nested = config.get("vision_config") if kind in ("clip", "siglip") else None
    given = config if nested is None else {"model_type": f"{kind}_vision_model"} | nested
    family = BY_MODEL_TYPE.get(given.get("model_type"))
    if family is None:
        known = ", ".join(["llava", "clip", "siglip", *BY_MODEL_TYPE])
        raise WeightsError(f"{folder}/config.json: model_type '{kind}' is not supported. Known: {known}.")
    return family.name, family.part, family.configure(given, folder)


def prompt_from(path: str | Path) -> PromptConfig:
    """How a llava-hf folder was prompted: its processor's image transform, and otherwise LLaVA-1.5's settings."""
    folder = Path(path).expanduser()
    processor = image_processor(folder)
    if processor.get("do_pad"):
        transform = "letterbox"
    else:
        transform = (
            "crop"
            if processor.get("do_center_crop", "Siglip" not in str(processor.get("image_processor_type")))
            else "naive"
        )
    return PromptConfig(tokenizer=str(folder), template="vicuna_v1", transform=transform, layout="llava")
