"""Records that cannot be used: every policy, what is counted and where it is written, and when a run stops."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from data_helpers import llama_tokenizer, record
from PIL import Image

from jaxvlm.config import DataConfig, LogConfig, ModelConfig, PromptConfig, SourceConfig, StageConfig, VisionConfig
from jaxvlm.data import DataError, bad, samples
from jaxvlm.data.loader import Loader
from jaxvlm.data.mixture import mixture_table
from jaxvlm.train.metrics import Meter, open_metrics, read_events, read_metrics

GONE = "image file … is missing or empty"


@pytest.fixture
def folder(tmp_path):
    """Source `a`: 20 good records with an image, two whose image is missing, one without an answer. `b`: 5 of text."""
    llama_tokenizer(tmp_path / "tokenizer")
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    good = [record("<image>\nq?", "yes " * (1 + i % 3), id=f"a{i}", image=f"{i % 5}.png") for i in range(20)]
    lost = [
        record("<image>\nq?", "a", id="gone", image="x.png"),
        record("<image>", "a", id="gone too", image="dir/y.png"),
    ]
    (tmp_path / "a.json").write_text(json.dumps([*good[:10], *lost, record("nobody answers", id="mute"), *good[10:]]))
    (tmp_path / "b.json").write_text(json.dumps([record(f"text {i}", "no", id=i) for i in range(5)]))
    return tmp_path


def loader(folder, names="ab", truncation="after_splice", **data):
    sources = tuple(SourceConfig(name, str(folder / f"{name}.json"), str(folder)) for name in names)
    settings = dict(sources=sources, packing=True, bad_records="skip", max_bad_share=0.2) | data
    prompt = PromptConfig(str(folder / "tokenizer"), template="prism", length=64, truncation=truncation)
    model = ModelConfig(vision=VisionConfig(image_size=28, patch_size=14))
    options = dict(batch_size=4, seed=0, cache_dir=folder / "cache", skipped_path=folder / "out" / "skipped.jsonl")
    return Loader(DataConfig(**settings), prompt, model, **options)


def lines(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def ids(made):
    return {made.sample(i)["id"] for i in range(len(made._samples.source))}


def test_skipped_records_are_counted_by_source_and_reason_and_listed(folder):
    made = loader(folder)
    stats = made.stats()
    (mute,) = (reason for reason in stats["sources"]["a"]["skipped"] if reason != GONE)
    assert stats["sources"]["a"]["skipped"] == {GONE: 2, mute: 1} and "answer" in mute and "mute" not in mute
    assert stats["sources"]["b"]["skipped"] == {} and (stats["skipped"], stats["quarantined"]) == (3, 0)
    assert (stats["sources"]["a"]["records"], stats["sources"]["a"]["lost"]) == (20, 3)
    listed = lines(made.skipped_path)
    assert [(one["source"], one["record"], one["id"]) for one in listed] == [
        ("a", 10, "gone"),
        ("a", 11, "gone too"),
        ("a", 12, "mute"),
    ]
    assert listed[1]["image"] == str(folder / "dir" / "y.png") and listed[1]["file"] == str(folder / "a.json")
    table = mixture_table(stats)
    assert f"a: 2 left out: {GONE}" in table and table.splitlines()[1].split()[-1] == "3"


def test_a_source_that_loses_too_much_stops_the_run(folder):
    with pytest.raises(DataError) as error:
        loader(folder, max_bad_share=0.1)
    assert "a loses 3 of 23 records (13.0%), more than data.max_bad_share = 0.1" in str(error.value)
    assert f"  2 x {GONE}\n" in str(error.value) and "`jaxvlm data verify`" in str(error.value)
    assert loader(folder, max_bad_share=3 / 23).stats()["skipped"] == 3
    with pytest.raises(DataError, match="max_bad_share is a share between 0 and 1, not 5"):
        loader(folder, max_bad_share=5.0)


def test_a_wrong_folder_is_told_without_listing_every_record(folder, monkeypatch):
    monkeypatch.setattr(samples, "MANY", 5)
    monkeypatch.setattr(samples, "record_place", None)  # which every entry of a list needs
    for i in range(5):
        (folder / f"{i}.png").unlink()
    with pytest.raises(DataError, match=rf"a loses 22 of 22 records .*\n  22 x {GONE}, the first: {folder}/0.png"):
        loader(folder)


def test_reasons_are_counted_without_what_is_particular():
    def kind(reason, **more):
        return bad.kind({"reason": reason} | more)

    assert kind("record 'a 1' has 2 images but 1 <image>") == kind("record 7 has 12 images but 3 <image>")
    assert kind("image file /a b/c.png is gone", image="/a b/c.png") == kind("image file /d/e.png is gone")
    assert kind("""record "it's" is longer than `length` (2048)""") == "is longer than `length` (N)"
    assert kind("line 3 is not JSON: column 14: Expecting ','") == "line N is not JSON: column N: Expecting …"
    assert kind("record 'x' has no answer") != kind("record 'x' has no question")


# ------------------------------------------------------------------------------------------------------ the quarantine


def quarantine(folder, entries):
    path = folder / "quarantine.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return dict(bad_records="quarantine", quarantine=str(path))


def test_a_list_of_skipped_records_is_a_quarantine_list(folder):
    skipping = loader(folder)
    made = loader(folder, bad_records="quarantine", quarantine=skipping.skipped_path)
    assert ids(made) == ids(skipping) and (made.stats()["skipped"], made.stats()["quarantined"]) == (0, 3)
    assert made.stats()["sources"]["a"]["quarantined"] == 3 and made.skipped_path is None
    assert [batch.keys() for batch in made.batches()] == [batch.keys() for batch in skipping.batches()]
    assert "a: 3 left out by the quarantine list" in mixture_table(made.stats())


def test_good_records_can_be_quarantined_and_what_is_not_listed_is_an_error(folder):
    entry = dict(source="a", file=str(folder / "a.json"))
    listed = [entry | dict(record=n, id=i) for n, i in ((0, "a0"), (10, "gone"), (11, "gone too"), (12, "mute"))]
    made = loader(folder, **quarantine(folder, listed))
    assert "a0" not in ids(made) and len(ids(made)) == 19 + 5 and made.stats()["quarantined"] == 4
    with pytest.raises(DataError) as error:
        loader(folder, **quarantine(folder, listed[:2]))
    assert "1 image files are missing or empty" in str(error.value) and "1 records cannot be used" in str(error.value)
    assert "quarantine.jsonl does not list them" in str(error.value)
    with pytest.raises(DataError, match="a loses 4 of 23 records"):
        loader(folder, **quarantine(folder, listed), max_bad_share=0.1)


def test_a_quarantine_list_moves_with_its_data(folder, tmp_path_factory):
    entry = dict(source="a", file="/elsewhere/a.json")
    listed = [entry | dict(record=n, id=i) for n, i in ((10, "gone"), (11, "gone too"), (12, "mute"))]
    assert loader(folder, **quarantine(folder, listed)).stats()["quarantined"] == 3
    for changes, message in (
        (dict(source="c"), r"is about /elsewhere/a.json, which none of the sources reads \(.*a.json, .*b.json\)"),
        (dict(id="other"), "was made for another /elsewhere/a.json: its record 10 has id 'gone', not 'other'"),
        (dict(record="10"), "line 1 must be an object with `file` and `record`"),
    ):
        with pytest.raises(DataError, match=message):
            loader(folder, **quarantine(folder, [one | changes for one in listed]))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(bad_records="quarantine"), "bad_records = 'quarantine' goes with `quarantine`"),
        (dict(quarantine="list.jsonl"), "they are 'skip' and 'list.jsonl'"),
        (dict(bad_records="quarantine", quarantine="/no/list.jsonl"), "list /no/list.jsonl cannot be read"),
        (dict(bad_records="drop"), "bad_records must be 'error', 'skip', 'quarantine', not 'drop'"),
    ],
)
def test_settings_that_cannot_be_used(folder, settings, message):
    with pytest.raises(DataError, match=message):
        loader(folder, **settings)


def test_a_quarantine_list_that_is_not_json(folder):
    (folder / "list.jsonl").write_text('{"record": 1\n')
    with pytest.raises(DataError, match="list.jsonl, line 1 is not JSON"):
        loader(folder, bad_records="quarantine", quarantine=str(folder / "list.jsonl"))


# ------------------------------------------------------------------------------------- images that break while it runs


def spoil(path):
    """Half of the file is lost: the header still reads."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.filterwarnings("ignore:Left out of the loss")
