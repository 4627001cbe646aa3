"""Answering a benchmark in several processes that are killed, in bounded memory, and the same whatever stands beside."""

from __future__ import annotations

import json
import random
import tracemalloc

import eval_helpers
import hf_copy
import pytest
import tiny

from jaxvlm.config import PromptConfig
from jaxvlm.data.assets import toy
from jaxvlm.evals import score
from jaxvlm.evals.question_file import EvalError
from jaxvlm.infer.answers import RequestError, generate_file, parts, read_records
from jaxvlm.infer.engine import Engine

COUNT = 60


class Fake:
    """Answers with a colour told by the question, in batches of three; dies after `life` batches."""

    prompt, exact, fingerprint = PromptConfig(), False, "model-1"

    def __init__(self, life=10**9):
        self.life, self.asked = life, []

    def generate_batches(self, requests, *, batch_size, **sampling):
        for start in range(0, len(requests), 3):
            self.life -= 1
            if self.life < 0:
                raise KeyboardInterrupt
            batch = range(start, min(start + 3, len(requests)))
            self.asked += [requests[i]["id"] for i in batch]
            yield [(i, ("red", "blue")[int(requests[i]["id"]) % 3 == 0]) for i in batch]


def answer(engine, folder, part=(0, 1)):
    return generate_file(engine, folder / "q.jsonl", folder / "a.jsonl", max_new_tokens=4, part=part, log=str)


def write_questions(folder, count=COUNT):
    folder.mkdir(exist_ok=True)
    lines = (json.dumps({"question_id": str(i), "text": "what? " * (1 + i % 7)}) + "\n" for i in range(count))
    (folder / "q.jsonl").write_text("".join(lines))


def metrics(folder) -> bytes:
    found = [record for path in parts(folder / "a.jsonl") for record in read_records(path, mend=False)]
    return json.dumps(score("gqa", "llava15", found, eval_helpers.questions("gqa", COUNT))).encode()


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_random_and_resumed_by_other_numbers_of_processes(tmp_path, seed):
    rng = random.Random(seed)
    write_questions(tmp_path / "whole")
    write_questions(tmp_path / "killed")
    answer(Fake(), tmp_path / "whole")
    asked = []
    for count in (3, 2, 5):
        for index in rng.sample(range(count), count):
            engine = Fake(life=rng.randrange(3))
            try:
                answer(engine, tmp_path / "killed", (index, count))
            except KeyboardInterrupt:
                path = tmp_path / "killed" / f"a-{index:05}-of-{count:05}.jsonl"
                if path.is_file():
                    path.write_bytes(path.read_bytes() + b'{"question_id": "5", "te')
            asked += engine.asked
    with pytest.raises(EvalError, match="of 60 questions have no answer"):
        metrics(tmp_path / "killed")
    last = Fake()
    answer(last, tmp_path / "killed")
    assert last.asked and sorted(asked + last.asked, key=int) == [str(i) for i in range(COUNT)]  # each of them once
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_a_part_of_another_model_or_setting_is_refused(tmp_path):
    write_questions(tmp_path)
    answer(Fake(), tmp_path, (0, 2))
    for name, value in {"fingerprint": "model-2", "prompt": PromptConfig(transform="naive"), "exact": True}.items():
        other = Fake()
        setattr(other, name, value)
        with pytest.raises(RequestError, match="another model or other sampling settings"):
            answer(other, tmp_path, (1, 2))


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    config = tiny.model_config()
    prompt = PromptConfig(tokenizer=str(toy.write_tokenizer(tmp_path_factory.mktemp("t") / "t")), transform="naive")
    return Engine(config, prompt, hf_copy.random_params(config))


def requests(count):
    words = ("red ", "what colour ", "left half ", "is it ")
    texts = ("".join(words[(i + k) % 4] for k in range(1 + i % 9)) for i in range(count))
    return [{"id": i, "messages": [{"role": "user", "content": text}], "images": []} for i, text in enumerate(texts)]


def test_an_exact_answer_is_computed_by_the_same_program_alone_and_among_others(engine, monkeypatch):
    asked = requests(11)
    shapes, inputs = [], engine._inputs

    def seen(prompts, *more):
        found = inputs(prompts, *more)
        shapes.append({(len(prompt.tokens), found[0][0].shape) for prompt in prompts})
        return found

    monkeypatch.setattr(engine, "_inputs", seen)
    monkeypatch.setattr(engine, "exact", True)
    together = engine.generate(asked, max_new_tokens=8, batch_size=4)
    many, shapes = set().union(*shapes), []
    alone = [engine.generate([one], max_new_tokens=8, batch_size=4)[0] for one in asked]
    assert alone == together and len(set(together)) > 2
    assert set().union(*shapes) == many and {shape[0] for _, shape in many} == {4} and len(many) > 3


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_benchmarks_prompts_are_not_all_kept(engine, monkeypatch, count):
    """Many requests through the real engine's batches; what it computes with them is left out."""
    monkeypatch.setattr(engine, "_answer", lambda prompts, *more: [[5]] * len(prompts))
    asked = requests(count)
    for one in asked:  # as long as prompts with an image are
        one["messages"][0]["content"] *= 8
    assert max(len(engine._prompt(one, 0).tokens) for one in asked[:9]) > 150
    tracemalloc.start()
    done = sum(len(batch) for batch in engine.generate_batches(asked, max_new_tokens=4))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{count} requests: at most {peak / 2**20:.1f} MiB")
    assert done == count and peak < 500_000 + 200 * count  # kept, a prompt of 200 tokens takes 1,600 bytes and more
