"""`jaxvlm eval`'s verbs for what the papers asked about benchmarks, data and language models, beside scores."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxvlm.config import ConfigError
from jaxvlm.data.assets import resolve_assets
from jaxvlm.evals import answers, cluster_page, readers, tasks
from jaxvlm.evals import clusters as clustering
from jaxvlm.evals import language as lm
from jaxvlm.evals import leakage as leaks
from jaxvlm.evals import wording as words
from jaxvlm.evals.asking import picture_name


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


def leakage(argv: Sequence[str]) -> int:
    """Which of a benchmark's pictures are in the training data, by perceptual hashes, and results without them."""
    parser = argparse.ArgumentParser(prog="jaxvlm eval leakage", description=leakage.__doc__)
    parser.add_argument("--task", required=True, help="`jaxvlm eval tasks` lists them")
    parser.add_argument(
        "--references",
        required=True,
        type=resolve_assets,
        metavar="PATH",
        help="its official file or folder",
    )
    parser.add_argument("--split", default="", help="which split, where the files hold several")
    parser.add_argument(
        "--images", required=True, type=resolve_assets, metavar="FOLDER", help="the benchmark's pictures"
    )
    parser.add_argument(
        "--training",
        required=True,
        type=resolve_assets,
        metavar="PATH",
        help="a source, or a folder of pictures",
    )
    parser.add_argument(
        "--training-images",
        default="",
        type=resolve_assets,
        metavar="FOLDER",
        help="the pictures that it names",
    )
    parser.add_argument(
        "--distance",
        type=int,
        default=leaks.DISTANCE,
        help="bits that may differ (4); 0 is nearest to Cambrian's count",
    )
    parser.add_argument(
        "--result", metavar="FILE", help="of eval score or benchmark: its score without the pictures seen"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON: every picture that was found, and where")
    options = parser.parse_args(argv)
    references = tasks.read_references(options.task, options.references, options.split)
    result = read_result(options.result) if options.result else None
    if result and result["task"] != options.task:
        raise ConfigError(f"{options.result} is a result of {result['task']}, not of {options.task}.")
    shown = {one["id"]: picture_name(options.task, one, Path(options.images)) for one in references}
    named = sorted({name for name in shown.values() if name})
    files = [partial(str, Path(options.images, name)) for name in named]
    mine = leaks.hashes(files, "pictures of the benchmark", leaks.kept_file(options.images))
    bad = [name for name, pair in zip(named, mine, strict=True) if pair is None]
    if bad:
        raise ConfigError(f"{len(bad)} of the benchmark's pictures cannot be read, {bad[0]} among them.")
    pictures = leaks.training_pictures(options.training, options.training_images)
    kept = leaks.kept_file(options.training, options.training_images)
    theirs = leaks.hashes(list(pictures.values()), "pictures of training", kept)
    readable = {name: pair for name, pair in zip(pictures, theirs, strict=True) if pair}
    found = leaks.copies(dict(zip(named, mine, strict=True)), readable, options.distance)
    places = {copy.picture for copy in found}
    seen = {name for name, picture in shown.items() if picture in places}
    made: dict[str, Any] = {
        "task": options.task,
        "training": options.training,
        "distance": options.distance,
        "pictures": len(named),
        "training_pictures": len(readable),
        "unreadable": len(pictures) - len(readable),
        "seen_pictures": len(places),
        "seen_questions": sorted(seen),
        "copies": [copy._asdict() for copy in found],
    }
    share = 100 * len(places) / len(named)
    print(
        f"{options.task}: {len(places):,} of {len(named):,} pictures ({share:.2f} %) are among {len(readable):,} of training"
        f" ({made['unreadable']:,} unreadable); {len(seen):,} of {len(shown):,} questions are about them."
    )
    if result:
        made["score"] = leaks.without(result, references, seen)
        rows = [("questions", "n", made["score"]["headline"], "95 %")]
        for name in ("all", "clean", "seen"):
            one = made["score"][name]
            value = one["value"]
            shown_value = ("-", "") if value is None else (f"{value:.2f}", span(one["interval"]))
            rows.append((name, f"{one['n']:,}", *shown_value))
        print("\n" + columns(rows))
    save(made, options.out)
    return 0


def wording(argv: Sequence[str]) -> int:
    """How long answers are, how many are refusals, and what POPE and CHAIR say of hallucination."""
    parser = argparse.ArgumentParser(prog="jaxvlm eval wording", description=wording.__doc__)
    parser.add_argument(
        "--answers", action="append", default=[], metavar="NAME=FILE", help="a model's answers; repeat it"
    )
    parser.add_argument("--prompts", default="", metavar="FILE", help="the question file; rates are by its `category`")
    parser.add_argument(
        "--result", action="append", default=[], metavar="NAME=FILE", help="of eval score, of pope or chair"
    )
    parser.add_argument("--out", metavar="FILE", help="write everything there as JSON, each refusal with it")
    options = parser.parse_args(argv)
    asked, scored = named("--answers", options.answers), named("--result", options.result, several=True)
    if not options.answers and not options.result:
        raise ConfigError("Nothing to read: give --answers NAME=FILE, --result NAME=FILE, or both.")
    read = {name: answers.read_answers(file, options.prompts) for name, file in asked}
    made: dict[str, Any] = {
        "answers": {name: words.describe(records) for name, records in read.items()},
        "hallucination": {},
    }
    rows = [("answers", "category", "n", "words", "95 %", "median", "longest twentieth", "empty", "refused", "95 %")]
    for name, parts in made["answers"].items():
        for category, one in parts.items():
            length, refused = (span(one[name], 1) for name in ("words_interval", "refused_interval"))
            cells = (f"{one['words']:.1f}", length, f"{one['median']:.0f}", f"{one['p95']:.0f}", f"{one['empty']:,}")
            rows.append((name, category, f"{one['n']:,}", *cells, f"{one['refused']:.1f} %", refused))
    if read:
        print(columns(rows))
    for name, file in scored:
        result = read_result(file)
        if result["task"] not in words.HALLUCINATION:
            raise ConfigError(
                f"{file} is a result of {result['task']}; hallucination is read from {', '.join(words.HALLUCINATION)}."
            )
        numbers = {
            key: result["aggregate"][key] for key in words.HALLUCINATION[result["task"]] if key in result["aggregate"]
        }
        told, key = made["hallucination"].setdefault(name, {}), f"{result['task']} {result['protocol']}"
        if key in told:
            raise ConfigError(
                f"{name} has two results of {key}; {file} is the second. Give each run a name of its own."
            )
        told[key] = numbers
        shown = ", ".join(f"{key} {value:.2f}" for key, value in numbers.items())
        print(f"\n  {name}, {result['task']} ({result['protocol']}): {shown}")
    if options.out:
        save(made, options.out)
    return 0


def language(argv: Sequence[str]) -> int:
    """What tuning did to the language model: perplexity of a text and multiple choice by likelihood, without pictures."""
    parser = argparse.ArgumentParser(prog="jaxvlm eval language", description=language.__doc__)
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="a run or model; the first is what others are compared with",
    )
    parser.add_argument("--text", metavar="FILE", help="held-out text, UTF-8")
    parser.add_argument(
        "--mmlu", metavar="PATH", help="a CSV, or the folder with test/ and dev/ (five examples before each)"
    )
    parser.add_argument("--arc", metavar="FILE", help="JSONL, AI2's or the Hub's")
    parser.add_argument("--hellaswag", metavar="FILE", help="JSONL")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions of each")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--out", metavar="FILE", help="write everything there as JSON")
    options = parser.parse_args(argv)
    runs = dict(named("--run", options.run))
    asked = {name: getattr(options, name) for name in lm.READERS if getattr(options, name)}
    questions = {name: lm.READERS[name](path)[: options.limit] for name, path in asked.items()}
    text = Path(options.text).read_text(encoding="utf-8") if options.text else ""
    if not text and not questions:
        raise ConfigError("Nothing to ask: give --text, --mmlu, --arc or --hellaswag.")
    from jaxvlm.infer.engine import load

    made: dict[str, Any] = {"runs": {}, "changes": {}}
    for name, path in runs.items():
        engine = load(path, dtype=None)
        one = {"text": lm.perplexity(engine, text, batch_size=options.batch_size)} if text else {}
        one |= {task: lm.choose(engine, some, batch_size=options.batch_size) for task, some in questions.items()}
        made["runs"][name] = {"model": engine.fingerprint, **one}
        del engine
    before, *rest = runs
    for name in rest:
        made["changes"][name] = {
            task: lm.change(made["runs"][before][task], made["runs"][name][task])
            for task in ["text"] * bool(text) + list(questions)
        }
    rows = [("", "", *runs, *(f"{name} - {before}" for name in rest))]
    measures = [("text", m) for m in ("perplexity", "bits_per_byte", "loss") if text]
    for task, measure in measures + [(task, m) for task in questions for m in ("accuracy", "accuracy_norm")]:
        cells = [f"{made['runs'][name][task][measure]:.3f}" for name in runs]
        for name in rest:
            moved = made["changes"][name][task]
            around = moved.get(f"{measure}_interval")
            cells.append(
                f"{moved[measure]:+.3f}" + (f" ({around[0]:+.3f} to {around[1]:+.3f})" if around else "")
                if measure in moved
                else ""
            )
        rows.append((task, measure, *cells))
    print(columns(rows))
    if options.out:
        save(made, options.out)
    return 0