def test_images_that_break_later_are_listed_once_and_counted(folder):
    spoil(folder / "3.png")
    made = loader(folder)
    batches = list(made.batches())
    counts = sum(bad.broken_conversations(batch, len(made.source_names)) for batch in batches)
    assert counts.tolist() == [4, 0]  # every fifth of 20
    list(loader(folder).batches(1))  # a resumed run sees some of them again
    listed = lines(made.broken_path)
    assert sorted(one["id"] for one in listed) == ["a13", "a18", "a3", "a8"]
    assert all(one["image"] == str(folder / "3.png") and "cannot be read" in one["reason"] for one in listed)
    both = [*lines(made.skipped_path), *listed]
    clean = loader(folder, **quarantine(folder, both), max_bad_share=0.5)
    assert sum(bad.broken_conversations(batch, 2).sum() for batch in clean.batches()) == 0


def meter(folder, made, start=0):
    """A meter of a stage that nothing is trained in."""
    stage = StageConfig(name="align", data=made.data, batch_size=4)
    state = SimpleNamespace(
        trainable={"connector": {"kernel": np.ones((2, 2))}}, frozen={"llm": {"kernel": np.ones(3)}}
    )
    path = folder / "metrics.jsonl"
    return Meter(stage, tiny.model_config(), state, made.num_steps, start, path, LogConfig(every_steps=2), made.stats())


