"""Short free text: exact match, ANLS, relaxed accuracy, OCRBench, the open questions of MMMU and MathVista."""

from __future__ import annotations

import math
import re

from jaxvlm.evals.scorers import Record, Scored, accuracy
from jaxvlm.evals.scorers.choice import LETTERS, after_answer_is, cambrian_letter, mmmu_letter
from jaxvlm.evals.scorers.normalise import vqa


def normalise(text: str) -> str:
    """What exact match compares: blanks at the ends stripped, lower case, periods at the end removed.

    This is LLaVA's own treatment of GQA answers (evaluation §1); nothing inside the text changes.
    """
    return text.strip().lower().rstrip(".").strip()


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if the normalised texts are equal, else 0.0."""
    return float(normalise(prediction) == normalise(answer))


def exact(prediction: Record, reference: Record) -> Scored:
    """`exact_match` with the reference's `answer`."""
    return accuracy(normalise(prediction["text"]), exact_match(prediction["text"], str(reference["answer"])))


# ------------------------------------------------------------------------------------------------- documents and charts


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: the least number of characters inserted, deleted or replaced."""
    if len(first) < len(second):
        first, second = second, first
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (letter != other))
    return row[-1]


ANLS_THRESHOLD = 0.5


def anls(prediction: Record, reference: Record) -> Scored:
    """DocVQA's and InfoVQA's: 1 - distance / longer length for the nearest answer, 0 below one half.

    Distances are between texts in lower case with single blanks, lengths those of the texts as given, in upper case. Two
    empty strings are equal.
    """
    text = _spaced(prediction["text"])
    best = 0.0
    for answer in reference["answers"]:
        length = max(len(prediction["text"].upper()), len(answer.upper()))
        best = max(best, 1 - edit_distance(text, _spaced(answer)) / length if length else 1.0)
    return Scored(text, {"anls": best if best >= ANLS_THRESHOLD else 0.0})


def _spaced(text: str) -> str:
    return " ".join(text.strip().lower().split())


def stvqa_anls(prediction: Record, reference: Record) -> Scored:
    """mmf's for ST-VQA: as ANLS, with blanks stripped at the ends only."""
    text = prediction["text"].lower().strip()
    best = 0.0
    for answer in (answer.lower().strip() for answer in reference["answers"]):
        longest = max(len(text), len(answer))
        if not longest:
            return Scored(text, {"anls": 0.0}, valid=False, note="two empty strings: the official code divides by zero")
        share = 1 - edit_distance(text, answer) / longest
        best = max(best, share if share >= ANLS_THRESHOLD else 0.0)
    return Scored(text, {"anls": best})


TOLERANCE = 0.05


def as_number(text: str) -> float | None:
    """What Python's `float` makes of it (blanks, 1_000, inf and nan too), or None."""
    try:
        return float(text)
    except ValueError:
        return None


def chartqa(prediction: Record, reference: Record) -> Scored:
    """ChartQA's relaxed accuracy as in Pix2Struct: 5 % of the truth, percentages as fractions, else equal in lower case.

    A truth of zero has no tolerance: it goes to the comparison of strings, so "0.0" for "0" is wrong.
    """
    text, truth = prediction["text"], str(reference["answer"])
    found, target = _percent(text), _percent(truth)
    if found is not None and target:
        return accuracy(text, abs(found - target) / abs(target) <= TOLERANCE)
    return accuracy(text, text.lower() == truth.lower())


def _percent(text: str) -> float | None:
    if text.endswith("%"):
        share = as_number(text.rstrip("%"))
        return None if share is None else share / 100
    return as_number(text)


def chartqa_cambrian(prediction: Record, reference: Record) -> Scored:
    """Cambrian's: 5 % of the truth if both are numbers as they stand, else equal in lower case."""
    text, truth = prediction["text"].lower(), str(reference["answer"]).lower()
    found, target = as_number(text), as_number(truth)
    if found is not None and target is not None:
        return accuracy(text, abs(found - target) <= abs(target) * TOLERANCE)
    return accuracy(text, text == truth)


FORMULAS = "Handwritten Mathematical Expression Recognition"


def ocrbench(prediction: Record, reference: Record) -> Scored:
    """OCRBench's: an answer occurs in the text, in lower case; formulas keep their case and lose their blanks.

    An answer of no characters occurs in every text.
    """
    formula = (
        reference.get("type", reference.get("question_type")) == FORMULAS or reference.get("dataset_name") == "HME100k"
    )
    answers = reference["answers"] if isinstance(reference["answers"], list) else [reference["answers"]]

    def plain(text: str) -> str:
        text = (text if formula else text.lower()).strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text

    text = plain(prediction["text"])
    return accuracy(text, any(plain(str(answer)) in text for answer in answers))


def tallyqa_text(prediction: Record, reference: Record) -> Scored:
    """TallyQA by generation: the number, in digits or as a word up to ten; ours, not a paper's."""
    text = vqa(prediction["text"])
    return accuracy(text, text == str(reference["answer"]), text.isdigit())


# ----------------------------------------------------------------------------------------------------- MMMU, MathVista

NUMBER_FORMS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
SENTENCE = re.compile(r"\.\s(?=[A-Z])|\n")
TRIVIAL = (":", ",", ".", "!", "?", ";", "'")


