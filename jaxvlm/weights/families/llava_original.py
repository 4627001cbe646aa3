"""LLaVA in its own form: v1 (one linear layer), v1.5 and v1.6 (recipes §3.1).

A language model's config.json with `mm_*` entries, its tensors under their usual names, and the projector among them.
The vision tower is mostly only named; v1.6 holds it too.
"""

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
from jaxvlm.weights.families.known import tower
from jaxvlm.weights.families.llava import grids, max_tiles
from jaxvlm.weights.hf_config import template_of
from jaxvlm.weights.readers import WeightsError

# The class that a checkpoint was saved from says what its language model is; v1 called the Llama class plain 'llava'.
_LANGUAGE = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
_TEMPLATES = {"llava_mistral": "mistral_instruct", "llava_qwen": "qwen"}
_YI_VOCABULARY = 64000  # LLaVA-1.6-34B, which calls itself 'llava' and speaks ChatML

_DEFAULTS = {
    "model_type": "llava",
    "mm_projector_type": "linear",  # before the entry was there, there was nothing else
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "image_aspect_ratio": None,
    "tie_word_embeddings": False,
    "s2": False,
    "s2_scales": "336,672,1008",
}
_PREFIX = r"(base_model\.model\.)?"
_VISION = _PREFIX + r"model\.vision_tower\.vision_tower\."
_LANGUAGE_MODEL = _PREFIX + r"(model\.(?=(embed_tokens|layers|norm)\.)|(?=lm_head\.))"


def split_name(name: str) -> tuple[str, str] | None:
    if connector := mlp_name(name):
        return "connector", connector
    for place, prefix in (("vision", _VISION), ("llm", _LANGUAGE_MODEL)):
        if found := re.match(prefix, name):
            return place, name[found.end() :]
    return None


def _language(c: dict, folder: Path) -> Family:
    kind = c["model_type"]
    if kind not in _LANGUAGE:
        raise WeightsError(
            f"{folder}/config.json: model_type '{kind}' is not supported; of LLaVA's own, {', '.join(_LANGUAGE)} are."
        )
    return part_family("llm", _LANGUAGE[kind], folder)


def families(given: dict, folder: Path) -> dict[str, Family]:
    c = _DEFAULTS | given
    return {"vision": tower(c["mm_vision_tower"], folder)[1], "llm": _language(c, folder)}


def configure(given: dict, folder: Path) -> ModelConfig:
    c = _DEFAULTS | given
    values, family, where = tower(c["mm_vision_tower"], folder)
    vision = family.configure(values, where)
    scales = sorted(int(size) for size in str(c["s2_scales"]).split(",")) if c["s2"] else [vision.image_size]
    if scales[0] < vision.patch_size or any(size % scales[0] for size in scales):
        raise WeightsError(f"{folder}/config.json: s2_scales '{c['s2_scales']}' are not multiples of a whole image.")
    tokens = c["mm_vision_select_feature"]
    if tokens not in ("patch", "cls_patch"):
        raise WeightsError(f"{folder}/config.json: mm_vision_select_feature '{tokens}' is not patch or cls_patch.")
    vision = dataclasses.replace(
        vision,
        image_size=scales[0],
        scales=tuple(size // scales[0] for size in scales),
        feature_layers=(c["mm_vision_select_layer"],),
        feature_norm=False,
        feature_tokens=tokens,
    )
    feature_states(vision)  # raises for layers that there are not
    kind = c["mm_projector_type"]
    if not re.fullmatch(r"linear|mlp[1-9]\d?x_gelu", kind):
        raise WeightsError(
            f"{folder}/config.json: mm_projector_type '{kind}' is not supported; linear, mlpNx_gelu are."
        )
    language = _language(c, folder)
    text = {key: value for key, value in given.items() if not key.startswith("mm_")}
    text |= {"model_type": _LANGUAGE[c["model_type"]], "tie_word_embeddings": c["tie_word_embeddings"]}
    return ModelConfig(
        vision=vision,
        connector=ConnectorConfig(kind, row_end="unpad" in c["mm_patch_merge_type"]),
        llm=language.configure(text, folder),
    )


def prompt(given: dict, folder: Path) -> dict[str, Any]:
    """The transform by `image_aspect_ratio`; the template by the class, as LLaVA chooses it by the folder's name."""
    c = _DEFAULTS | given
    yi = "chatml_direct" if c.get("vocab_size") == _YI_VOCABULARY else "vicuna_v1"
    values = {"layout": "llava", "template": _TEMPLATES.get(c["model_type"]) or template_of(folder) or yi}
    if length := c.get("tokenizer_model_max_length"):
        values["length"] = length
    aspect = c["image_aspect_ratio"]
    if not aspect or not aspect.startswith("anyres"):
        return values | {"transform": "letterbox" if aspect == "pad" else "crop"}
    if c["mm_patch_merge_type"] != "spatial_unpad":
        raise WeightsError(
            f"{folder}/config.json: mm_patch_merge_type '{c['mm_patch_merge_type']}' with image_aspect_ratio "
            f"'{aspect}' is not supported; spatial_unpad is."
        )
    pinpoints = c["image_grid_pinpoints"]
    if isinstance(pinpoints, str):  # '(1x1),...,(6x6)', counted in tiles
        rows, columns = (int(n) for n in re.findall(r"\d+", pinpoints)[-2:])
        tiles = tuple((r, k) for r in range(1, rows + 1) for k in range(1, columns + 1))
    else:  # (width, height) here
        size = tower(c["mm_vision_tower"], folder)[0].get("image_size", 336)
        tiles = grids([[height, width] for width, height in pinpoints], size, folder)
    values |= {"transform": "anyres", "grids": tiles, "max_tiles": max_tiles(aspect, folder)}
    return values | {"tile_several": c["model_type"] != "llava_qwen"}  # OneVision


LLAVA_ORIGINAL = Format(
    name="llava-original",
    recognise=lambda given: "mm_vision_tower" in given and "mm_vision_tower_aux_list" not in given,
    configure=configure,
    families=families,
    split_name=split_name,
    prompt=prompt,
    tower_key="mm_vision_tower",
    # What the first stage leaves is a projector alone.
    outside=lambda given: {"vision": given["mm_vision_tower"], "llm": given.get("_name_or_path", "not by name")},
)
