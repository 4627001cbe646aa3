"""Runs side by side: one page, and Markdown, of what `jaxvlm eval benchmark` left in folders, with a browser of samples."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageOps

from jaxvlm import html
from jaxvlm.evals.baselines import guessed, one_answer
from jaxvlm.evals.exactness import check_in_words
from jaxvlm.evals.question_file import EvalError
from jaxvlm.evals.readers import read_json
from jaxvlm.evals.scorers.boxes import OCID_SIZE, from_pixels, unpad
from jaxvlm.evals.seeing import BIAS, CENTRIC, labels_in_words
from jaxvlm.infer.answers import merged, read_records, speed_in_words

# By protocol, what its paper prints of two models: Liu et al. 2023, tables 3 and 4; Karamcheti et al. 2024, the main table, where
# LLaVA-1.5 is as they score it; Tong et al. 2024, the main table.
PUBLISHED: dict[str, tuple[str, dict[str, tuple[float, float]]]] = {
    "llava15": (
        "LLaVA-1.5 7B / 13B",
        {
            "vqav2": (78.5, 80.0),
            "gqa": (62.0, 63.3),
            "vizwiz": (50.0, 53.6),
            "scienceqa": (66.8, 71.6),
            "textvqa-ocr": (58.2, 61.3),
            "pope": (85.9, 85.9),
            "mme": (1510.7, 1531.3),
            "mmbench": (64.3, 67.7),
            "mmbench-cn": (58.3, 63.6),
            "seed-bench": (58.6, 61.6),
        },
    ),
    "prismatic": (
        "LLaVA-1.5 7B / Prism-DINOSigLIP 7B",
        {
            "vqav2": (76.5, 81.0),
            "gqa": (61.6, 65.3),
            "vizwiz": (54.2, 52.8),
            "textvqa-ocr": (58.3, 59.7),
            "textvqa": (46.1, 55.6),
            "refcoco": (55.1, 77.8),
            "refcoco+": (49.5, 73.1),
            "refcocog": (50.9, 71.0),
            "ocid-ref": (35.1, 54.1),
            "vsr": (51.5, 59.6),
            "pope": (86.6, 88.1),
            "tallyqa": (62.1, 66.7),
            "ai2d": (54.1, 55.7),
        },
    ),
    "cambrian": (
        "Cambrian-1 8B / 34B",
        {
            "mme": (1547.1, 1689.3),
            "mmbench": (75.9, 81.4),
            "seed-bench": (74.7, 75.3),
            "gqa": (64.6, 65.8),
            "scienceqa": (80.4, 85.6),
            "mmmu": (42.7, 49.7),
            "mathvista": (49.0, 53.2),
            "ai2d": (73.0, 79.7),
            "chartqa": (73.3, 75.6),
            "ocrbench": (62.4, 60.0),
            "textvqa-ocr": (71.7, 76.7),
            "docvqa": (77.8, 75.5),
            "mmvp": (51.3, 52.7),
            "realworldqa": (64.2, 67.8),
        },
    ),
}
NOTHING = "–"
COLOURS = ("#e0492f", "#2f6fe0", "#b04fd0", "#e09a20")  # of the runs' boxes; the truth's is green
TRUTH = "#16a34a"
FILTERS = {"all": "all", "wrong": "wrong", "blind-right": "right without seeing", "disagree": "runs disagree"}


class Run(NamedTuple):
    """One folder of `jaxvlm eval benchmark`."""

    name: str
    sighted: dict[str, Any]  # the result
    blind: dict[str, Any] | None
    asked: dict[str, dict]  # the sighted questions, by id
    answers: dict[str, str]
    references: dict[str, dict]
    images: Path
    leakage: dict[str, Any] | None  # the folder's leakage.json


def read_run(text: str) -> Run:
    """The run of a FOLDER or NAME=FOLDER. Raises `EvalError` for a folder in which no benchmark was run to its end."""
    name, _, folder = text.rpartition("=")
    folder = Path(folder)
    if not (folder / "sighted-result.json").is_file():
        raise EvalError(f"{folder} holds no sighted-result.json: name a folder of `jaxvlm eval benchmark --out`.")
    blind = [path for path in sorted(folder.glob("*-result.json")) if path.name != "sighted-result.json"]
    result = read_json(folder / "sighted-result.json")
    answers = merged(folder / "sighted-answers.jsonl", [one["id"] for one in result["per_sample"]])
    return Run(
        name or folder.name,
        result,
        read_json(blind[0]) if blind else None,
        {str(record["question_id"]): record for record in read_records(folder / "sighted-questions.jsonl", mend=False)},
        {str(record["question_id"]): record["text"] for record in answers},
        {record["id"]: record for record in read_records(folder / "references.jsonl", mend=False)},
        Path(result["images"]),
        read_json(folder / "leakage.json") if (folder / "leakage.json").is_file() else None,
    )


def write(runs: Sequence[Run], out: str | Path, *, samples: int = 60, seed: int = 0) -> Path:
    """Writes `runs.html` and `runs.md` into the folder `out`; returns the page's path.

    Of each benchmark `samples` questions are shown, drawn by the seed, a share of them from each filter.
    """
    if len({(run.name, *_benchmark(run)) for run in runs}) < len(runs):
        raise EvalError("Two runs of one benchmark have one name: call them NAME=FOLDER.")
    benchmarks: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        benchmarks.setdefault(_benchmark(run), []).append(run)
    table = [_row(run) for group in benchmarks.values() for run in group]
    heads = [head for head in table[0] if any(row[head] != NOTHING for row in table)]
    rows = [[row[head] for head in heads] for row in table]
    body = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    notes = (
        "Scores are the number that papers print, under the protocol named; they compare only where the protocol is the "
        "same, and the questions too. Chance, and what the best single answer to all would have, are of these questions. A "
        f"benchmark is language-centric where seeing is worth less than {CENTRIC:.0f} points, and has a language bias where the "
        f"blind model is {BIAS:.0f} or more above chance; with a question mark where the 95 % interval does not tell. Unseen "
        "pictures: the questions about pictures of which `jaxvlm eval leakage` has found no copy in training."
    )
    sections = [
        '<header><p class="eyebrow">jaxvlm</p><h1>Runs side by side</h1></header>',
        f'<section><h2>Scores</h2>{html.table("Each run on each benchmark", heads, body)}<p class="quiet">{notes}</p></section>',
        "<section><h2>Samples</h2>" + _filters(),
        *(_browser(name, group, samples, seed) for name, group in benchmarks.items()),
        "</section>",
        "<section><h2>What the scores depend on</h2>" + "".join(_facts(run) for run in runs) + "</section>",
    ]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows] + ["", notes]
    (out / "runs.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    page = out / "runs.html"
    page.write_text(html.document("Runs side by side - jaxvlm", sections, STYLE), encoding="utf-8")
    return page


def _benchmark(run: Run) -> tuple[str, str]:
    return run.sighted["task"], run.sighted["protocol"]


def _row(run: Run) -> dict[str, str]:
    """By column."""
    result, (task, protocol) = run.sighted, _benchmark(run)
    found, clean = (run.blind or {}).get("seeing"), ((run.leakage or {}).get("score") or {}).get("clean")
    models, numbers = PUBLISHED.get(protocol, ("", {}))
    return {
        "benchmark": f"{task}, {protocol}: {result['headline']}",
        "run": run.name,
        "n": f"{result['n']:,}",
        "score": _number(result["value"]),
        "95 %": _span(result.get("intervals", {}).get(result["headline"])),
        "chance": _number(guessed(task, protocol, list(run.references.values()))),
        "one answer": _number(one_answer(task, protocol, list(run.references.values()))),
        "blind": f"{_number(run.blind['value'])} ({run.blind['blind']})" if run.blind else NOTHING,
        "seeing is worth": f"{found['gap']:.1f} ({_span(found['gap_interval'])})" if found else NOTHING,
        "label": labels_in_words(found["labels"]) if found else NOTHING,
        "unseen pictures": f"{_number(clean['value'])} (n {clean['n']:,})" if clean else NOTHING,
        "published": f"{' / '.join(map(str, numbers[task]))} ({models})" if task in numbers else NOTHING,
    }


def _span(interval: Sequence[float] | None) -> str:
    return f"{interval[0]:.1f} to {interval[1]:.1f}" if interval else NOTHING


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}"


# --------------------------------------------------------------------------------------------------------------- samples


def _right(result: Mapping | None) -> dict[str, bool]:
    """By question, whether the answer has at least half of its first score."""
    return {one["id"]: next(iter(one["scores"].values()), 0) >= 0.5 for one in result["per_sample"]} if result else {}


def _browser(name: tuple[str, str], runs: Sequence[Run], count: int, seed: int) -> str:
    verdicts = [_right(run.sighted) for run in runs]
    blind = [_right(run.blind) for run in runs]
    kinds: dict[str, set[str]] = {}
    for question in sorted(set.intersection(*(set(one) for one in verdicts))):
        said = {one[question] for one in verdicts}
        marks = {"wrong": False in said, "disagree": len(said) > 1}
        marks["blind-right"] = any(one.get(question) for one in blind)
        kinds[question] = {kind for kind, holds in marks.items() if holds}
    order = list(kinds)
    random.Random(seed).shuffle(order)
    drawn: dict[str, None] = {}
    for kind in ("disagree", "blind-right", "wrong"):
        drawn |= dict.fromkeys([one for one in order if kind in kinds[one]][: count // 4])
    drawn = dict.fromkeys([*drawn, *(one for one in order if one not in drawn)][:count])
    cards = "".join(_card(question, kinds[question], runs, verdicts) for question in drawn)
    shown = f"{len(drawn):,} of {len(kinds):,} questions, drawn by the seed, a share of each kind"
    return f'<h3>{escape(", ".join(name))} <span class="quiet">{shown}</span></h3><div class="samples">{cards}</div>'


def _card(question: str, kinds: set[str], runs: Sequence[Run], verdicts: Sequence[Mapping[str, bool]]) -> str:
    asked, reference = runs[0].asked[question], runs[0].references.get(question, {})
    lines = []
    for i, (run, right) in enumerate(zip(runs, verdicts, strict=True)):
        colour = f' style="border-left: 4px solid {COLOURS[i]}; padding-left: 6px"' if i < len(COLOURS) else ""
        kind = "right" if right[question] else "wrong"
        scores = next(one["scores"] for one in run.sighted["per_sample"] if one["id"] == question)
        told = ", ".join(f"{key} {value:.2f}" for key, value in scores.items() if isinstance(value, (int, float)))
        words = escape(run.answers.get(question, "")) or "<em>(nothing)</em>"
        lines.append(
            f'<dt{colour}>{escape(run.name)}</dt><dd>{words} <span class="{kind}" title="{escape(told)}">{kind}</span></dd>'
        )
    return (
        f'<article class="card sample {" ".join(sorted(kinds))}">{_picture(question, asked, reference, runs)}'
        f'<p class="question">{escape(asked["text"])}</p><dl>{"".join(lines)}<dt>reference</dt>'
        f'<dd>{escape(_truth(reference))}</dd></dl><p class="quiet">{escape(question)}</p></article>\n'
    )


def _truth(reference: Mapping) -> str:
    for name in ("label", "answer", "answers", "bbox", "objects"):
        if name in reference:
            value = reference[name]
            if isinstance(value, list):
                value = ", ".join(dict.fromkeys(str(one["answer"] if isinstance(one, dict) else one) for one in value))
            elif isinstance(value, int) and isinstance(reference.get("choices"), list):
                value = f"{'ABCDEFGHIJKLMNOP'[value]}. {reference['choices'][value]}"
            return str(value)
    return "–"


def _picture(question: str, asked: Mapping, reference: Mapping, runs: Sequence[Run]) -> str:
    if not asked.get("image"):
        return '<p class="quiet">no image</p>'
    try:
        image = ImageOps.exif_transpose(Image.open(runs[0].images / asked["image"])).convert("RGB")
    except OSError:
        return '<p class="quiet">the image file is gone</p>'
    if "bbox" in reference and "sentence" in reference:
        _draw(image, question, reference, runs)
    return html.picture(image, f"Picture of question {question}")


def _draw(image: Image.Image, question: str, reference: Mapping, runs: Sequence[Run]) -> None:
    """The truth's box in green, each run's in its colour; all as fractions of the image."""
    ocid = runs[0].sighted["task"] == "ocid-ref"
    size = OCID_SIZE if ocid else (reference["width"], reference["height"])
    pixels = reference["bbox"]
    if isinstance(pixels, str):  # OCID-Ref's
        pixels = [float(part) for part in pixels.strip("[]").split(",")]
    boxes = [(from_pixels(pixels, *size), TRUTH)]
    for run, colour in zip(runs, COLOURS, strict=False):
        box = next(one["parsed"] for one in run.sighted["per_sample"] if one["id"] == question)
        if box:
            boxes.append((unpad(box, *size) if run.sighted["protocol"] == "llava15" else box, colour))
    pen = ImageDraw.Draw(image)
    for box, colour in boxes:
        corners = [value * side for value, side in zip(box, image.size * 2, strict=True)]
        pen.rectangle(corners, outline=colour, width=max(2, max(image.size) // 150))


def _filters() -> str:
    buttons = "".join(
        f'<label><input type="radio" name="show" id="show-{key}"{" checked" * (key == "all")}> {words}</label>'
        for key, words in FILTERS.items()
    )
    return f'<fieldset class="filters"><legend class="quiet">Show</legend>{buttons}</fieldset>'


def _facts(run: Run) -> str:
    result = run.sighted
    settings = ", ".join(f"{name} {value}" for name, value in result.get("settings", {}).items())
    facts = {
        "Split": result["split"],
        "Prompt": result["prompt"],
        "Not understood": result["invalid"],
        "Settings": settings,
        "Speed": speed_in_words(result.get("speed")),
        "In the exact mode": check_in_words(result.get("exact_check")),
    }
    facts = {name: value for name, value in facts.items() if value != ""}
    lines = "".join(f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items())
    return f"<h3>{escape(run.name)}, {escape(result['task'])}</h3><dl class='facts'>{lines}</dl>"


STYLE = """
.samples { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 280px), 1fr)); }
.sample img { display: block; width: 100%; height: auto; border-radius: 6px; margin-bottom: 10px; }
.sample img.tiny { image-rendering: pixelated; }
.sample .question { white-space: pre-line; font-weight: 600; overflow-wrap: anywhere; }
.sample dl { margin: 0; display: grid; grid-template-columns: auto 1fr; gap: 2px 12px; font-size: 0.9rem; }
.sample dt { color: var(--quiet); } .sample dd { margin: 0; overflow-wrap: anywhere; }
.sample dd span { border-radius: 4px; padding: 0 6px; font-size: 0.8rem; }
.right { color: var(--good); background: var(--good-bg); } dd .wrong { color: var(--bad); background: var(--bad-bg); }
.filters { border: 0; padding: 0; margin: 0 0 16px; display: flex; flex-wrap: wrap; gap: 8px 20px; }
.filters label { padding: 8px 0; } h3 { margin: 28px 0 12px; font-size: 1rem; }
main th, main td { padding: 8px 11px; }
main td:nth-child(-n+2), main th:nth-child(-n+2) { text-align: left; }
""" + "".join(
    f"main:has(#show-{key}:checked) .sample:not(.{key}) {{ display: none; }}\n" for key in FILTERS if key != "all"
)
