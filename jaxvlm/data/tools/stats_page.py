"""The numbers of `jaxvlm data stats` as a page: a table, the lengths of each source, the sizes of its images."""

from __future__ import annotations

import math
from html import escape

from jaxvlm.html import axis_ticks, document, percent, table

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 340, 170, 44, 22, 8, 18  # of a histogram, in SVG units
SIDE = 240  # of a map of sizes


def stats_page(title: str, facts: str, made: dict) -> str:
    """The page of what `summary` returned."""
    groups = made["groups"]
    lengths = "\n".join(_lengths(name, group, made) for name, group in groups.items())
    sizes = "\n".join(_sizes(name, group) for name, group in groups.items() if "image_histogram" in group)
    sections = [_header(title, facts, made), _table(made)]
    sections.append(
        f'<section aria-labelledby="lengths"><h2 id="lengths">Lengths in {made["unit"]}</h2>\n<p class="quiet">Records of '
        f'each length, visual tokens included; the lines are the median and the 95th percentile.</p>\n<div class="charts">'
        f"{lengths}</div></section>"
    )
    if sizes:
        sections.append(
            '<section aria-labelledby="sizes"><h2 id="sizes">Image sizes</h2>\n<p class="quiet">Width and height in pixels, '
            "on scales that double; the stronger a cell, the more images. The diagonal is a square.</p>\n"
            f'<div class="maps">{sizes}</div></section>'
        )
    return document(f"{title} - jaxvlm data", sections, STYLE)


def _header(title: str, facts: str, made: dict) -> str:
    every = list(made["groups"].values())[-1]
    numbers = {
        "records": f"{every['records']:,}",
        made["unit"]: _short(every["length"]["total"]),
        "supervised": percent(every["supervised_share"]),
        "images": _short(every["images"]),
    }
    if "packed_fill" in every:
        numbers["of packed rows filled"] = percent(every["packed_fill"])
    if made["unusable"]:
        numbers["records left out"] = f"{made['unusable']:,}"
    shown = "".join(f"<li><strong>{value}</strong> {escape(name)}</li>" for name, value in numbers.items())
    return (
        f'<header>\n<p class="eyebrow">jaxvlm data stats</p>\n<h1>{escape(title)}</h1>\n<p>{escape(facts)}</p>\n'
        f'<ul class="numbers">{shown}</ul>\n</header>'
    )


def _table(made: dict) -> str:
    packed = made["unit"] == "tokens"
    heads = ["Source", "Records", made["unit"].capitalize(), "Median", "95&#8239;%", "Longest", "Supervised", "Images"]
    heads += ["Median size", "Cut"] + ["Packed fill", "Tile fill", "Unpacked fill"] * packed
    rows = []
    for name, group in made["groups"].items():
        length, size = group["length"], group.get("image_size")
        cells = [f"{group['records']:,}", _short(length["total"]), f"{length['median']:,.0f}", f"{length['95%']:,.0f}"]
        cells += [f"{length['max']:,}", percent(group["supervised_share"]), f"{group['images']:,}"]
        cells += ["{:.0f}&#8239;x&#8239;{:.0f}".format(*size["median"]) if size else "&ndash;", f"{group['cut']:,}"]
        if packed:
            tiles = percent(group["packed_tile_fill"]) if group["images"] else "&ndash;"
            cells += [percent(group["packed_fill"]), tiles, percent(group["unpacked_fill"])]
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    note = ""
    if packed:
        one = len(rows) == 1
        slots = list(made["groups"].values())[-1]["tiles_per_row"]
        note = (
            f'<p class="quiet">Fill: the part of rows of {made["row_length"]:,} tokens that holds something, '
            f"{'packed' if one else 'each source packed by itself (the last line: all together)'} and with one conversation "
            f"a row. Tile fill: of its tile slots, {'' if one else 'in the last line '}{slots} a row. Cut: records longer than a "
            "row.</p>"
        )
    return f'<section aria-label="Sources">{table("By source", heads, rows)}{note}</section>'


