"""Reading Hugging Face's JSON files: what the families' `configure` functions share."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxvlm.config import ConfigError, UserError
from jaxvlm.templates import OWN, own_template
from jaxvlm.weights.readers import WeightsError, require_content

ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu_erf",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "relu": "relu",
}


def image_processor(folder: Path) -> dict:
    """The image part of `preprocessor_config.json` or, in newer folders, of `processor_config.json`."""
    for file in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        if file.is_file():
            values = checked(read_json(file), file)
            return (values.get("image_processor") or values) if file.name == "processor_config.json" else values
    return {}


_CHATML = r"(?=[\s\S]*<\|im_start\|>)"
# What a chat template written for one of our templates contains; the first that fits is taken.
_MARKS = (
    (OWN, r"<\|im_sep\|>"),  # Phi-4's, which is not ChatML
    ("gemma", r"<start_of_turn>"),
    ("phi_3", r"<\|user\|>[\s\S]*<\|end\|>"),
    ("cambrian_chatml", rf"{_CHATML}[\s\S]*You are Cambrian"),
    ("chatml_direct", rf"{_CHATML}[\s\S]*Answer the questions\."),
    ("qwen_2_5", rf"{_CHATML}[\s\S]*You are Qwen, created by Alibaba Cloud"),
    ("qwen", rf"{_CHATML}[\s\S]*You are a helpful assistant\b"),
    ("chatml", _CHATML),
    ("llava_llama_2", r"\[INST\][\s\S]*<<SYS>>|<<SYS>>[\s\S]*\[INST\]"),
    ("prism_llama_2", r"<<SYS>(?!>)"),
    ("prism_mistral", r"\[INST\][\s\S]*\"</s>\""),
    ("mistral_instruct", r"\[INST\]"),
    ("cambrian_llama_3", r"You are Cambrian"),
    ("llama_3", r"<\|start_header_id\|>"),
    ("llava_v1", r"curious human"),
    ("vicuna_v1", r"USER: ?"),
    ("prism", r"In: "),
    ("prism_phi", r"Output:"),
)


def template_of(folder: Path) -> str | None:
    """The name of the conversation template that a folder's chat template is written for; its own where none is like it.

    None if the folder has none.
    """
    text = own_template(folder)
    return text and next((template for template, mark in _MARKS if re.search(mark, text)), OWN)


def config_file(folder: Path) -> Path | None:
    """The file in a folder that says what the checkpoint there is; OpenCLIP gives its own another name."""
    files = (folder / name for name in ("config.json", "open_clip_config.json"))
    return next((file for file in files if file.is_file()), None)


def read_json(file: Path) -> dict:
    require_content(file)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} is not valid JSON: {error}. Get the file again.") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{file} is not a JSON object but a {type(values).__name__}. Get the file again.")
    return values


@contextlib.contextmanager
def explained(file: Path) -> Iterator[None]:
    """Turns whatever a configuration of the wrong form leads to into one sentence about its file."""
    try:
        yield
    except ConfigError as error:  # of the model that it describes
        raise WeightsError(f"{file}: {error}") from error
    except UserError:
        raise
    except KeyError as error:
        raise WeightsError(f"{file} lacks {error}. Get the file again.") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        raise WeightsError(f"{file} is not as it has to be ({type(error).__name__}: {error}). Get it again.") from error


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return (_whole(value) or isinstance(value, float)) and math.isfinite(value)


def _list_of(fits: Any, value: Any) -> bool:
    return isinstance(value, list) and all(map(fits, value))


# What the entries of a config.json have to be, at whatever depth they stand: (in words, the test, the entries).
_FORMS = (
    (
        "a whole number from 1 on",
        lambda value: _whole(value) and 0 < value < 2**31,
        "hidden_size intermediate_size num_attention_heads vocab_size max_position_embeddings ffn_dim r",
    ),
    (
        "a whole number from 1 to 1000",
        lambda value: _whole(value) and 0 < value <= 1000,
        "num_hidden_layers",
    ),
    (
        "a whole number from 1 on, or null",
        lambda value: value is None or (_whole(value) and 0 < value < 2**31),
        "num_key_value_heads head_dim sliding_window original_max_position_embeddings word_embed_proj_dim "
        "tokenizer_model_max_length",
    ),
    ("a whole number", lambda value: _whole(value) and 0 <= value < 2**31, "num_register_tokens max_window_layers"),
    (
        "a whole number from 1 on, or a list of them",
        lambda value: _list_of(lambda n: _whole(n) and n > 0, value if isinstance(value, list) else [value]),
        "image_size patch_size hidden_sizes depths",
    ),
    (
        "a whole number or a list of them",
        lambda value: _list_of(_whole, value if isinstance(value, list) else [value]),
        "vision_feature_layer mm_vision_select_layer",
    ),
    (
        "a number above 0",
        lambda value: _number(value) and value > 0,
        "rms_norm_eps layer_norm_eps rope_theta rope_local_base_freq query_pre_attn_scalar mlp_ratio "
        "factor low_freq_factor high_freq_factor lora_alpha",
    ),
    (
        "a number above 0, or null",
        lambda value: value is None or (_number(value) and value > 0),
        "attn_logit_softcapping final_logit_softcapping attention_factor partial_rotary_factor",
    ),
    ("a list of numbers", lambda value: _list_of(_number, value), "short_factor long_factor"),
    (
        "a list of three numbers, or null",
        lambda value: value is None or (_list_of(_number, value) and len(value) == 3),
        "image_mean",
    ),
    (
        "a list of three numbers above 0, or null",
        lambda value: value is None or (_list_of(_number, value) and len(value) == 3 and min(value) > 0),
        "image_std",
    ),
    (
        "true or false",
        lambda value: isinstance(value, bool),
        "attention_bias mlp_bias qkv_bias enable_bias use_sliding_window use_swiglu_ffn multimodal_projector_bias "
        "tie_word_embeddings s2 use_rslora",
    ),
    (
        "a text",
        lambda value: isinstance(value, str),
        "hidden_act hidden_activation activation_function projector_hidden_act rope_type mm_vision_tower "
        "mm_projector_type mm_patch_merge_type vision_feature_select_strategy vision_aspect_ratio architecture",
    ),
    (
        "an object or null",
        lambda value: value is None or isinstance(value, dict),
        "text_config vision_config rope_scaling rope_parameters image_processor",
    ),
    (
        "a list of pairs of whole numbers, a text, or null",
        lambda value: isinstance(value, str | None) or _list_of(lambda n: _list_of(_whole, n) and len(n) == 2, value),
        "image_grid_pinpoints",
    ),
    ("a text or null", lambda value: isinstance(value, str | None), "base_model_name_or_path"),
    (
        "a list of texts or null",
        lambda value: value is None or _list_of(lambda text: isinstance(text, str), value),
        "layer_types modules_to_save",
    ),
)
_EXPECTED = {entry: (what, fits) for what, fits, entries in _FORMS for entry in entries.split()}


def checked(values: dict, file: Path, above: str = "") -> dict:
    """The values of a JSON file. Raises `WeightsError` naming the first entry that is not what it has to be."""
    for name, value in values.items():
        what, fits = _EXPECTED.get(name, ("", None))
        if fits is not None and not fits(value):
            raise WeightsError(f"{file}: {above}{name} is {value!r:.60}, and has to be {what}. Get the file again.")
        if isinstance(value, dict):
            checked(value, file, f"{above}{name}.")
    return values


def activation(name: str, folder: Path) -> str:
    if name not in ACTIVATIONS:
        raise WeightsError(
            f"{folder}/config.json: activation '{name}' is not supported; known: {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


def refuse(folder: Path, config: dict, **values: Any) -> None:
    for key, value in values.items():
        if config.get(key) == value:
            raise WeightsError(f"{folder}/config.json: {key} = {value} is not supported.")
