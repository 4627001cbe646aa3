"""Scoring all answers to VQAv2's validation questions, beside the official scorer.

  python benchmarks/eval_bench.py --official VQA [--rounds 3] [--out benchmarks/results/evals.json]

VQA is a clone of github.com/GT-Vision-Lab/VQA; without `--official` only ours is timed. It is Python 2: its print statements
are made calls in memory, nothing else is changed. The 214,354 questions, their ten people's answers and the predictions are
synthetic: words drawn from Zipf's law, with capitals, articles, punctuation and number words among them; of three in ten questions
all people agree, which the official code does not rewrite.

Each side reads the same three JSON files and scores, in turn, in a process of its own; its time is taken for reading and scoring
together and for scoring alone, by the clock and by the time that the process computed. Reported are medians and the ratio of
medians: above 1, ours is faster. The two accuracies must be equal to the official two decimals.

  python benchmarks/eval_bench.py --generation [--rounds 3] [--out benchmarks/results/generation.json]

times greedy answers instead: questions of easy-VQA's test set to a model of the quickstart's size with random weights, 8 new
tokens each, asked one at a time, in batches of 16, and in exact batches of 16, in turn; after one round that compiles. Counted are
the answers of the batches that differ from those asked one at a time, for each --dtype.

  python benchmarks/eval_bench.py --many [--out benchmarks/results/evals_many.json]

answers 20,000 questions about 400 drawn pictures into a file, as `jaxvlm eval benchmark` does, by the toy model of
`configs/quickstart.py:tiny` with random weights, 8 new tokens each in batches of 16, and notes the process's largest resident
size; beside it 2,000 of them, and the first 1,000 asked one at a time. Each in a process of its own that has compiled before its
time starts. A model this small says nothing of a real one's speed: measured is what the runner costs and keeps.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COUNT = 214_354
WORDS = """yes no 1 2 3 white red blue green black brown one two none left right man woman dog cat tennis baseball
frisbee wood grass t-shirt don't wont couch pizza, 1,000 10:30 u.s.a. a/b sunny outside kitchen""".split()
ALONE = 6  # so many are asked alone in the exact mode too, which computes 16 rows for each
SIDES = ("jaxvlm", "official")
MANY = (1_000, 2_000, 20_000)  # asked one at a time; and in batches into a file


def write_data(folder: Path) -> None:
    """questions.json, annotations.json and answers.json in the official forms."""
    rng = random.Random(0)
    weights = [1 / (rank + 1) for rank in range(len(WORDS))]
    dress = ("{}", "{}", "{}", "{}", "the {}", "{}.", "{}?", "a {}")
    questions, annotations, answers = [], [], []
    for i in range(COUNT):
        likely = rng.choices(WORDS, weights, k=4)
        agreed = rng.random() < 0.3
        people = [
            likely[0] if agreed or rng.random() < 0.5 else rng.choice(dress).format(rng.choice(likely))
            for _ in range(10)
        ]
        names = {"question_id": i, "image_id": i // 5}
        questions.append({**names, "question": f"What is {likely[1]} here?"})
        given = [{"answer": word, "answer_confidence": "yes", "answer_id": k} for k, word in enumerate(people, 1)]
        kind = {"question_type": "what is", "answer_type": "other", "multiple_choice_answer": people[0]}
        annotations.append({**names, **kind, "answers": given})
        answers.append({"question_id": i, "answer": rng.choice(dress).format(rng.choice(likely)).capitalize()})
    for name, content in (
        (
            "questions",
            dict.fromkeys(("info", "task_type", "data_type", "data_subtype", "license"), "") | {"questions": questions},
        ),
        ("annotations", {"annotations": annotations}),
        ("answers", answers),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))


def ours(folder: Path) -> dict:
    from jaxvlm.evals import score, tasks
    from jaxvlm.evals.answers import read_answers

    started = clock()
    references, answers = tasks.read_references("vqav2", folder), read_answers(folder / "answers.json")
    read = clock()
    result = score("vqav2", "official", answers, references)
    return times(started, read) | {"accuracy": round(result["value"], 2)}


