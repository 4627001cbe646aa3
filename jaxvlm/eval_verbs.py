"""`jaxvlm eval VERB`: benchmarks without a model: what there is, scores of answers on file, submissions."""

from __future__ import annotations

import argparse
import csv
import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxvlm.config import ConfigError
from jaxvlm.data.assets import resolve_assets
from jaxvlm.evals import answers, judges, readers, submissions, tasks
from jaxvlm.evals.asking import draw, write_questions
from jaxvlm.evals.blind import BLIND_MODES
from jaxvlm.evals.compare import RESAMPLES, z_scores
from jaxvlm.evals.compare import compare as compare_runs
from jaxvlm.evals.compare import intervals as intervals_of
from jaxvlm.evals.exactness import check_in_words, exact_check
from jaxvlm.evals.scoring import score as score_answers
from jaxvlm.evals.seeing import seeing, seeing_in_words
from jaxvlm.infer.answers import answer_requests, merged, read_requests, settings, speed, speed_in_words
from jaxvlm.study_verbs import clusters, columns, language, leakage, named, read_result, save, span, wording

USAGE = """jaxvlm eval: evaluate a run, and score answers that any program wrote.

  jaxvlm eval --run WORKDIR     evaluate a run on its config's questions (`jaxvlm eval --run WORKDIR --help`)
  jaxvlm eval tasks [TASK]      the benchmarks and their protocols
  jaxvlm eval benchmark --task T --protocol P --references R --images DIR --run RUN --out DIR    ask a model and score it
  jaxvlm eval questions --task T --protocol P --references R --images DIR --out Q    what a model is asked, sighted or blind
  jaxvlm eval score     --task T --protocol P --references R --answers A             score answers; no model is run
  jaxvlm eval export    --task T --protocol P --references R --answers A --out F     the benchmark's submission file
  jaxvlm eval compare   --run NAME=RESULT.json --run ... --references R              which differences are more than noise
  jaxvlm eval clusters  TABLE.csv --out DIR             which benchmarks measure the same
  jaxvlm eval leakage   --task T --references R --images DIR --training PATH --out F  which pictures training has seen
  jaxvlm eval wording   --answers NAME=A --prompts Q    length and refusals; with --result hallucination
  jaxvlm eval language  --run before=RUN --run after=RUN --text F --mmlu DIR    what tuning did to the language model

A is LLaVA's answer JSONL, `jaxvlm generate`'s, or an official submission; R is what `jaxvlm eval tasks T` says. Example:
  jaxvlm eval score --task gqa --protocol llava15 --answers merge.jsonl --references testdev_balanced_questions.json
"""


def show_tasks(argv: Sequence[str]) -> int:
    """The benchmarks and their protocols; with the name of one, what it reads and how each protocol scores it."""
    parser = argparse.ArgumentParser(prog="jaxvlm eval tasks", description=show_tasks.__doc__)
    parser.add_argument("task", nargs="?")
    parser.add_argument("--markdown", action="store_true", help="the table of docs/evaluation.md")
    options = parser.parse_args(argv)
    name = options.task
    if options.markdown:
        print("\n".join(_markdown()))
        return 0
    if not name:
        rows = [("task", "benchmark", "protocols")]
        rows += [(name, task.title, ", ".join(task.protocols)) for name, task in tasks.TASKS.items()]
        print(columns(rows))
        return 0
    task = tasks.find_task(name)
    splits = ", ".join(f"{split} ({count:,})" for split, count in task.splits.items()) or "not listed"
    print(f"{task.title}\n  reads       {task.files}\n  splits      {splits}")
    print(f"  submission  {'yes' if name in submissions.WRITERS else 'none'}\n")
    rows = [("protocol", "takes", "papers print", "")]
    rows += [(key, how.takes, how.headline, how.note) for key, how in task.protocols.items()]
    print(columns(rows))
    return 0


