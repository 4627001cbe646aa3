"""The conversation templates as Jinja, for servers that render conversations themselves.

They must render what `data.conversation` renders; a test holds the two together (this room may not import that one).
"""

from __future__ import annotations

import json

from jaxvlm.templates import TEMPLATES

# What a message `m` says, as `text`: of a list of parts the images first.
_TEXT = (
    "{% set text %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endset %}"
)


def chat_template(name: str, layout: str = "llava") -> str:
    """Jinja source that renders messages (strings, or lists of text and image parts) like the named template.

    With the layout `prismatic` all images stand in front of everything.
    """
    t = TEMPLATES[name]

    def say(text: str) -> str:
        pieces = [json.dumps(piece) for piece in text.split("{eos}")]
        return f"{{{{ {' + eos_token + '.join(pieces)} }}}}" if text else ""

    before, after = (t.system_format or "{}").split("{}")
    system = f"{{% if system %}}{say(before)}{{{{ system }}}}{say(after)}{{% endif %}}"
    inside, outside = (system, "") if t.system_inside else ("", system)
    words = "text.replace('<image>', '').strip()"
    first = ""
    if layout == "prismatic":
        count = "{{ '<image>' * text.count('<image>') }}"
        first = f"{{% for m in messages %}}{{% if m['role'] == 'user' %}}{_TEXT}{count}{{% endif %}}{{% endfor %}}"
        images, question = "", f"{{{{ {words} }}}}"
    elif t.style == "bare":
        images, question = "{{ '<image>' * text.count('<image>') }}", f"{{{{ {words} }}}}"
    else:  # one image moves to the front of its turn, several keep their places
        front = f'{{{{ ("<image>\\n" + {words}).strip() }}}}'
        images = ""
        plain = "{{ text.strip() }}" if "user" in t.strip else "{{ text }}"
        question = f"{{% if text.count('<image>') == 1 %}}{front}{{% else %}}{plain}{{% endif %}}"
    answer = "{{ text.strip() }}" if "assistant" in t.strip or layout == "prismatic" else "{{ text }}"
    return (
        f"{{% set system = {json.dumps(t.system)} %}}"
        "{% if messages and messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set messages = messages[1:] %}{% endif %}"
        f"{say(t.start)}{first}{outside}{{% for m in messages %}}{_TEXT}{{% if m['role'] == 'user' %}}{images}"
        f"{{% if loop.first %}}{say(t.user)}{inside}{{% else %}}{say(t.between + t.user)}{{% endif %}}"
        f"{question}{say(t.ask)}"
        f"{{% else %}}{say(t.lead)}{answer}{say(t.end + t.after)}{{% endif %}}{{% endfor %}}"
    )


def taking_parts(template: str) -> str:
    """A tokenizer's own chat template such that messages may be lists of text and image parts, as servers send them.

    One that knows of images takes such lists already. To another they are given as texts, images first.
    """
    if "image" in template:
        return template
    return (
        "{% set said = namespace(messages=[]) %}{% for m in messages %}"
        f"{_TEXT}{{% set said.messages = said.messages + [dict(m, content=text)] %}}"
        "{% endfor %}{% set messages = said.messages %}" + template
    )