def _comparable(text: str) -> list[float | str]:
    """MMMU's normalisation: a number to two decimals, else lower case; a single character only beside a blank."""
    text = text.strip()
    number = as_number(text.replace(",", ""))
    if number is not None:
        return [round(number, 2)]
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _key_phrases(text: str) -> list[str]:
    """What follows "is", "so", "answer" ... in each line, shortest first come; "=" counts in the last line.

    The text is lower case before it is split at sentences, which look for a capital: so only line breaks split it.
    """
    text = text.strip().strip(".").lower()
    phrases, lines = [], SENTENCE.split(text)
    for number, line in enumerate(lines):
        marks = INDICATORS + ("=",) * (number == len(lines) - 1)
        shortest = ""
        for tail in (line.split(mark)[-1].strip() for mark in marks if mark in line):
            shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest and shortest.strip() not in TRIVIAL:
            phrases.append(shortest)
    return phrases or [text]


def mmmu_open(prediction: Record, reference: Record) -> Scored:
    """MMMU's open questions: an answer occurs in a key phrase, or equals a number in one."""
    phrases = _key_phrases(prediction["text"])
    phrases += [number for phrase in phrases for form in NUMBER_FORMS for number in form.findall(phrase)]
    found = {item for phrase in phrases for item in _comparable(phrase)}
    truths = reference["answer"] if isinstance(reference["answer"], list) else [reference["answer"]]
    answers = [item for truth in truths for item in _comparable(truth)]
    words = [answer for answer in answers if isinstance(answer, str)]
    right = any(any(word in item for word in words) if isinstance(item, str) else item in answers for item in found)
    return accuracy(sorted(map(str, found)), right)


def mmmu(prediction: Record, reference: Record) -> Scored:
    """MMMU's own. A choice that cannot be read is guessed by the official code, with one random stream for all of them.

    Such a row is not valid and wrong here; `aggregates.mmmu` draws the guesses.
    """
    if reference["question_type"] != "multiple-choice":
        return mmmu_open(prediction, reference)
    letter = mmmu_letter(prediction["text"], dict(zip(LETTERS, reference["choices"], strict=False)))
    truth = reference["answer"]
    return accuracy(letter, letter in truth if isinstance(truth, list) else letter == truth, letter is not None)


def mmmu_cambrian(prediction: Record, reference: Record) -> Scored:
    """Cambrian's: the first character for choices, else the text; or within 5 %, relative to the answer given."""
    text = after_answer_is(prediction["text"])
    closed = reference["question_type"] == "multiple-choice"
    text = cambrian_letter(prediction["text"]) if closed else text.rstrip(".")
    truth = str(reference["answer"]).lower()
    return accuracy(text, text == truth or _near(text, truth))


def _near(text: str, truth: str) -> bool:
    found, target = as_number(text), as_number(truth)
    return found is not None and target is not None and abs(target - found) <= abs(found) * TOLERANCE


def mathvista_cambrian(prediction: Record, reference: Record) -> Scored:
    """Cambrian's: the lower-case text is the truth, as a letter for choices; or within 5 %, relative to the answer given.

    Its cut at the first period waits for a type "multiple-choice" that MathVista calls multi_choice, so it never comes.
    """
    text, truth = prediction["text"].lower().strip(), str(reference["answer"]).lower()
    if reference["question_type"] == "multi_choice":
        truth = LETTERS[reference["choices"].index(reference["answer"])].lower()
    return accuracy(text, text == truth or _near(text, truth))


LETTER_IN_BRACKETS = re.compile(r"\(([a-zA-Z])\)")
QUOTED_ANSWER = re.compile(r'The answer is "(.*)"\.')


def mathvista(prediction: Record, reference: Record) -> Scored:
    """MathVista's own comparison of an extracted answer.

    The extraction is the prediction's `extraction` (a judge's, as officially), else what the official code takes without
    asking: the text itself, or what is quoted in `The answer is "...".`. A choice that is no letter becomes the option
    nearest in edit distance, so there is always one.
    """
    extracted = prediction.get("extraction")
    if extracted is None:
        quoted = QUOTED_ANSWER.search(prediction["text"])
        extracted = quoted[1] if quoted else prediction["text"]
    kind, choices = reference["answer_type"], reference.get("choices")
    if reference["question_type"] == "multi_choice":
        return _nearest_choice(str(extracted).strip(), choices, reference["answer"])
    number = as_number(str(extracted))
    if kind == "integer":
        extracted = str(int(number)) if number is not None and math.isfinite(number) else None
    elif kind == "float":
        extracted = None if number is None else str(round(number, int(reference["precision"])))
    return accuracy(extracted, extracted == reference["answer"], extracted is not None)


def _nearest_choice(text: str, choices: list[str], truth: str) -> Scored:
    bracketed = LETTER_IN_BRACKETS.search(text)
    text = bracketed[1].upper() if bracketed else text
    options = LETTERS[: len(choices)]
    if len(text) == 1 and text in options:
        return accuracy(choices[options.index(text)], choices[options.index(text)] == truth)
    nearest = min(choices, key=lambda choice: edit_distance(text, choice))
    return accuracy(nearest, nearest == truth, valid=text in choices)
