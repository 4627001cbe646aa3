"""A source of ten million records: how long it takes to open, to become a table, and what a loader's worker pays for it.

    python benchmarks/data_scale.py                        # 10 million records, as JSONL and as a JSON list
    python benchmarks/data_scale.py --records 100000 --out /tmp/scale.json

Records are short (155 bytes), and half of them name one of 5,000 images, so that all is bookkeeping. Tokenising is timed on a
part of them; for the whole table the first records' tokens are used again and again, unless --tokenise asks for all. Each step
runs in a process of its own, which says how much memory it came to. What is generated goes to a temporary folder, 12 GB of it,
and is deleted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

IMAGES = 5000
TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    "▁",
    "▁what",
    "▁is",
    "▁this",
    "▁a",
    "▁cat",
    "▁on",
    "▁the",
    "▁mat",
    *"0123456789?,.:InOut",
]


def generate(folder: Path, count: int) -> None:
    """The records as `a.jsonl` and `a.json`, a tokenizer of whole words, and the images: one small file under many names."""
    with open(folder / "a.jsonl", "w") as lines, open(folder / "a.json", "w") as whole:
        for start in range(0, count, 10_000):
            records = [_record(i) for i in range(start, min(count, start + 10_000))]
            lines.write("\n".join(records) + "\n")
            whole.write(("[" if start == 0 else ",\n") + ",\n".join(records))
        whole.write("]\n")
    write_tokenizer(folder / "tokenizer")
    (folder / "images").mkdir()
    from PIL import Image

    Image.new("RGB", (32, 32), "teal").save(folder / "images" / "0.png")
    for i in range(1, IMAGES):
        os.link(folder / "images" / "0.png", folder / "images" / f"{i}.png")


def _record(i: int) -> str:
    turns = [{"from": "human", "value": f"{'' if i % 2 else '<image> '}what is this, {i % 100}?"}]
    turns.append({"from": "gpt", "value": f"a cat on the mat {i}."})
    return json.dumps({"id": f"{i:08d}", **({} if i % 2 else {"image": f"{i % IMAGES}.png"}), "conversations": turns})


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    made = Tokenizer(models.WordLevel({t: i for i, t in enumerate(dict.fromkeys(TOKENS))}, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})
    )


def memory() -> dict[str, float]:
    """Resident memory of this process in MB: its own, that of mapped files (shared, and given back when asked), the peak."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    mine = {name: int(fields[key].split()[0]) / 1024 for name, key in (("own_mb", "RssAnon"), ("mapped_mb", "RssFile"))}
    return mine | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def source_of(folder: Path, name: str):
    from jaxvlm.config import SourceConfig

    return SourceConfig("a", str(folder / name), str(folder / "images"))


def step_open(folder: Path, name: str) -> dict:
    from jaxvlm.data.sources import open_source

    before, said = memory(), []
    start, processor = time.perf_counter(), time.process_time()
    source = open_source(source_of(folder, name), folder / "cache", said.append)
    opened, processor = time.perf_counter() - start, time.process_time() - processor
    numbers = np.random.default_rng(0).integers(0, len(source), 20_000).tolist()
    start = time.perf_counter()
    assert all(source[i]["id"] == f"{i:08d}" for i in numbers)
    reads = len(numbers) / (time.perf_counter() - start)
    size = os.path.getsize(folder / name) / 1e6
    after = memory()
    more = {"added_mb": after["own_mb"] + after["mapped_mb"] - before["own_mb"] - before["mapped_mb"]}
    return (
        {
            "seconds": opened,
            "processor_seconds": processor,
            "file_mb": size,
            "records": len(source),
            "random_reads_per_s": reads,
        }
        | more
        | {"said": said}
    )


def step_tokenise(folder: Path, name: str, count: int, total: int, workers: int) -> dict:
    """Records a second, from the file to the table, with `workers` processes."""
    from jaxvlm.data import table
    from jaxvlm.data.loader import Loader

    table.LARGE = 0
    source = dataclasses.replace(source_of(folder, name), fraction=count / total)
    start = time.perf_counter()
    Loader(*stage(folder, source, workers), batch_size=8, seed=0, cache_dir=folder / "cache")
    return {"records": count, "records_per_s": count / (time.perf_counter() - start)}


