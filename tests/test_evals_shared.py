"""Answering a benchmark in several processes that are killed, in bounded memory, and the same whatever stands beside."""

from __future__ import annotations

import json
import random
import tracemalloc

import eval_helpers
import hf_copy
import pytest
import tiny
from PIL import Image

from jaxvlm.config import PromptConfig
from jaxvlm.data.assets import toy
from jaxvlm.evals import score
from jaxvlm.evals.exactness import check_in_words, exact_check
from jaxvlm.evals.question_file import EvalError
from jaxvlm.infer.answers import (
    RequestError,
    answer_requests,
    generate_file,
    merged,
    parts,
    read_records,
    read_requests,
    speed,
    speed_in_words,
)
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
    lines = (json.dumps({"question_id": str(i), "text": f"what {i}? " * (1 + i % 7)}) + "\n" for i in range(count))
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
    for name, value, what in (
        ("fingerprint", "model-2", "another model"),
        ("prompt", PromptConfig(transform="naive"), "another transform"),
        ("exact", True, r"another exact \(False, now True\)"),
    ):
        other = Fake()
        setattr(other, name, value)
        with pytest.raises(RequestError, match=f"a-00000-of-00002.jsonl holds answers with {what}"):
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


def test_an_exact_answer_is_computed_by_the_same_program_alone_and_among_others(engine, monkeypatch, tmp_path):
    asked = requests(11)
    pictures = sorted(map(str, (toy.write_dataset(tmp_path, count=3) / "images").iterdir()))
    for i in range(1, 9):  # of one to three pictures, in prompts that are as long as others without
        asked[i]["images"] = pictures[: 1 + i % 3]
        asked[i]["messages"][0]["content"] = "<image>" * (1 + i % 3) + " red" * (14 - 4 * (i % 3))
    shapes, inputs = [], engine._inputs

    def seen(prompts, *more):
        found = inputs(prompts, *more)
        visual = None if found[0][2] is None else found[0][2].shape
        shapes.append({(len(prompt.tokens), found[0][0].shape, visual) for prompt in prompts})
        return found

    monkeypatch.setattr(engine, "_inputs", seen)
    monkeypatch.setattr(engine, "exact", True)
    together = engine.generate(asked, max_new_tokens=8, batch_size=4)
    many, shapes = set().union(*shapes), []
    alone = [engine.generate([one], max_new_tokens=8, batch_size=4)[0] for one in asked]
    assert alone == together and len(set(together)) > 2
    assert set().union(*shapes) == many and {shape[0] for _, shape, _ in many} == {4} and len(many) > 3
    assert len({visual for _, _, visual in many}) == 4  # no tiles, and places for one, two and four


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


def test_another_picture_choice_or_place_under_the_same_id_is_refused(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "p.png")
    asked = {"question_id": 1, "text": "Is it\u2028red?", "image": "p.png"}

    def ask(**changes):
        (tmp_path / "q.jsonl").write_text(json.dumps(asked | changes, ensure_ascii=False) + "\n")
        options = {"images": tmp_path, "max_new_tokens": 4, "log": str}
        return generate_file(Fake(), tmp_path / "q.jsonl", tmp_path / "a.jsonl", **options)

    assert ask() == 1 and ask() == 0
    for changes, message in (
        ({"text": "Is it blue?"}, "another prompt to 1: 'Is it.u2028red.', now 'Is it blue.'"),
        ({"image": []}, "about another picture than none"),
        ({"options": ["a", "b"]}, "other candidates or options"),
        ({"text": "Is it\u2028red?\n<image>"}, "or its picture elsewhere"),
    ):
        with pytest.raises(RequestError, match=message):
            ask(**changes)
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "p.png")
    with pytest.raises(RequestError, match="answers 1 about another picture than .*p.png"):
        ask()


