"""Evaluation while a stage trains: what is held out, what its loss is, and that neither training nor resuming notices."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from held_out_helpers import loss_by_hand
from hf_copy import random_params
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvlm import job
from jaxvlm.config import CheckpointConfig, ConfigError, MeshConfig, SourceConfig, WatchConfig
from jaxvlm.data import DataError
from jaxvlm.data.assets import toy
from jaxvlm.data.loader import Loader
from jaxvlm.data.mixture import choose
from jaxvlm.evals import question_file, slim
from jaxvlm.infer import decoding
from jaxvlm.infer.engine import Engine
from jaxvlm.models.vlm import VLM, abstract_params, logical_axes
from jaxvlm.parallel.mesh import make_mesh
from jaxvlm.parallel.rules import param_shardings
from jaxvlm.train.checkpoint import content_hash
from jaxvlm.train.loop import train_stage
from jaxvlm.train.metrics import Meter, read_events, read_metrics
from jaxvlm.train.state import TrainState
from jaxvlm.train.step import make_evaluate
from jaxvlm.train.watch import check_watch, held_out_loss
from jaxvlm.weights.saved import load_model

MESH = MeshConfig(data=2, fsdp=2, tensor=2)  # the tests' eight simulated devices


class Ended(RuntimeError):
    """What stands for a kill."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run of one stage on two sources; the first holds 20 records out, the second none."""
    folder = tmp_path_factory.mktemp("watch")
    made = tiny.run_config(toy.write_dataset(folder / "data"), toy.write_tokenizer(folder / "tok"), mesh=MESH)
    (one,) = made.stages[1].data.sources
    sources = (
        dataclasses.replace(one, name="asked", held_out=20),
        dataclasses.replace(one, name="told", path=str(folder / "data" / "align.json")),
    )
    stage = dataclasses.replace(
        made.stages[1],
        data=dataclasses.replace(made.stages[1].data, sources=sources),
        steps=5,
        watch=WatchConfig(every_steps=2, questions=(("left", 3), ("right", 2))),
    )
    asked_once = dataclasses.replace(made.eval, blind="")
    return dataclasses.replace(made, stages=(stage,), checkpoint=CheckpointConfig(every_steps=2), eval=asked_once)


def changed(world, **changes):
    return dataclasses.replace(world, stages=(dataclasses.replace(world.stages[0], **changes),))


def records(world):
    return json.loads(open(world.stages[0].data.sources[0].path).read())


def loader(world, held_out=False, **changes):
    stage = changed(world, **changes).stages[0]
    more = dict(batch_size=stage.batch_size, steps=stage.steps, seed=world.seed, held_out=held_out)
    return Loader(stage.data, world.prompt, world.model, **more)


def events(workdir):
    found = [event for kind in ("held_out", "slim") for event in read_events(workdir / "metrics.jsonl", kind)]
    return [{key: value for key, value in event.items() if key != "seconds"} for event in found]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The run, not interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    job.run(world, workdir)
    return workdir


# --------------------------------------------------------------------------------------------------- what is held out


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 200), st.data(), st.floats(0.3, 3.0), st.integers(0, 5))
def test_what_is_held_out_is_nested_and_never_trained_on(count, data, fraction, seed):
    """Of some records the rules let only the even ones through."""
    kept = [{"image": "x.png"} if i % 2 == 0 else {} for i in range(count)]
    rules = data.draw(st.booleans())
    passing = {i for i in range(count) if i % 2 == 0 or not rules}
    small, large = sorted(data.draw(st.tuples(*[st.integers(0, len(passing) - 1)] * 2)))

    def copies(number, seed=seed, held_out=False):
        source = SourceConfig(path="x", held_out=number, fraction=fraction, text_only=not rules)
        return choose(kept, source, seed, held_out)

    sets = {number: set(np.flatnonzero(copies(number, held_out=True)).tolist()) for number in {small, large} - {0}}
    for number, out in sets.items():
        assert len(out) == number and out < passing
        np.testing.assert_array_equal(copies(number, held_out=True), copies(number, seed + 1, held_out=True))
        rest = len(passing) - number
        if round(fraction * rest):
            used = copies(number)
            assert abs(used.sum() - fraction * rest) <= 0.5 + 1e-9 * count
            assert not out & set(np.flatnonzero(used).tolist())
            if fraction >= 1:
                assert out | set(np.flatnonzero(used).tolist()) == passing
    if small:
        assert sets[small] <= sets[large]