def _lengths(name: str, group: dict, made: dict) -> str:
    edges, counts = group["length_histogram"]["edges"], group["length_histogram"]["records"]
    top, high = edges[-1], max(counts)
    marks = axis_ticks(0, high, 3, whole=True)
    high = max(high, marks[-1])

    def x(value: float) -> float:
        return LEFT + value / top * (WIDTH - LEFT - RIGHT)

    def y(count: float) -> float:
        return HEIGHT - BOTTOM - count / high * (HEIGHT - TOP - BOTTOM)

    grid = "".join(
        f'<path class="grid" d="M{LEFT} {y(mark):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{_short(mark)}</text>'
        for mark in marks
    )
    bars = "".join(
        f'<rect class="bar" x="{x(a) + 0.5:.1f}" y="{y(count):.1f}" width="{max(x(b) - x(a) - 1, 0.5):.1f}" '
        f'height="{y(0) - y(count):.1f}"/>'
        for a, b, count in zip(edges, edges[1:], counts, strict=False)
        if count
    )
    lines = "".join(
        f'<path class="line" d="M{x(group["length"][key]):.1f} {TOP}V{y(0):.1f}"/>' for key in ("median", "95%")
    )
    below = "".join(
        f'<text x="{x(mark):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{mark:,.0f}</text>'
        for mark in axis_ticks(0, top, 4, whole=True)
        if mark <= top
    )
    length = group["length"]
    label = f"Lengths of {name}: median {length['median']:.0f}, 95 % under {length['95%']:.0f}, longest {length['max']}"
    return (
        f'<figure class="card"><figcaption>{escape(name)} <span class="quiet">{group["records"]:,} records, '
        f'{percent(group["supervised_share"])} supervised</span></figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{grid}{bars}{lines}{below}</svg></figure>\n'
    )


def _sizes(name: str, group: dict) -> str:
    """A map of image sizes: a cell for each quarter of a doubling of width and height."""
    edges, cells = group["image_histogram"]["edges"], group["image_histogram"]["width_height_images"]
    low, high = math.log2(edges[0]), math.log2(edges[-1])
    most = max(count for *_, count in cells)
    scale = (SIDE - LEFT - RIGHT) / (high - low)
    floor = SIDE - LEFT - RIGHT + TOP

    def place(power: float) -> float:
        return (power - low) * scale

    drawn = "".join(
        f'<rect class="bar" x="{LEFT + place(math.log2(edges[i])):.1f}" y="{floor - place(math.log2(edges[j + 1])):.1f}" '
        f'width="{scale / 4:.1f}" height="{scale / 4:.1f}" opacity="{0.2 + 0.8 * math.log1p(count) / math.log1p(most):.2f}"/>'
        for i, j, count in cells
    )
    grid = "".join(
        f'<path class="grid" d="M{LEFT} {floor - place(p):.1f}H{LEFT + place(high):.1f}M{LEFT + place(p):.1f} '
        f'{floor - place(high):.1f}V{floor:.1f}"/><text x="{LEFT - 6}" y="{floor - place(p) + 4:.1f}" text-anchor="end">{2**p}'
        f'</text><text x="{LEFT + place(p):.1f}" y="{floor + 16:.1f}" text-anchor="middle">{2**p}</text>'
        for p in range(math.ceil(low), math.floor(high) + 1, 2)
    )
    label = "Image sizes of {}: median {:.0f} x {:.0f}".format(name, *group["image_size"]["median"])
    counts = group["images_per_record"]
    each = (
        "" if list(counts) == [1] else "; of a record: " + ", ".join(f"{n} in {count:,}" for n, count in counts.items())
    )
    return (
        f'<figure class="card"><figcaption>{escape(name)} <span class="quiet">{group["images"]:,} images{each}</span>'
        f'</figcaption><svg viewBox="0 0 {SIDE} {floor + BOTTOM:.0f}" role="img" aria-label="{escape(label)}">{grid}<path '
        f'class="line" d="M{LEFT} {floor:.1f}L{LEFT + place(high):.1f} {floor - place(high):.1f}"/>{drawn}</svg></figure>\n'
    )


def _short(count: float) -> str:
    """1234567 as '1.2M'."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            value = count / (1e3 if letter == "k" else size)
            return f"{value:.1f}".removesuffix(".0") + letter
    return f"{count:,.0f}"


STYLE = """
main { max-width: 1140px; }
th, td { padding: 8px 9px; }
th:first-child { padding-left: 18px; }
.charts, .maps { display: grid; gap: 16px; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.maps { grid-template-columns: repeat(auto-fill, minmax(min(100%, 230px), 1fr)); }
figcaption .quiet { display: block; font-size: 0.8rem; }
.bar { fill: var(--accent); }
.line { stroke: var(--quiet); stroke-dasharray: 3 3; }
.numbers { list-style: none; display: flex; flex-wrap: wrap; gap: 8px 32px; margin: 20px 0 0; padding: 0; }
.numbers strong { display: block; font-size: 1.8rem; line-height: 1.2; color: var(--accent); }
"""
