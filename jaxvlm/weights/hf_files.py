"""The small files of a llava-hf folder: configs, processor, tokenizer, chat template (ecosystem §3.2)."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxvlm.config import LLMConfig, ModelConfig, PromptConfig, VisionConfig
from jaxvlm.weights.hf_config import ACTIVATIONS
from jaxvlm.weights.readers import WeightsError

HF_ACTIVATIONS = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("tokenizer.model", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class TokenizerFacts:
    image_id: int
    ids: dict[str, int]
    bos: int | None
    eos: int | None
    pad: int | None


def copy_tokenizer(source: Path, out: Path) -> TokenizerFacts:
    """Copies a tokenizer folder, adding `<image>` as a special token if it has none. Raises `WeightsError`."""
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
    if "<image>" not in ids:
        ids["<image>"] = max(ids.values()) + 1
    if all(token["content"] != "<image>" for token in tokenizer.get("added_tokens", [])):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        tokenizer.setdefault("added_tokens", []).append({"id": ids["<image>"], "content": "<image>"} | flags)
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"][str(ids["<image>"])] = {"content": "<image>"} | flags
        _write(out / "tokenizer.json", tokenizer)
    _write(config_file, config | {"processor_class": "LlavaProcessor"})

    def id_of(role: str) -> int | None:
        token = config.get(f"{role}_token")
        return ids.get(token["content"] if isinstance(token, dict) else token)

    return TokenizerFacts(ids["<image>"], ids, id_of("bos"), id_of("eos"), id_of("pad"))


def write_configs(
    model: ModelConfig,
    prompt: PromptConfig,
    tokenizer: TokenizerFacts,
    vocab_size: int,
    dtype: str,
    out: Path,
) -> None:
    """config.json, generation_config.json, both processor files and the chat template."""
    vision = model.vision
    strategy = "full" if vision.feature_tokens == "cls_patch" or not vision.class_token else "default"
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 5
        "image_seq_length": vision.num_tokens,
        "image_token_index": tokenizer.image_id,
        "multimodal_projector_bias": True,
        "projector_hidden_act": HF_ACTIVATIONS[model.connector.activation],
        "vision_feature_layer": vision.feature_layers[0]
        if len(vision.feature_layers) == 1
        else list(vision.feature_layers),
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": model.llm.tie_embeddings,
        "vision_config": vision_config(vision),
        "text_config": text_config(model.llm, vocab_size, tokenizer) | {"dtype": dtype},
    }
    _write(out / "config.json", config)
    ends = {tokenizer.ids.get(mark) for mark in CHAT_ENDS.get(prompt.template, ())} | {tokenizer.eos}
    ends = sorted(end for end in ends if end is not None)
    known = {"bos_token_id": tokenizer.bos, "pad_token_id": tokenizer.pad, "eos_token_id": ends or None}
    _write(out / "generation_config.json", {key: value for key, value in known.items() if value is not None})
    image = image_processor(vision, prompt.transform)
    _write(out / "preprocessor_config.json", image | {"processor_class": "LlavaProcessor"})
    processor = {
        "processor_class": "LlavaProcessor",
        "image_processor": image,
        "image_token": "<image>",
        "num_additional_image_tokens": int(vision.class_token),
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": strategy,
    }
    _write(out / "processor_config.json", processor)
    if prompt.template in CHAT:
        (out / "chat_template.jinja").write_text(chat_template(prompt.template))


def vision_config(vision: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model" if vision.class_token else "siglip_vision_model",
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_dim,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.num_heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": HF_ACTIVATIONS[vision.activation],
        "layer_norm_eps": vision.norm_eps,
    } | ({} if vision.class_token else {"vision_use_head": False})  # SigLIP's pooling head has no part in LLaVA


def text_config(llm: LLMConfig, vocab_size: int, tokenizer: TokenizerFacts) -> dict[str, Any]:
    kind = "qwen2" if llm.qkv_bias else "mistral" if llm.sliding_window else "llama"
    config = {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": llm.width,
        "intermediate_size": llm.mlp_dim,
        "num_hidden_layers": llm.depth,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "head_dim": llm.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": llm.max_positions,
        "rms_norm_eps": llm.norm_eps,
        "rope_theta": llm.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": llm.rope_theta},  # transformers 5
        "tie_word_embeddings": llm.tie_embeddings,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
    }
    if kind != "llama":
        config["sliding_window"] = llm.sliding_window
    if kind == "qwen2":
        config |= {"use_sliding_window": llm.sliding_window is not None, "max_window_layers": 0}
    return config


def image_processor(vision: VisionConfig, transform: str) -> dict[str, Any]:
    """The HF image processor that computes this package's transform of the same name (recipes §3.2)."""
    side = vision.image_size
    square, shortest = {"height": side, "width": side}, {"shortest_edge": side}
    naive = {"size": square} if not vision.class_token else {"size": square, "do_center_crop": False}
    kinds = {
        "letterbox": ("LlavaImageProcessor", {"do_pad": True, "size": shortest, "do_center_crop": True}),
        "crop": ("CLIPImageProcessor", {"size": shortest, "do_center_crop": True}),
        "naive": ("CLIPImageProcessor" if vision.class_token else "SiglipImageProcessor", naive),
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


# ------------------------------------------------------------------------------------------------------- chat templates

# The conversation templates as Jinja: text before a question, after it, before an answer, after it. They must render
# what `data.conversation.prompt` renders; a test holds the two together (this room may not import that one).
_VICUNA = {"user": "USER: ", "ask": " ASSISTANT:", "lead": " ", "end": "</s>", "system_format": ("", " ")}
_INST = {"user": "[INST] ", "ask": " [/INST]", "lead": " ", "end": " </s>"}
_CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
CHAT: dict[str, dict[str, Any]] = {
    "vicuna_v1": _VICUNA | {"system": _CURIOUS.format("user")},
    "llava_v1": _VICUNA | {"system": _CURIOUS.format("human")},
    "llava_llama_2": _INST
    | {
        "between": "<s>",
        "system_format": ("<<SYS>>\n", "\n<</SYS>>\n\n"),
        "system_inside": True,
        "system": "You are a helpful language and vision assistant. You are able to understand the visual content that "
        "the user provides, and assist the user with a variety of tasks using natural language.",
    },
    "mistral_instruct": _INST,
    "chatml": {
        "user": "<|im_start|>user\n",
        "ask": "<|im_end|>\n<|im_start|>assistant\n",
        "lead": "",
        "end": "<|im_end|>\n",
        "system_format": ("<|im_start|>system\n", "<|im_end|>\n"),
        "strip_answers": True,
    },
    "prism": {"user": "In: ", "ask": "\nOut:", "lead": " ", "end": "{{ eos_token }}"}
    | {"image_first": True, "strip_answers": True},
}
CHAT_ENDS = {name: (values["end"].strip(),) for name, values in CHAT.items()}


def chat_template(name: str) -> str:
    """Jinja source that renders messages (strings, or lists of text and image parts) like the named template."""
    defaults = {"between": "", "system": "", "system_format": ("", ""), "system_inside": False}
    t = defaults | {"image_first": False, "strip_answers": False} | CHAT[name]

    def say(text: str) -> str:
        return text if "{{" in text or not text else f"{{{{ {json.dumps(text)} }}}}"

    before, after = t["system_format"]
    system = f"{{% if system %}}{say(before)}{{{{ system }}}}{say(after)}{{% endif %}}"
    inside, outside = (system, "") if t["system_inside"] else ("", system)
    text = (
        "{% set text %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}" + say("<image>\n") + "{% endif %}{% endfor %}"
        "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
        "{% endif %}{% endset %}"
    )
    words = "text.replace('<image>', '').strip()"
    if t["image_first"]:
        images, question = "{{ '<image>' * text.count('<image>') }}", f"{{{{ {words} }}}}"
    else:  # one image moves to the front of its turn, several keep their places
        front = f'{{{{ ("<image>\\n" + {words}).strip() }}}}'
        images = ""
        question = f"{{% if text.count('<image>') == 1 %}}{front}{{% else %}}{{{{ text }}}}{{% endif %}}"
    answer = "{{ text.strip() }}" if t["strip_answers"] else "{{ text }}"
    return (
        f"{{% set system = {json.dumps(t['system'])} %}}"
        "{% if messages and messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set messages = messages[1:] %}{% endif %}"
        f"{outside}{{% for m in messages %}}{text}{{% if m['role'] == 'user' %}}{images}"
        f"{{% if loop.first %}}{say(t['user'])}{inside}{{% else %}}{say(t['between'] + t['user'])}{{% endif %}}"
        f"{question}{say(t['ask'])}"
        f"{{% else %}}{say(t['lead'])}{answer}{say(t['end'])}{{% endif %}}{{% endfor %}}"
    )


def _write(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