def test_several_processes_ask_nothing_and_say_so(world, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert job.questions_of(world.stages[0], world, None) is None
    assert "'instruct': watch.questions are not asked in a job of several processes" in capsys.readouterr().out


@pytest.mark.parametrize("number, message", [(4, "held_out 4 of the 4 records of x leaves none"), (9, "held_out 9")])
def test_something_is_left_to_train_on(number, message):
    with pytest.raises(DataError, match=message):
        choose([{}] * 4, SourceConfig(path="x", held_out=number), 0)


def test_the_loader_of_held_out_records(world):
    """Each of them once, in batches of the training's shape, the last one filled up with empty rows."""
    train, out = loader(world), loader(world, held_out=True)
    numbers = np.flatnonzero(choose(records(world), world.stages[0].data.sources[0], 0, held_out=True))
    ids = [out.sample(i)["id"] for i in out._rows.samples]
    assert sorted(ids) == sorted(records(world)[i]["id"] for i in numbers) and len(ids) == 20
    asked = [train.sample(i) for i in train._rows.samples]
    assert not set(ids) & {one["id"] for one in asked if one["source"] == "asked"}
    assert out.source_names == ("asked",) and train.source_names == ("asked", "told")
    batches = list(out.batches())
    for batch in batches:
        expected = next(train.batches())
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (v.shape, v.dtype) for k, v in expected.items()}
    assert sum(batch["segment_ids"].max(1).sum() for batch in batches) == 20
    assert not batches[-1]["segment_ids"][-1].any()
    with pytest.raises(DataError, match="None of the stage's sources"):
        only = dataclasses.replace(world.stages[0].data, sources=world.stages[0].data.sources[1:])
        loader(world, held_out=True, data=only)


def test_a_quarantine_list_about_another_source_is_no_error(world, tmp_path):
    listed = tmp_path / "list.jsonl"
    told = world.stages[0].data.sources[1]
    first = json.loads(open(told.path).read())[0]
    listed.write_text(json.dumps({"source": told.name, "file": told.path, "record": 0, "id": first["id"]}) + "\n")
    data = dataclasses.replace(world.stages[0].data, bad_records="quarantine", quarantine=str(listed))
    assert loader(world, data=data).stats()["quarantined"] == 1
    assert loader(world, held_out=True, data=data).stats()["samples"] == 20


# ------------------------------------------------------------------------------------------------------ what is measured


def test_the_loss_is_that_of_each_record_alone(world, whole):
    """Of the run's model after its last step, which a mesh of eight devices trained, in rows of several records."""
    loss, tokens = loss_by_hand(whole, world.stages[0].data.sources[0])
    last = read_events(whole / "metrics.jsonl", "held_out")[-1]
    assert last["step"] == 5 and last["tokens"] == {"asked": tokens, "all": tokens}
    assert last["loss"]["asked"] == last["loss"]["all"] == pytest.approx(loss, rel=1e-4)


def test_events_come_every_k_steps_and_at_the_end(whole):
    found = events(whole)
    assert [(e["event"], e["step"]) for e in found] == [(k, s) for k in ("held_out", "slim") for s in (2, 4, 5)]
    assert all(e["stage"] == "instruct" for e in found)
    losses = [e["loss"]["all"] for e in found[:3]]
    assert losses == sorted(losses, reverse=True)  # it learns
    page = (whole / "report.html").read_text()
    assert "held-out loss per supervised token" in page and "right, of 5 questions asked while training" in page


