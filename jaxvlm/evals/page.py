"""report.html: one page with everything in it (pictures, curves, styles), no script and no request to anywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from html import escape

from PIL import Image, ImageOps

from jaxvlm.config import ModelConfig, build
from jaxvlm.html import axis_ticks, document, percent, picture, table
from jaxvlm.progress import duration

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 600, 280, 52, 40, 14, 14  # of a loss curve, in SVG units
COLOURS = 6  # of the lines of `watched_curve`; further ones are dashed
# Events of `train.watch`: where their numbers are, and what these are, in short and of an event.
WATCHED = {
    "held_out": (
        "loss",
        "held-out loss",
        lambda event: f"held-out loss per supervised token, of {event['tokens']['all']:,}",
    ),
    "slim": (
        "scores",
        "questions right",
        lambda event: f"right, of {event['n']:,} questions asked while training",
    ),
}
POINTS = 300  # a curve with more steps is drawn through the means of this many groups of steps


def render(report: dict, metrics: Sequence[dict], config: dict, watched: Sequence[dict] = ()) -> str:
    """The page as HTML. Raises nothing for a missing sample image: the card says that it is gone."""
    sections = [
        _header(report),
        _results(report),
        _samples(report["samples"]),
        _training(report["stages"], metrics, watched),
        _run(report, config),
    ]
    return document(f"{report['name'] or 'run'} - jaxvlm report", sections, STYLE)


# ------------------------------------------------------------------------------------------------------------- results


def _header(report: dict) -> str:
    scores = report["eval"]
    headline = ""
    if scores:
        name, entry = next(iter(scores.items()))
        rest = [f"question-only majority {percent(entry['majority'])}", f"chance {percent(entry['chance'])}"]
        if entry["blind"] is not None:
            rest.insert(0, f"{percent(entry['blind'])} without the image")
        headline = (
            f'<p class="headline"><strong>{percent(entry["sighted"])}</strong> <span>of the {entry["n"]} '
            f"&ldquo;{escape(name)}&rdquo; questions answered exactly right<br>"
            f'<span class="quiet">{", ".join(rest)}</span></span></p>'
        )
    description = f"<p>{escape(report['description'])}</p>" if report["description"] else ""
    created = escape(report["created"].replace("T", " ").replace("+00:00", " UTC"))
    return (
        f'<header>\n<p class="eyebrow">jaxvlm run report</p>\n<h1>{escape(report["name"] or "run")}</h1>\n'
        f'{description}\n{headline}\n<p class="quiet">{created}</p>\n</header>'
    )


def _results(report: dict) -> str:
    if not report["eval"]:
        return '<section aria-labelledby="results"><h2 id="results">Results</h2><p>Nothing was evaluated.</p></section>'
    info = report["eval_info"]
    ways = {
        "noimage": "the image is withheld",
        "shuffle": "another test image is shown",
        "gray": "a grey image is shown",
    }
    blind = ways.get(info.get("blind"), "")
    notes = [
        "Exact match after stripping blanks, case and a final period.",
        f"Whiskers: {escape(info.get('interval', '95 % interval'))}.",
        f"Blind: the same model when {blind}." if blind else "",
        f"Majority: the most frequent answer to the same question, counted in the {escape(info.get('majority', ''))}.",
        "Chance: a uniform guess among the category's answers.",
        f"Answered: {info['questions_per_second']:.1f} questions a second." if info.get("questions_per_second") else "",
    ]
    charts = "\n".join(_category(name, entry) for name, entry in report["eval"].items())
    return (
        '<section aria-labelledby="results">\n<h2 id="results">Results</h2>\n'
        f'<div class="charts">\n{charts}\n</div>\n{_score_table(report["eval"])}\n'
        f'<p class="quiet">{" ".join(note for note in notes if note)}</p>\n</section>'
    )


def _category(name: str, entry: dict) -> str:
    bars = []
    for kind in ("sighted", "blind", "majority", "chance"):
        if entry[kind] is None:
            continue
        whisker = ""
        if entry.get(f"{kind}_interval"):
            low, high = (100 * bound for bound in entry[f"{kind}_interval"])
            whisker = f'<i class="whisker" style="left:{low:.2f}%;width:{high - low:.2f}%"></i>'
        bars.append(
            f'<li class="{kind}"><span>{kind}</span><span class="track" aria-hidden="true">'
            f'<i class="bar" style="width:{100 * entry[kind]:.2f}%"></i>{whisker}</span>'
            f"<b>{percent(entry[kind])}</b></li>"
        )
    label = "all questions" if name == "all" else f"&ldquo;{escape(name)}&rdquo;"
    return (
        f'<figure class="card"><figcaption>{label} <span class="quiet">n = {entry["n"]}</span></figcaption>'
        f'<ul class="bars">{"".join(bars)}</ul></figure>'
    )


def _score_table(scores: dict) -> str:
    gain = any(entry.get("gain") is not None for entry in scores.values())
    heads = ["Questions", "n", "Sighted", "Blind", "Majority", "Chance"] + (["Sighted &minus; blind"] if gain else [])
    rows = []
    for name, entry in scores.items():
        cells = [str(entry["n"]), _with_interval(entry, "sighted"), _with_interval(entry, "blind")]
        cells += [percent(entry["majority"]), percent(entry["chance"])] + ([_with_interval(entry, "gain")] * gain)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    return table("Accuracy by question type, with 95 % intervals", heads, rows)


def _with_interval(entry: dict, kind: str) -> str:
    if entry.get(kind) is None:
        return "&ndash;"
    low, high = entry[f"{kind}_interval"]
    return f'{percent(entry[kind])} <span class="quiet">[{100 * low:.1f}, {100 * high:.1f}]</span>'


# ------------------------------------------------------------------------------------------------------------- samples


def _samples(samples: Sequence[dict]) -> str:
    if not samples:
        return ""
    return (
        '<section aria-labelledby="samples">\n<h2 id="samples">Samples</h2>\n'
        '<p class="quiet">Drawn with the run&rsquo;s seed, in turn from each question type; not selected.</p>\n'
        f'<div class="samples">\n{"".join(map(_sample, samples))}</div>\n</section>'
    )


def _sample(sample: dict) -> str:
    verdict, sign = ("right", "&#10003;") if sample["right"] else ("wrong", "&#10007;")
    question, answer, truth = (escape(str(sample[key])) for key in ("question", "prediction", "answer"))
    return (
        f'<article class="card sample">{_picture(sample["image"], sample["question"])}<div><p class="question">{question}</p>\n'
        f"<dl><dt>Model</dt><dd>{answer or '<em>(nothing)</em>'}</dd><dt>Truth</dt><dd>{truth}</dd></dl>\n"
        f'<p class="verdict {verdict}">{sign} {verdict}</p></div></article>\n'
    )


def _picture(path: str | None, question: str) -> str:
    """The image as a data URI: small pictures as they are (the page enlarges them in blocks), large ones reduced."""
    if not path:
        return '<p class="missing quiet">no image</p>'
    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except OSError:
        return '<p class="missing quiet">the image file is gone</p>'
    return picture(image, f"Picture for: {question}")


# ------------------------------------------------------------------------------------------------------------ training


def _training(stages: Sequence[dict], metrics: Sequence[dict], watched: Sequence[dict]) -> str:
    if not stages:
        return ""
    figures, rows, watched_rows = [], [], []
    for stage in stages:
        entries = [entry for entry in metrics if entry["stage"] == stage["name"]]
        points = [(entry["step"], entry["loss"]) for entry in entries if math.isfinite(entry["loss"])]
        if points:
            figures.append(loss_curve(stage["name"], points))
        for kind in WATCHED:
            if events := [e for e in watched if (e["event"], e["stage"]) == (kind, stage["name"])]:
                figures.append(watched_curve(stage["name"], kind, events))
                watched_rows.append(_watched_row(stage["name"], kind, events))
        cells = [f"{stage['steps']:,}", f"{stage['first_loss']:.3f}", f"{stage['final_loss']:.3f}"]
        cells += [
            _middle(entries, "tokens_per_second", 1, ",.0f"),
            _middle(entries, "images_per_second", 1, ",.1f"),
        ]
        cells += [
            _middle(entries, "mfu", 100, ".1f", " %"),
            duration(sum(e.get("seconds") or 0 for e in entries)),
        ]
        rows.append(
            f'<tr><th scope="row">{escape(stage["name"])}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        )
    heads = ["Stage", "Steps", "First loss", "Final loss", "Tokens/s", "Images/s", "MFU", "Time in steps"]
    watched_heads = ["Stage", "What", "Times", "First", "at step", "Last", "at step"]
    beside = table("Evaluated while training", watched_heads, watched_rows) if watched_rows else ""
    return (
        '<section aria-labelledby="training">\n<h2 id="training">Training</h2>\n'
        f'<div class="curves">\n{"".join(figures)}</div>\n'
        f"{table('Training stages; speeds are medians over the steps', heads, rows)}\n{beside}</section>"
    )


def _watched_row(name: str, kind: str, events: Sequence[dict]) -> str:
    key, title, _ = WATCHED[kind]
    cells = [title, f"{len(events):,}"]
    for event in (events[0], events[-1]):
        cells += [_shown(kind, event[key]["all"]), f"{event['step']:,}"]
    return f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _middle(entries: Sequence[dict], key: str, factor: float, form: str, unit: str = "") -> str:
    values = sorted(entry[key] for entry in entries if entry.get(key) is not None)
    return f"{factor * values[len(values) // 2]:{form}}{unit}" if values else "&ndash;"


def loss_curve(name: str, points: Sequence[tuple[int, float]]) -> str:
    """An SVG of the loss over the steps: every step faintly, and a running mean over it.

    The axis is logarithmic when the loss falls by more than a factor of ten.
    """
    points = _thin(points)
    losses = [loss for _, loss in points]
    logarithmic = min(losses) > 0 and max(losses) / min(losses) > 10
    ticks = _log_ticks(min(losses), max(losses)) if logarithmic else axis_ticks(min(0.0, *losses), max(losses))
    scale = math.log if logarithmic else float
    low, high = (min(*losses, ticks[0]), max(*losses, ticks[-1])) if logarithmic else (ticks[0], ticks[-1])
    low, high = scale(low), scale(high)
    first, last = points[0][0], points[-1][0]

    def x(step: float) -> float:
        return LEFT + (step - first) / max(last - first, 1) * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        return TOP + (high - scale(loss)) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)

    def path(values: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{x(step):.1f} {y(loss):.1f}" for step, loss in values)

    label = f"Loss of stage {name}: from {losses[0]:.3f} at step {first} to {losses[-1]:.3f} at step {last}"
    return (
        f'<figure class="card"><figcaption>{escape(name)} <span class="quiet">loss per supervised token'
        f"{', log scale' if logarithmic else ''}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{_grid(ticks, y, '{:g}'.format)}{_steps(first, last, x)}"
        f'<path class="raw" d="{path(points)}"/><path class="smooth" d="{path(_smooth(points))}"/>'
        f'<circle class="end" cx="{x(last):.1f}" cy="{y(_smooth(points)[-1][1]):.1f}" r="3.5"/></svg></figure>\n'
    )


def _grid(ticks: Sequence[float], y: Callable[[float], float], text: Callable[[float], str]) -> str:
    return "".join(
        f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{text(tick)}</text>'
        for tick in ticks
    )


def _steps(first: float, last: float, x: Callable[[float], float]) -> str:
    ticks = [tick for tick in axis_ticks(first, last, 5, whole=True) if first <= tick <= last] or [first]
    marks = "".join(
        f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:,.0f}</text>' for tick in ticks
    )
    return f'{marks}<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">step</text>'


def watched_curve(name: str, kind: str, events: Sequence[dict]) -> str:
    """An SVG of what a stage's events of one kind say at their steps: a line for each source or question type, and 'all'."""
    key, title, what = WATCHED[kind]
    lines = {one: [(e["step"], e[key][one]) for e in events if one in e[key]] for one in events[-1][key]}
    if len(lines) == 2:  # a part that is the whole
        lines = {one: points for one, points in lines.items() if one != "all"}
    values = [value for points in lines.values() for _, value in points if math.isfinite(value)]
    ticks = [0, 0.25, 0.5, 0.75, 1] if kind == "slim" else axis_ticks(min([0.0, *values]), max([0.0, *values]))
    last = max(events[-1]["step"], 1)

    def x(step: float) -> float:
        return LEFT + step / last * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (ticks[-1] - value) / (ticks[-1] - ticks[0]) * (HEIGHT - TOP - BOTTOM)

    drawn, legend = "", ""
    for number, (one, points) in enumerate(lines.items()):
        colour = "all" if one == "all" else f"line{number % COLOURS}" + " again" * (number >= COLOURS)
        places = [(x(step), y(value)) for step, value in points if math.isfinite(value)]
        drawn += f'<path class="{colour}" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in places)}"/>' if places else ""
        drawn += "".join(f'<circle class="{colour}" cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>' for a, b in places)
        legend += (
            f'<li class="{colour}"><i aria-hidden="true"></i>{escape(one)} <b>{_shown(kind, points[-1][1])}</b></li>'
        )
    label = (
        f"{title} of stage {name}, after steps {', '.join(str(e['step']) for e in events)}; the last values are below"
    )
    return (
        f'<figure class="card"><figcaption>{escape(name)} <span class="quiet">{what(events[-1])}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{_grid(ticks, y, ('{:.0%}' if kind == 'slim' else '{:g}').format)}{_steps(0, last, x)}{drawn}</svg>"
        f'<ul class="legend">{legend}</ul></figure>\n'
    )


