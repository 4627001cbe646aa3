"""The small files of a llava-hf folder: configs, processor, tokenizer (ecosystem §3.2)."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxvlm.config import LLMConfig, ModelConfig, PromptConfig, VisionConfig
from jaxvlm.templates import OWN, TEMPLATES, own_template
from jaxvlm.weights.chat_templates import chat_template, taking_parts
from jaxvlm.weights.families import describe_decoder
from jaxvlm.weights.families.hf_towers import HF_ACTIVATIONS, describe_tower
from jaxvlm.weights.families.llava import PINPOINTS
from jaxvlm.weights.hf_config import read_json
from jaxvlm.weights.readers import WeightsError

CLASSES = {  # the model and its processor
    "llava": ("LlavaForConditionalGeneration", "LlavaProcessor"),
    "llava_next": ("LlavaNextForConditionalGeneration", "LlavaNextProcessor"),
}
_DECODERS = {"opt": "OPT", "gemma3_text": "Gemma3"}  # where a class is not its model_type with a capital
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("tokenizer.model", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class TokenizerFacts:
    image_id: int  # -1 where there is none
    ids: dict[str, int]
    bos: int | None
    eos: int | None
    pad: int | None


def copy_tokenizer(source: Path, out: Path, image: bool = True, processor: str = "LlavaProcessor") -> TokenizerFacts:
    """Copies a tokenizer folder; with `image`, `<image>` is one of its special tokens. Raises `WeightsError`."""
    if not (source / "tokenizer.json").is_file():
        raise WeightsError(
            f"prompt.tokenizer = '{source}' is not a folder with a tokenizer.json, which the export needs."
        )
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, out / name)
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
    ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    config_file = out / "tokenizer_config.json"
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    if image and "<image>" not in ids:
        ids["<image>"] = max(ids.values()) + 1
    if image and all(token["content"] != "<image>" for token in tokenizer.get("added_tokens", [])):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        tokenizer.setdefault("added_tokens", []).append({"id": ids["<image>"], "content": "<image>"} | flags)
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"][str(ids["<image>"])] = {"content": "<image>"} | flags
        write(out / "tokenizer.json", tokenizer)
    write(config_file, config | ({"processor_class": processor} if image else {}))

    def id_of(role: str) -> int | None:
        token = config.get(f"{role}_token")
        return ids.get(token["content"] if isinstance(token, dict) else token)

    return TokenizerFacts(ids.get("<image>", -1), ids, id_of("bos"), id_of("eos"), id_of("pad"))


def write_configs(
    model: ModelConfig,
    prompt: PromptConfig,
    tokenizer: TokenizerFacts,
    vocab_size: int,
    dtype: str,
    out: Path,
) -> None:
    """config.json, generation_config.json, both processor files and the chat template.

    A model with row ends is LLaVA-NeXT's; any other is plain LLaVA's.
    """
    vision, kind = model.vision, "llava_next" if model.connector.row_end else "llava"
    strategy = "full" if vision.feature_tokens == "cls_patch" or not vision.class_token else "default"
    layers = vision.feature_layers
    config = {
        "architectures": [CLASSES[kind][0]],
        "model_type": kind,
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 5
        "image_seq_length": vision.num_tokens,
        "image_token_index": tokenizer.image_id,
        "multimodal_projector_bias": model.connector.bias,
        "projector_hidden_act": HF_ACTIVATIONS[model.connector.activation],
        "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": model.llm.tie_embeddings,
        "vision_config": describe_tower(vision)[1],
        "text_config": text_config(model.llm, vocab_size, tokenizer) | {"dtype": dtype},
    }
    image = image_processor(vision, prompt.transform)
    if kind == "llava_next":
        pinpoints = {
            "image_grid_pinpoints": [[side * vision.image_size for side in grid] for grid in tile_grids(prompt)]
        }
        config |= pinpoints | {"use_image_newline_parameter": True}
        image |= pinpoints
    write(out / "config.json", config)
    write(out / "generation_config.json", generation_config(prompt, tokenizer))
    write(out / "preprocessor_config.json", image | {"processor_class": CLASSES[kind][1]})
    processor = {
        "processor_class": CLASSES[kind][1],
        "image_processor": image,
        "image_token": "<image>",
        "num_additional_image_tokens": int(vision.class_token),
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": strategy,
    }
    write(out / "processor_config.json", processor)
    if prompt.template == OWN:
        own = own_template(Path(prompt.tokenizer)) or ""
        (out / "chat_template.jinja").write_text(taking_parts(own), encoding="utf-8")
    elif TEMPLATES[prompt.template].style != "plain":
        (out / "chat_template.jinja").write_text(chat_template(prompt.template, prompt.layout), encoding="utf-8")


def generation_config(prompt: PromptConfig, tokenizer: TokenizerFacts) -> dict[str, Any]:
    """Where an answer ends: at the template's end of turn, or where the tokenizer's model ended it, and at its EOS."""
    if prompt.template == OWN:
        file = Path(prompt.tokenizer) / "generation_config.json"
        given = read_json(file).get("eos_token_id") if file.is_file() else None
        ends = set(given if isinstance(given, list) else [given])
    else:
        ends = {tokenizer.ids.get(TEMPLATES[prompt.template].end.strip())}
    ends = sorted(end for end in ends | {tokenizer.eos} if end is not None)
    known = {"bos_token_id": tokenizer.bos, "pad_token_id": tokenizer.pad, "eos_token_id": ends or None}
    return {key: value for key, value in known.items() if value is not None}


def text_config(llm: LLMConfig, vocab_size: int, tokenizer: TokenizerFacts) -> dict[str, Any]:
    """The decoder's config.json, with as many tokens as are written and the special ones among them."""
    values = describe_decoder(llm)[1]
    kind = values["model_type"]
    special = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    architecture = f"{_DECODERS.get(kind, kind.capitalize())}ForCausalLM"
    return values | special | {"vocab_size": vocab_size, "architectures": [architecture]}


def tile_grids(prompt: PromptConfig) -> tuple[tuple[int, int], ...]:
    """The (rows, columns) of tiles that an `anyres` prompt chooses from."""
    return prompt.grids or tuple((height // 336, width // 336) for height, width in PINPOINTS)


def image_processor(vision: VisionConfig, transform: str) -> dict[str, Any]:
    """The HF image processor that computes this package's transform of the same name (recipes §3.2)."""
    side = vision.image_size
    square, shortest = {"height": side, "width": side}, {"shortest_edge": side}
    naive = {"size": square} if not vision.class_token else {"size": square, "do_center_crop": False}
    kinds = {
        "letterbox": ("LlavaImageProcessor", {"do_pad": True, "size": shortest, "do_center_crop": True}),
        "crop": ("CLIPImageProcessor", {"size": shortest, "do_center_crop": True}),
        "naive": ("CLIPImageProcessor" if vision.class_token else "SiglipImageProcessor", naive),
        "anyres": ("LlavaNextImageProcessor", {"do_pad": True, "size": shortest, "do_center_crop": True}),
    }
    if transform not in kinds:
        raise WeightsError(f"No HF image processor does transform '{transform}'; those for {', '.join(kinds)} exist.")
    name, steps = kinds[transform]
    return {
        "image_processor_type": name,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
        **steps,
        **({"crop_size": square} if steps.get("do_center_crop") else {}),
    }


def write(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
