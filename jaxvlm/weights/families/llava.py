"""LLaVA in Hugging Face's form, and its any-resolution kin LLaVA-NeXT and LLaVA-OneVision (recipes §3.2)."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from jaxvlm.config import ConnectorConfig, ModelConfig
from jaxvlm.models.vit import feature_states
from jaxvlm.weights.families import part_family
from jaxvlm.weights.families.base import Family, Format
from jaxvlm.weights.families.connectors import mlp_name
from jaxvlm.weights.hf_config import activation, image_processor, template_of
from jaxvlm.weights.readers import WeightsError

_DEFAULTS = {
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "image_token_index": 32000,
}
# What a config without a tower or a language model means.
_CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14}
_CLIP |= {"image_size": 336, "num_hidden_layers": 24, "num_attention_heads": 16}
_SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 14}
_SIGLIP |= {"image_size": 384, "num_hidden_layers": 26, "num_attention_heads": 16}

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # LLaVA-1.6's, (height, width)
DEFAULTS = {
    "llava": _DEFAULTS | {"vision_config": _CLIP, "text_config": {"model_type": "llama"}},
    "llava_next": _DEFAULTS
    | {"vision_config": _CLIP, "text_config": {"model_type": "llama"}, "image_grid_pinpoints": PINPOINTS},
    "llava_onevision": _DEFAULTS
    | {
        "vision_config": _SIGLIP,
        "text_config": {"model_type": "qwen2"},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_token_index": 151646,
        "vision_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
    },
}

# What the name starts with, in any year; what is left of it is the part's own name.
_PREFIXES = {
    "vision": r"(model\.)?vision_tower\.",
    "llm": r"(model\.)?language_model\.|(?=lm_head\.)",
}
# As on the hub; transformers has loaded these names since 4.36, and vLLM loads no others (ecosystem §3.2).
EXPORT_PREFIXES = {
    "vision": "vision_tower.vision_model.",
    "connector": "multi_modal_projector.",
    "llm": "language_model.",
}


def split_name(name: str) -> tuple[str, str] | None:
    if connector := mlp_name(name):
        return "connector", connector
    for place, prefix in _PREFIXES.items():
        found = re.match(prefix, name)
        if found:
            return place, name[found.end() :]
    return None


def complete(given: dict) -> dict:
    c = DEFAULTS[given["model_type"]] | {key: value for key, value in given.items() if value is not None}
    # A tied head may be declared at either level; older files leave it out of the outer one.
    tied = c["text_config"].get("tie_word_embeddings", c.get("tie_word_embeddings", False))
    return c | {"text_config": {"model_type": "llama"} | c["text_config"] | {"tie_word_embeddings": tied}}


def families(given: dict, folder: Path) -> dict[str, Family]:
    c = complete(given)
    return {
        "vision": part_family("vision", c["vision_config"].get("model_type", "clip_vision_model"), folder),
        "llm": part_family("llm", c["text_config"]["model_type"], folder),
    }


def configure(given: dict, folder: Path) -> ModelConfig:
    c, tables = complete(given), families(given, folder)
    vision = tables["vision"].configure(c["vision_config"], folder)
    layer, strategy = c["vision_feature_layer"], c["vision_feature_select_strategy"]
    layers = (layer,) if isinstance(layer, int) else tuple(layer)
    if strategy not in ("default", "full"):
        raise WeightsError(f"{folder}/config.json: vision_feature_select_strategy '{strategy}' is not default or full.")
    if strategy == "default" and not vision.class_token:
        raise WeightsError(
            f"{folder}/config.json: vision_feature_select_strategy 'default' drops the first token, but this tower has no class "
            "token, so a patch would be lost. Set it to 'full' if the model was trained on all patches."
        )
    if strategy == "full" and vision.num_registers:
        raise WeightsError(f"{folder}/config.json: register tokens as visual tokens are not supported.")
    full = strategy == "full" and vision.class_token
    # LLaVA takes hidden states, which no final norm has touched.
    features = {"feature_layers": layers, "feature_norm": False, "feature_tokens": "cls_patch" if full else "patch"}
    vision = dataclasses.replace(vision, **features)
    if vision.kind == "vit":
        feature_states(vision)  # raises for layers that there are not
    return ModelConfig(
        vision=vision,
        connector=ConnectorConfig(
            "mlp2x_gelu",
            activation=activation(c["projector_hidden_act"], folder),
            bias=c["multimodal_projector_bias"],
            row_end=c["model_type"] != "llava",
        ),
        llm=tables["llm"].configure(c["text_config"], folder),
    )


def prompt(given: dict, folder: Path) -> dict[str, Any]:
    """The transform of the folder's image processor, and the template that its chat template is written after."""
    c, values = complete(given), {"layout": "llava"}
    if template := template_of(folder):
        values["template"] = template
    if c["model_type"] == "llava":
        return values | {"transform": _single_transform(image_processor(folder))}
    size = c["vision_config"].get("image_size", 336)
    values |= {"transform": "anyres", "grids": grids(c["image_grid_pinpoints"], size, folder)}
    if c["model_type"] == "llava_onevision":
        values |= {"max_tiles": max_tiles(c["vision_aspect_ratio"], folder), "tile_several": False}
    return values


def grids(pinpoints: list, size: int, folder: Path) -> tuple[tuple[int, int], ...]:
    """Resolutions (height, width) as (rows, columns) of tiles."""
    if any(height % size or width % size for height, width in pinpoints):
        raise WeightsError(
            f"{folder}/config.json: image_grid_pinpoints {pinpoints} are not whole tiles of {size} pixels."
        )
    return tuple((height // size, width // size) for height, width in pinpoints)


def max_tiles(aspect_ratio: str, folder: Path) -> int:
    """9 of 'anyres_max_9', 0 of plain 'anyres'."""
    found = re.fullmatch(r"anyres(_max_(\d+))?", aspect_ratio)
    if not found:
        raise WeightsError(
            f"{folder}/config.json: the image aspect ratio '{aspect_ratio}' is not supported; anyres_max_N is."
        )
    return int(found[2] or 0)


def _single_transform(processor: dict) -> str:
    if processor.get("do_pad"):
        return "letterbox"
    crops = processor.get("do_center_crop", "Siglip" not in str(processor.get("image_processor_type")))
    return "crop" if crops else "naive"


def _is_hf(given: dict) -> bool:
    # LLaVA's own files call themselves 'llava' too.
    return given.get("model_type") in DEFAULTS and not any(key.startswith("mm_") for key in given)


LLAVA_HF = Format(
    name="llava-hf",
    recognise=_is_hf,
    configure=configure,
    families=families,
    split_name=split_name,
    prompt=prompt,
)
