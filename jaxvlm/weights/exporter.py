"""Models as checkpoints of other projects: llava-hf, LLaVA-NeXT in Hugging Face's form, LLaVA's own form, PEFT adapters.

The llava-hf key names are those of the hub's checkpoints (recipes §3.2), which transformers and vLLM load; what
transformers itself writes today, vLLM does not (ecosystem §3.2).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxvlm.config import ModelConfig, PromptConfig
from jaxvlm.models.lora import merge_all, without_lora
from jaxvlm.weights import hf_files, llava_files
from jaxvlm.weights.adapters import CONFIG as ADAPTER_CONFIG
from jaxvlm.weights.adapters import joined_modules, write_adapters
from jaxvlm.weights.families import describe_decoder
from jaxvlm.weights.families.base import Family
from jaxvlm.weights.families.connectors import connector_family
from jaxvlm.weights.families.hf_towers import describe_tower
from jaxvlm.weights.readers import WeightsError
from jaxvlm.weights.saved import new_folder
from jaxvlm.weights.tensors_out import SHARD_BYTES, Tensor, part_tensors, write_shards


@dataclass(frozen=True)
class Target:
    """A form that models are exported in.

    `reasons(model, prompt)`: why this model cannot be; empty if it can. `rename(model, part, name)`: a tensor's name
    there, from its name in the part's table, behind 'FOLDER/' if it is kept in a folder of its own. `files`: writes what
    stands beside the tensors. `image_token`: whether the tokenizer needs `<image>`.
    """

    reasons: Callable[[ModelConfig, PromptConfig], list[str]]
    rename: Callable[[ModelConfig, str, str], str]
    files: Callable[..., None]
    image_token: bool = True
    processor: str = ""


def export(
    params: dict,
    model: ModelConfig,
    prompt: PromptConfig,
    out: str | Path,
    format: str = "llava-hf",
    *,
    merge: bool = True,
    base: str = "",
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes the model as `format`, one of `FORMATS`, into a new folder and gives its path back.

    Adapters are merged, or with `merge=False` left out: what is written is then the base that a `peft` export of the
    same model belongs to, and `base` its name there. Layers of the tower after the selected features, which this
    package does not keep, are written as zeros. Where the tokenizer needs `<image>` and has none it gets it, and the
    embedding rows for it (the mean of the others) if the vocabulary has no room. `dtype` casts (None keeps each tensor's
    own). Raises `WeightsError` with all the reasons if the form cannot hold this model.
    """
    require_exportable(model, prompt, format)
    with new_folder(Path(out)) as folder:
        if format == "peft":
            write_adapters(params, model, folder, base, dtype)
            return Path(out)
        target = TARGETS[format]
        if any(lora.rank for lora in model.lora):
            params = merge_all(params, model) if merge else _without_lora(params)
            model = without_lora(model)
        tokenizer = hf_files.copy_tokenizer(Path(prompt.tokenizer), folder, target.image_token, target.processor)
        rows = model.llm.vocab_size
        if tokenizer.image_id >= rows:
            rows = -(-(tokenizer.image_id + 1) // 64) * 64  # whole tiles, as on the hub
        tensors = list(_tensors(params, model, target, rows, dtype))
        places: dict[str, list[Tensor]] = {}
        for tensor in tensors:
            place, _, name = tensor.name.rpartition("/")
            places.setdefault(place, []).append(dataclasses.replace(tensor, name=name))
        for place, held in places.items():
            (folder / place).mkdir(exist_ok=True)
            write_shards(held, folder / place, shard_bytes)
        target.files(model, prompt, tokenizer, rows, str(tensors[-1].dtype), folder)
    return Path(out)


def require_exportable(model: ModelConfig, prompt: PromptConfig, format: str) -> None:
    """Raises `WeightsError` saying why the form cannot hold the model, and what can."""
    if format not in FORMATS:
        raise WeightsError(f"There is no export format '{format}'; there are: {', '.join(FORMATS)}.")
    reasons = _peft_reasons(model) if format == "peft" else TARGETS[format].reasons(model, prompt)
    if reasons:
        others = [name for name, target in TARGETS.items() if not target.reasons(model, prompt)]
        own = "No other form holds it either: keep jaxvlm's own form, which jaxvlm chat, eval and jaxvlm.load read."
        instead = f"Use --format {others[0]}." if others else own
        raise WeightsError(f"'{format}' cannot hold this model: {'; '.join(reasons)}. {instead}")


def keep_adapters(params: dict, model: ModelConfig, out: Path) -> None:
    """Writes the model's adapters in PEFT's form, anew, if it has any and they have such a form: for a run, which merges
    them into the model that it saves.
    """
    if model.llm.lora.rank and not _peft_reasons(model):
        shutil.rmtree(out, ignore_errors=True)
        with new_folder(out) as folder:
            write_adapters(params, model, folder)


def copy_adapters(kept: Path, out: Path, base: str = "") -> None:
    """What `keep_adapters` wrote, to a new folder, for the model called `base`."""
    with new_folder(out) as folder:
        for file in kept.iterdir():
            shutil.copy(file, folder / file.name)
        settings = json.loads((folder / ADAPTER_CONFIG).read_text())
        hf_files.write(folder / ADAPTER_CONFIG, settings | {"base_model_name_or_path": base})


# -------------------------------------------------------------------------------------------------------- what fits where


def _peft_reasons(model: ModelConfig) -> list[str]:
    if not model.llm.lora.rank:
        return ["it has no adapters (llm.lora.rank = 0)"]
    reasons = _common_reasons(model)
    if any(tower.lora.rank for tower in model.vision.parts):
        reasons.append(
            "the vision tower has adapters too (vision.lora), which PEFT adapters of a LLaVA do not hold here"
        )
    if not reasons and (joined := joined_modules(model.llm)):
        reasons.append(f"the base holds {' and '.join(joined)} as one matrix, whose parts have adapters of their own")
    if model.connector.kind != "mlp2x_gelu" or model.connector.row_end or model.connector.input_norm:
        reasons.append("the adapters are for a llava-hf model, and this one's connector has no class there")
    return reasons


def _common_reasons(model: ModelConfig) -> list[str]:
    """What no form of LLaVA has."""
    vision, reasons = model.vision, []
    for describe, config in ((describe_tower, vision), (describe_decoder, model.llm)):
        try:
            describe(config)
        except WeightsError as error:
            reasons.append(str(error).rstrip("."))
    if vision.feature_norm:
        reasons.append("the tower's final norm is applied to the features (vision.feature_norm)")
    if vision.pool != 1 or vision.resized_grid:
        reasons.append("visual tokens are pooled or resized (vision.pool, vision.resized_grid)")
    if model.connector.input_norm:
        reasons.append("the connector starts with a norm (connector.input_norm)")
    if model.llm.head_bias or model.llm.logit_softcap:
        reasons.append("the head has a bias or a soft cap (llm.head_bias, llm.logit_softcap)")
    return reasons


def _hf_reasons(model: ModelConfig, prompt: PromptConfig) -> list[str]:
    reasons = _common_reasons(model)
    if model.connector.kind != "mlp2x_gelu":
        reasons.append(f"the connector is '{model.connector.kind}', and only 'mlp2x_gelu' has a class there")
    if len(model.vision.scales) > 1:
        reasons.append("the tower sees several scales (vision.scales)")
    if model.llm.learned_positions and model.llm.tie_embeddings:
        reasons.append("LLaVA's classes cannot tie an OPT's head to its embedding (llm.tie_embeddings)")
    if prompt.layout == "images_first":
        reasons.append("images stand in front of BOS (prompt.layout = 'images_first')")
    return reasons


def _llava_hf_reasons(model: ModelConfig, prompt: PromptConfig) -> list[str]:
    reasons = _hf_reasons(model, prompt)
    if model.connector.row_end:
        reasons.append("rows of visual tokens end with a learned token (connector.row_end)")
    if prompt.transform in ("anyres", "anyres_max_9", "hd", "hd224"):
        reasons.append(f"images are cut into tiles (prompt.transform = '{prompt.transform}')")
    return reasons


def _llava_next_reasons(model: ModelConfig, prompt: PromptConfig) -> list[str]:
    reasons = _hf_reasons(model, prompt)
    if prompt.transform != "anyres" or not model.connector.row_end:
        reasons.append("it is for tiled images with row ends (prompt.transform = 'anyres', connector.row_end = True)")
    if prompt.max_tiles or not prompt.tile_several:
        reasons.append("large grids are scaled down, or several images not tiled (prompt.max_tiles, tile_several)")
    return reasons


# ------------------------------------------------------------------------------------------------------------- tensors


def _hf_name(model: ModelConfig, part: str, name: str) -> str:
    if part == "connector":
        return "image_newline" if name == "newline" else f"multi_modal_projector.{name}"
    if part == "vision":  # CLIP and SigLIP have one more module around them than DINOv2
        return f"vision_tower.{'' if model.vision.layer_scale else 'vision_model.'}{name}"
    return f"language_model.{'' if name.startswith('lm_head.') else 'model.'}{name}"


TARGETS = {
    "llava-hf": Target(_llava_hf_reasons, _hf_name, hf_files.write_configs, processor="LlavaProcessor"),
    "llava-next-hf": Target(_llava_next_reasons, _hf_name, hf_files.write_configs, processor="LlavaNextProcessor"),
    "llava-original": Target(
        lambda model, prompt: _common_reasons(model) + llava_files.reasons(model, prompt),
        llava_files.rename,
        llava_files.write_configs,
        image_token=False,
    ),
}
FORMATS = (*TARGETS, "peft")


def _tensors(params: dict, model: ModelConfig, target: Target, rows: int, dtype: Any) -> Iterator[Tensor]:
    parts: dict[str, tuple[Family, Any]] = {
        "vision": (describe_tower(model.vision)[0], model.vision),
        "connector": (connector_family(model), model),
        "llm": (describe_decoder(model.llm)[0], model.llm),
    }
    for part, (family, config) in parts.items():
        for tensor in part_tensors(flatten_dict(params[part], sep="/"), family, config):
            if rows > model.llm.vocab_size and tensor.name.endswith(("embed_tokens.weight", "lm_head.weight")):
                tensor = tensor.with_rows(rows)
            tensor = dataclasses.replace(tensor, name=target.rename(model, part, tensor.name))
            yield tensor if dtype is None else tensor.cast(jnp.dtype(dtype))


def _without_lora(tree: dict) -> dict:
    return {
        name: _without_lora(value) if isinstance(value, dict) else value
        for name, value in tree.items()
        if not name.startswith("lora_")
    }
