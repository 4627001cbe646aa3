"""The conversation templates as Jinja, for servers that render conversations themselves.

They must render what `data.conversation` renders; a test holds the two together (this room may not import that one).
"""

from __future__ import annotations

import json
from typing import Any

_VICUNA = {"user": "USER: ", "ask": " ASSISTANT:", "lead": " ", "end": "</s>", "system_format": ("", " ")}
_INST = {"user": "[INST] ", "ask": " [/INST]", "lead": " ", "end": " </s>"}
_CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
_HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_BARE = {"user": "", "ask": "", "lead": " ", "image_first": True, "strip_answers": True}
_STRIPPED = {"strip_answers": True, "strip_questions": True}
_LLAMA_3 = _STRIPPED | {
    "start": "<|begin_of_text|>",
    "user": "<|start_header_id|>user<|end_header_id|>\n\n",
    "ask": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "lead": "",
    "end": "<|eot_id|>",
    "system_format": ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
}
_CAMBRIAN = (
    "You are Cambrian, a highly intelligent multimodal AI trained by NYU Vision X.",
    "As a multimodal AI, you have the ability to process and analyze images. Whenever an image is present in the "
    "conversation, very carefully examine it and consider its content when formulating your response.",
    "You should give concise responses to very simple questions, but provide thorough responses to more complex "
    "and open-ended questions.",
)
# Text before a question, after it, before an answer, after it.
CHAT: dict[str, dict[str, Any]] = {
    "vicuna_v1": _VICUNA | {"system": _CURIOUS.format("user")},
    "llava_v1": _VICUNA | {"system": _CURIOUS.format("human")},
    "llava_llama_2": _INST
    | {
        "between": "<s>",
        "system_format": ("<<SYS>>\n", "\n<</SYS>>\n\n"),
        "system_inside": True,
        "system": _HELPFUL,
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
    "prism_llama_2": _INST
    | _STRIPPED
    | {
        "end": "</s>",
        "between": "<s>",
        "system_format": ("<<SYS>\n", "\n<</SYS>>\n\n"),
        "system_inside": True,
        "system": _HELPFUL,
    },
    "prism_mistral": _INST | _STRIPPED | {"end": "</s>"},
    "prism_phi": {"start": "<|endoftext|>", "user": "Input: ", "ask": "\nOutput:", "lead": " "}
    | {"end": "\n<|endoftext|>", "image_first": True, "strip_answers": True},
    "blip2": _BARE | {"end": "\n"},
    "instructblip": _BARE | {"end": "{{ eos_token }}"},
    "llama_3": _LLAMA_3,
    "cambrian_llama_3": _LLAMA_3
    | {
        "user": "<|start_header_id|>user<|end_header_id|>",
        "ask": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
        "system_format": ("<|start_header_id|>system<|end_header_id|>", "<|eot_id|>"),
        "system": "{} \n    {}\n    {} ".format(*_CAMBRIAN),
    },
    "cambrian_chatml": {
        "user": "<|im_start|>user\n",
        "ask": "<|im_end|><|im_start|>assistant\n",
        "lead": "",
        "end": "<|im_end|>",
        "system_format": ("<|im_start|>system\n", "<|im_end|>"),
        "system": " ".join(_CAMBRIAN),
        "strip_answers": True,
    },
}
CHAT_ENDS = {name: (values["end"].strip(),) for name, values in CHAT.items()}


def chat_template(name: str, layout: str = "llava") -> str:
    """Jinja source that renders messages (strings, or lists of text and image parts) like the named template.

    With the layout `prismatic` all images stand in front of everything.
    """
    defaults = {"between": "", "system": "", "system_format": ("", ""), "system_inside": False}
    t = defaults | {"image_first": False, "strip_answers": False, "strip_questions": False, "start": ""} | CHAT[name]

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
    first = ""
    if layout == "prismatic":
        count = "{{ '<image>' * text.count('<image>') }}"
        first = f"{{% for m in messages %}}{{% if m['role'] == 'user' %}}{text}{count}{{% endif %}}{{% endfor %}}"
        images, question = "", f"{{{{ {words} }}}}"
    elif t["image_first"]:
        images, question = "{{ '<image>' * text.count('<image>') }}", f"{{{{ {words} }}}}"
    else:  # one image moves to the front of its turn, several keep their places
        front = f'{{{{ ("<image>\\n" + {words}).strip() }}}}'
        images = ""
        plain = "{{ text.strip() }}" if t["strip_questions"] else "{{ text }}"
        question = f"{{% if text.count('<image>') == 1 %}}{front}{{% else %}}{plain}{{% endif %}}"
    answer = "{{ text.strip() }}" if t["strip_answers"] or layout == "prismatic" else "{{ text }}"
    return (
        f"{{% set system = {json.dumps(t['system'])} %}}"
        "{% if messages and messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set messages = messages[1:] %}{% endif %}"
        f"{say(t['start'])}{first}{outside}{{% for m in messages %}}{text}{{% if m['role'] == 'user' %}}{images}"
        f"{{% if loop.first %}}{say(t['user'])}{inside}{{% else %}}{say(t['between'] + t['user'])}{{% endif %}}"
        f"{question}{say(t['ask'])}"
        f"{{% else %}}{say(t['lead'])}{answer}{say(t['end'])}{{% endif %}}{{% endfor %}}"
    )
