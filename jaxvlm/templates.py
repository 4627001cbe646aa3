"""What a model is prompted with, by name: conversation templates (recipes §1.2 P4-P6) and versions of image transforms.

`data.conversation` renders the templates and labels them, `weights.chat_templates` writes them as Jinja for other projects.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from jaxvlm.config import UserError

IMAGE_MARK = "<image>"
OWN = "tokenizer"  # the name of the tokenizer's own chat template

# Of the transforms in `data.image`. A version is raised whenever the pixels change, and saved with every model.
TRANSFORM_VERSIONS = {"naive": 1, "crop": 1, "letterbox": 1, "letterbox_unpad": 1, "anyres": 1, "anyres_max_9": 1}
TRANSFORM_VERSIONS |= {"hd": 1, "hd224": 1}


@dataclass(frozen=True)
class Template:
    """The fixed text around the turns: start, system, then for each pair user + question + ask + lead + answer
    + end + after.

    `{eos}` in `end` is the tokenizer's own end-of-sequence token.
    """

    user: str  # before the question
    ask: str  # after the question; inference stops here
    lead: str  # supervised, before the answer
    end: str  # supervised, after the answer
    after: str = ""  # after the answer, not supervised
    between: str = ""  # before every question but the first
    system: str = ""  # the default system prompt
    system_format: str | None = None  # where the system prompt goes; None: the template has no place for one
    system_inside: bool = False  # the system prompt stands after `user` in the first turn, not before it
    strip: tuple[str, ...] = ()  # roles whose text loses surrounding white space
    style: str = "instruct"  # instruct | plain (the question is dropped) | bare (images in front, no newline)
    specials: tuple[str, ...] = ()  # tokens that must exist in the tokenizer
    start: str = ""  # before everything, where the tokenizer puts no BOS there itself


_VICUNA = Template(
    user="USER: ",
    ask=" ASSISTANT:",
    lead=" ",
    end="</s>",
    system_format="{} ",
    specials=("</s>",),
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
)
_HELPFUL = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_INST = Template(user="[INST] ", ask=" [/INST]", lead=" ", end=" </s>", specials=("</s>",))
_LLAMA_2 = replace(
    _INST,
    between="<s>",
    specials=("<s>", "</s>"),
    system_format="<<SYS>>\n{}\n<</SYS>>\n\n",
    system_inside=True,
    system=_HELPFUL,
)
_LLAMA_3 = Template(
    start="<|begin_of_text|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n",
    ask="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    lead="",
    end="<|eot_id|>",
    system_format="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    strip=("user", "assistant"),
    specials=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
_BLIP2 = Template(user="", ask="", lead=" ", end="\n", strip=("user", "assistant"), style="bare")
# Answers lose surrounding white space: tokenizers would merge it with the newline that ends the prompt.
_CHATML = Template(
    user="<|im_start|>user\n",
    ask="<|im_end|>\n<|im_start|>assistant\n",
    lead="",
    end="<|im_end|>",
    after="\n",
    system_format="<|im_start|>system\n{}<|im_end|>\n",
    strip=("assistant",),
    specials=("<|im_start|>", "<|im_end|>"),
)
_DIRECT = replace(
    _CHATML,
    ask="<|im_end|><|im_start|>assistant\n",
    after="",
    system_format="<|im_start|>system\n{}<|im_end|>",
    system="Answer the questions.",
)
_CAMBRIAN = (
    "You are Cambrian, a highly intelligent multimodal AI trained by NYU Vision X.",
    "As a multimodal AI, you have the ability to process and analyze images. Whenever an image is present in the "
    "conversation, very carefully examine it and consider its content when formulating your response.",
    "You should give concise responses to very simple questions, but provide thorough responses to more complex and "
    "open-ended questions.",
)


TEMPLATES = {
    "vicuna_v1": _VICUNA,
    "llava_v1": replace(
        _VICUNA,
        system="A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    ),
    "llava_llama_2": _LLAMA_2,
    "mistral_instruct": _INST,
    "chatml": _CHATML,
    "qwen": replace(_CHATML, system="You are a helpful assistant."),  # Qwen 1.5 and 2, and LLaVA-OneVision on them
    "qwen_2_5": replace(_CHATML, system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    # LLaVA-1.6-34B's: no newlines between the turns.
    "chatml_direct": _DIRECT,
    "cambrian_chatml": replace(_DIRECT, system=" ".join(_CAMBRIAN)),
    "plain": Template(user="", ask="", lead="", end="\n", style="plain"),
    # Prismatic's captions end with the end of sequence.
    "plain_eos": Template(
        user="", ask="", lead="", end="{eos}", style="plain", strip=("assistant",), specials=("{eos}",)
    ),
    "prism": Template(
        user="In: ",
        ask="\nOut:",
        lead=" ",
        end="{eos}",
        strip=("user", "assistant"),
        style="bare",
        specials=("{eos}",),
    ),
    # Prismatic's for chat models; the one bracket too few is in what its Llama-2 chat models were trained on.
    "prism_llama_2": replace(
        _LLAMA_2, end="</s>", system_format="<<SYS>\n{}\n<</SYS>>\n\n", strip=("user", "assistant")
    ),
    "prism_mistral": replace(_INST, end="</s>", strip=("user", "assistant")),
    "prism_phi": Template(
        start="<|endoftext|>",
        user="Input: ",
        ask="\nOutput:",
        lead=" ",
        end="\n<|endoftext|>",
        strip=("user", "assistant"),
        style="bare",
        specials=("<|endoftext|>",),
    ),
    "phi_3": Template(
        user="<|user|>\n",
        ask="<|end|>\n<|assistant|>\n",
        lead="",
        end="<|end|>",
        after="\n",
        system_format="<|system|>\n{}<|end|>\n",
        strip=("user", "assistant"),  # its special tokens swallow the white space that follows them
        specials=("<|user|>", "<|end|>", "<|assistant|>"),
    ),
    # Gemma 2's and 3's; it has no role for a system prompt, which Gemma 3 puts in front of the first question.
    "gemma": Template(
        start="<bos>",
        user="<start_of_turn>user\n",
        ask="<end_of_turn>\n<start_of_turn>model\n",
        lead="",
        end="<end_of_turn>",
        after="\n",
        system_format="{}\n\n",
        system_inside=True,
        strip=("user", "assistant"),
        specials=("<bos>", "<start_of_turn>", "<end_of_turn>"),
    ),
    # A question stands alone, as it was given: BLIP-2 and InstructBLIP have learnt from prompts of every kind.
    "blip2": _BLIP2,
    "instructblip": replace(_BLIP2, end="{eos}", specials=("{eos}",)),
    "llama_3": _LLAMA_3,
    # Cambrian leaves out the empty lines, and so does its training data.
    "cambrian_llama_3": replace(
        _LLAMA_3,
        user="<|start_header_id|>user<|end_header_id|>",
        ask="<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
        system_format="<|start_header_id|>system<|end_header_id|>{}<|eot_id|>",
        system="{} \n    {}\n    {} ".format(*_CAMBRIAN),
    ),
}


def own_template(folder: Path) -> str | None:
    """The Jinja chat template in a folder with a tokenizer or processor, if there is one.

    Raises `UserError` for a file that is not JSON.
    """
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json", "processor_config.json"):
        if not (folder / name).is_file():
            continue
        text = (folder / name).read_text(encoding="utf-8")
        if not name.endswith(".jinja"):
            try:
                text = json.loads(text).get("chat_template")
            except (ValueError, AttributeError, RecursionError) as error:
                raise UserError(f"{folder / name} is not a JSON object: {error}") from error
        if isinstance(text, list):  # several templates by name
            text = next((entry["template"] for entry in text if entry.get("name") == "default"), None)
        if not isinstance(text, str | None):
            raise UserError(
                f"{folder / name}: chat_template is {text!r:.60}, and has to be a text. Get the file again."
            )
        if text:
            return text
    return None
