"""The runner with engines that need no model: an oracle, one that sees nothing, and one that dies half way."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxvlm.config import EvalConfig, PromptConfig
from jaxvlm.data.assets import toy
from jaxvlm.data.image import image_size, load_image
from jaxvlm.evals import runner
from jaxvlm.evals.question_file import EvalError
from jaxvlm.infer.answers import RequestError


class Fake:
    """Answers by `see(request)`, two at a time and in its own order; dies after `life` answers."""

    prompt, exact = PromptConfig(), False

    def __init__(self, see, life=10**9, fingerprint="model-1"):
        self.see, self.life, self.fingerprint, self.asked = see, life, fingerprint, []

    def generate_batches(self, requests, **sampling):
        order = list(range(len(requests)))[::-1]
        for start in range(0, len(order), 2):
            if len(self.asked) >= self.life:
                raise KeyboardInterrupt
            self.asked += [requests[i] for i in order[start : start + 2]]
            yield [(i, self.see(requests[i])) for i in order[start : start + 2]]


@pytest.fixture
def data(tmp_path):
    return toy.write_dataset(tmp_path / "data", count=8)


@pytest.fixture
def config(data):
    return EvalConfig("vqa", str(data / "test.jsonl"), str(data / "images"), batch_size=2, max_new_tokens=4)


@pytest.fixture
def oracle(data):
    """Reads the colour off the picture, and says 'red' when it sees none."""
    records = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    truth = {(record["image"], record["text"]): record["answer"] for record in records}

    def see(request):
        text = request["messages"][0]["content"].removeprefix("<image>\n").split("\n")[0]
        return truth[Path(request["images"][0]).name, text].upper() + "." if request["images"] else "red"

    return see


def run(engine, config, folder, **options):
    return runner.run(engine, config, workdir=folder, log=lambda text: None, **options)


def test_an_oracle_is_right_and_blind_it_is_not(oracle, config, data, tmp_path):
    engine = Fake(oracle)
    results = run(engine, config, tmp_path, training=[("What colour is the left half?", "blue")])
    scores = results["scores"]
    records = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    left = [record for record in records if record["category"] == "left"]
    assert list(scores) == ["left", "right", "all"] and scores["all"]["n"] == 16
    assert scores["left"]["sighted"] == 1 and scores["left"]["sighted_interval"] == (1, 1)
    assert scores["left"]["blind"] == sum(r["answer"] == "red" for r in left) / 8
    assert scores["left"]["majority"] == sum(r["answer"] == "blue" for r in left) / 8
    assert scores["left"]["chance"] == 1 / len({r["answer"] for r in left})
    assert scores["left"]["gain"] == pytest.approx(1 - scores["left"]["blind"])
    blind = [request for request in engine.asked if not request["images"]]
    assert len(blind) == 2 and not any("<image>" in request["messages"][0]["content"] for request in blind)
    answered = [json.loads(line) for line in (tmp_path / "answers-noimage.jsonl").read_text().splitlines()]
    assert sorted(a["question_id"] for a in answered) == sorted(r["question_id"] for r in records)  # asked once each
    assert results["info"]["majority"] == "training answers" and results["info"]["questions_per_second"] > 0


def test_shuffled_images_mislead_the_oracle(oracle, config, tmp_path):
    engine = Fake(oracle)
    scores = run(engine, dataclasses.replace(config, blind="shuffle"), tmp_path)["scores"]
    assert scores["all"]["sighted"] == 1 and scores["all"]["blind"] < 0.6
    pairs = {}
    for request in engine.asked:
        pairs.setdefault(request["id"], []).append(request["images"][0])
    assert all(len(set(images)) == 2 for images in pairs.values())


def test_grey_images_have_the_size_of_the_others(oracle, config, tmp_path):
    def see(request):
        return "red" if "gray-" in request["images"][0] else oracle(request)

    engine = Fake(see)
    scores = run(engine, dataclasses.replace(config, blind="gray"), tmp_path)["scores"]
    (gray,) = tmp_path.glob("gray-*.png")  # one for all, as all images are of one size
    sizes = {image_size(request["images"][0]) for request in engine.asked}
    assert len(sizes) == 1 and np.unique(np.asarray(load_image(gray))).tolist() == [127]
    assert scores["all"]["sighted"] == 1 and scores["all"]["blind"] < 0.6 and len(engine.asked) == 16 + 2


def test_a_killed_evaluation_goes_on_where_it_stopped(oracle, config, tmp_path):
    whole = run(Fake(oracle), config, tmp_path / "whole")
    dying = Fake(oracle, life=6)
    with pytest.raises(KeyboardInterrupt):
        run(dying, config, tmp_path / "part")
    path = tmp_path / "part" / "answers-sighted.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # torn in the last record
    rest = Fake(oracle)
    resumed = run(rest, config, tmp_path / "part")
    assert len(rest.asked) == 16 - 5 + 2  # blind, the two questions are asked once each
    assert resumed["scores"] == whole["scores"] and resumed["samples"] == whole["samples"]


def test_a_larger_subset_asks_only_what_is_new(oracle, config, tmp_path):
    small = dataclasses.replace(config, limits=(("left", 3),), blind="shuffle")
    scores = run(Fake(oracle), small, tmp_path)["scores"]
    assert list(scores) == ["left", "all"] and scores["left"]["n"] == 3
    engine = Fake(oracle)
    full = run(engine, dataclasses.replace(small, limits=()), tmp_path)
    assert len(engine.asked) == 2 * (16 - 3)
    assert full["scores"] == run(Fake(oracle), dataclasses.replace(small, limits=()), tmp_path / "fresh")["scores"]


def test_answers_of_another_model_or_prompt_are_refused(oracle, config, tmp_path):
    run(Fake(oracle), config, tmp_path)
    with pytest.raises(RequestError, match="with another model .*'model-1', now 'model-2'"):
        run(Fake(oracle, fingerprint="model-2"), config, tmp_path)
    with pytest.raises(RequestError, match=r"another prompt to .* or phrase.', now 'What colour is the \w+ half\?'"):
        run(Fake(oracle), dataclasses.replace(config, task="open"), tmp_path)
    engine = Fake(oracle, fingerprint="model-2")
    run(engine, config, tmp_path, overwrite=True)
    assert len(engine.asked) == 16 + 2


def test_samples_are_of_different_images_and_every_category(oracle, config, tmp_path):
    samples = run(Fake(oracle), dataclasses.replace(config, blind="", samples=6), tmp_path)["samples"]
    assert len({sample["image"] for sample in samples}) == 6
    assert [sample["category"] for sample in samples].count("left") == 3 and all(s["right"] for s in samples)


def test_settings_that_cannot_work(oracle, config, tmp_path):
    with pytest.raises(EvalError, match="'grey' is not one of '', 'noimage', 'gray', 'shuffle'"):
        run(Fake(oracle), dataclasses.replace(config, blind="grey"), tmp_path)
    with pytest.raises(EvalError, match="does not exist"):
        run(Fake(oracle), dataclasses.replace(config, path="no.jsonl"), tmp_path)