def _shown(kind: str, value: float) -> str:
    return percent(value) if kind == "slim" else f"{value:.3f}"


def _thin(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    if len(points) <= POINTS:
        return list(points)
    edges = [round(i * len(points) / POINTS) for i in range(POINTS + 1)]
    groups = [points[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred running mean over a twelfth of the curve, narrower towards its ends so that they stay in place."""
    reach = max(1, len(points) // 24)
    smooth = []
    for i, (step, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        window = points[i - near : i + near + 1]
        smooth.append((step, sum(loss for _, loss in window) / len(window)))
    return smooth


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in ticks if low <= tick <= high] or [low, high]


# ----------------------------------------------------------------------------------------------------------- this run


def _run(report: dict, config: dict) -> str:
    facts = {
        "Wall time": duration(report["wall_seconds"]),
        "Peak memory": f"{report['peak_memory_bytes'] / 2**30:.2f} GiB",
        "Devices": ", ".join(report["devices"]),
        **report["facts"],
        **_model_facts(config),
        "Versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
    lines = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(str(value))}</dd></div>" for key, value in facts.items() if value
    )
    return (
        '<section aria-labelledby="run">\n<h2 id="run">This run</h2>\n'
        f'<dl class="facts">{lines}</dl>\n<details><summary>Full configuration</summary>'
        f"<pre>{escape(json.dumps(config, indent=2, ensure_ascii=False, default=str))}</pre></details>\n</section>"
    )


def _model_facts(config: dict) -> dict[str, str]:
    model = config.get("model")
    if not model:
        return {}
    vision, llm = model["vision"], model["llm"]
    tokens = build(ModelConfig, model).tile_tokens
    return {
        "Vision": f"{vision['kind']}, {vision['image_size']} px, {tokens} visual tokens a tile",
        "Connector": model["connector"]["kind"],
        "Language model": f"{llm['depth']} layers of width {llm['width']}, vocabulary {llm['vocab_size']:,}",
        "Compute type": model["dtype"],
        "Seed": str(config.get("seed", "")),
    }


STYLE = """
:root { --sighted: var(--accent); --blind: #b4620e; --majority: #6b7484; --chance: #98a1b1; }
@media (prefers-color-scheme: dark) { :root { --blind: #e5a05a; --majority: #98a3b5; --chance: #6d788b; } }
.headline { display: flex; flex-wrap: wrap; gap: 4px 18px; align-items: center; margin: 22px 0; max-width: none; }
.headline strong { font-size: 3.2rem; line-height: 1; color: var(--sighted); letter-spacing: -0.02em; }
.charts, .curves, .samples { display: grid; gap: 16px; margin-bottom: 16px; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 290px), 1fr)); }
.curves { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.samples { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.bars { list-style: none; margin: 0; padding: 0; display: grid; gap: 8px; font-size: 0.875rem; }
.bars li { display: grid; grid-template-columns: 4.6em 1fr 4.3em; gap: 10px; align-items: center; }
.bars b { text-align: right; font-weight: 600; font-variant-numeric: tabular-nums; }
.track { position: relative; height: 16px; border-radius: 4px; background: var(--track); }
.bar { position: absolute; inset: 0 auto 0 0; border-radius: 4px; }
.sighted .bar { background: var(--sighted); } .blind .bar { background: var(--blind); }
.majority .bar { background: var(--majority); } .chance .bar { background: var(--chance); }
.whisker { position: absolute; top: 3px; height: 10px; border: solid var(--ink); border-width: 0 1.5px; }
.whisker::after { content: ""; position: absolute; top: 4px; left: 0; right: 0; border-top: 1.5px solid var(--ink); }
.sample { display: flex; flex-direction: column; gap: 12px; padding: 0 0 14px; overflow: hidden; }
.sample > div { padding: 0 16px; }
.sample img, .missing { width: 100%; height: 190px; object-fit: contain; background: var(--track); margin: 0; }
.sample img.tiny { image-rendering: pixelated; padding: 11px 0; }
.missing { display: grid; place-items: center; }
.question { font-weight: 600; line-height: 1.35; overflow-wrap: anywhere; white-space: pre-line; }
.sample dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 12px; margin: 0 0 10px; font-size: 0.925rem; }
.sample dt { color: var(--quiet); } .sample dd { margin: 0; overflow-wrap: anywhere; }
.verdict { display: inline-block; margin: 0; padding: 1px 10px; border-radius: 99px; font-size: 0.8rem;
  font-weight: 600; }
.right { color: var(--good); background: var(--good-bg); }
.wrong { color: var(--bad); background: var(--bad-bg); }
.raw { stroke: var(--sighted); opacity: 0.32; }
.smooth { stroke: var(--sighted); stroke-width: 2.2; } .end { fill: var(--sighted); }
.all { --line: var(--ink); } .line0 { --line: #2f7de1; } .line1 { --line: #d1730f; } .line2 { --line: #1d9a5b; }
.line3 { --line: #b14fc5; } .line4 { --line: #c8423b; } .line5 { --line: #7c8798; }
svg [class^="line"], svg .all { stroke: var(--line); stroke-width: 2.2; } svg path.again { stroke-dasharray: 5 4; }
circle[class^="line"], circle.all { fill: var(--line); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 6px 0 0; padding: 0; font-size: 0.875rem; }
.legend li { overflow-wrap: anywhere; } .legend b { font-variant-numeric: tabular-nums; font-weight: 600; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 50%; background: var(--line); margin-right: 7px; }
.legend .again i { background: none; border: 2px dashed var(--line); }
"""
