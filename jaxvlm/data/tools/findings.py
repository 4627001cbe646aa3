"""What a check found, as lines of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of a report: `mark` is ok, note (nothing to do) or problem (its user must act), `advice` says how."""

    mark: str
    name: str
    value: str
    advice: tuple[str, ...] = ()


def show(title: str, findings: Iterable[Finding], out: Callable[[str], object]) -> None:
    """Prints findings under a title."""
    out(f"\n{title}")
    for finding in findings:
        out(f"  {finding.mark:<8}{finding.name:<20} {finding.value}")
        for line in finding.advice:
            out(f"{'':10}-> {line}")


def text_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Aligned lines, the first column to the left and the others to the right."""
    rows = [heads, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    return lines


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first of many, as in 'a, b, c and 97 more'."""
    rest = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
