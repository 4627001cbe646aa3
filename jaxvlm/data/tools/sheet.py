"""Samples as a contact sheet: one HTML file with their pictures, what is supervised marked, for a phone and a desk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from jaxvlm.data import DataError
from jaxvlm.data.image import load_image
from jaxvlm.data.tools.samples import Picture, Run, Sample, counts, image_facts
from jaxvlm.html import document, picture


def contact_sheet(title: str, facts: str, samples: Sequence[tuple[Sample, Callable]]) -> str:
    """The page. Each sample comes with the function that gives the content of an image by its name."""
    cards = "\n".join(_card(sample, content) for sample, content in samples)
    marks = "".join(
        _painted(run)
        for run in (
            Run("text", "supervised", True),
            Run("text", " given ", False),
            Run("image", "1", False),
            Run("text", " ", False),
            Run("special", "special token", False),
        )
    )
    header = (
        f'<header>\n<p class="eyebrow">jaxvlm data inspect</p>\n<h1>{escape(title)}</h1>\n<p>{escape(facts)}</p>\n'
        f'<p class="legend text">{marks}</p>\n</header>'
    )
    return document(f"{title} - jaxvlm data", [header, f'<section class="sheet">\n{cards}\n</section>'], STYLE)


def _card(sample: Sample, content: Callable) -> str:
    pictures = "".join(_picture(i, image, content) for i, image in enumerate(sample.images, 1))
    lines = [f'<p class="quiet">{counts(sample)}</p>'] if sample.length is not None else []
    lines += [f'<p class="note">{escape(note)}</p>' for note in sample.notes]
    lines += [f'<p class="error">unusable: {escape(sample.error)}</p>'] if sample.error else []
    text = "".join(map(_painted, sample.runs))
    return (
        f'<article class="card">\n<h2>{escape(sample.source)} <span class="quiet">record {sample.number}, id '
        f'{escape(str(sample.identity))}</span></h2>\n<div class="pictures">{pictures}</div>\n{"".join(lines)}\n'
        f'<p class="text" tabindex="0">{text}</p>\n</article>'
    )


def _picture(number: int, image: Picture, content: Callable) -> str:
    shown = f'<span class="missing">{escape(image.seen.fault)}</span>'
    if not image.seen.fault:
        try:
            shown = picture(load_image(content(image.name), image.title), f"image {number}, {image.title}")
        except DataError:
            shown = '<span class="missing">does not decode</span>'
    return (
        f'<figure>{shown}<figcaption><span class="image">image {number}</span> {escape(image.title)}<br>'
        f'<span class="quiet">{escape(image_facts(image))}</span></figcaption></figure>'
    )


def _painted(run: Run) -> str:
    if run.kind == "image":
        return f'<span class="image">image {run.text}</span>'
    text = escape(run.text).replace("\n", '<span class="newline">&#8629;</span>\n')
    text = f'<span class="special">{text}</span>' if run.kind == "special" else text
    return f"<mark>{text}</mark>" if run.supervised else text


STYLE = """
:root { --image: #5b3fb5; --image-bg: #ebe6fa; }
@media (prefers-color-scheme: dark) { :root { --image: #c3b1ff; --image-bg: #2d2450; } }
.sheet { display: grid; gap: 16px; margin-top: 24px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr));
  align-items: start; }
.card h2 { font-size: 1rem; margin: 0 0 10px; overflow-wrap: anywhere; }
.card p { margin: 8px 0 0; }
.pictures { display: grid; gap: 10px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 160px), 1fr)); }
figure { margin: 0; min-width: 0; }
figure img, .missing { display: grid; place-items: center; width: 100%; height: 220px; object-fit: contain;
  background: var(--track); border-radius: 6px; color: var(--quiet); }
img.tiny { image-rendering: pixelated; }
figcaption { font-size: 0.8rem; font-weight: 400; margin: 4px 0 0; overflow-wrap: anywhere; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 0.85rem/1.6 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  max-height: 460px; overflow-y: auto; }
mark { color: var(--good); background: var(--good-bg); border-bottom: 2px solid var(--good); border-radius: 3px; }
.image { color: var(--image); background: var(--image-bg); border-radius: 4px; padding: 0 5px; font-size: 0.8rem; }
.special { text-decoration: underline dotted; font-weight: 600; }
.newline { color: var(--quiet); opacity: 0.7; }
.error { color: var(--bad); background: var(--bad-bg); border-radius: 6px; padding: 6px 10px; font-size: 0.875rem; }
.note { color: var(--quiet); border-left: 3px solid var(--line); padding-left: 10px; font-size: 0.875rem; }
"""
