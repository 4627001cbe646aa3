"""Yes/no answers: POPE, MME, VSR."""

from __future__ import annotations

from jaxvlm.evals.scorers import Record, Scored, accuracy
from jaxvlm.evals.scorers.choice import first_token

NO_WORDS = frozenset(("No", "not", "no"))


def pope_answer(text: str) -> str:
    """POPE's reading: `no` if the first sentence has the word No, no or not, else `yes`. So "NO", "nope" and "" are yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if NO_WORDS & set(words) else "yes"


def pope(prediction: Record, reference: Record) -> Scored:
    """POPE's and LLaVA's scorer. A label that is not `no` counts as yes."""
    answer = pope_answer(prediction["text"])
    label = "no" if reference["label"] == "no" else "yes"
    return accuracy(answer, answer == label)


def pope_cambrian(prediction: Record, reference: Record) -> Scored:
    """Cambrian's: the first word in lower case, without `.:,` at its end, is the label."""
    found = prediction["text"].lower().split()
    if not found:
        return accuracy("", 0.0, valid=False, note="empty answer: the official code stops")
    answer = found[0].rstrip(".:,")
    return accuracy(answer, answer == reference["label"].lower(), valid=answer in ("yes", "no"))


def pope_prismatic(prediction: Record, reference: Record) -> Scored:
    """Prismatic's: the likelier of Yes and No as the first token; p(Yes) is kept for the areas under the curves."""
    return first_token(prediction, ["yes", "no"], reference["label"], positive=0)


def vsr_prismatic(prediction: Record, reference: Record) -> Scored:
    """Prismatic's: the likelier of True and False as the first token."""
    return first_token(prediction, [True, False], bool(int(reference["label"])), positive=0)


def vsr_text(prediction: Record, reference: Record) -> Scored:
    """VSR by generation: the text is True or False, whatever its case and with a period or not; ours, not a paper's."""
    word = prediction["text"].strip().rstrip(".").lower()
    valid = word in ("true", "false")
    return accuracy(word, valid and (word == "true") == bool(int(reference["label"])), valid)


def mme_answer(text: str) -> str:
    """MME's reading: yes, or else no, anywhere in the first four characters of the unstripped text; else `other`."""
    text = text.lower()
    start = text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme(prediction: Record, reference: Record) -> Scored:
    """MME's own: so "snow" is no, "eyes" is yes, and "The answer is yes" neither, which is wrong."""
    answer = mme_answer(prediction["text"])
    return accuracy(answer, answer == reference["answer"].lower(), valid=answer != "other")


def mme_cambrian(prediction: Record, reference: Record) -> Scored:
    """Cambrian's: the whole text in lower case without periods at its end."""
    answer = prediction["text"].lower().rstrip(".")
    return accuracy(answer, answer == reference["answer"].lower(), valid=answer in ("yes", "no"))