def test_questions_are_some_of_the_evaluation_and_scored_by_category(world, whole, monkeypatch):
    """All right about the left half, and one of two about the right one."""
    questions = {one.id: one for one in question_file.read_questions(world.eval.path, world.eval.images)}
    answers = map(json.loads, (whole / "eval" / "answers-sighted.jsonl").read_text().splitlines())
    prompts = {
        one["question_id"]: (f"<image>\n{one['prompt']}", questions[one["question_id"]].image) for one in answers
    }
    truth = {name: questions[name].answer for name in prompts}
    asked, wrong = [], []

    def generate(engine, requests, *, max_new_tokens, batch_size):
        assert (max_new_tokens, batch_size) == (world.eval.max_new_tokens, world.eval.batch_size)
        asked.extend((one["id"], (one["messages"][0]["content"], one["images"][0])) for one in requests)
        wrong.append(next(one["id"] for one in requests if "right half" in one["messages"][0]["content"]))
        return ["nothing" if one["id"] in wrong else truth[one["id"]].upper() + "." for one in requests]

    monkeypatch.setattr(Engine, "generate", generate)
    made = slim.slim_scores(world, world.stages[0].watch, None)(7, load_model(whole)[0])
    assert dict(asked).items() < prompts.items() and len(asked) == made["n"] == 5
    assert made["scores"] == {"left": 1.0, "right": 0.5, "all": 0.8}


def test_asking_again_compiles_nothing_and_sees_other_parameters(world, whole, monkeypatch):
    mesh = make_mesh(MESH)
    placed = param_shardings(logical_axes(world.model), abstract_params(world.model), mesh)
    params, texts, generate = load_model(whole, lambda config: placed)[0], [], Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda *a, **k: texts.append(generate(*a, **k)) or texts[-1])
    ask = slim.slim_scores(world, world.stages[0].watch, mesh)
    ask(1, params)
    compiled = [decoding.encode_images, decoding.prefill, decoding.decode]
    before = [function._cache_size() for function in compiled]
    other = jax.tree.map(lambda x: -x, params)
    ask(2, other)
    assert before == [function._cache_size() for function in compiled]
    assert texts[0] != texts[1]


def test_images_of_held_out_records_have_features(world, whole, tmp_path):
    """With features from the disk the same loss; some pictures are only in what is held out."""
    data = dataclasses.replace(world.stages[0].data, sources=world.stages[0].data.sources[:1])
    one = changed(world, data=data, cache_features=True)
    assert set(loader(one, held_out=True).image_paths()) - set(loader(one).image_paths())
    mesh, params = make_mesh(MeshConfig(), jax.devices()[:1]), load_model(whole)[0]
    features = job.stage_features(0, one, params["vision"], tmp_path)
    evaluate = jax.jit(make_evaluate(VLM(world.model), 1))
    state = TrainState(0, {}, params, None)
    found = []
    with jax.set_mesh(mesh):
        for made in (job.stage_loader(0, one, features, held_out=True), loader(one, held_out=True)):
            assert ("features" in next(made.batches())) == (not found)
            found.append(held_out_loss(evaluate, state, made, mesh, lambda: None))
    assert found[0]["loss"]["asked"] == pytest.approx(found[1]["loss"]["asked"], rel=1e-5)
    assert found[0]["tokens"] == found[1]["tokens"]


# ------------------------------------------------------------------------------------------- what must not notice


def number_of(params):
    """Of every bit of the parameters, between 0 and 1."""
    return int(content_hash(params), 16) / 16**16


def train(world, workdir, **changes):
    """The stage alone on one device, its result a moving average; questions are answered by a hash of the parameters.

    Returns the hash of the result.
    """
    changes["optimizer"] = dataclasses.replace(world.stages[0].optimizer, ema_decay=0.5)
    stage, mesh = changed(world, **changes).stages[0], make_mesh(MeshConfig(), jax.devices()[:1])

    def ask(step, params):
        return {"scores": {"all": number_of(params)}, "n": step, "seconds": 0.0}

    loaders = (loader(world), loader(world, held_out=True)) if stage.watch.every_steps else (loader(world), None)
    with jax.set_mesh(mesh):
        params = jax.device_put(random_params(world.model), jax.devices()[0])
        more = (world.checkpoint, None, None, loaders[1], ask if stage.watch.every_steps else None)
        trained, _ = train_stage(stage, world.model, params, loaders[0], mesh, workdir, workdir / "stage", *more)
        return number_of(trained)


@pytest.fixture(scope="module")
def watched(world, tmp_path_factory):
    """(work directory, hash of the parameters) of a stage that nothing happened to."""
    workdir = tmp_path_factory.mktemp("watched")
    return workdir, train(world, workdir)


