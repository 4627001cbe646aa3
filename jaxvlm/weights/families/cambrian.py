"""Cambrian-1 (recipes §1.1 A7, §3.4): a language model, the aggregator's tensors beside it, and towers by name.

Every tower gives its last, normed features (CLIP alone those that LLaVA takes), resized to the number of tokens that
the config says. Images are always letterboxed and the bars left out, whatever `image_aspect_ratio` says: training
knows nothing else, and answers do not read it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from jaxvlm.config import ConnectorConfig, ModelConfig, SVAConfig, VisionConfig
from jaxvlm.weights.families import BY_MODEL_TYPE, part_family
from jaxvlm.weights.families.base import Family, Format
from jaxvlm.weights.families.connectors import mlp_name
from jaxvlm.weights.families.known import TOWERS
from jaxvlm.weights.families.timm import TIMM_CONVNEXT, TIMM_VIT, timm_config
from jaxvlm.weights.families.vit import CLIP_TRAITS
from jaxvlm.weights.readers import WeightsError

_LANGUAGE = {"cambrian_llama": "llama", "cambrian_mistral": "mistral", "cambrian_phi3": "phi3"}
_SIGLIP = {  # OpenCLIP's, which timm computes with the exact GELU
    "siglip/CLIP-ViT-SO400M-14-384": "vit_so400m_patch14_siglip_384",
    "timm/ViT-SO400M-14-SigLIP-384": "vit_so400m_patch14_siglip_384",
    "siglip/CLIP-ViT-SO400M-14": "vit_so400m_patch14_siglip_224",
    "timm/ViT-SO400M-14-SigLIP": "vit_so400m_patch14_siglip_224",
}
_CONVNEXT = {"clip-convnext-XXL": "convnext_xxlarge.clip", "clip-convnext-L": "convnext_large.clip"}
_HEADS = 16  # of every cross-attention; no entry says so

_DEFAULTS = {
    "mm_projector_type": "linear",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "connector_only": True,
    "start_of_vision_sampler_layers": 0,
    "stride_of_vision_sampler_layers": 1,
    "num_of_vision_sampler_layers": 0,
    "tie_word_embeddings": False,
}
_AGGREGATOR = r"model\.(?=mm_projector|vision_sampler|vision_query|image_newline$)"
_TOWER = r"model\.vision_tower_aux_list\.(\d+)\.vision_tower\."


def split_name(name: str) -> tuple[str, str] | None:
    if found := re.match(_AGGREGATOR, name):
        return "connector", name[found.end() :]
    if found := re.match(_TOWER, name):
        return f"vision/towers_{found[1]}", name[found.end() :]
    if found := re.match(r"model\.(?=(embed_tokens|layers|norm)\.)|(?=lm_head\.)", name):
        return "llm", name[found.end() :]
    return None


def split_concatenated(name: str) -> tuple[str, str] | None:
    """As `split_name`, of a checkpoint whose towers' channels are joined and whose connector is an MLP."""
    if connector := mlp_name(name):
        return "connector", connector
    return split_name(name)


def _tower(name: str, tokens: int, c: dict, folder: Path) -> tuple[VisionConfig, Family]:
    """A tower by the name that Cambrian gives it, resized to so many tokens."""
    size = re.search(r"-res(\d+)", name)
    plain = re.sub(r"-(res|interp)\d+|-multi-stage", "", name)
    final = {"feature_layers": (-1,), "feature_norm": True}
    if plain in _SIGLIP:  # with bars of CLIP's colour, as of every tower from OpenCLIP
        config, family = dataclasses.replace(timm_config(_SIGLIP[plain]), **final, fill=CLIP_TRAITS["mean"]), TIMM_VIT
    elif plain in _CONVNEXT:
        config, family = timm_config(_CONVNEXT[plain]), TIMM_CONVNEXT
        stages = tuple(range(len(config.stage_depths))) if "multi-stage" in name else (-1,)
        config = dataclasses.replace(config, image_size=1024, feature_layers=stages, feature_norm=False)
    elif plain in TOWERS:
        family = BY_MODEL_TYPE[TOWERS[plain]["model_type"]]
        config = family.configure(TOWERS[plain], folder)
        if family.name == "clip":
            tokens_of = "cls_patch" if c["mm_vision_select_feature"] == "cls_patch" else "patch"
            final = {"feature_layers": (c["mm_vision_select_layer"],), "feature_tokens": tokens_of}
        config = dataclasses.replace(config, **final)
    else:
        known = ", ".join((*_SIGLIP, *_CONVNEXT, *TOWERS))
        raise WeightsError(f"{folder}/config.json: the vision tower '{name}' is not supported. Known: {known}.")
    if size:
        config = dataclasses.replace(config, image_size=int(size[1]))
    side = math.isqrt(tokens)
    return dataclasses.replace(config, resized_grid=0 if config.grid == side else side), family


