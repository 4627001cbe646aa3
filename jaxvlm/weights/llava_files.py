"""What makes a folder LLaVA's own beside the tensors: their names and config.json (recipes §3.1)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxvlm.config import ModelConfig, PromptConfig, VisionConfig
from jaxvlm.weights.families import describe_decoder
from jaxvlm.weights.families.hf_towers import describe_tower
from jaxvlm.weights.families.known import TOWERS
from jaxvlm.weights.hf_files import TokenizerFacts, generation_config, image_processor, text_config, tile_grids, write
from jaxvlm.weights.readers import WeightsError

_CLASSES = {"llama": ("llava_llama", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM")}
_TOWER = "vision_tower"  # the folder of a tower that has no name on the hub


def reasons(model: ModelConfig, prompt: PromptConfig) -> list[str]:
    """Why LLaVA's code cannot compute this model."""
    found, connector = [], model.connector
    try:
        if describe_tower(model.vision)[1]["model_type"] != "clip_vision_model":
            found.append("LLaVA's own code has CLIP towers only")
        kind = describe_decoder(model.llm)[1]["model_type"]
        if kind not in _CLASSES:
            found.append(f"LLaVA's own code has {' and '.join(_CLASSES)} only, and this language model is a {kind}")
    except WeightsError:
        pass  # said already
    linear = connector.kind == "linear" or connector.kind.startswith("mlp")
    if not linear or not connector.bias or connector.activation != "gelu_erf":
        found.append(
            f"LLaVA's projectors are linear layers with biases and the exact GELU, this one is '{connector.kind}'"
        )
    if prompt.layout in ("prismatic", "images_first"):
        found.append(f"images stand in front of the prompt (prompt.layout = '{prompt.layout}')")
    if prompt.transform not in ("letterbox", "crop", "anyres") or prompt.max_tiles:
        found.append(f"LLaVA prepares no images as prompt.transform = '{prompt.transform}' does")
    if (prompt.transform == "anyres") != connector.row_end:
        found.append("LLaVA has row ends where images are tiled, and nowhere else (connector.row_end)")
    return found


def rename(model: ModelConfig, part: str, name: str) -> str:
    if part == "vision":  # a tower without a name on the hub is loaded from a folder, whole
        prefix = "model.vision_tower.vision_tower." if _hub_name(model.vision) else f"{_TOWER}/"
        return f"{prefix}vision_model.{name}"
    if part == "llm":
        return name if name.startswith("lm_head.") else f"model.{name}"
    if name == "newline":
        return "model.image_newline"
    layer, kind = name.removeprefix("linear_").split(".")
    if model.connector.kind == "linear":
        return f"model.mm_projector.{kind}"
    return f"model.mm_projector.{2 * (int(layer) - 1)}.{kind}"  # an activation between any two


def write_configs(
    model: ModelConfig, prompt: PromptConfig, tokenizer: TokenizerFacts, vocab_size: int, dtype: str, out: Path
) -> None:
    """config.json, generation_config.json and, for a tower that has no name on the hub, the rest of its folder.

    The weights of a tower from the hub are among the tensors, and `unfreeze_mm_vision_tower` has LLaVA's code load them
    from there. Any other's are in a folder, which that code looks for from where it is run.
    """
    vision, text = model.vision, text_config(model.llm, vocab_size, tokenizer)
    kind, architecture = _CLASSES[text["model_type"]]
    values: dict[str, Any] = text | {
        "architectures": [architecture],
        "model_type": kind,
        "dtype": dtype,
        "torch_dtype": dtype,
        "mm_vision_tower": _hub_name(vision) or _TOWER,
        "mm_hidden_size": vision.feature_width,
        "mm_projector_type": model.connector.kind,
        "mm_vision_select_layer": vision.feature_layers[0],
        "mm_vision_select_feature": vision.feature_tokens,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "unfreeze_mm_vision_tower": _hub_name(vision) is not None,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_model_max_length": prompt.length,
        "tokenizer_padding_side": "right",
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad" if prompt.transform == "letterbox" else "square",
    }
    if prompt.transform == "anyres":
        side = vision.image_size
        pinpoints = [[columns * side, rows * side] for rows, columns in tile_grids(prompt)]
        values |= {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"}
        values |= {"image_grid_pinpoints": pinpoints}
    if len(vision.scales) > 1:
        values |= {"s2": True, "s2_scales": ",".join(str(vision.image_size * scale) for scale in vision.scales)}
    write(out / "config.json", values)
    write(out / "generation_config.json", generation_config(prompt, tokenizer))
    if (out / _TOWER).is_dir():
        write(out / _TOWER / "config.json", describe_tower(vision)[1] | {"architectures": ["CLIPVisionModel"]})
        write(out / _TOWER / "preprocessor_config.json", image_processor(vision, "crop"))


def _hub_name(vision: VisionConfig) -> str | None:
    """The name on the hub of a tower of this architecture, whose images are normalised in the same way."""
    family, given = describe_tower(vision)
    wanted = dataclasses.replace(family.configure(given, Path()), mean=vision.mean, std=vision.std)
    for name, known in TOWERS.items():
        if known["model_type"] == given["model_type"] and family.configure(known, Path()) == wanted:
            return name
    return None