def test_like_questions_are_asked_once_and_the_speed_says_so(tmp_path):
    lines = [{"question_id": str(i), "text": f"what {i % 4}?"} for i in range(12)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    engines = [Fake(), Fake()]
    assert [answer(engine, tmp_path, (i, 2)) for i, engine in enumerate(engines)] == [6, 6]
    assert [len(engine.asked) for engine in engines] == [2, 2]
    found = merged(tmp_path / "a.jsonl", [str(i) for i in range(12)])
    assert [one["question_id"] for one in found] == [str(i) for i in range(12)]
    taken = speed(found)
    assert (taken["answered"], taken["asked"]) == (12, 4) and list(taken["parts"]) == [
        "00000-of-00002",
        "00001-of-00002",
    ]
    assert taken["per_second"] == pytest.approx(4 / sum(part["seconds"] for part in taken["parts"].values()))
    assert "4 in 0:00 and 8 more like them; by part: 00000-of-00002 " in speed_in_words(taken)
    assert answer(Fake(), tmp_path) == 0 and generate_sampled(tmp_path) == 12  # drawn answers are each their own


def generate_sampled(folder):
    engine = Fake()
    options = {"max_new_tokens": 4, "temperature": 1.0, "log": str}
    generate_file(engine, folder / "q.jsonl", folder / "drawn.jsonl", **options)
    return len(engine.asked)


def test_merging_takes_exactly_one_answer_to_each_question(tmp_path):
    write_questions(tmp_path, 6)
    answer(Fake(), tmp_path, (0, 2))
    ids = [str(i) for i in range(6)]
    with pytest.raises(RequestError, match="3 of 6 questions have no answer in .*a.jsonl, 1 among them"):
        merged(tmp_path / "a.jsonl", ids)
    answer(Fake(), tmp_path)
    assert len(merged(tmp_path / "a.jsonl", ids)) == 6 and len(merged(tmp_path / "a.jsonl", ids[:2])) == 2
    part = tmp_path / "a-00000-of-00002.jsonl"
    part.with_name("a-00000-of-00009.jsonl").write_bytes(part.read_bytes())
    with pytest.raises(RequestError, match="a-00000-of-00009.jsonl answers 0, which another line answers too"):
        merged(tmp_path / "a.jsonl", ids)


def test_a_torn_line_is_cut_however_long_it_is(tmp_path):
    path = tmp_path / "a.jsonl"
    for whole in (b"", b'{"a": 1}\n', b'{"a": 1}\n{"b": "' + b"x" * 200_000 + b'"}\n'):
        for torn in (b"", b"{", b'{"c": "' + b"y" * 150_000):
            path.write_bytes(whole + torn)
            assert len(read_records(path, mend=False)) == whole.count(b"\n") and path.read_bytes() == whole + torn
            assert len(read_records(path)) == whole.count(b"\n") and path.read_bytes() == whole
    path.write_bytes(b'{"a": 1}\n{"b\n{"c": 1}\n')
    with pytest.raises(RequestError, match="a.jsonl:2 is not JSON"):
        read_records(path)


class Rounds(Fake):
    """Answers `ids` otherwise in the exact mode."""

    def __init__(self, ids):
        super().__init__()
        self.ids, self.exact = ids, False

    def generate_batches(self, requests, **options):
        for batch in super().generate_batches(requests, **options):
            yield [(i, text + "." * (self.exact and requests[i]["id"] in self.ids)) for i, text in batch]


def test_the_fast_mode_is_compared_with_the_exact_one(tmp_path):
    write_questions(tmp_path)
    asked = read_requests(tmp_path / "q.jsonl", tmp_path)
    options = {"max_new_tokens": 4, "log": str}

    def check(ids, out, count):
        engine = Rounds(ids)
        answer_requests(engine, asked, tmp_path / "a.jsonl", **options)
        found = merged(tmp_path / "a.jsonl", [one["id"] for one in asked])
        return exact_check(engine, asked, found, tmp_path / out, count=count, seed=1, **options), engine

    (some, engine), (all_, _) = check({"7", "9"}, "some", 16), check({"7", "9"}, "all", 60)
    assert some["asked"] == 16 and all_["asked"] == 60 and engine.exact is False
    assert [one["question_id"] for one in all_["different"]] == ["7", "9"] and all_["differ"] == 2
    assert all_["different"][1] == {"question_id": "9", "fast": "blue", "exact": "blue."}
    assert all_["share"] == pytest.approx(100 * 2 / 60) and 0 < all_["interval"][0] < 100 * 2 / 60 < all_["interval"][1]
    drawn = {str(record["question_id"]) for record in read_records(tmp_path / "some")}
    assert some["differ"] == len(drawn & {"7", "9"}) and len(drawn) == 16
    more, engine = check(set(), "some", 20)  # goes on with the first sixteen, which are among the twenty
    assert more["asked"] == 20 and len(engine.asked) == 4
    assert check(set(), "none", 0)[0] is None and check(set(), "default", None)[0]["asked"] == 16
    assert check_in_words(all_).startswith("2 of 60 texts differ (0.9 to 11.4 %)") and check_in_words(None) == ""