def _towers(c: dict, folder: Path) -> list[tuple[VisionConfig, Family]]:
    pairs = zip(c["mm_vision_tower_aux_list"], c["mm_vision_tower_aux_token_len_list"], strict=True)
    return [_tower(name, tokens, c, folder) for name, tokens in pairs]


def _language(c: dict, folder: Path) -> Family:
    kind = c.get("model_type")
    if kind not in _LANGUAGE:
        raise WeightsError(
            f"{folder}/config.json: model_type '{kind}' is not supported; of Cambrian's, {', '.join(_LANGUAGE)} are."
        )
    return part_family("llm", _LANGUAGE[kind], folder)


def families(given: dict, folder: Path) -> dict[str, Family]:
    c = _DEFAULTS | given
    towers = {f"vision/towers_{i}": family for i, (_, family) in enumerate(_towers(c, folder))}
    return towers | {"llm": _language(c, folder)}


def configure(given: dict, folder: Path) -> ModelConfig:
    c = _DEFAULTS | given
    language = _language(c, folder)
    towers = tuple(config for config, _ in _towers(c, folder))
    text = {key: value for key, value in c.items() if not key.startswith(("mm_", "vision_"))}
    return ModelConfig(
        vision=VisionConfig(kind="fused", towers=towers),
        connector=ConnectorConfig(c["mm_projector_type"], row_end=True, **_sva(c, folder)),
        llm=language.configure(text | {"model_type": _LANGUAGE[c["model_type"]]}, folder),
    )


def _sva(c: dict, folder: Path) -> dict[str, SVAConfig]:
    if c["mm_projector_type"] != "sva":
        return {}
    lengths = set(c["query_num_list"]) | {c["image_token_len"]}
    if len(lengths) > 1:
        raise WeightsError(
            f"{folder}/config.json: query groups of several sizes ({sorted(lengths)}) are not supported."
        )
    count = 0 if c["connector_only"] else c["num_of_vision_sampler_layers"]
    start, stride = c["start_of_vision_sampler_layers"], c["stride_of_vision_sampler_layers"]
    return {
        "sva": SVAConfig(
            width=c["vision_hidden_size"],
            num_heads=_HEADS,
            depth=c["connector_depth"],
            groups=c["num_query_group"],
            grid=math.isqrt(c["image_token_len"]),
            llm_layers=tuple(start + stride * n for n in range(count)),
        )
    }


def prompt(given: dict, folder: Path) -> dict[str, Any]:
    """Letterboxed images without their bars; the template by the language model, as the scripts choose it."""
    c = _DEFAULTS | given
    vocabularies = {32000: "vicuna_v1", 64000: "cambrian_chatml"}
    template = vocabularies.get(c.get("vocab_size"), "cambrian_llama_3")
    values = {"layout": "llava", "template": "mistral_instruct" if "mistral" in c["model_type"] else template}
    if length := c.get("tokenizer_model_max_length"):
        values["length"] = length
    return values | {"transform": "letterbox_unpad"}


def _format(name: str, sva: bool, split: Any) -> Format:
    def recognise(given: dict) -> bool:
        return "mm_vision_tower_aux_list" in given and (given.get("mm_projector_type") == "sva") == sva

    return Format(
        name=name,
        recognise=recognise,
        configure=configure,
        families=families,
        split_name=split,
        prompt=prompt,
        outside=lambda given: {"vision": ",".join(given["mm_vision_tower_aux_list"])},
    )


CAMBRIAN = _format("cambrian", True, split_name)
CAMBRIAN_MLP = _format("cambrian-mlp", False, split_concatenated)
