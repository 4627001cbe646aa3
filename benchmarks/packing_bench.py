"""How full packed rows are, how well shuffled, and how long planning them takes, on lengths like those of the 665K mixture.

  python benchmarks/packing_bench.py [--large 10000000] [--out benchmarks/results/packing.json]

The lengths are synthetic: of each source its published number of records, and a log-normal number of text tokens whose median is
typical of it (so that a record has about 850 tokens in the mean, recipes §4.5), with 576 visual tokens for an image.

Of the shuffle it measures, against the uniform permutation that packing starts from:
  rank correlation   of the places of samples in the plan and in the permutation; 1: packing changes nothing
  moved              by how many places, in the mean and at most
  mix                over batches of 128 rows, the squared deviation of a source's number of samples from its share, divided by
                     what independent draws would give: the mean and the largest over sources; 1: as random draws
  drift              the rank correlation of a sample's length and its place; 0: no curriculum
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path

import numpy as np

BATCH = 128  # rows
# Of each source: records, whether they have an image, median text tokens (template included), spread of their logarithm.
SOURCES = {
    "llava": (157_712, 1, 260, 0.45),
    "sharegpt": (40_688, 0, 1500, 0.9),  # cut at 2,048
    "vqav2": (82_783, 1, 150, 0.35),
    "gqa": (72_140, 1, 280, 0.5),
    "okvqa": (8_998, 1, 68, 0.08),
    "ocrvqa": (80_000, 1, 165, 0.25),
    "aokvqa": (66_160, 1, 105, 0.1),
    "textcaps": (21_953, 1, 125, 0.25),
    "refcoco": (48_447, 1, 280, 0.5),
    "vg": (86_417, 1, 400, 0.12),
}


def mixture(count: int, row_length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths, tiles and sources of `count` samples in random order, int [count]."""
    rng = np.random.default_rng(seed)
    records, images, medians, spreads = np.asarray(list(SOURCES.values())).T
    source = rng.permutation(
        np.repeat(np.arange(len(records)), np.round(records * count / records.sum() + 0.5).astype(int))
    )[:count]
    text = np.round(medians[source] * np.exp(spreads[source] * rng.standard_normal(count)))
    text = np.where(images[source] > 0, text, np.minimum(text, 2048))
    tiles = images[source].astype(int)
    return np.clip(text + 576 * tiles, 45, row_length).astype(int), tiles, source


def quality(samples: np.ndarray, offsets: np.ndarray, lengths: np.ndarray, source: np.ndarray) -> dict[str, float]:
    """The measures of the shuffle above; `samples` are places in the permutation."""
    moved = np.abs(samples - np.arange(len(samples)))
    batch = np.repeat(np.arange(len(offsets) - 1) // BATCH, np.diff(offsets))
    whole = batch < (len(offsets) - 1) // BATCH
    sizes = np.bincount(batch[whole])  # [batches] samples
    ratios = []
    for one in range(source.max() + 1):
        share = (source == one).mean()
        counts = np.bincount(batch[whole], weights=source[samples[whole]] == one)
        ratios.append(((counts - sizes * share) ** 2 / (sizes * share * (1 - share))).mean())
    return {
        "rank_correlation": float(np.corrcoef(samples, np.arange(len(samples)))[0, 1]),
        "moved_mean": float(moved.mean()),
        "moved_most": int(moved.max()),
        "mix_mean": float(np.mean(ratios)),
        "mix_most": float(np.max(ratios)),
        "drift": float(
            np.corrcoef(lengths[samples].argsort(kind="stable").argsort(kind="stable"), np.arange(len(samples)))[0, 1]
        ),
    }


def measure(count: int, row_length: int) -> dict[str, float]:
    """Plans `count` samples and measures the rows."""
    from jaxvlm.data.packing import plan, slots_needed

    lengths, tiles, source = mixture(count, row_length)
    slots = slots_needed(lengths, tiles, row_length)
    start, cpu = time.perf_counter(), time.process_time()
    rows = plan(lengths, tiles, row_length, slots)
    took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    return {
        "samples": count,
        "row_length": row_length,
        "tiles_per_row": slots,
        "rows": len(rows),
        "token_fill": float(lengths.sum() / (len(rows) * row_length)),
        "tile_fill": float(tiles.sum() / (len(rows) * slots)),
        **quality(rows.samples, rows.offsets, lengths, source),
        **took,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=int, default=10_000_000, help="samples of the last, large plan")
    parser.add_argument("--out", default="", metavar="FILE")
    options = parser.parse_args()
    total = sum(records for records, *_ in SOURCES.values())
    runs = []
    for count, row_length in ((total, 2048), (total, 4096), (total, 8192), (options.large, 4096)):
        one = measure(count, row_length)
        runs.append(one)
        print(
            f"{count:>11,} samples, rows of {row_length} with {one['tiles_per_row']:>2} tile slots: "
            f"tokens {one['token_fill']:.3f}, slots {one['tile_fill']:.3f}; "
            f"rank correlation {one['rank_correlation']:.5f}, moved {one['moved_mean']:,.0f} (at most {one['moved_most']:,}), "
            f"mix {one['mix_mean']:.2f} (at most {one['mix_most']:.2f}), drift {one['drift']:+.3f}; "
            f"{one['seconds']:.1f} s ({one['cpu_seconds']:.1f} s of processor)",
            flush=True,
        )
    if options.out:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
        what = {"what": "packing on lengths like the 665K mixture's", "device": f"{platform.machine()}, one core"}
        what |= {"versions": {"numpy": np.__version__}, "commit": head}
        Path(options.out).write_text(json.dumps({**what, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
