"""The user's words for a question, by protocol: a function of the reference record, without the image's marker."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from jaxvlm.evals.question_file import OPTION_LETTER as LETTER
from jaxvlm.evals.question_file import SHORT_ANSWER as SHORT
from jaxvlm.evals.question_file import with_format
from jaxvlm.evals.scorers import Record
from jaxvlm.evals.scorers.choice import LETTERS

Prompt = Callable[[Record], str]

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
CHINESE_LETTER = "\n请直接回答选项字母。"
ONLY_LETTER = "\nPlease answer directly with only the letter of the correct option and nothing else."
SHORT_DIRECT = "\nGive the short answer directly."
NUMBER_OR_PHRASE = "\nAnswer the question using a single number or phrase."
DESCRIBE = "Generate a short caption of the image."
MME_YES_NO = "Please answer yes or no."


def asked(record: Record) -> str:
    return str(record["question"])


def with_suffix(suffix: str) -> Prompt:
    """The question and a suffix, which starts with its own line break."""
    return lambda record: asked(record) + suffix


short = with_suffix(SHORT)
vizwiz = with_suffix(UNANSWERABLE + SHORT)


def options(choices: Any) -> str:
    """A line for each choice: `A. ...`."""
    return "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def choices(suffix: str = LETTER, head: str = "") -> Prompt:
    """The hint if there is one (MMBench), the question, its options, and a suffix; Cambrian's `head` is " Options:"."""

    def prompt(record: Record) -> str:
        hint = f"{record['hint']}\n" if record.get("hint") else ""
        return hint + asked(record) + head + options(record["choices"]) + suffix

    return prompt


def mme(record: Record) -> str:
    """LLaVA replaces the official request for yes or no by its own."""
    return asked(record).replace(MME_YES_NO, "").rstrip() + SHORT


def textvqa_ocr(head: str) -> Prompt:
    """With the Rosetta tokens of `ocr_tokens` in a line of their own (none: the line ends after the head)."""
    return lambda record: f"{asked(record)}\n{head} {', '.join(record.get('ocr_tokens', ()))}".rstrip() + SHORT


def scienceqa(record: Record) -> str:
    """LLaVA's CQM form: context (N/A without one), question, options in one line."""
    inline = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, record["choices"], strict=False))
    return f"Context: {record.get('hint') or 'N/A'}\nQuestion: {asked(record)}\nOptions: {inline}" + LETTER


def scienceqa_cambrian(record: Record) -> str:
    hint = f"{record['hint']} " if record.get("hint") else ""
    return hint + asked(record) + options(record["choices"]) + ONLY_LETTER


def box(record: Record) -> str:
    """Prismatic's, with double quotes round the expression."""
    return f'Please provide the bounding box coordinate of the region this sentence describes: "{record["sentence"]}"'


def true_false(record: Record) -> str:
    return (
        f'Based on the image, is this statement "True" or "False"? {record["caption"]}\n'
        'Respond with "True" or "False" directly.'
    )


def mmmu(record: Record) -> str:
    """Cambrian's, with the `<image 1>` marks removed; of `options` as text it shows what stands between single quotes."""
    if record["question_type"] != "multiple-choice":
        text = short(record)
    else:
        listed = record.get("options")
        shown = re.findall(r"'(.*?)'", listed) if isinstance(listed, str) else record["choices"]
        text = choices(head=" Options:")({**record, "choices": shown})
    return re.sub(r"<image \d+>", "", text).strip()


def mathvista_query(record: Record) -> str:
    """MathVista's own: its file holds the whole prompt."""
    return str(record["query"])


def mathvista(record: Record) -> str:
    closed = record["question_type"] == "multi_choice"
    reason = "\nFirst show your reasoning process and then give the final answer."
    return mathvista_query(record) + (reason if closed else SHORT)


def cvbench(record: Record) -> str:
    """The file's own prompt, which lists the options."""
    return str(record["prompt"]) + LETTER


def own(suffix: str) -> Prompt:
    """Of a question file."""
    return lambda record: with_format(str(record["text"]), suffix)


def bench(record: Record) -> str:
    return str(record["text"])


def describe(record: Record) -> str:
    return DESCRIBE
