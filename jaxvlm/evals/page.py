"""report.html: one page with everything in it (pictures, curves, styles), no script and no request to anywhere."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from html import escape

from PIL import Image, ImageOps

from jaxvlm.config import ModelConfig, build

SECURITY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 600, 280, 52, 40, 14, 14  # of a loss curve, in SVG units
POINTS = 300  # a curve with more steps is drawn through the means of this many groups of steps
THUMBNAIL = 480  # pixels


def render(report: dict, metrics: Sequence[dict], config: dict) -> str:
    """The page as HTML. Raises nothing for a missing sample image: the card says that it is gone."""
    title = escape(report["name"] or "run")
    sections = [
        _header(report),
        _results(report),
        _samples(report["samples"]),
        _training(report["stages"], metrics),
        _run(report, config),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title} - jaxvlm report</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{SECURITY}">\n'
        f'<meta name="color-scheme" content="light dark">\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n'
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


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
    blind = {"noimage": "the image is withheld", "shuffle": "another test image is shown"}.get(info.get("blind"), "")
    notes = [
        "Exact match after stripping blanks, case and a final period.",
        f"Whiskers: {escape(info.get('interval', '95 % interval'))}.",
        f"Blind: the same model when {blind}." if blind else "",
        f"Majority: the most frequent answer to the same question, counted in the {escape(info.get('majority', ''))}.",
        "Chance: a uniform guess among the category's answers.",
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
    return _table("Accuracy by question type, with 95 % intervals", heads, rows)


def _with_interval(entry: dict, kind: str) -> str:
    if entry.get(kind) is None:
        return "&ndash;"
    low, high = entry[f"{kind}_interval"]
    return f'{percent(entry[kind])} <span class="quiet">[{100 * low:.1f}, {100 * high:.1f}]</span>'


def _table(caption: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


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
        f'<article class="card sample">{_picture(sample["image"], question)}<div><p class="question">{question}</p>\n'
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
    tiny = max(image.size) <= 160
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    data, form = io.BytesIO(), "PNG" if tiny else "JPEG"
    image.save(data, form, **({"optimize": True} if tiny else {"quality": 85}))
    uri = f"data:image/{form.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
    kind = ' class="tiny"' if tiny else ""
    return f'<img{kind} src="{uri}" width="{image.width}" height="{image.height}" alt="Picture for: {question}">'


# ------------------------------------------------------------------------------------------------------------ training


def _training(stages: Sequence[dict], metrics: Sequence[dict]) -> str:
    if not stages:
        return ""
    figures, rows = [], []
    for stage in stages:
        entries = [entry for entry in metrics if entry["stage"] == stage["name"]]
        points = [(entry["step"], entry["loss"]) for entry in entries if math.isfinite(entry["loss"])]
        if points:
            figures.append(loss_curve(stage["name"], points))
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
    return (
        '<section aria-labelledby="training">\n<h2 id="training">Training</h2>\n'
        f'<div class="curves">\n{"".join(figures)}</div>\n'
        f"{_table('Training stages; speeds are medians over the steps', heads, rows)}\n</section>"
    )


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
    ticks = _log_ticks(min(losses), max(losses)) if logarithmic else _ticks(min(0.0, *losses), max(losses))
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

    grid = "".join(
        f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in ticks
    )
    steps = [tick for tick in _ticks(first, last, 5, whole=True) if first <= tick <= last] or [first]
    marks = "".join(
        f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:,.0f}</text>' for tick in steps
    )
    label = f"Loss of stage {name}: from {losses[0]:.3f} at step {first} to {losses[-1]:.3f} at step {last}"
    return (
        f'<figure class="card"><figcaption>{escape(name)} <span class="quiet">loss per supervised token'
        f"{', log scale' if logarithmic else ''}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{grid}{marks}'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">step</text>'
        f'<path class="raw" d="{path(points)}"/><path class="smooth" d="{path(_smooth(points))}"/>'
        f'<circle class="end" cx="{x(last):.1f}" cy="{y(_smooth(points)[-1][1]):.1f}" r="3.5"/></svg></figure>\n'
    )


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


def _ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    rough = (high - low or abs(high) or 1.0) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    step = max(1.0, round(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


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


def duration(seconds: float) -> str:
    """Seconds in words: '42 s', '11 min 20 s', '2 h 5 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def percent(value: float) -> str:
    """0.785 as '78.5 %'."""
    return f"{100 * value:.1f}&#8239;%"


STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b2230; --quiet: #5b6577; --line: #dfe3ea;
  --track: #e9ecf2; --sighted: #2563c9; --blind: #b4620e; --majority: #6b7484; --chance: #98a1b1; --right: #16703c;
  --right-bg: #e2f4e9; --wrong: #a8271c; --wrong-bg: #fbe7e4; }
@media (prefers-color-scheme: dark) { :root { --page: #11151c; --card: #1a202a; --ink: #e7ebf2; --quiet: #a3adbd;
  --line: #2e3745; --track: #2a3240; --sighted: #6ea3f7; --blind: #e5a05a; --majority: #98a3b5; --chance: #6d788b;
  --right: #7fd6a2; --right-bg: #16351f; --wrong: #f5998f; --wrong-bg: #421d19; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 64px; }
section { margin-top: 48px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0 0 14px; }
p { margin: 0 0 12px; max-width: 75ch; }
.quiet { color: var(--quiet); font-size: 0.875rem; font-weight: 400; }
.eyebrow { color: var(--sighted); font-size: 0.8rem; font-weight: 650; letter-spacing: 0.06em;
  text-transform: uppercase; margin: 0 0 4px; }
.headline { display: flex; flex-wrap: wrap; gap: 4px 18px; align-items: center; margin: 22px 0; max-width: none; }
.headline strong { font-size: 3.2rem; line-height: 1; color: var(--sighted); letter-spacing: -0.02em; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0; padding: 16px 18px; }
.charts, .curves, .samples { display: grid; gap: 16px; margin-bottom: 16px; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 290px), 1fr)); }
.curves { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.samples { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
figcaption { font-weight: 600; margin-bottom: 10px; }
.bars { list-style: none; margin: 0; padding: 0; display: grid; gap: 8px; font-size: 0.875rem; }
.bars li { display: grid; grid-template-columns: 4.6em 1fr 4.3em; gap: 10px; align-items: center; }
.bars b { text-align: right; font-weight: 600; font-variant-numeric: tabular-nums; }
.track { position: relative; height: 16px; border-radius: 4px; background: var(--track); }
.bar { position: absolute; inset: 0 auto 0 0; border-radius: 4px; }
.sighted .bar { background: var(--sighted); } .blind .bar { background: var(--blind); }
.majority .bar { background: var(--majority); } .chance .bar { background: var(--chance); }
.whisker { position: absolute; top: 3px; height: 10px; border: solid var(--ink); border-width: 0 1.5px; }
.whisker::after { content: ""; position: absolute; top: 4px; left: 0; right: 0; border-top: 1.5px solid var(--ink); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  margin-bottom: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 12px 18px 4px; color: var(--quiet); font-size: 0.875rem; }
th, td { padding: 8px 18px; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; font-weight: 600; color: var(--quiet); font-size: 0.8rem; }
th:first-child { text-align: left; font-weight: 600; }
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
.right { color: var(--right); background: var(--right-bg); }
.wrong { color: var(--wrong); background: var(--wrong-bg); }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 13px; fill: var(--quiet); font-variant-numeric: tabular-nums; }
svg path { fill: none; stroke-linejoin: round; }
.grid { stroke: var(--line); } .raw { stroke: var(--sighted); opacity: 0.32; }
.smooth { stroke: var(--sighted); stroke-width: 2.2; } .end { fill: var(--sighted); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 12px 28px;
  margin: 0 0 18px; }
.facts dt { color: var(--quiet); font-size: 0.8rem; } .facts dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow: auto; max-height: 520px; padding: 14px 18px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; font: 0.8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
:focus-visible { outline: 2px solid var(--sighted); outline-offset: 2px; }
@media print { body { background: none; } .card, .scroll { break-inside: avoid; } details { display: none; } }
"""