def official(folder: Path, clone: Path) -> dict:
    """VQA's own steps: index the annotations and the results, evaluate."""
    names: dict = {"unicode": str}
    for part in ("PythonHelperTools/vqaTools/vqa.py", "PythonEvaluationTools/vqaEvaluation/vqaEval.py"):
        text = (clone / part).read_text(encoding="utf-8").expandtabs(4)
        exec(re.sub(r"^( *)print +(.+)$", r"\1print(\2)", text, flags=re.M), names)
    with contextlib.redirect_stdout(io.StringIO()):
        started = clock()
        truth = names["VQA"](str(folder / "annotations.json"), str(folder / "questions.json"))
        results = truth.loadRes(str(folder / "answers.json"), str(folder / "questions.json"))
        read = clock()
        evaluation = names["VQAEval"](truth, results, n=2)
        evaluation.evaluate()
        return times(started, read) | {"accuracy": evaluation.accuracy["overall"]}


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def times(started: tuple[float, float], read: tuple[float, float]) -> dict:
    done = clock()
    both, alone = ([end - start for start, end in zip(since, done, strict=True)] for since in (started, read))
    names = ("read_and_score_seconds", "read_and_score_cpu_seconds", "score_seconds", "score_cpu_seconds")
    return dict(zip(names, (*both, *alone), strict=True))


def generation(rounds: int, dtypes: list[str], count: int = 32, new: int = 8) -> dict:
    """Seconds of each way of asking, and how many answers differ, by type."""
    import dataclasses

    import jax
    import numpy as np

    from jaxvlm.data.assets import ensure, resolve_assets
    from jaxvlm.infer.engine import Engine
    from jaxvlm.main import load_config
    from jaxvlm.models.vlm import abstract_params

    values = resolve_assets(load_config(str(Path(__file__).parents[1] / "configs" / "quickstart.py")))
    folder = ensure("easy-vqa")
    asked = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    asked = random.Random(0).sample(asked, count)
    requests = [
        {
            "id": one["question_id"],
            "messages": [{"role": "user", "content": "<image>\n" + one["text"]}],
            "images": [str(folder / "images" / one["image"])],
        }
        for one in asked
    ]
    found = {}
    for dtype in dtypes:
        rng = np.random.default_rng(0)
        config = dataclasses.replace(values.model, dtype=dtype)
        params = jax.tree.map(
            lambda leaf: jax.numpy.asarray(0.05 * rng.standard_normal(leaf.shape, np.float32), dtype),  # noqa: B023
            abstract_params(config),
        )
        engine = Engine(config, values.prompt, params)

        def one_by_one(engine: Engine = engine) -> list[str]:
            engine.exact = False
            return [engine.generate([one], max_new_tokens=new, batch_size=1)[0] for one in requests]

        def batched(exact: bool = False, engine: Engine = engine) -> list[str]:
            engine.exact = exact
            return engine.generate(requests, max_new_tokens=new, batch_size=16)

        ways = {"one_by_one": one_by_one, "batched": batched, "exact": lambda: batched(True)}  # noqa: B023
        texts, seconds = {}, {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name, way in ways.items():
                engine._visual.clear()
                started = time.perf_counter()
                texts[name] = way()
                if turn:
                    seconds[name].append(time.perf_counter() - started)
        engine.exact = True
        alone = [engine.generate([one], max_new_tokens=new, batch_size=16)[0] for one in requests[:ALONE]]
        medians = {name: statistics.median(taken) for name, taken in seconds.items()}
        found[dtype] = {
            "seconds": seconds,
            "answers_per_second": {name: count / taken for name, taken in medians.items()},
            "batched_over_one_by_one": medians["one_by_one"] / medians["batched"],
            "batched_unlike_one_by_one": sum(
                a != b for a, b in zip(texts["batched"], texts["one_by_one"], strict=True)
            ),
            f"exact_unlike_exact_alone_of_{ALONE}": sum(a != b for a, b in zip(texts["exact"], alone, strict=False)),
            "distinct_answers": len(set(texts["batched"])),
        }
        print(dtype, json.dumps(found[dtype], indent=1), flush=True)
    about = {"what": f"{count} greedy answers of {new} tokens, quickstart's size, random weights"}
    about |= {"device": f"{jax.devices()[0].device_kind}, {platform.machine()}", "jax": jax.__version__}
    return about | {"commit": head("."), "types": found}


def many(side: str, count: int, folder: Path) -> dict:
    """Answers `count` questions in batches into a file (`file`) or one at a time (`loop`): seconds and MiB."""
    import resource

    import jax
    import numpy as np

    from jaxvlm.data.assets import resolve_assets, toy
    from jaxvlm.infer.answers import answer_requests, merged, read_requests
    from jaxvlm.infer.engine import Engine
    from jaxvlm.main import load_config
    from jaxvlm.models.vlm import abstract_params

    rng = np.random.default_rng(0)
    if not (folder / "q.jsonl").is_file():
        pictures = sorted(path.name for path in (toy.write_dataset(folder, 400) / "images").iterdir())
        words = "red green blue yellow left right half colour what is the it".split()
        asked = [
            {"question_id": i, "text": " ".join([*rng.choice(words, 1 + i % 20), f"{i}?"]), "image": pictures[i % 400]}
            for i in range(MANY[-1])
        ]
        (folder / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    values = resolve_assets(load_config(str(Path(__file__).parents[1] / "configs" / "quickstart.py:tiny")))
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), abstract_params(values.model))
    engine = Engine(values.model, values.prompt, params)
    requests = read_requests(folder / "q.jsonl", folder / "images")[:count]
    if side == "loop":
        ask = [lambda one=one: engine.generate([one], max_new_tokens=8, batch_size=1) for one in requests]
        for one in ask[:40]:
            one()
        started = time.perf_counter()
        for one in ask:
            one()
        return {"seconds": time.perf_counter() - started, "questions": count}
    out = folder / f"{count}.jsonl"
    answer_requests(engine, requests[:640], folder / f"warm-{count}.jsonl", max_new_tokens=8)
    mebibytes, before = 2**20 if sys.platform == "darwin" else 2**10, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    answer_requests(engine, requests, out, max_new_tokens=8)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    distinct = len({one["text"] for one in merged(out, [one["id"] for one in requests])})
    found = {"seconds": seconds, "questions": count, "distinct_answers": distinct}
    return found | {"before_mib": before / mebibytes, "peak_mib": peak / mebibytes}


