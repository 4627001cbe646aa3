"""Conversations as token ids with labels.

A template renders a conversation to one text and knows which characters of it the model must write. The text
is tokenised once, chunk by chunk between images as LLaVA does, and the labels follow from the tokens'
character offsets; nothing is tokenised a second time to find them, so they cannot disagree (recipes §1.2 P1,
P4-P7).

What is supervised: everything that inference would have to generate, which is the answer with the space in
front of it and the template's end of turn. The prompt of inference is therefore exactly the start of the
training text.

What users write stays text: a `</s>` or `<|im_start|>` inside a message is tokenised as plain characters and
never becomes a special token, and an `<image>` inside an answer is text too. `<image>` in a human turn always
stands for an image of the record; a count that differs from the number of images is an error.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from jaxvlm.data import DataError
from jaxvlm.data.tokenizer import Tokenizer

IMAGE_TOKEN = -200  # stands where an image's tokens go, as in LLaVA
IMAGE_MARK = "<image>"
IMAGES_IN_FRONT = ("prismatic", "images_first")  # layouts that take the images out of the text

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


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

_CAMBRIAN = (
    "You are Cambrian, a highly intelligent multimodal AI trained by NYU Vision X.",
    "As a multimodal AI, you have the ability to process and analyze images. Whenever an image is present in the "
    "conversation, very carefully examine it and consider its content when formulating your response.",
    "You should give concise responses to very simple questions, but provide thorough responses to more complex "
    "and open-ended questions.",
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
    # Answers lose surrounding white space: tokenizers would merge it with the newline that ends the prompt.
    "chatml": Template(
        user="<|im_start|>user\n",
        ask="<|im_end|>\n<|im_start|>assistant\n",
        lead="",
        end="<|im_end|>",
        after="\n",
        system_format="<|im_start|>system\n{}<|im_end|>\n",
        strip=("assistant",),
        specials=("<|im_start|>", "<|im_end|>"),
    ),
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
    # Nothing stands between its turns.
    "cambrian_chatml": Template(
        user="<|im_start|>user\n",
        ask="<|im_end|><|im_start|>assistant\n",
        lead="",
        end="<|im_end|>",
        system_format="<|im_start|>system\n{}<|im_end|>",
        strip=("assistant",),
        specials=("<|im_start|>", "<|im_end|>"),
        system=" ".join(_CAMBRIAN),
    ),
}


class Rendered(NamedTuple):
    text: str
    spans: list[tuple[int, int]]  # supervised characters, end of turn included
    image_marks: list[int]  # character index of each `<image>` that stands for an image
    content: list[tuple[int, int]]  # characters that users wrote


class Encoded(NamedTuple):
    tokens: np.ndarray  # int32 [n], IMAGE_TOKEN where an image stands
    weights: np.ndarray  # float32 [n], 1 where the token is supervised


class _Writer:
    """Collects pieces of text and remembers what each was."""

    def __init__(self):
        self.pieces: list[str] = []
        self.length = 0
        self.spans: list[tuple[int, int]] = []
        self.marks: list[int] = []
        self.content: list[tuple[int, int]] = []

    def frame(self, text: str) -> None:
        self.pieces.append(text)
        self.length += len(text)

    def written(self, text: str) -> None:
        if text:
            self.content.append((self.length, self.length + len(text)))
            self.frame(text)

    def image(self) -> None:
        self.marks.append(self.length)
        self.frame(IMAGE_MARK)


def render(
    conversations: Sequence[dict],
    template: str,
    *,
    layout: str = "llava",
    eos: str = "</s>",
    name: str = "conversation",
) -> Rendered:
    """Renders a conversation: LLaVA's `[{"from": "human"|"gpt", "value": str}]` or chat messages.

    A first turn of role `system` takes the place of the template's own system prompt. A first turn by the
    assistant is left out, as LLaVA does. With a layout of IMAGES_IN_FRONT the images stand at the very start. A
    conversation that ends with a question is rendered up to where the answer begins. `name` is used in
    errors.

    Raises `DataError` for roles that do not alternate, an empty conversation, and turns the template cannot
    hold.
    """
    style = get_template(template)
    system, turns = _turns(conversations, style, template, name)
    if style.style == "plain" and len(turns) > 2:
        raise DataError(
            f"{name}: the template {template!r} holds one caption, not {len(turns)} turns; use another template."
        )
    out = _Writer()
    out.frame(style.start)
    if layout in IMAGES_IN_FRONT:
        for role, text in turns:
            for _ in range(text.count(IMAGE_MARK) if role == "user" else 0):
                out.image()
        turns = [(role, (text.replace(IMAGE_MARK, "") if role == "user" else text).strip()) for role, text in turns]
    if system and not style.system_inside:
        _system(out, style, system)
    for i, (role, text) in enumerate(turns):
        text = text.strip() if role in style.strip else text
        if role == "assistant":
            start = out.length
            out.frame(style.lead)
            out.written(text)
            out.frame(style.end.format(eos=eos))
            out.spans.append((start, out.length))
            out.frame(style.after)
            continue
        out.frame(style.between if i else "")
        _user(out, style, text, system if i == 0 and style.system_inside else "")
        out.frame(style.ask)
    return Rendered("".join(out.pieces), out.spans, out.marks, out.content)


def _user(out: _Writer, style: Template, text: str, system: str) -> None:
    """One human turn. A single image moves to the front of its turn; several keep their places."""
    count = text.count(IMAGE_MARK)
    if style.style != "instruct":
        for _ in range(count):
            out.image()
        out.frame(style.user)
        if style.style == "bare":
            out.written(text.replace(IMAGE_MARK, "").strip())
        return
    out.frame(style.user)
    if system:
        _system(out, style, system)
    if count == 1:
        text = f"{IMAGE_MARK}\n{text.replace(IMAGE_MARK, '').strip()}".strip()
    for i, part in enumerate(text.split(IMAGE_MARK)):
        if i:
            out.image()
        out.written(part)


def _system(out: _Writer, style: Template, system: str) -> None:
    before, after = style.system_format.split("{}")
    out.frame(before)
    out.written(system)
    out.frame(after)


def _turns(
    conversations: Sequence[dict], style: Template, template: str, name: str
) -> tuple[str, list[tuple[str, str]]]:
    """The system prompt and the (role, text) turns, checked."""
    if not isinstance(conversations, (list, tuple)) or not conversations:
        raise DataError(f"{name}: the conversation is empty; it must be a list of turns.")
    turns = []
    for i, turn in enumerate(conversations):
        role = text = None
        if isinstance(turn, dict):
            role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if role not in _ROLES or not isinstance(text, str):
            want = "{'from': 'human' | 'gpt', 'value': TEXT}"
            raise DataError(f"{name}: turn {i} must be {want}, not {str(turn)[:80]!r}.")
        turns.append((_ROLES[role], text))
    system = style.system
    if turns[0][0] == "system":
        if style.system_format is None:
            raise DataError(f"{name}: the template {template!r} has no place for a system prompt; remove that turn.")
        system, turns = turns[0][1], turns[1:]
    if turns and turns[0][0] == "assistant":
        turns = turns[1:]
    if not turns:
        raise DataError(f"{name}: the conversation has no human turn.")
    for i, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[i % 2]:
            said = " ".join({"user": "human", "assistant": "gpt"}.get(r, r) for r, _ in turns[:6])
            raise DataError(
                f"{name}: roles must alternate human, gpt, human, gpt; these are {said}"
                f"{' …' if turns[6:] else ''}. Merge the turns that follow each other."
            )
    return system, turns


def get_template(name: str) -> Template:
    """The template of this name. Raises `DataError` listing the names."""
    if name not in TEMPLATES:
        raise DataError(f"There is no template {name!r}; the templates are {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


def check_template(tokenizer: Tokenizer, template: str) -> None:
    """Raises `DataError` if the tokenizer lacks a special token that the template ends its turns with."""
    for token in get_template(template).specials:
        token = tokenizer.eos if token == "{eos}" else token
        if token not in tokenizer.special_tokens:
            fits = [
                n for n, t in TEMPLATES.items() if all(s in {*tokenizer.special_tokens, "{eos}"} for s in t.specials)
            ]
            what = f"special token {token!r}" if token else "end-of-sequence token"
            raise DataError(
                f"The template {template!r} needs the {what}, which {tokenizer.path} does not have."
                f" Templates that fit it: {', '.join(fits)}."
            )


def stop_ids(tokenizer: Tokenizer, template: str) -> tuple[int, ...]:
    """The ids that end an answer: the template's end of turn, and the tokenizer's end of sequence."""
    ends = get_template(template).end.format(eos=tokenizer.eos or "").strip(" ")
    ids = tokenizer.encode(ends)[-1:] if ends else []
    return tuple(dict.fromkeys([*ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]))


def record_images(record: dict) -> list[str]:
    """The image names of a record: none, one, or a list."""
    images = record.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise DataError(f"record {record.get('id')!r}: 'image' must be a file name or a list of them, not {images!r}.")
    return images


def image_instructions(conversations: Sequence[dict]) -> list[str]:
    """Of each `<image>` of a conversation that `render` takes, the text of the human turn it stands in."""
    turns = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in conversations]
    asked = [text for role, text in turns if _ROLES[role] == "user"]
    return [text.replace(IMAGE_MARK, "").strip() for text in asked for _ in range(text.count(IMAGE_MARK))]


def encode(record: dict, tokenizer: Tokenizer, template: str, layout: str = "llava") -> Encoded:
    """One LLaVA record as tokens int32 [n] (IMAGE_TOKEN for each image) and weights float32 [n].

    Raises `DataError` naming the record: bad turns, `<image>` count other than the number of images, no
    answer at the end, nothing supervised.
    """
    (encoded,) = encode_all([record], tokenizer, template, layout)
    if isinstance(encoded, DataError):
        raise encoded
    return encoded


def encode_all(
    records: Sequence[dict], tokenizer: Tokenizer, template: str, layout: str = "llava"
) -> list[Encoded | DataError]:
    """`encode` of each record, tokenised on all cores; the error itself for a record that cannot be used."""
    check_template(tokenizer, template)
    results: list[Encoded | DataError | None] = [None] * len(records)
    rendered = []
    for i, record in enumerate(records):
        try:
            rendered.append((i, render_record(record, template, layout, tokenizer.eos)))
        except DataError as error:
            results[i] = error
    for (i, _), encoded in zip(rendered, _tokenize([r for _, r in rendered], tokenizer), strict=True):
        empty = DataError(f"record {records[i].get('id')!r} has no supervised token; remove it.")
        results[i] = encoded if encoded.weights.any() else empty
    return results


def render_record(record: dict, template: str, layout: str = "llava", eos: str | None = "</s>") -> Rendered:
    """`render` of a LLaVA record, checked against its images. Raises `DataError` naming the record, as `encode` does."""
    if not isinstance(record, dict):
        raise DataError(f"a record must be an object with 'conversations', not {str(record)[:60]!r}.")
    name = f"record {record.get('id')!r}"
    if "conversations" not in record:
        raise DataError(f"{name} has no 'conversations'; its keys are {', '.join(map(repr, record)) or 'none'}.")
    rendered = render(record["conversations"], template, layout=layout, eos=eos, name=name)
    images, marks = len(record_images(record)), len(rendered.image_marks)
    if marks != images:
        raise DataError(
            f"{name} has {images} image{'s' * (images != 1)} but {marks} {IMAGE_MARK} in its human turns;"
            f" add or remove {IMAGE_MARK}, or correct its 'image'."
        )
    if len(rendered.spans) == 0 or _ROLES[_last_role(record["conversations"])] != "assistant":
        raise DataError(f"{name} ends with a human turn; add the answer or remove that turn.")
    return rendered


def _last_role(conversations: Sequence[dict]) -> str:
    return conversations[-1].get("from", conversations[-1].get("role"))


def prompt(messages: Sequence[dict], tokenizer: Tokenizer, template: str, layout: str = "llava") -> np.ndarray:
    """Chat messages as int32 tokens (IMAGE_TOKEN for each image), ending where the assistant's answer begins.

    `messages` are `{"role": "user" | "assistant", "content": str}`, the last by the user; a first one by
    `system` takes the place of the template's system prompt. The result is a prefix of `encode` of the same
    conversation answered.
    """
    check_template(tokenizer, template)
    if not messages or not isinstance(messages[-1], dict) or _ROLES.get(_last_role(messages)) != "user":
        raise DataError("The last message must be by the user: it is the one to be answered.")
    rendered = render(messages, template, layout=layout, eos=tokenizer.eos, name="messages")
    return _tokenize([rendered], tokenizer)[0].tokens


def _tokenize(rendered: Sequence[Rendered], tokenizer: Tokenizer) -> list[Encoded]:
    """Tokenises the chunks between images of every text in one call, and labels them by their offsets."""
    kept = [_template_specials(one, tokenizer) for one in rendered]
    chunks = [
        (start, one.text[start:end], None if spans is None else _within(spans, start, end))
        for one, spans in zip(rendered, kept, strict=True)
        for start, end in _between_images(one)
    ]
    tokenized = iter(tokenizer.encode_batch([(text, specials) for _, text, specials in chunks]))
    starts = iter([start for start, _, _ in chunks])
    return [_labelled(one, tokenizer, tokenized, starts) for one in rendered]


def _labelled(rendered: Rendered, tokenizer: Tokenizer, tokenized: Iterator, starts: Iterator[int]) -> Encoded:
    """Takes the text's chunks from the iterators and joins them: BOS once, IMAGE_TOKEN between chunks."""
    ids: list[int] = []
    unsupervised = np.zeros(1, np.float32)
    weights = []
    for i in range(len(rendered.image_marks) + 1):
        chunk, offsets = next(tokenized)
        start = next(starts)
        if i or (tokenizer.adds_bos and chunk[:1] != [tokenizer.bos_id]):
            ids.append(IMAGE_TOKEN if i else tokenizer.bos_id)
            weights.append(unsupervised)
        ids += chunk
        weights.append(_covered(offsets + start, rendered.spans))
    return Encoded(np.asarray(ids, np.int32), np.concatenate(weights))