# ------------------------------------------------------------------------------------------------- what all verbs share


def named(option: str, texts: Sequence[str], several: bool = False) -> list[tuple[str, str]]:
    """(name, path) of each NAME=PATH that an option was given. Raises `ConfigError` where one of the two is missing, and for
    a name given twice, unless one may have `several`.
    """
    pairs = [text.partition("=")[::2] for text in texts]
    for text, pair in zip(texts, pairs, strict=True):
        if not all(pair):
            raise ConfigError(f"{option} {text}: give a name and a path, as in {option} mine=PATH.")
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice and not several:
        raise ConfigError(f"{option}: two are called {twice!r}; give each a name of its own.")
    return pairs


def read_result(path: str | Path) -> dict[str, Any]:
    """A result that `jaxvlm eval score --out` or `jaxvlm eval benchmark` wrote. Raises `ConfigError` for another file."""
    result = readers.read_json(Path(path))
    if not (isinstance(result, dict) and {"task", "protocol", "aggregate", "per_sample"} <= result.keys()):
        raise ConfigError(f"{path} is no result: `jaxvlm eval score --out` and `jaxvlm eval benchmark` write them.")
    return result


def span(interval: Sequence[float], digits: int = 2) -> str:
    """An interval in words."""
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def save(result: dict[str, Any], path: str | Path) -> None:
    """Writes a result as JSON."""
    Path(path).write_text(json.dumps(result, ensure_ascii=False, indent=1, default=str) + "\n", encoding="utf-8")


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells as text, set in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
