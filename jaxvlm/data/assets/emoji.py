"""Emoji-VQA: Unicode emoji in five art styles, with their names and groups, as images with questions (assets §3).

Names and groups come from OpenMoji's table, drawings from the SVG sets of Iconify: Noto (Apache-2.0), Twemoji (CC BY
4.0), OpenMoji (CC BY-SA 4.0), Fluent flat (MIT), EmojiOne (CC BY 4.0). Two things are held out: a tenth of the
concepts in every style, and one style of every concept.
"""

from __future__ import annotations

import json
import random
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jaxvlm.data.assets.download import AssetError, Package, open_in_tar
from jaxvlm.data.assets.llava_json import caption, conversation, question, write_json, write_jsonl


def _iconify(style: str, version: str, sha256: str, megabytes: float) -> Package:
    file = f"iconify-json-{style}-{version}.tgz"
    return Package(f"@iconify-json/{style}", version, file, sha256, megabytes, registry="npm")


STYLES = {
    "noto": _iconify("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", 3.1),
    "twemoji": _iconify("twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", 1.6),
    "openmoji": _iconify("openmoji", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5", 1.3),
    "fluent": _iconify(
        "fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", 1.2
    ),
    "emojione": _iconify("emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e", 0.7),
}
NAMES = Package(
    "openmoji",
    "17.0.0",
    "openmoji-17.0.0.tgz",
    "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    4.3,
    registry="npm",
)
PACKAGES = (*STYLES.values(), NAMES)

SEED = 0
SIZE = 128  # pixels
COMPLETE = ("noto", "twemoji", "openmoji")  # a concept counts if these draw it
NEW_STYLE = "twemoji"  # never trained on
NEW_CONCEPTS = 0.1  # of the concepts, never trained on
GROUPS = {  # Unicode's groups, without flags and symbols, in one word each
    "smileys-emotion": "smiley",
    "people-body": "person",
    "animals-nature": "nature",
    "food-drink": "food",
    "travel-places": "travel",
    "activities": "activity",
    "objects": "object",
}
WHAT = "What is this?"
GROUP = f"Which group does it belong to: {', '.join(list(GROUPS.values())[:-1])} or {list(GROUPS.values())[-1]}?"


class Concept(NamedTuple):
    slug: str
    name: str
    group: str


def prepare(files: dict[str, Path], out: Path, log: Callable[[str], None]) -> None:
    """align.json, instruct.json, test.jsonl and images/STYLE/SLUG.png"""
    with tarfile.open(files[NAMES.name]) as archive, open_in_tar(archive, "data/openmoji.json") as file:
        table = json.load(file)
    drawings = {}
    for style, package in STYLES.items():
        with tarfile.open(files[package.name]) as archive, open_in_tar(archive, "icons.json") as file:
            drawings[style] = json.load(file)
    concepts = select(table, drawings)
    found = {style: [c for c in concepts if svg(drawings[style], c.slug)] for style in STYLES}
    log(f"  drawing {sum(map(len, found.values())):,} images of {len(concepts):,} concepts ...")
    for style, drawn in found.items():
        (out / "images" / style).mkdir(parents=True)
        for concept in drawn:
            png = rasterise(svg(drawings[style], concept.slug))
            (out / "images" / style / f"{concept.slug}.png").write_bytes(png)
    records = split(concepts, {style: {c.slug for c in drawn} for style, drawn in found.items()})
    write_json(out / "align.json", records["align"])
    write_json(out / "instruct.json", records["instruct"])
    write_jsonl(out / "test.jsonl", records["test"])


def select(table: list[dict], drawings: dict[str, dict]) -> list[Concept]:
    """The concepts of `GROUPS`, without variants of skin tone, that the complete styles all draw."""
    concepts = {}
    for row in table:
        # "woman: red hair" and "family: man, boy" are variants, which several styles draw alike.
        if row["group"] in GROUPS and not row["skintone"] and ":" not in row["annotation"]:
            concept = Concept(
                slug(row["annotation"]), re.sub(r"[“”]", "", row["annotation"]).lower(), GROUPS[row["group"]]
            )
            if all(svg(drawings[style], concept.slug) for style in COMPLETE):
                concepts.setdefault(concept.slug, concept)
    return list(concepts.values())


def slug(name: str) -> str:
    """A name as Iconify spells it: 'woman’s hat' -> 'womans-hat'."""
    plain = name.lower().replace("’", "").replace("'", "").translate(str.maketrans("éåãíôñç", "eaaionc"))
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def svg(icons: dict, name: str) -> str | None:
    """The drawing of a name in an Iconify set, through plain aliases; None if the set lacks it."""
    seen = set()
    while name in icons.get("aliases", {}) and name not in icons["icons"]:
        alias = icons["aliases"][name]
        if alias.keys() - {"parent"} or name in seen:  # turned or mirrored drawings mean something else
            return None
        seen.add(name)
        name = alias["parent"]
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>'


def rasterise(drawing: str) -> bytes:
    """A PNG of `SIZE` pixels on white."""
    try:
        import resvg_py
    except ImportError:
        raise AssetError("Drawing the emoji needs the resvg-py package: pip install resvg-py") from None
    return bytes(
        resvg_py.svg_to_bytes(svg_string=drawing, width=SIZE, height=SIZE, background="white", skip_system_fonts=True)
    )


def split(concepts: list[Concept], drawn: dict[str, set[str]]) -> dict[str, list[dict]]:
    """Training captions and conversations, and test questions about what was held out."""
    rng = random.Random(SEED)
    new = {c.slug for c in rng.sample(concepts, round(NEW_CONCEPTS * len(concepts)))}
    known = [c for c in concepts if c.slug not in new]
    by_group = defaultdict(list)
    for concept in known:
        by_group[concept.group].append(concept)
    records = {"align": [], "instruct": [], "test": []}
    for style, slugs in drawn.items():
        for concept in (c for c in concepts if c.slug in slugs):
            name, image = f"{style}-{concept.slug}", f"{style}/{concept.slug}.png"
            if concept.slug in new:
                records["test"].append(question(f"{name}-group", image, GROUP, concept.group, "group of a new concept"))
                continue
            other = rng.choice([c for c in by_group[concept.group] if c.name != concept.name])
            if style == NEW_STYLE:
                records["test"] += _new_style(name, image, concept, other)
                continue
            records["align"].append(caption(f"align-{name}", image, concept.name, rng))
            truth = rng.random() < 0.5
            asked = concept if truth else other
            pairs = [(WHAT, concept.name), (GROUP, concept.group), (is_it(asked.name), "yes" if truth else "no")]
            records["instruct"].append(conversation(f"train-{name}", image, rng.sample(pairs, 3)))
    return records


def _new_style(name: str, image: str, concept: Concept, other: Concept) -> list[dict]:
    """The name, and the same yes/no question once with each answer."""
    return [
        question(f"{name}-name", image, WHAT, concept.name, "name in a new style"),
        question(f"{name}-yes", image, is_it(concept.name), "yes", "yes/no in a new style"),
        question(f"{name}-no", image, is_it(other.name), "no", "yes/no in a new style"),
    ]


def is_it(name: str) -> str:
    return f'Is this called "{name}"?'