def _markdown() -> Iterator[str]:
    yield "| task | benchmark, its splits | reads | protocols: what papers print | submission |"
    yield "|---|---|---|---|---|"
    for name, task in tasks.TASKS.items():
        splits = "".join(f"; {split}: {count:,}" for split, count in task.splits.items())
        protocols = "<br>".join(
            f"`{key}`: {how.headline}" + f", by {how.takes}" * (how.takes != "text") + f" ({how.note})" * bool(how.note)
            for key, how in task.protocols.items()
        )
        files = task.files.replace("*", r"\*")
        yield f"| `{name}` | {task.title}{splits} | {files} | {protocols} | {'yes' if name in submissions.WRITERS else ''} |"


def questions(argv: Sequence[str]) -> int:
    """Write what a model is asked, sighted or blind, as a question file for `jaxvlm generate --input` and LLaVA's scripts."""
    parser = argparse.ArgumentParser(prog="jaxvlm eval questions", description=questions.__doc__)
    _asked(parser)
    parser.add_argument(
        "--images",
        default="",
        type=resolve_assets,
        metavar="FOLDER",
        help="the benchmark's pictures; those inside a .tsv (MMBench) are written there",
    )
    blind = [mode or "none" for mode in BLIND_MODES]
    parser.add_argument(
        "--blind", default="none", choices=blind, help="what is shown in place of a picture (default: itself)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --blind shuffle")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSONL; grey pictures are written beside it")
    options = parser.parse_args(argv)
    tasks.find(options.task, options.protocol)
    references = tasks.read_references(options.task, options.references, options.split)
    if options.images and Path(options.references).suffix == ".tsv":
        readers.save_pictures(Path(options.references), Path(options.images))
    more = {"images": options.images, "blind": options.blind.replace("none", ""), "seed": options.seed}
    count = write_questions(options.task, options.protocol, references, options.out, **more)
    print(f"{options.out}: {count:,} questions. To answer them:")
    print(f"  jaxvlm generate --run RUN --input {options.out} --images {options.images or '.'} --output answers.jsonl")
    return 0