def stage(folder: Path, source, workers: int) -> tuple:
    from jaxvlm.config import DataConfig, ModelConfig, PromptConfig, VisionConfig

    data = DataConfig(sources=(source,), packing=True, tiles_per_row=32, num_workers=workers)
    prompt = PromptConfig(str(folder / "tokenizer"), "prism", length=1024)
    return data, prompt, ModelConfig(VisionConfig(image_size=28, patch_size=14))


def repeat_encodings() -> None:
    """Records of every chunk get the tokens of the first one's: the same number of images, and about as many tokens."""
    from jaxvlm.data import table

    real, first = table.encode_all, []

    def encode_all(records, *settings):
        first.extend([] if first else real(records, *settings))
        return first[: len(records)]

    table.encode_all = encode_all


def step_load(folder: Path, name: str, workers: int) -> dict:
    """The loader's start: the table, which an earlier call may have left in the cache, the mixture and the plan.

    Without workers the table's tokens are repeated ones.
    """
    from jaxvlm.data.loader import Loader
    from jaxvlm.data.rows import saved_plan

    def log(message: str) -> None:
        print(f"    {message}", file=sys.stderr, flush=True)

    if not workers:
        repeat_encodings()
    start = time.perf_counter()
    made = stage(folder, source_of(folder, name), workers)
    loader = Loader(*made, batch_size=8, seed=0, cache_dir=folder / "cache", log=log)
    took = time.perf_counter() - start
    reader = loader._reader
    reader.plan = saved_plan(reader.plan, folder / "cache" / "plans")
    pickled = pickle.dumps(reader)
    (folder / "reader.pickle").write_bytes(pickled)
    facts = {"rows": loader.num_rows, "fill": loader.stats()["fill"], "pickled_reader_bytes": len(pickled)}
    return {"seconds": took, "processor_seconds": time.process_time()} | facts | memory()


def step_work(folder: Path, rows: int) -> dict:
    """What a worker process does: unpickles the reader, and makes rows from all over the run."""
    import jaxvlm.data.rows  # noqa: F401, so that what code costs is counted before

    before = memory()
    start = time.perf_counter()
    reader = pickle.loads((folder / "reader.pickle").read_bytes())
    from jaxvlm.data.rows import _opened_plan

    total = len(_opened_plan(reader.plan).offsets) - 1
    reader.batch([0])
    first = time.perf_counter() - start
    most = 0.0
    for row in np.random.default_rng(0).integers(0, total, rows).tolist():
        reader.batch([row])
        most = max(most, memory()["mapped_mb"])
    after = memory()
    added = {f"added_{key}": after[key] - before[key] for key in ("own_mb", "mapped_mb")}
    peak = {"peak_added_mapped_mb": most - before["mapped_mb"], "peak_with_code_mb": after["own_mb"] + most}
    return {"first_row_seconds": first, "rows": rows} | added | peak


def run(step: str, folder: Path, *arguments: object) -> dict:
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder), *map(str, arguments)]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(f"{step} {' '.join(map(str, arguments))}: {json.dumps(result)}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=2, help="processes that tokenise")
    parser.add_argument(
        "--tokenise", action="store_true", help="all records for the table, which takes most of an hour"
    )
    parser.add_argument("--rows", type=int, default=20_000, help="that the worker makes, of any in the run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data_scale.json")
    parser.add_argument("--scratch", type=Path, help="where the temporary folder is made")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        arguments = [int(a) if a.isdigit() else a for a in options.arguments]
        print(json.dumps(globals()[f"step_{options.step}"](options.folder, *arguments)))
        return
    folder = Path(tempfile.mkdtemp(prefix="data-scale-", dir=options.scratch))
    try:
        start = time.perf_counter()
        generate(folder, options.records)
        print(f"generated in {time.perf_counter() - start:.0f} s", flush=True)
        made: dict = {"records": options.records, "cores": os.cpu_count()}
        for name in ("a.jsonl", "a.json"):
            made[name] = {"first_open": run("open", folder, name), "later_open": run("open", folder, name)}
        part = min(200_000, options.records)
        made["tokenising"] = run("tokenise", folder, "a.jsonl", part, options.records, options.workers)
        made["table"] = run("load", folder, "a.jsonl", options.workers if options.tokenise else 0)
        made["later_start"] = run("load", folder, "a.jsonl", 0)
        made["worker"] = run("work", folder, options.rows)
        made["cache_mb"] = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file()) / 1e6
        made["load_average"] = os.getloadavg()[0]
    finally:
        shutil.rmtree(folder)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(_rounded(made), indent=1) + "\n")
    print(f"written to {options.out}")


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