def losses(workdir):
    return [(entry["step"], entry["loss"]) for entry in read_metrics(workdir / "metrics.jsonl")]


def test_training_is_the_same_to_the_bit(world, watched, tmp_path):
    workdir, digest = watched
    assert [(e["event"], e["step"]) for e in events(workdir)] == [
        (k, s) for k in ("held_out", "slim") for s in (2, 4, 5)
    ]
    assert (
        events(workdir)[-1]["scores"]["all"] == digest and len({e["scores"]["all"] for e in events(workdir)[3:]}) == 3
    )
    assert train(world, tmp_path, watch=WatchConfig()) == digest
    assert events(tmp_path) == []
    assert losses(tmp_path) == losses(workdir) and len(losses(workdir)) == 5


def test_a_stage_that_is_ended_again_and_again_has_each_event_once(world, watched, tmp_path, monkeypatch):
    """First after an evaluation, then within that of the last step, which is saved by then."""
    add, evaluate, ends = Meter.add, Meter.evaluate, {}

    def ending_add(self, step, *more):
        add(self, step, *more)
        if ends == {"step": step}:
            raise Ended

    def ending_evaluate(self, kind, step, measure):
        if ends == {kind: step}:
            raise Ended
        evaluate(self, kind, step, measure)

    monkeypatch.setattr(Meter, "add", ending_add)
    monkeypatch.setattr(Meter, "evaluate", ending_evaluate)
    counts = []
    for ends in ({"step": 3}, {"slim": 5}):  # noqa: B007
        with pytest.raises(Ended):
            train(world, tmp_path)
        counts.append(len(events(tmp_path)))
    assert counts == [2, 5]
    ends = {}
    assert train(world, tmp_path) == watched[1]
    assert events(tmp_path) == events(watched[0]) and losses(tmp_path) == losses(watched[0])
    assert train(world, tmp_path) == watched[1]  # a finished stage is not evaluated again
    assert events(tmp_path) == events(watched[0])


# --------------------------------------------------------------------------------------------------- what is refused


def test_settings_that_cannot_be_used(world):
    sources = world.stages[0].data.sources
    bad = dataclasses.replace(world.stages[0].data, sources=(sources[0], dataclasses.replace(sources[0], held_out=3)))
    with pytest.raises(ConfigError, match="held_out = 20 in stage 'instruct' and 3 in"):
        check_watch(changed(world, data=bad))
    none = dataclasses.replace(world.stages[0].data, sources=sources[1:])
    with pytest.raises(ConfigError, match="nothing to evaluate: set `held_out`"):
        check_watch(changed(world, data=none, watch=WatchConfig(every_steps=1)))
    named = dataclasses.replace(world.stages[0].data, sources=(dataclasses.replace(sources[0], name="all"),))
    with pytest.raises(ConfigError, match="is called 'all'"):
        check_watch(changed(world, data=named))
    with pytest.raises(ConfigError, match="set config.eval"):
        check_watch(dataclasses.replace(world, eval=dataclasses.replace(world.eval, task="")))
    with pytest.raises(question_file.EvalError, match="watch.questions names the category 'top'"):
        slim.slim_scores(world, WatchConfig(questions=(("top", 1),)), None)
    with pytest.raises(question_file.EvalError, match="watch.questions has 0 of 'left'"):
        slim.slim_scores(world, WatchConfig(questions=(("left", 0),)), None)


def test_a_run_may_be_watched_otherwise_but_not_hold_other_records_out(world, whole):
    watched_less = changed(world, watch=WatchConfig(every_steps=3, questions=()))
    job.claim_workdir(watched_less, whole)
    sources = world.stages[0].data.sources
    other = dataclasses.replace(
        world.stages[0].data, sources=(dataclasses.replace(sources[0], held_out=21), sources[1])
    )
    with pytest.raises(ConfigError, match=r"stages.0.data.sources.0.held_out: 20 -> 21"):
        job.claim_workdir(changed(world, data=other), whole)
    assert loader(world, data=other).fingerprint != loader(world).fingerprint
    job.claim_workdir(world, whole)