def benchmark(argv: Sequence[str]) -> int:
    """Ask a model a benchmark's questions and score its answers; with --blind once more without seeing. Goes on where it
    was stopped."""
    parser = argparse.ArgumentParser(prog="jaxvlm eval benchmark", description=benchmark.__doc__)
    _asked(parser)
    parser.add_argument("--run", required=True, metavar="PATH", help="a run's --workdir, or a model in any format")
    parser.add_argument(
        "--images", required=True, type=resolve_assets, metavar="FOLDER", help="the benchmark's pictures"
    )
    parser.add_argument(
        "--blind", default="none", choices=["none", *BLIND_MODES[1:]], help="what the second run is shown"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="about N questions, drawn by --seed; pairs and circles stay whole"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument(
        "--exact", action="store_true", help="an answer never depends on what is asked beside it; slower"
    )
    parser.add_argument(
        "--check",
        type=int,
        metavar="N",
        help="ask N questions, drawn by --seed, again in the exact mode and say how many answers differ (default: 2 %% of "
        "them, at least 16; 0: none)",
    )
    parser.add_argument(
        "--part",
        type=_part,
        default=(0, 1),
        metavar="I/N",
        help="only answer, as process I (from 0) of N that share --out; without it, score what they answered",
    )
    _intervals(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="questions, answers and results go there")
    options = parser.parse_args(argv)
    _, how = tasks.find(options.task, options.protocol)
    if how.takes == "judgement":
        raise ConfigError(
            f"{options.task} is rated by another model: jaxvlm eval questions, generate, then eval score."
        )
    if options.check is not None and options.check < 0:
        raise ConfigError(f"--check {options.check}: say how many questions to ask again, 0 for none.")
    references = tasks.read_references(options.task, options.references, options.split)
    references = draw(references, options.limit, options.seed) if options.limit else references
    from jaxvlm.infer.engine import load

    engine, results = load(options.run, dtype=None), []
    engine.exact = options.exact
    how_asked = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
    how_asked["model_id"] = Path(options.run).name
    for mode in [""] + [options.blind] * (options.blind != "none"):
        name = (mode or "sighted") + f"-{options.seed}" * (mode == "shuffle")
        asked, made, again, scored = (
            Path(options.out) / f"{name}-{end}"
            for end in ("questions.jsonl", "answers.jsonl", "exact.jsonl", "result.json")
        )
        write_questions(
            options.task, options.protocol, references, asked, images=options.images, blind=mode, seed=options.seed
        )
        requests = read_requests(asked, Path(options.images))
        answer_requests(engine, requests, made, part=options.part, label=name, **how_asked)
        if options.part[1] > 1:
            continue
        found = merged(made, [request["id"] for request in requests])
        result = score_answers(options.task, options.protocol, found, references, split=options.split)
        if options.intervals:
            result["intervals"] = intervals_of(result, references, resamples=options.intervals)
        result |= {"blind": mode, "settings": settings(found), "speed": speed(found)}
        result["exact_check"] = exact_check(
            engine, requests, found, again, count=options.check, seed=options.seed, **how_asked
        )
        results.append(result)
        if mode and None not in (results[0]["value"], result["value"]):
            result["seeing"] = seeing(*results, references, resamples=options.intervals or RESAMPLES, seed=options.seed)
        save(result | {"images": str(Path(options.images).absolute())}, scored)
        print(f"\n{name}: {_summary(result)}\n")
    if results:  # for `jaxvlm report`
        complete = readers.completed(references, tasks.find_task(options.task).complete)
        kept = "".join(json.dumps(one, ensure_ascii=False, default=str) + "\n" for one in complete)
        (Path(options.out) / "references.jsonl").write_text(kept, encoding="utf-8")
    if len(results) > 1 and "seeing" in results[1]:
        print(seeing_in_words(results[1]["seeing"]))
    return 0


def score(argv: Sequence[str]) -> int:
    """Score answers on file as a paper does. No model is run, but for a judge where the benchmark has one."""
    parser = _parser("score", score.__doc__)
    parser.add_argument("--model", default="", help="the model that answered (default: what the answers say)")
    parser.add_argument("--subset", action="store_true", help="score the questions that were answered")
    _intervals(parser)
    parser.add_argument(
        "--out", metavar="FILE", help="write the whole result there, every answer's score with it, as JSON"
    )
    judge = parser.add_argument_group("benchmarks whose answers another model rates")
    judge.add_argument("--judgements", metavar="FILE", help="the ratings: read, or written with --judge")
    judge.add_argument("--judge", metavar="URL", help="ask the server at this address, as in http://127.0.0.1:8000/v1")
    judge.add_argument("--judge-model", metavar="NAME", help="its model")
    judge.add_argument("--judge-prompt", metavar="FILE", help="MM-Vet's few-shot prompt, or LLaVA's rule.json")
    options = parser.parse_args(argv)
    _, how = tasks.find(options.task, options.protocol)
    references, found = _read(options)
    if how.takes == "judgement":
        found = _judged(options, references, found)
    result = score_answers(
        options.task,
        options.protocol,
        found,
        references,
        split=options.split,
        model=options.model,
        subset=options.subset,
    )
    if options.intervals:
        result["intervals"] = intervals_of(result, references, resamples=options.intervals)
    print(_summary(result))
    if options.out:
        save(result, Path(options.out))
        print(f"\nWritten to {options.out}.")
    return 0


def export(argv: Sequence[str]) -> int:
    """Write answers as the file that the benchmark's own code or server takes."""
    parser = _parser("export", export.__doc__)
    parser.add_argument("--out", required=True, metavar="PATH", help="the file to write; a folder for MME and POPE")
    options = parser.parse_args(argv)
    tasks.find(options.task, options.protocol)
    references, found = _read(options)
    count = submissions.export(options.task, options.protocol, found, references, options.out)
    print(f"{options.out}: {count:,} answers.")
    return 0


def compare(argv: Sequence[str]) -> int:
    """Which differences between runs are more than noise: intervals, paired tests, and z-scores over benchmarks."""
    parser = argparse.ArgumentParser(prog="jaxvlm eval compare", description=compare.__doc__)
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        metavar="NAME=FILE[,FILE]",
        help="a run and its results (of eval score or benchmark), one a benchmark; more of one benchmark are other seeds",
    )
    parser.add_argument(
        "--references", action="append", required=True, metavar="[TASK=]PATH", help="each benchmark's official file"
    )
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help=f"draws of the bootstrap ({RESAMPLES})")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--out", metavar="FILE", help="write everything there as JSON")
    parser.add_argument("--csv", metavar="FILE", help="write a table there, runs by benchmarks")
    options = parser.parse_args(argv)
    if options.resamples < 100:
        raise ConfigError(f"--resamples {options.resamples}: an interval takes 100 draws or more.")
    found = _results(options.run)
    places = dict(text.split("=", 1) if "=" in text else ("", text) for text in options.references)
    made, values = [], {}
    for (task, protocol), results in found.items():
        path = places.get(task) or (places.get("") if len({task for task, _ in found}) == 1 else None)
        if path is None:
            raise ConfigError(f"--references {task}=PATH is needed: the official file of {task}.")
        split = next(iter(results.values()))[0]["split"]
        references = tasks.read_references(task, path, split if tasks.find_task(task).split_in_files else "")
        one = compare_runs(results, references, resamples=options.resamples, seed=options.seed)
        made.append(one)
        values[f"{task} {protocol}"] = {name: run["value"] for name, run in one["runs"].items()}
        print(_compared(one) + "\n")
    whole = {name: runs for name, runs in values.items() if len(runs) == len(options.run)}
    scores = z_scores(whole) if len(whole) > 1 else None
    if scores:
        heads = ("z-scores", *whole, "mean")
        print(columns([heads, *((run, *(f"{zs[name]:+.2f}" for name in heads[1:])) for run, zs in scores.items())]))
    if options.out:
        save({"benchmarks": made, "z_scores": scores}, Path(options.out))
    if options.csv:
        with Path(options.csv).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["run", *values])
            names = dict.fromkeys(name for runs in values.values() for name in runs)
            writer.writerows([name, *(runs.get(name, "") for runs in values.values())] for name in names)
    return 0


