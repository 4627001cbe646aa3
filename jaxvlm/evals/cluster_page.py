"""What `clusters.analyse` found, as files: clusters.json, tables, and a page with the dendrogram, correlations and components."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from jaxvlm.evals.clusters import stability
from jaxvlm.html import axis_ticks, document

CELL, LABEL, ROW, WIDTH = 40, 130, 24, 760  # SVG units
COLOURS = (
    "#2563c9",
    "#b45309",
    "#16703c",
    "#a8271c",
    "#6d28d9",
    "#0e7490",
    "#be185d",
    "#4d7c0f",
)  # of clusters, in turn


def write(found: Mapping[str, Any], folder: str | Path) -> None:
    """Writes clusters.json, pairs.csv, benchmarks.csv and clusters.html."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "clusters.json").write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    names = found["benchmarks"]
    pairs = [("first", "second", "pearson", "low", "high", "spearman", "together")]
    for a, b in combinations(range(len(names)), 2):
        numbers = (
            found["pearson"][a][b],
            *found["pearson_interval"][a][b],
            found["spearman"][a][b],
            found["together"][a][b],
        )
        pairs.append((names[a], names[b], *(f"{number:.4f}" for number in numbers)))
    points = [("benchmark", "cluster", "component_1", "component_2")]
    for name, point in zip(names, found["pca"]["benchmarks"], strict=True):
        points.append((name, found["clusters"][name], *(f"{value:.4f}" for value in point)))
    for name, rows in (("pairs.csv", pairs), ("benchmarks.csv", points)):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    figures = [
        ("Dendrogram", "Average linkage of 1 - r. Colours are the clusters of the cut.", _dendrogram(found)),
        ("Correlations", "Pearson's r of each two benchmarks, in the dendrogram's order.", _matrix(found)),
        ("Principal components", "Each benchmark by its correlations with the first two components.", _plane(found)),
    ]
    sections = [
        f'<header><p class="eyebrow">jaxvlm</p><h1>Which benchmarks measure the same</h1><p>{len(found["models"])} models, '
        f"{len(names)} benchmarks; {found['resamples']:,} draws of the models.</p></header>",
        *(
            f'<section><h2>{title}</h2><figure class="card"><figcaption class="quiet">{text}</figcaption>'
            f'<div class="scroll">{figure}</div></figure></section>'
            for title, text, figure in figures
        ),
        f"<section><h2>Left out</h2><p>{escape('; '.join(found['left_out']) or 'nothing')}</p></section>",
    ]
    page = document("Benchmark clusters - jaxvlm", sections, STYLE)
    (folder / "clusters.html").write_text(page, encoding="utf-8")


def _order(found: Mapping[str, Any]) -> list[int]:
    """The leaves from top to bottom, so that no two branches cross."""
    count = len(found["benchmarks"])

    def leaves(node: int) -> list[int]:
        return (
            [node] if node < count else [x for child in found["linkage"][node - count][:2] for x in leaves(int(child))]
        )

    return leaves(2 * count - 2)


def _colour(found: Mapping[str, Any], leaf: int) -> str:
    return COLOURS[found["clusters"][found["benchmarks"][leaf]] % len(COLOURS)]


def _svg(width: float, height: float, label: str, parts: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def _text(x: float, y: float, words: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def _dendrogram(found: Mapping[str, Any]) -> str:
    names, order = found["benchmarks"], _order(found)
    ticks = axis_ticks(0.0, max(row[2] for row in found["linkage"]))
    scale = (WIDTH - LABEL - 30) / ticks[-1]
    bottom, parts = ROW * len(names) + 8, []
    for tick in ticks:
        x = LABEL + tick * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 18, f"{tick:g}", "middle"))
    places = {leaf: (LABEL, ROW * (i + 0.6)) for i, leaf in enumerate(order)}
    shade = {leaf: _colour(found, leaf) for leaf in order}
    for leaf, (x, y) in places.items():
        parts.append(_text(x - 8, y + 4, names[leaf], "end"))
    for step, (a, b, height, _) in enumerate(found["linkage"]):
        (xa, ya), (xb, yb), x = places[int(a)], places[int(b)], LABEL + height * scale
        colour = shade[int(a)] if shade[int(a)] == shade[int(b)] else "var(--quiet)"
        parts.append(f'<path d="M{xa:.1f} {ya:.1f}H{x:.1f}V{yb:.1f}H{xb:.1f}" stroke="{colour}" stroke-width="2"/>')
        places[len(names) + step], shade[len(names) + step] = (x, (ya + yb) / 2), colour
    return _svg(WIDTH, bottom + 24, "Dendrogram of the benchmarks", parts)


def _matrix(found: Mapping[str, Any]) -> str:
    names, order, values = found["benchmarks"], _order(found), np.array(found["pearson"])
    parts = []
    for row, a in enumerate(order):
        parts.append(_text(LABEL - 8, LABEL + CELL * row + 25, names[a], "end"))
        x = LABEL + CELL * row + 24
        parts.append(_text(x, LABEL - 8, names[a], more=f' transform="rotate(-60 {x:.1f} {LABEL - 8})"'))
        for column, b in enumerate(order):
            r, (low, high) = values[a, b], found["pearson_interval"][a][b]
            left, top = LABEL + CELL * column, LABEL + CELL * row
            fill = "var(--accent)" if r >= 0 else "var(--bad)"
            about = escape(f"{names[a]}, {names[b]}: {r:.2f} ({low:.2f} to {high:.2f})")
            parts.append(
                f'<g><title>{about}</title><rect x="{left}" y="{top}" width="{CELL - 2}" height="{CELL - 2}" fill="{fill}" '
                f'fill-opacity="{0.85 * r * r:.2f}"/>{_text(left + 19, top + 24, f"{r:.2f}", "middle", STRONG)}</g>'
            )
    size = LABEL + CELL * len(names)
    return _svg(size + 60, size + 4, "Correlations of the benchmarks", parts)


STRONG = ' class="number"'


def _plane(found: Mapping[str, Any]) -> str:
    pca, size = found["pca"], 620.0
    parts = [
        f'<line class="grid" x1="{size / 2}" x2="{size / 2}" y1="0" y2="{size}"/>',
        f'<line class="grid" x1="0" x2="{size}" y1="{size / 2}" y2="{size / 2}"/>',
        f'<circle class="grid" cx="{size / 2}" cy="{size / 2}" r="{size / 2 - 20}" fill="none"/>',
        _text(size - 4, size / 2 - 6, f"first, {100 * pca['shares'][0]:.0f} % of the variance", "end"),
        _text(size / 2 + 6, 14, f"second, {100 * pca['shares'][1]:.0f} %"),
    ]
    for leaf, (x, y) in enumerate(pca["benchmarks"]):
        left, top = (1 + x) * (size / 2 - 20) + 20, (1 - y) * (size / 2 - 20) + 20
        parts.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="5" fill="{_colour(found, leaf)}"/>')
        parts.append(_text(left + 9, top + 4, found["benchmarks"][leaf]))
    return _svg(size + 90, size, "Benchmarks in the plane of two components", parts)


def summary(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of a table: each cluster, its benchmarks, and how stable it is."""
    rows = [("cluster", "in draws together", "benchmarks")]
    for number, share in stability(found).items():
        members = [name for name, cluster in found["clusters"].items() if cluster == number]
        rows.append((str(number), f"{100 * share:.0f} %" if len(members) > 1 else "-", ", ".join(members)))
    return rows


STYLE = "svg { min-width: 620px; } svg text { fill: var(--ink); } svg .number { font-size: 11px; }"
