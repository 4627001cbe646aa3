"""`jaxvlm eval`'s verbs for what the papers asked about benchmarks, data and language models, beside scores."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxvlm.evals import cluster_page
from jaxvlm.evals import clusters as clustering


def clusters(argv: Sequence[str]) -> int:
    """Which benchmarks measure the same: correlations, dendrogram and principal components of models x benchmarks."""
    parser = argparse.ArgumentParser(prog="jaxvlm eval clusters", description=clusters.__doc__)
    parser.add_argument("table", help="CSV, a model a row, a benchmark a column (`jaxvlm eval compare --csv`)")
    parser.add_argument(
        "--clusters", type=int, default=4, help="how many the dendrogram is cut into (4, as Cambrian's)"
    )
    parser.add_argument("--groups", metavar="FILE", help="CSV of benchmark,group: a grouping to compare with")
    parser.add_argument("--resamples", type=int, default=1000, help="draws of the models (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="figures, CSV and JSON go there")
    options = parser.parse_args(argv)
    table = clustering.read_table(options.table)
    groups = clustering.read_groups(options.groups, table.benchmarks) if options.groups else None
    more = {"groups": groups, "resamples": options.resamples, "seed": options.seed}
    found = clustering.analyse(table, options.clusters, **more)
    cluster_page.write(found, options.out)
    print(
        f"{len(table.models)} models, {len(table.benchmarks)} benchmarks. First component: "
        f"{100 * found['pca']['shares'][0]:.0f} % of the variance.\n"
    )
    print(columns(cluster_page.summary(found)))
    for line in table.left_out:
        print(f"  left out: {line}")
    if len(table.models) < clustering.FEW:
        print(f"  With {len(table.models)} models correlations say little; look at their intervals in pairs.csv.")
    if groups:
        said = found["agreement"]
        print(
            f"\n  within the groups r = {said['within']:.2f}, between {said['between']:.2f} (p = {said['p']:.4f}); "
            f"clusters against groups: adjusted Rand {said['adjusted_rand']:.2f} (p = {said['adjusted_rand_p']:.4f})"
        )
    print(f"\nWritten to {options.out}; open clusters.html in a browser.")
    return 0


# -------------------------------------------------------------------------------------------------------------- output


def save(result: dict[str, Any], path: str | Path) -> None:
    """Writes a result as JSON."""
    Path(path).write_text(json.dumps(result, ensure_ascii=False, indent=1, default=str) + "\n", encoding="utf-8")


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells as text, set in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
