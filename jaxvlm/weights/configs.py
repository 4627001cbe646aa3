"""What a checkpoint says about the model inside it: `config.json` of Hugging Face, GGUF metadata, or its tensor names.

transformers leaves out of a `config.json` whatever equals its class's defaults, so those defaults are part of the
format and stand here as data (transformers 5.23, `configuration_*.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxvlm.config import ConnectorConfig, LLMConfig, ModelConfig, PromptConfig, VisionConfig
from jaxvlm.weights.gguf_file import GGUFFile
from jaxvlm.weights.readers import WeightsError, open_source

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_VIT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
_LLM = {
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "head_dim": None,
    "hidden_act": "silu",
}
_LLM |= {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": _VIT
    | {"intermediate_size": 3072, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": _VIT
    | {
        "intermediate_size": 3072,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    "dinov2": _VIT | {"mlp_ratio": 4, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6},
    "dinov2_with_registers": _VIT
    | {
        "mlp_ratio": 4,
        "patch_size": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "num_register_tokens": 4,
    },
    "llama": _LLM
    | {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
    },
    "mistral": _LLM
    | {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
    | {"sliding_window": 4096},
    "qwen2": _LLM
    | {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    }
    | {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
    "llava": {
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
    },
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

ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu_erf",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
VISION_FAMILIES = {
    "clip_vision_model": "clip",
    "siglip_vision_model": "siglip",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
}
NORMALISATION = {
    "clip": (CLIP_MEAN, CLIP_STD),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "dinov2": (IMAGENET_MEAN, IMAGENET_STD),
}


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
        return "gguf-llama", "llm", _from_gguf(source)
    names = source.names()
    if "_conv_stem.weight" in names and "_conv_head.weight" in names:
        depth = len({name.split(".")[1] for name in names if name.startswith("_blocks.")})
        return "efficientnet-lite", "vision", _efficientnet(source.shape("_conv_head.weight")[0], depth)
    raise WeightsError(
        f"{path} has no config.json beside it and its tensors are of no known kind (they start with "
        f"{', '.join(sorted(names)[:3])}). Put the config.json of the checkpoint into the same folder."
    )


def _from_hf(folder: Path) -> tuple[str, str, Any]:
    config = _read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind in ("clip", "siglip"):
        nested = {"model_type": f"{kind}_vision_model"} | (config.get("vision_config") or {})
        return kind, "vision", _vision(nested, folder)
    if kind in VISION_FAMILIES:
        return VISION_FAMILIES[kind], "vision", _vision(config, folder)
    if kind in ("llama", "mistral", "qwen2"):
        return "llama", "llm", _llm(config, folder)
    if kind == "llava" and not any(key.startswith("mm_") for key in config):
        return "llava-hf", "model", _llava(config, folder)
    if any(key.startswith("mm_") for key in config):
        raise WeightsError(
            f"{folder}: this is a checkpoint in LLaVA's original format. Use its llava-hf conversion (on the hub under "
            "llava-hf/), or give the parts: a CLIP folder, the projector file and the language model."
        )
    raise WeightsError(
        f"{folder}/config.json: model_type '{kind}' is not supported. Known: llava, clip, siglip, dinov2, "
        "dinov2_with_registers, llama (Vicuna, SmolLM2), mistral, qwen2."
    )


def _vision(given: dict, folder: Path) -> VisionConfig:
    kind = given.get("model_type", "clip_vision_model")
    if kind not in VISION_FAMILIES:
        raise WeightsError(
            f"{folder}: a vision tower of model_type '{kind}' is not supported; CLIP, SigLIP, DINOv2 are."
        )
    family, c = VISION_FAMILIES[kind], DEFAULTS[kind] | given
    _refuse(folder, c, use_swiglu_ffn=True, qkv_bias=False)
    mean, std = NORMALISATION[family]
    processor = image_processor(folder)
    sizes = {name: c[name] if isinstance(c[name], int) else set(c[name]) for name in ("image_size", "patch_size")}
    for name, size in sizes.items():
        if not isinstance(size, int):
            if len(size) != 1:
                raise WeightsError(f"{folder}: {name} {c[name]} is not square.")
            sizes[name] = size.pop()
    return VisionConfig(
        kind="vit",
        **sizes,
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        mlp_dim=c["intermediate_size"] if family != "dinov2" else c["hidden_size"] * c["mlp_ratio"],
        activation=_activation(c["hidden_act"], folder),
        norm_eps=c["layer_norm_eps"],
        class_token=family != "siglip",
        num_registers=c.get("num_register_tokens", 0),
        patch_bias=family != "clip",
        pre_norm=family == "clip",
        layer_scale=family == "dinov2",
        mean=tuple(processor.get("image_mean", mean)),
        std=tuple(processor.get("image_std", std)),
    )


def _llm(given: dict, folder: Path) -> LLMConfig:
    kind = given.get("model_type", "llama")
    if kind not in ("llama", "mistral", "qwen2"):
        raise WeightsError(f"{folder}: a language model of type '{kind}' is not supported; llama, mistral, qwen2 are.")
    c = DEFAULTS[kind] | given
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise WeightsError(
            f"{folder}: RoPE scaling of type '{scaling}' is not supported; the positions would be wrong."
        )
    _refuse(folder, c, attention_bias=True, mlp_bias=True)
    if c["hidden_act"] != "silu":
        raise WeightsError(f"{folder}: hidden_act '{c['hidden_act']}' is not supported in the language model; silu is.")
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    if window and 0 < c.get("max_window_layers", 0) < c["num_hidden_layers"]:
        raise WeightsError(f"{folder}: layers with and without a sliding window in one model are not supported.")
    if window and c.get("max_window_layers", 0) >= c["num_hidden_layers"]:
        window = None  # Qwen2 counts the layers *without* a window
    heads = c["num_attention_heads"]
    return LLMConfig(
        vocab_size=c["vocab_size"],
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=c["num_key_value_heads"] or heads,
        head_dim=c["head_dim"] or c["hidden_size"] // heads,
        mlp_dim=c["intermediate_size"],
        rope_theta=float(rope.get("rope_theta", c["rope_theta"])),
        norm_eps=c["rms_norm_eps"],
        qkv_bias=kind == "qwen2",
        tie_embeddings=c["tie_word_embeddings"],
        sliding_window=window,
        max_positions=c["max_position_embeddings"],
    )


def _llava(given: dict, folder: Path) -> ModelConfig:
    import dataclasses

    c = DEFAULTS["llava"] | given
    _refuse(folder, c, multimodal_projector_bias=False)
    vision = _vision(c.get("vision_config") or LLAVA_VISION, folder)
    text = LLAVA_TEXT | (c.get("text_config") or {})
    layer, strategy = c["vision_feature_layer"], c["vision_feature_select_strategy"]
    if not isinstance(layer, int):
        if len(layer) != 1:
            raise WeightsError(f"{folder}: features of several layers ({layer}) are not supported.")
        layer = layer[0]
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
        vision=dataclasses.replace(vision, feature_layer=layer, feature_tokens="cls_patch" if full else "patch"),
        connector=ConnectorConfig("mlp2x_gelu", activation=_activation(c["projector_hidden_act"], folder)),
        llm=_llm(text | {"tie_word_embeddings": tied}, folder),
    )


def _from_gguf(source: GGUFFile) -> LLMConfig:
    meta = source.metadata
    kind = meta.get("general.architecture")
    if kind != "llama":
        raise WeightsError(f"{source.path}: GGUF architecture '{kind}' is not supported; llama is.")

    def get(name: str, default: Any = None) -> Any:
        value = meta.get(f"llama.{name}", default)
        if value is None:
            raise WeightsError(f"{source.path}: the GGUF metadata lacks 'llama.{name}'. Convert the model again.")
        return value

    if get("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in source.names():
        raise WeightsError(f"{source.path}: RoPE scaling is not supported; the positions would be wrong.")
    heads, width = get("attention.head_count"), get("embedding_length")
    return LLMConfig(
        vocab_size=source.shape("token_embd.weight")[0],
        width=width,
        depth=get("block_count"),
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length", get("rope.dimension_count", width // heads)),
        mlp_dim=get("feed_forward_length"),
        rope_theta=float(get("rope.freq_base", 10000.0)),
        norm_eps=round(float(get("attention.layer_norm_rms_epsilon")), 12),  # a float32 in the file
        tie_embeddings="output.weight" not in source.names(),
        max_positions=get("context_length"),
    )


def _efficientnet(width: int, depth: int) -> VisionConfig:
    return VisionConfig(
        kind="efficientnet_lite",
        image_size=224,
        patch_size=32,
        width=width,
        depth=depth,
        class_token=False,
        pre_norm=False,
        feature_layer=-1,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


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


def image_processor(folder: Path) -> dict:
    """The image part of `preprocessor_config.json` or, in newer folders, of `processor_config.json`."""
    for file in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        if file.is_file():
            values = _read_json(file)
            return values.get("image_processor", values) if file.name == "processor_config.json" else values
    return {}


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise WeightsError(f"{file} is not valid JSON: {error}") from error


def _activation(name: str, folder: Path) -> str:
    if name not in ACTIVATIONS:
        raise WeightsError(f"{folder}: activation '{name}' is not supported; known: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def _refuse(folder: Path, config: dict, **values: Any) -> None:
    for key, value in values.items():
        if config.get(key) == value:
            raise WeightsError(f"{folder}/config.json: {key} = {value} is not supported.")