def run_many(rounds: int) -> dict:
    found: dict[str, list[dict]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for side, count in zip(("loop", "file", "file"), MANY, strict=True):
                command = [sys.executable, __file__, "--side", side, "--count", str(count), "--folder", folder]
                said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
                one = json.loads(said.splitlines()[-1])
                one["per_second"] = one["questions"] / one["seconds"]
                found.setdefault(f"{side} {count}", []).append(one)
                print(side, one, flush=True)
    rates = {name: statistics.median(one["per_second"] for one in runs) for name, runs in found.items()}
    import jax

    about = {"what": f"{MANY[-1]:,} greedy answers of 8 tokens, toy model with random weights, 400 pictures"}
    about |= {"device": f"{jax.devices()[0].device_kind}, {platform.machine()}, 2 shared cores", "jax": jax.__version__}
    rate = rates[f"file {MANY[-1]}"] / rates[f"loop {MANY[0]}"]
    return about | {"commit": head("."), "per_second": rates, "file_over_loop": rate, "rounds": found}


def head(folder: str) -> str:
    return subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", default="", metavar="VQA", help="a clone of GT-Vision-Lab/VQA")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="", metavar="FILE")
    parser.add_argument("--generation", action="store_true", help="time generating instead of scoring")
    parser.add_argument("--many", action="store_true", help="answer 20,000 questions into a file")
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help="of the generating model, as in float32,bfloat16")
    parser.add_argument("--side", choices=(*SIDES, "file", "loop"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        print("\n" + json.dumps(many(options.side, options.count, Path(options.folder))))
        return
    if options.many:
        result = run_many(options.rounds)
        if options.out:
            Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
        return
    if options.side:
        folder = Path(options.folder)
        print(json.dumps(ours(folder) if options.side == "jaxvlm" else official(folder, Path(options.official))))
        return
    if options.generation:
        result = generation(options.rounds, options.dtype.split(","))
        if options.out:
            Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
        return
    sides = SIDES if options.official else SIDES[:1]
    found: dict[str, list[dict]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        for _ in range(options.rounds):
            for side in sides:
                command = [sys.executable, __file__, "--side", side, "--folder", folder, "--official", options.official]
                found[side].append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
                print(side, found[side][-1], flush=True)
    accuracies = {side: {one["accuracy"] for one in runs} for side, runs in found.items()}
    if len(set.union(*accuracies.values())) != 1:
        raise SystemExit(f"The sides disagree: {accuracies}")
    names = [name for name in found["jaxvlm"][0] if name.endswith("seconds")]
    medians = {
        side: {name: statistics.median(one[name] for one in runs) for name in names} for side, runs in found.items()
    }
    ratios = {name: medians["official"][name] / medians["jaxvlm"][name] for name in names} if options.official else {}
    print(json.dumps({"medians": medians, "official_over_jaxvlm": ratios}, indent=1))
    if options.out:
        about = {"what": f"scoring {COUNT:,} synthetic VQAv2 answers", "device": f"{platform.machine()}, one core"}
        about |= {"versions": {"python": platform.python_version()}, "commit": head(".")}
        about["official_commit"] = head(options.official or ".")
        result = about | {"medians": medians, "official_over_jaxvlm": ratios, "rounds": found}
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