def _results(runs: Sequence[str]) -> dict[tuple[str, str], dict[str, list[dict]]]:
    """Results by benchmark (task, protocol) and by the name of the run."""
    found: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for name, files in named("--run", runs):
        for file in files.split(","):
            result = read_result(file)
            found.setdefault((result["task"], result["protocol"]), {}).setdefault(name, []).append(result)
    return found


def _compared(one: dict[str, Any]) -> str:
    lines = [f"{one['task']}, {one['protocol']}: {one['headline']}, {one['n']:,} questions, {one['resamples']:,} draws"]
    rows = [("run", "value", "95 %", "seeds", "deviation")]
    for name, run in one["runs"].items():
        spread = "" if run["deviation"] is None else f"{run['deviation']:.2f}"
        rows.append((name, f"{run['value']:.2f}", span(run["interval"]), str(run["seeds"]), spread))
    lines += ["", columns(rows), ""]
    rows = [("difference", "", "95 %", "p", "corrected", "McNemar", "")]
    for pair in one["pairs"]:
        exact = "" if pair["mcnemar"] is None else f"{pair['mcnemar']:.4f}"
        names = f"{pair['first']} - {pair['second']}"
        cells = (
            f"{pair['difference']:+.2f}",
            span(pair["interval"]),
            f"{pair['p']:.4f}",
            f"{pair['p_holm']:.4f}",
            exact,
        )
        rows.append((names, *cells, "within noise" if pair["noise"] else "real"))
    return "\n".join([*lines, columns(rows)])