def step_metrics(made):
    sources = np.arange(len(made.source_names), dtype=np.float32)
    return {
        "loss": 1.0,
        "grad_norm": 1.0,
        "supervised_tokens": 3,
        "tokens": 9,
        "images": 2,
        "source_loss": 6 * sources,
        "source_tokens": 2 * sources,
    }


@pytest.mark.filterwarnings("ignore:Left out of the loss")
def test_metrics_tell_what_was_left_out_before_and_during_the_run(folder):
    spoil(folder / "3.png")
    made = loader(folder, max_bad_share=0.5)
    batches = list(made.batches())
    (folder / "metrics.jsonl").write_text("")
    halves = [batches[: len(batches) // 2], batches[len(batches) // 2 :]]
    for start, part in zip((0, len(halves[0])), halves, strict=True):  # the second half is a resumed run
        one = meter(folder, made, start)
        for step, batch in enumerate(part, start + 1):
            one.add(step, batch, step_metrics(made))
        one.close()
    (event,) = read_events(folder / "metrics.jsonl")
    assert event == {"event": "data", "stage": "align"} | json.loads(json.dumps(made.stats()))
    assert event["sources"]["a"]["skipped"][GONE] == 2
    steps = read_metrics(folder / "metrics.jsonl")
    assert steps[-1]["broken"] == {"a": 4} and steps[-1]["step"] == made.num_steps
    assert steps[0]["source_loss"] == {"b": 3.0}  # `a` had no supervised token


@pytest.mark.filterwarnings("ignore:Left out of the loss")
def test_a_source_whose_images_break_stops_the_run(folder):
    spoil(folder / "3.png")
    made = loader(folder, max_bad_share=0.2)  # 3 of 23 from the start, and then 4 more
    one = meter(folder, made)
    with pytest.raises(
        DataError, match=r"a loses [567] of 23 records.*max_bad_share = 0.2:\n(.*\n)*.*cannot be decoded"
    ):
        for step, batch in enumerate(made.batches(), 1):
            one.add(step, batch, step_metrics(made))
        one.close()


def test_a_resumed_stage_replaces_its_event(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for event, start in (({"event": "data", "stage": "x", "n": 1}, 0), ({"event": "data", "stage": "x", "n": 2}, 1)):
        with open_metrics(path, "x", start, event) as file:
            for step in (start + 1, start + 2):
                file.write(json.dumps({"stage": "x", "step": step}) + "\n")
    with open_metrics(path, "y", 0, {"event": "data", "stage": "y"}):
        pass
    assert [entry.get("n") for entry in read_events(path)] == [2, None]
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 3]


# -------------------------------------------------------------------------------------------------------- what was cut


def test_what_is_dropped_for_its_length_is_counted_and_no_error(folder):
    long = [record("q", "word " * 100, id="long"), *(record("q", "a", id=i) for i in range(2))]
    (folder / "long.json").write_text(json.dumps(long))
    with pytest.raises(
        DataError, match="record number 0: record 'long': the sequence has .* tokens but `length` is 64"
    ):
        loader(folder, ["long"], "error", bad_records="error")
    made = loader(folder, ["long"], "drop", bad_records="error", max_bad_share=0.0)
    stats = made.stats()
    assert (stats["records"], stats["dropped"], stats["skipped"], made.skipped_path) == (2, 1, 0, None)
    assert mixture_table(stats).splitlines()[1:][0].split()[-1] == "1"
    assert "long: 1 left out: longer than `length`" in mixture_table(stats)


def test_what_is_cut_off_is_shown_for_each_source(folder):
    long = [record("q", "word " * 100, "<image>", "late", id="long", image="0.png"), record("q", "a")]
    (folder / "long.json").write_text(json.dumps(long))
    stats = loader(folder, ["long", "b"]).stats()
    one = stats["sources"]["long"]
    assert (one["truncated"], one["dropped_images"], one["images"]) == (1, 1, 0)
    assert (stats["truncated"], stats["dropped_images"], stats["sources"]["b"]["truncated"]) == (1, 1, 0)
    heads, row = (line.split("  ") for line in mixture_table(stats).splitlines()[:2])
    assert [cell.strip() for cell in heads if cell][-3:] == ["truncated", "images cut", "left out"]
    assert [cell.strip() for cell in row if cell][-3:] == ["1", "1", "0"]
