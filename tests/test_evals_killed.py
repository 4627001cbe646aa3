"""`jaxvlm eval benchmark` in real processes that are killed without warning, against one that nothing happened to."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import hf_copy
import pytest
import tiny

from jaxvlm.config import PromptConfig
from jaxvlm.data.assets import toy
from jaxvlm.infer.answers import iterate_records, parts
from jaxvlm.weights.saved import save_model

ROOT = Path(__file__).resolve().parent.parent
COUNT = 240


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A saved model with random weights, pictures, and questions in GQA's form."""
    folder = tmp_path_factory.mktemp("world")
    config = tiny.model_config()
    prompt = PromptConfig(tokenizer=str(toy.write_tokenizer(folder / "tokenizer")), transform="naive")
    save_model(folder / "model", hf_copy.random_params(config), config, prompt, {})
    files = sorted((toy.write_dataset(folder, count=8) / "images").iterdir())
    pictures = [path.rename(path.with_suffix(".jpg")).stem for path in files]  # as GQA's are called
    words = ("red", "what colour", "left half", "is it")
    rng = random.Random(0)
    questions = {
        str(i): {
            "imageId": rng.choice(pictures),
            "question": " ".join(rng.choices(words, k=1 + i % 6)) + f" {i}?",
            "answer": "red",
            "isBalanced": True,
        }
        for i in range(COUNT)
    }
    (folder / "gqa.json").write_text(json.dumps(questions))
    return folder


def start(world, out, part=None) -> subprocess.Popen:
    options = {"task": "gqa", "protocol": "llava15", "references": world / "gqa.json", "images": world / "images"}
    options |= {"run": world / "model", "out": out, "max_new_tokens": 8, "batch_size": 2, "intervals": 100}
    command = [sys.executable, "-m", "jaxvlm.main", "eval", "benchmark", "--exact"]
    command += [f"--{name}={value}" for name, value in (options | ({"part": part} if part else {})).items()]
    flags = "--xla_backend_optimization_level=0"  # of one device, not the tests' eight
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "OMP_NUM_THREADS": "1"}
    log = (Path(out).parent / "log").open("a")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def answered(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in parts(out / "sighted-answers.jsonl"))


def metrics(out: Path) -> bytes:
    """The result but for how long it took."""
    result = json.loads((out / "sighted-result.json").read_text())
    assert result.pop("speed")["answered"] == COUNT and result["n"] == COUNT
    return json.dumps(result).encode()


def test_killed_at_random_moments_and_resumed_by_other_numbers_of_processes(world, tmp_path):
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(2)
    assert start(world, whole).wait(timeout=120) == 0, (tmp_path / "log").read_text()
    torn, seen = 0, [0]
    for count in (2, 3, 1):
        aim = seen[-1] + rng.randrange(1, COUNT // 6)  # as many answers there are when all are killed
        children = [start(world, killed, f"{i}/{count}") for i in range(count)]
        while answered(killed) < aim and any(child.poll() is None for child in children):
            time.sleep(0.001)
        time.sleep(rng.random() / 100)  # in the midst of a batch, or of writing it
        for child in children:
            child.kill()
            child.wait()
        torn += sum(not path.read_bytes().endswith(b"\n") for path in parts(killed / "sighted-answers.jsonl"))
        seen.append(answered(killed))
    assert all(a < b < COUNT for a, b in zip(seen, seen[1:], strict=False)), seen
    assert not (killed / "sighted-result.json").exists()
    last = sorted(parts(killed / "sighted-answers.jsonl"))[0]
    last.write_bytes(last.read_bytes() + b'{"question_id": "5", "te')  # what a write cut in two leaves
    assert start(world, killed).wait(timeout=120) == 0, (tmp_path / "log").read_text()
    assert metrics(killed) == metrics(whole) and answered(killed) == COUNT
    texts = {r["text"] for path in parts(killed / "sighted-answers.jsonl") for r in iterate_records(path)}
    assert len(texts) > 20  # of other words, other metrics would follow
    print(f"killed after {seen[1:]} answers, {torn} torn lines")
