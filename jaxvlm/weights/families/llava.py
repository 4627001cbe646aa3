"""A whole LLaVA in one checkpoint: its three parts behind prefixes, which changed over the years (recipes §3.2)."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from jaxvlm.config import ConnectorConfig, ModelConfig
from jaxvlm.weights.families import part_family
from jaxvlm.weights.hf_config import activation, refuse
from jaxvlm.weights.readers import WeightsError

DEFAULTS = {
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
}
# A LLaVA config without a tower or a language model means these.
LLAVA_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "patch_size": 14,
}
LLAVA_VISION |= {"image_size": 336, "num_hidden_layers": 24, "num_attention_heads": 16}
LLAVA_TEXT = {"model_type": "llama"}


# (what the name starts with, what that becomes for the part's own table).
LLAVA_PREFIXES = {
    "vision": ((r"(model\.)?(vision_tower\.)+(vision_model\.)?", ""),),
    "connector": (
        (r"(model\.)?multi_modal_projector\.", ""),
        (r"(base_model\.model\.)?(model\.)?mm_projector\.0\.", "linear_1."),  # LLaVA's own mm_projector.bin
        (r"(base_model\.model\.)?(model\.)?mm_projector\.2\.", "linear_2."),
        (r"(base_model\.model\.)?(model\.)?mm_projector\.(?=weight|bias)", "linear_1."),
    ),
    "llm": ((r"(language_model\.)?lm_head\.", "lm_head."), (r"(model\.)?language_model\.(model\.)?", "")),
}
LLAVA_EXPORT = {
    "vision": "vision_tower.vision_model.",
    "connector": "multi_modal_projector.",
    "llm": "language_model.",
}


def split_llava_name(name: str) -> tuple[str, str] | None:
    """(part, the name in that part's table) of a tensor in a LLaVA checkpoint, or None if it belongs to no part."""
    for part, prefixes in LLAVA_PREFIXES.items():
        for prefix, replacement in prefixes:
            found = re.match(prefix, name)
            if found:
                return part, replacement + name[found.end() :]
    return None


def configure(given: dict, folder: Path) -> ModelConfig:
    c = DEFAULTS | given
    refuse(folder, c, multimodal_projector_bias=False)
    given_vision = c.get("vision_config") or LLAVA_VISION
    vision = part_family("vision", given_vision.get("model_type", "clip_vision_model"), folder).configure(
        given_vision, folder
    )
    text = LLAVA_TEXT | (c.get("text_config") or {})
    layer, strategy = c["vision_feature_layer"], c["vision_feature_select_strategy"]
    layers = (layer,) if isinstance(layer, int) else tuple(layer)
    if strategy == "default" and not vision.class_token:
        raise WeightsError(
            f"{folder}: vision_feature_select_strategy 'default' drops the first token, but this tower has no class "
            "token, so a patch would be lost. Set it to 'full' if the model was trained on all patches."
        )
    if strategy == "full" and vision.num_registers:
        raise WeightsError(f"{folder}: register tokens as visual tokens are not supported.")
    full = strategy == "full" and vision.class_token
    # A tied head may be declared at either level; older files leave it out of the outer one.
    tied = text.get("tie_word_embeddings", c.get("tie_word_embeddings", False))
    return ModelConfig(
        vision=dataclasses.replace(vision, feature_layers=layers, feature_tokens="cls_patch" if full else "patch"),
        connector=ConnectorConfig("mlp2x_gelu", activation=activation(c["projector_hidden_act"], folder)),
        llm=part_family("llm", text["model_type"], folder).configure(text | {"tie_word_embeddings": tied}, folder),
    )
