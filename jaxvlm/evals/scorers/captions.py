"""Hallucination in captions: CHAIR (Rohrbach et al. 2018), objects of MSCOCO that a caption names and the image lacks."""

from __future__ import annotations

import re
from collections.abc import Iterable

from jaxvlm.evals.scorers import Record, Scored

WORD = re.compile(r"[a-z0-9]+(?:[-'][a-z0-9]+)*")
IRREGULAR = {
    **{"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose"},
    **{"oxen": "ox", "knives": "knife", "calves": "calf", "policemen": "policeman", "wolves": "wolf"},
}
PAIRS = """motor bike,motor cycle,air plane,traffic light,street light,traffic signal,stop light,fire hydrant,stop sign,
parking meter,suit case,sports ball,baseball bat,baseball glove,tennis racket,wine glass,hot dog,cell phone,mobile phone,
teddy bear,hair drier,potted plant,laptop computer,home plate,train track""".replace("\n", "").split(",")
ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()
# Two words that are one object; "baby bird" names no person, "passenger jet" neither.
DOUBLE = {pair: pair for pair in PAIRS}
DOUBLE |= {f"{age} {animal}": animal for animal in ANIMALS for age in ("baby", "adult")}
DOUBLE |= {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet"}


def read_synonyms(lines: Iterable[str]) -> dict[str, str]:
    """Each word of CHAIR's `synonyms.txt` -> the object it names: a line is an object and its synonyms, `, ` between."""
    objects = {}
    for line in lines:
        names = [name.strip() for name in line.strip().split(",") if name.strip()]
        objects |= {name: names[0] for name in names}
    return objects


def objects_named(caption: str, synonyms: dict[str, str]) -> list[str]:
    """The MSCOCO objects that a caption names, one entry a mention, in order.

    The official code tokenises with NLTK and makes singulars with the `pattern` library. Here a word is a run of letters
    and digits, and a plural counts if its singular is in the list, which differs for rare plurals.
    """
    words = [_singular(word, synonyms) for word in WORD.findall(caption.lower())]
    joined, i = [], 0
    while i < len(words):
        pair = " ".join(words[i : i + 2])
        joined.append(DOUBLE.get(pair, words[i]))
        i += 2 if pair in DOUBLE else 1
    if "toilet" in joined:
        joined = [word for word in joined if word != "seat"]
    return [synonyms[word] for word in joined if word in synonyms]


def _singular(word: str, known: dict[str, str]) -> str:
    if word in IRREGULAR or word in known:
        return IRREGULAR.get(word, word)
    forms = [word[:-3] + "y"] if word.endswith("ies") else []
    forms += [word[:-2]] if word.endswith("es") else []
    forms += [word[:-1]] if word.endswith("s") and not word.endswith("ss") else []
    parts = set(known) | {part for pair in DOUBLE for part in pair.split()}
    return next((form for form in forms if form in parts), word)


def chair(prediction: Record, reference: Record) -> Scored:
    """Objects named and objects hallucinated; the reference holds the image's `objects` and the `synonyms`."""
    named = objects_named(prediction["text"], reference["synonyms"])
    false = [name for name in named if name not in reference["objects"]]
    values = {"mentions": float(len(named)), "hallucinated": float(len(false)), "clean": float(not false)}
    values |= {
        "objects": float(len(set(reference["objects"]))),
        "covered": float(len(set(named) & set(reference["objects"]))),
    }
    return Scored({"named": named, "hallucinated": false}, values)
