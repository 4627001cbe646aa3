"""Pages of one file: everything in it (pictures, curves, styles), no script and no request to anywhere.

The house's look, for a phone and a desk, light and dark. Every room may import this leaf.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape

from PIL import Image

SECURITY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
THUMBNAIL = 480  # pixels


def document(title: str, sections: Sequence[str], style: str = "") -> str:
    """A whole page of sections; `style` is CSS after the house's own."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{SECURITY}">\n'
        f'<meta name="color-scheme" content="light dark">\n<style>\n{STYLE}{style}</style>\n</head>\n<body>\n<main>\n'
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def table(caption: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls by itself where the page is narrow; `heads` and `rows` (`<tr>` elements) are HTML."""
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def picture(image: Image.Image, alt: str) -> str:
    """An RGB image inside the page: small ones as they are (class `tiny`, to be enlarged in blocks), large ones reduced."""
    tiny = max(image.size) <= 160
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    data, form = io.BytesIO(), "PNG" if tiny else "JPEG"
    image.save(data, form, **({"optimize": True} if tiny else {"quality": 85}))
    uri = f"data:image/{form.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
    kind = ' class="tiny"' if tiny else ""
    return f'<img{kind} src="{uri}" width="{image.width}" height="{image.height}" alt="{escape(alt)}">'


def axis_ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, for an axis."""
    rough = (high - low or abs(high) or 1.0) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    step = max(1.0, round(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def percent(value: float) -> str:
    """0.785 as '78.5 %'."""
    return f"{100 * value:.1f}&#8239;%"


STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b2230; --quiet: #5b6577; --line: #dfe3ea;
  --track: #e9ecf2; --accent: #2563c9; --good: #16703c; --good-bg: #e2f4e9; --bad: #a8271c; --bad-bg: #fbe7e4; }
@media (prefers-color-scheme: dark) { :root { --page: #11151c; --card: #1a202a; --ink: #e7ebf2; --quiet: #a3adbd;
  --line: #2e3745; --track: #2a3240; --accent: #6ea3f7; --good: #7fd6a2; --good-bg: #16351f; --bad: #f5998f;
  --bad-bg: #421d19; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 64px; }
section { margin-top: 48px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0 0 14px; }
p { margin: 0 0 12px; max-width: 75ch; }
.quiet { color: var(--quiet); font-size: 0.875rem; font-weight: 400; }
.eyebrow { color: var(--accent); font-size: 0.8rem; font-weight: 650; letter-spacing: 0.06em;
  text-transform: uppercase; margin: 0 0 4px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0; padding: 16px 18px; }
figcaption { font-weight: 600; margin-bottom: 10px; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  margin-bottom: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 12px 18px 4px; color: var(--quiet); font-size: 0.875rem; }
th, td { padding: 8px 18px; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; font-weight: 600; color: var(--quiet); font-size: 0.8rem; }
th:first-child { text-align: left; font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 13px; fill: var(--quiet); font-variant-numeric: tabular-nums; }
svg path { fill: none; stroke-linejoin: round; }
.grid { stroke: var(--line); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 12px 28px;
  margin: 0 0 18px; }
.facts dt { color: var(--quiet); font-size: 0.8rem; } .facts dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow: auto; max-height: 520px; padding: 14px 18px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; font: 0.8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media print { body { background: none; } .card, .scroll { break-inside: avoid; } details { display: none; } }
"""