def _parser(verb: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"jaxvlm eval {verb}", description=description)
    _asked(parser)
    parser.add_argument("--answers", required=True, metavar="FILE", help="the model's answers")
    parser.add_argument(
        "--questions", default="", metavar="FILE", help="LLaVA's question file (needed for its POPE answers)"
    )
    return parser


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, as in 0/4.")
    return int(index), int(count)


def _intervals(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--intervals",
        type=int,
        default=0,
        metavar="DRAWS",
        help="95 %% intervals of all numbers, by so many draws (1000)",
    )


def _asked(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, help="`jaxvlm eval tasks` lists them")
    parser.add_argument("--protocol", required=True, help="llava15, prismatic, cambrian, official, jaxvlm")
    parser.add_argument(
        "--references",
        required=True,
        type=resolve_assets,
        metavar="PATH",
        help="the benchmark's official file or folder",
    )
    parser.add_argument("--split", default="", help="which split, where the files hold several; otherwise only a name")


def _read(options: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    references = tasks.read_references(options.task, options.references, options.split)
    return references, answers.read_answers(options.answers, options.questions)


def _judged(options: argparse.Namespace, references: list[dict], found: list[dict]) -> list[dict]:
    """The answers with their judgements, from the file, or asked for and kept in it."""
    if not options.judgements or bool(options.judge) != bool(options.judge_model and options.judge_prompt):
        raise ConfigError(
            f"{options.task} is rated by another model: give --judgements FILE, or with it --judge URL, --judge-model NAME "
            "and --judge-prompt FILE."
        )
    matched = answers.match(found, references, options.subset)
    if not options.judge:
        return judges.judged_answers(matched, judges.read_judgements(options.judgements))
    texts = {name: answer["text"] for name, answer in matched.items()}
    judgements = judges.judge(
        options.task,
        texts,
        [reference for reference in references if reference["id"] in texts],
        judges.server(options.judge, options.judge_model),
        Path(options.judge_prompt).read_text(encoding="utf-8"),
        options.judgements,
    )
    return judges.judged_answers(matched, judgements)


def _summary(result: dict[str, Any]) -> str:
    """The result without its answers, as plain text."""
    value = "not among these questions" if result["value"] is None else f"{result['value']:.2f}"
    lines = [f"{result['task']}, {result['protocol']}: {result['headline']} {value}", ""]
    judge = result["judge"]
    facts = {
        "questions": f"{result['n']:,}, split: {result['split']}",
        "not understood": f"{result['invalid']:,} answers",
        "model": result["model"],
        "judge": judge and f"{judge['model']}, prompt {judge['prompt']}",
        "prompt": result["prompt"]
        and f"{result['prompt']} (of answers to it: {result['prompts_as_asked'] or 'not said'})",
        "speed": speed_in_words(result.get("speed")),
        "in exact mode": check_in_words(result.get("exact_check")),
    }
    lines += [f"  {name:16}{value}" for name, value in facts.items() if value]
    notes = [sample["note"] for sample in result["per_sample"] if "note" in sample]
    lines += [f"  {'scored 0':16}{notes.count(note):,} answers: {note}" for note in dict.fromkeys(notes)]
    spans = {name: span(interval) for name, interval in result.get("intervals", {}).items()}
    rows = [(name, f"{value:.2f}", spans.get(name, "")) for name, value in result["aggregate"].items()]
    return "\n".join(lines) + "\n\n" + columns(rows)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "tasks": show_tasks,
    "questions": questions,
    "benchmark": benchmark,
    "score": score,
    "export": export,
    "compare": compare,
    "clusters": clusters,
    "leakage": leakage,
    "wording": wording,
    "language": language,
}


def main(argv: Sequence[str]) -> int:
    """Runs one of `jaxvlm eval`'s verbs; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] not in VERBS:
        near = difflib.get_close_matches(argv[0], VERBS, n=1)
        raise ConfigError(f"There is no `jaxvlm eval {argv[0]}`: {f'did you mean {near[0]}?' if near else USAGE}")
    return VERBS[argv[0]](argv[1:])
