"""Multiple choice: by letter in the text, by first-token probability, and by the likelihood of each option."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from typing import Any

from jaxvlm.evals.scorers import Record, Scored, accuracy

LETTERS = string.ascii_uppercase

# ------------------------------------------------------------------------------------------------- by probabilities


def first_token(prediction: Record, candidates: Sequence[Any], truth: Any, positive: int | None = None) -> Scored:
    """The likeliest of `candidates` by `prediction["probabilities"]` (any monotone score); ties go to the first.

    `positive` names the candidate whose share is kept as the value `positive`, for areas under curves.
    """
    shares = [float(share) for share in prediction["probabilities"]]
    if len(shares) != len(candidates) or any(math.isnan(share) for share in shares):
        return accuracy(None, 0.0, valid=False, note=f"not {len(candidates)} probabilities")
    chosen = candidates[max(range(len(shares)), key=shares.__getitem__)]
    values = {"accuracy": float(chosen == truth)}
    if positive is not None:
        values["positive"] = shares[positive]
    return Scored(chosen, values)


def counting_prismatic(prediction: Record, reference: Record) -> Scored:
    """TallyQA in Prismatic: sixteen choices, 0 to 15, as letters A to P."""
    return first_token(prediction, range(16), int(reference["answer"]))


def diagrams_prismatic(prediction: Record, reference: Record) -> Scored:
    """AI2D in Prismatic: the likeliest of A to D."""
    return first_token(prediction, range(len(reference["choices"])), int(reference["answer"]))


def likelihood(prediction: Record, reference: Record) -> Scored:
    """SEED-Bench's own: the choice whose text has the least loss after the question; `losses`, one a choice."""
    losses = [-float(loss) for loss in prediction["losses"]]
    return first_token({"probabilities": losses}, LETTERS[: len(reference["choices"])], reference["answer"])


# ------------------------------------------------------------------------------------------------------ by letter


def exact_letter(prediction: Record, reference: Record) -> Scored:
    """LLaVA's for SEED-Bench: the text is the letter and nothing else."""
    text = prediction["text"]
    return accuracy(text, text == reference["answer"], text in tuple(LETTERS[: len(reference["choices"])]))


THE_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")
SCIENCEQA_LETTERS = "ABCDE"


def scienceqa(prediction: Record, reference: Record) -> Scored:
    """LLaVA's: the letter alone; or a letter and ". "; or "The answer is X" and a character, exactly once.

    "B.", "(B)", "b" and "B " are failures, and so is a letter beyond the question's choices.
    """
    text = prediction["text"]
    if text in SCIENCEQA_LETTERS and len(text) == 1:
        letter = text
    elif len(text) >= 3 and text[0] in SCIENCEQA_LETTERS and text[1:3] == ". ":
        letter = text[0]
    else:
        found = THE_ANSWER_IS.findall(text)
        letter = found[0] if len(found) == 1 else "FAILED"
    valid = letter in tuple(SCIENCEQA_LETTERS[: len(reference["choices"])])
    return accuracy(letter, valid and SCIENCEQA_LETTERS.index(letter) == int(reference["answer"]), valid)


# ------------------------------------------------------------------------------------------------------- Cambrian's


def after_answer_is(text: str) -> str:
    """Lower case, and what follows the last "answer is", then "answer is:", then "answer:".

    The first is split away before the second is looked for, so "The answer is: B" leaves ": b", which is wrong.
    """
    text = text.lower().strip()
    for keyword in ("answer is", "answer is:", "answer:"):
        text = text.split(keyword)[-1]
    return text.strip()


def cambrian_letter(text: str) -> str:
    """Cambrian's letter: the first character of what is left without `.:,` and brackets, so "banana" is b."""
    return after_answer_is(text).rstrip(".:,").lstrip("(").rstrip(")")[:1]


def _letter_of(reference: Record) -> str:
    """The right letter in lower case, from "B", "(B)" or an index."""
    answer = reference["answer"]
    return LETTERS[answer].lower() if isinstance(answer, int) else str(answer).strip("()").lower()


def cambrian(prediction: Record, reference: Record) -> Scored:
    """MMBench, SEED-Bench and CV-Bench in Cambrian. (Two of its scripts strip periods only, which decides nothing.)"""
    letter = cambrian_letter(prediction["text"])
    return accuracy(letter, letter == _letter_of(reference), _is_choice(letter, reference))


def diagrams_cambrian(prediction: Record, reference: Record) -> Scored:
    """AI2D in Cambrian: its script makes a to d the index that the truth is, so the index itself is right too."""
    letter = cambrian_letter(prediction["text"])
    index = str(reference["answer"])
    return accuracy(letter, letter in (_letter_of(reference), index), _is_choice(letter, reference))


def cvbench(prediction: Record, reference: Record) -> Scored:
    """CV-Bench: as its three scripts do; the Omni3D one also takes an option of a single character as the answer."""
    if reference["source"] != "Omni3D":
        return cambrian(prediction, reference)
    letter = cambrian_letter(prediction["text"])
    right = _letter_of(reference)
    option = reference["choices"][LETTERS.index(right.upper())]
    return accuracy(letter, letter in (right, option), _is_choice(letter, reference))