def _between_images(rendered: Rendered) -> list[tuple[int, int]]:
    starts = [0, *(mark + len(IMAGE_MARK) for mark in rendered.image_marks)]
    return list(zip(starts, [*rendered.image_marks, len(rendered.text)], strict=True))


def _template_specials(rendered: Rendered, tokenizer: Tokenizer) -> list[tuple[int, int]] | None:
    """Where the template's special tokens stand, if a user wrote something that looks like one too (rare)."""
    found = [match.span() for match in tokenizer.special_pattern.finditer(rendered.text)]
    kept = [span for span in found if not _overlaps(span, rendered.content)]
    return kept if len(kept) < len(found) else None


def _within(spans: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    return [(a - start, b - start) for a, b in spans if start <= a and b <= end]


def _overlaps(span: tuple[int, int], spans: list[tuple[int, int]]) -> bool:
    i = bisect.bisect_left(spans, (span[1], 0))  # the spans before i begin before this one ends
    return i > 0 and spans[i - 1][1] > span[0]


def _covered(offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """1.0 for the tokens that share a character with a span, float32 [n]."""
    if not spans:
        return np.zeros(len(offsets), np.float32)
    starts, ends = np.asarray(spans).T
    last = np.searchsorted(starts, np.maximum(offsets[:, 1], offsets[:, 0] + 1), side="left") - 1
    return ((last >= 0) & (ends[np.maximum(last, 0)] > offsets[:, 0])).astype(np.float32)
