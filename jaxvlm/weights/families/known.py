"""Towers and language models that checkpoints of other projects only name: the config.json of each, by its id.

LLaVA, Prismatic and Cambrian store the name of a frozen part instead of the part. What is here suffices to say what the
model is; the weights come from a path that the user gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxvlm.weights.families import BY_MODEL_TYPE, Family, timm
from jaxvlm.weights.hf_config import checked, config_file, explained, read_json
from jaxvlm.weights.readers import WeightsError


def _vit(kind: str, size: int, patch: int, width: int, depth: int, heads: int, mlp: int = 0, **more: Any) -> dict:
    values = {"model_type": kind, "image_size": size, "patch_size": patch, "hidden_size": width}
    values |= {"num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": mlp or 4 * width}
    return values | more


def _clip(size: int, patch: int, width: int, depth: int, heads: int, **more: Any) -> dict:
    return _vit("clip_vision_model", size, patch, width, depth, heads, **more)


def _siglip(size: int, patch: int, width: int = 768, depth: int = 12, heads: int = 12, **more: Any) -> dict:
    return _vit("siglip_vision_model", size, patch, width, depth, heads, **more)


_SO400M = {"width": 1152, "depth": 27, "heads": 16, "mlp": 4304}

TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-base-patch32": _clip(224, 32, 768, 12, 12),
    "openai/clip-vit-base-patch16": _clip(224, 16, 768, 12, 12),
    "openai/clip-vit-large-patch14": _clip(224, 14, 1024, 24, 16),
    "openai/clip-vit-large-patch14-336": _clip(336, 14, 1024, 24, 16),
    "google/siglip-base-patch16-224": _siglip(224, 16),
    "google/siglip-base-patch16-256": _siglip(256, 16),
    "google/siglip-base-patch16-384": _siglip(384, 16),
    "google/siglip-so400m-patch14-224": _siglip(224, 14, **_SO400M),
    "google/siglip-so400m-patch14-384": _siglip(384, 14, **_SO400M),
    "facebook/dinov2-large": _vit("dinov2", 518, 14, 1024, 24, 16),
    "facebook/dinov2-giant": _vit("dinov2", 518, 14, 1536, 40, 24, use_swiglu_ffn=True),
    "facebook/dinov2-with-registers-large": _vit("dinov2_with_registers", 518, 14, 1024, 24, 16),
    "google/vit-large-patch16-224": _vit("vit", 224, 16, 1024, 24, 16),
}

_LLAMA = {"model_type": "llama", "vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
_MISTRAL = {"model_type": "mistral", "vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768}
_PHI2 = {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32}
_PHI2 |= {"partial_rotary_factor": 0.4, "vocab_size": 51200}

LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": _LLAMA,
    "meta-llama/Llama-2-13b-hf": _LLAMA | _13B,
    "meta-llama/Llama-2-7b-chat-hf": _LLAMA,
    "meta-llama/Llama-2-13b-chat-hf": _LLAMA | _13B,
    "lmsys/vicuna-7b-v1.5": _LLAMA,
    "lmsys/vicuna-13b-v1.5": _LLAMA | _13B,
    "mistralai/Mistral-7B-v0.1": _MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.1": _MISTRAL,
    "microsoft/phi-2": _PHI2,
}


def tower(name: str, folder: Path) -> tuple[dict, Family, Path]:
    """(its config.json, its family, the folder to read further files from) of a tower that `folder` names.

    `name` is a known id, or the path of a folder that holds the tower. Raises `WeightsError` for anything else.
    """
    here = local(name, folder)
    if here is None and name not in TOWERS:
        known = ", ".join(TOWERS)
        raise WeightsError(
            f"{folder}/config.json names the vision tower '{name}', which is neither a folder nor one that jaxvlm "
            f"knows ({known}). Download it and give its folder: --vision PATH (init.vision in a config)."
        )
    if here is None:
        config = TOWERS[name]
    else:
        file = config_file(here)
        with explained(file):
            config = checked(tower_given(read_json(file)), file)
    family = BY_MODEL_TYPE.get(config.get("model_type"))
    if family is None or family.part != "vision":
        raise WeightsError(f"{here or folder}: '{config.get('model_type')}' is not a vision tower that jaxvlm reads.")
    return config, family, here or folder


def tower_given(config: dict) -> dict:
    """The vision part of a config.json; a CLIP or SigLIP with both towers is read as its image side."""
    if "architecture" in config or "model_cfg" in config:
        return timm.given_of(config)
    kind = config.get("model_type")
    nested = config.get("vision_config") if kind in ("clip", "siglip") else None
    return config if nested is None else {"model_type": f"{kind}_vision_model"} | nested


def local(name: str, folder: Path) -> Path | None:
    """The folder that a tower's name is the path of, from here or from the checkpoint's folder."""
    for path in (Path(name).expanduser(), folder / name):
        if config_file(path):
            return path
    return None