def mmvp(prediction: Record, reference: Record) -> Scored:
    """MMVP in Cambrian: the whole remaining text is the letter or the option."""
    text = after_answer_is(prediction["text"]).rstrip(".:,").lstrip("(").rstrip(")")
    letter = _letter_of(reference)
    options = [option.lower() for option in reference["choices"]]
    return accuracy(
        text, text in (letter, options[LETTERS.index(letter.upper())]), _is_choice(text, reference) or text in options
    )


def scienceqa_cambrian(prediction: Record, reference: Record) -> Scored:
    """Cambrian's: what stands before the first period is the letter, or the text is the option without punctuation."""
    text = after_answer_is(prediction["text"]).rstrip(".")
    plain = str.maketrans("", "", string.punctuation)
    option = reference["choices"][int(reference["answer"])].lower().strip()
    right = LETTERS[int(reference["answer"])].lower()
    same = text.translate(plain).strip() == option.translate(plain).strip()
    letter = text.split(".")[0]
    return accuracy(letter, same or letter == right, same or _is_choice(letter, reference))


def mmstar_cambrian(prediction: Record, reference: Record) -> Scored:
    """Cambrian's: the first word is the letter. Its "(A)" branch never holds, as the text is lower case by then."""
    found = prediction["text"].lower().split()
    if not found:
        return accuracy("", 0.0, valid=False, note="empty answer: the official code stops")
    letter = found[0].rstrip(".:,")
    return accuracy(letter, letter == reference["answer"].lower(), letter in tuple("abcd"))


def realworldqa(prediction: Record, reference: Record) -> Scored:
    """RealWorldQA in Cambrian: the first word of what follows "answer is"; the truth is a letter, a word or a number."""
    found = after_answer_is(prediction["text"]).rstrip(".").split()
    if not found:
        return accuracy("", 0.0, valid=False, note="empty answer: the official code stops")
    return accuracy(found[0], found[0] == str(reference["answer"]).lower())


def _is_choice(letter: str, reference: Record) -> bool:
    return len(letter) == 1 and letter in LETTERS[: len(reference["choices"])].lower()


# ------------------------------------------------------------------------------------- MMBench, MMStar, MMMU: their own

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
VERBOSE = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
LAST_WORDS = 4  # a letter counts among the last four words only


def infer_choice(text: str, choices: dict[str, str]) -> str | None:
    """MMBench's rule (VLMEvalKit's can_infer): a letter among the last words, else "answer is X", else an option's text.

    One letter alone must occur, as a word of its own. An option's text may stand anywhere, inside a word too ("catalog" is
    "cat"), if it is the only one and the answer is at most twice as long as all options. Z is a refusal, None no choice.
    """
    if "Failed to obtain answer via API" not in text:
        letter = _infer_letter(text, choices)
        if letter:
            return letter
    lowered = text.lower()
    if len(lowered) > 2 * sum(len(option) for option in choices.values()):
        return None
    found = [letter for letter, option in choices.items() if option.lower() in lowered]
    return found[0] if len(found) == 1 else None


def _infer_letter(text: str, choices: dict[str, str]) -> str | None:
    if any(refusal in text for refusal in REFUSALS):
        return "Z"
    words = text.translate(str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))).split()
    found = [letter for letter in choices if letter in words]
    if len(found) == 1 and words.index(found[0]) >= len(words) - LAST_WORDS:
        return found[0]
    if not found and "Z" in words:
        return "Z"
    verbose = VERBOSE.search(text)
    return verbose[1].upper() if verbose and verbose[1].upper() in choices else None


def mmbench(prediction: Record, reference: Record) -> Scored:
    """MMBench by rules alone (its exact-matching mode): what the rules cannot read is wrong, and no model is asked."""
    choices = dict(zip(LETTERS, reference["choices"], strict=False))
    letter = infer_choice(prediction["text"].strip(), choices)
    return accuracy(letter, letter == reference["answer"], letter in choices)


def mmstar(prediction: Record, reference: Record) -> Scored:
    """MMStar's own: the letter is the first character, or follows "(", "option " or "the answer is "."""
    text = prediction["text"].lower().strip().replace("\n", " ")
    answer = reference["answer"].lower().strip()
    places = [text[:1], text[1:2] if text[:1] == "(" else ""]
    places += [text[len(start) :][:1] for start in ("option ", "the answer is ") if text.startswith(start)]
    found = next((place for place in places if place and place in "abcd"), None)
    return accuracy(found, bool(answer) and answer in places, found is not None)


def mmmu_letter(text: str, choices: dict[str, str]) -> str | None:
    """MMMU's: the last "(B)", else the last " B ", else, in more than five words, the option that is named last."""
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    found = {letter: text.rfind(f"({letter})") for letter in choices if f"({letter})" in text}
    found = found or {letter: text.rfind(f" {letter} ") for letter in choices if f" {letter} " in text}
    if not found and len(text.split()) > 5:
        lowered = text.lower()
        found = {
            letter: lowered.rfind(option.lower()) for letter, option in choices.items() if option.lower() in lowered
        }
    return max(found, key=found.__getitem__) if found else None
