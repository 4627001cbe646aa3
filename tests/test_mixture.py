"""Mixtures: which records are used how often, and the sources inside LLaVA's 665K file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from data_helpers import llama_tokenizer, record, turns
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxvlm.config import DataConfig, ModelConfig, PromptConfig, SourceConfig, VisionConfig
from jaxvlm.data import DataError, llava_mix
from jaxvlm.data.loader import Loader
from jaxvlm.data.mixture import check_sources, choose, epoch_samples, mixture_table, shares

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
BOX = "Please provide the bounding box coordinate of the region this sentence describes: "
REGION = "Please provide a short description for this region: "
CAPTION = "Provide a one-sentence caption for the provided image.\nReference OCR token: STOP"
COCO = "coco/train2017/1.jpg"
# A record of every source, in the forms that the published file has.
EXAMPLES = {
    "llava": record("What is he doing?\n<image>", "He rides.", "Why?", "To work.", id="ll", image=COCO),
    "sharegpt": record("Write a poem.", "Roses are red.", id="sg"),
    "vqav2": record(f"<image>\nIs it red?{SHORT}", "Yes", "How many?", "2", "Where?", "Sky", id="v2", image=COCO),
    "gqa": record(f"<image>\nIs it left?{SHORT}", "no", id="gq", image="gqa/images/2.jpg"),
    "okvqa": record(f"<image>\nWhat sport?{SHORT}", "tennis", "Who won?", "she", id="ok", image=COCO),
    "ocrvqa": record(f"<image>\nWho wrote it?{SHORT}", "Me", id="oc", image="ocr_vqa/images/3.jpg"),
    "aokvqa": record(f"<image>\nWhat?\nA. x\nB. y{LETTER}", "B", id="ao", image=COCO),
    "textcaps": record(f"<image>\n{CAPTION}", "A sign.", id="tc", image="textvqa/train_images/4.jpg"),
    "refcoco": record(
        f"<image>\n{BOX}dog.", "[0.1, 0.2, 0.3, 0.4]", f"{REGION}[0, 0, 1, 1]", "cat", id="rc", image=COCO
    ),
    "vg": record(f"<image>\n{REGION}[0, 0, 1, 1].", "sky", id="vg", image="vg/VG_100K_2/5.jpg"),
    "other": record("<image>\nWhat?", "this", id="xx", image="chartqa/6.jpg"),
}


# ------------------------------------------------------------------------------------------------------------ choosing


class Unread:
    """Records that nobody may look at."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


fractions = st.floats(0.01, 3.5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), fractions, fractions, st.integers(0, 5))
def test_a_smaller_fraction_is_inside_a_larger_one(count, a, b, seed):
    small, large = sorted((a, b))
    source = SourceConfig(path="x")

    def copies(fraction):
        try:
            return choose(Unread(count), SourceConfig(path="x", fraction=fraction), seed)
        except DataError:
            assert round(fraction * count) == 0  # nothing is left
            return np.zeros(count, int)

    less, more = copies(small), copies(large)
    assert (less <= more).all() and abs(less.sum() - small * count) <= 0.5 + 1e-9 * count
    assert set(more) <= {int(large), int(large) + 1}
    np.testing.assert_array_equal(choose(Unread(count), source, seed), np.ones(count))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(sorted(EXAMPLES)), min_size=1, max_size=60), st.floats(0.05, 1.0), st.integers(0, 3))
def test_every_record_is_in_one_part_and_parts_are_chosen_alike(names, fraction, seed):
    """Of each source inside the file the same records, whichever others are kept."""
    records = [EXAMPLES[name] for name in names]

    def copies(*keep, **options):
        try:
            return choose(records, SourceConfig(path="x", mix=llava_mix.MIX, keep=keep, **options), seed)
        except DataError:
            return np.zeros(len(names), int)

    parts = {name: copies(name) for name in llava_mix.PARTS}
    for name, chosen in parts.items():
        np.testing.assert_array_equal(chosen, [one == name for one in names])
    np.testing.assert_array_equal(sum(parts.values()), 1)
    np.testing.assert_array_equal(copies(text_only=False), 1 - parts["sharegpt"])
    of_two = copies("gqa", "vg", fraction=fraction)
    assert of_two.sum() == round(fraction * (parts["gqa"] + parts["vg"]).sum())
    order = [i for i in np.random.default_rng(seed).permutation(len(names)) if names[i] in ("gqa", "vg")]
    assert set(np.flatnonzero(of_two)) == set(order[: of_two.sum()])


def test_what_cannot_be_read_is_kept_to_be_found_later():
    class Broken(list):
        def __getitem__(self, i):
            record = super().__getitem__(i)
            if record is None:
                raise DataError("line 2 is not JSON")
            return record

    records = Broken([EXAMPLES["gqa"], None, "text", EXAMPLES["vg"]])
    source = SourceConfig(path="x", mix=llava_mix.MIX, keep=("vg",), text_only=False)
    assert choose(records, source, 0).tolist() == [0, 1, 1, 1]


# ------------------------------------------------------------------------------------------------------------- weights


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 5.0)), min_size=1, max_size=4), st.integers(0, 4))
def test_weights_are_shares_and_no_record_is_seen_again_before_the_others(sources, seed):
    counts, weights = zip(*sources, strict=True)
    source = np.repeat(np.arange(len(counts)), counts)
    sizes = shares(counts, weights)
    assert sum(sizes) == sum(counts)
    exact = np.asarray(weights) / sum(weights) * sum(counts)
    assert (np.abs(sizes - exact) < 1 + 1e-9).all()
    seen = np.zeros(len(source), int)
    for epoch in range(4):
        samples = epoch_samples(source, weights, seed, epoch)
        assert np.bincount(source[samples], minlength=len(counts)).tolist() == sizes
        np.testing.assert_array_equal(samples, epoch_samples(source, weights, seed, epoch))
        np.add.at(seen, samples, 1)
        for i in range(len(counts)):
            assert np.ptp(seen[source == i]) <= 1
    # What an epoch takes of a source, it takes in random order: as a whole it is a permutation.
    everything = np.concatenate([epoch_samples(source, [None] * len(counts), seed, epoch) for epoch in range(2)])
    np.testing.assert_array_equal(np.bincount(everything), 2)


@pytest.mark.parametrize(
    "sources, message",
    [
        ([dict(weight=1.0), dict()], "Give every source a positive `weight`, or none of them"),
        ([dict(weight=0.0)], "positive `weight`"),
        ([dict(mix="llava_mix")], "no mix 'llava_mix'; the only one known is 'llava_v1_5_mix665k'"),
        ([dict(keep=("gqa",))], "so `mix` must be"),
        ([dict(mix=llava_mix.MIX, keep=("vqa2",))], "`keep` has 'vqa2', which .* does not. It has vqav2"),
    ],
)
def test_settings_that_cannot_be_used(sources, message):
    with pytest.raises(DataError, match=message):
        check_sources([SourceConfig(name="s", **source) for source in sources])


# ------------------------------------------------------------------------------------------------------------- the 665K


def test_the_rules_tell_the_sources_apart():
    for name, example in EXAMPLES.items():
        assert llava_mix.source_of(example) == name
    deeper = EXAMPLES["vg"] | {"image": ["data/vg/VG_100K/5.jpg"]}
    assert llava_mix.source_of(deeper) == "vg"
    assert llava_mix.source_of(EXAMPLES["okvqa"] | {"conversations": turns(f"<image> What?{SHORT}", "a")}) == "okvqa"
    for malformed in (
        None,
        [],
        {},
        {"image": 3},
        {"image": COCO},
        {"image": COCO, "conversations": ["x", {"from": "human"}]},
    ):
        assert llava_mix.source_of(malformed) == "other"


def test_the_published_counts():
    """LLaVA #657 counts by folder, #702 by source; they agree."""
    counts = llava_mix.COUNTS
    assert sum(counts.values()) == 665_298 and set(counts) == {rule.name for rule in llava_mix.RULES}
    assert sum(counts[rule.name] for rule in llava_mix.RULES if rule.folder == "coco") == 364_100
    assert llava_mix.looks_like(counts) and llava_mix.looks_like({name: 3 for name in counts})
    assert not llava_mix.looks_like({"llava": 100, "sharegpt": 3}) and not llava_mix.looks_like(
        counts | {"other": 10**6}
    )


def test_format_prompts_go_and_questions_stay():
    for name in ("vqav2", "okvqa", "gqa", "ocrvqa", "aokvqa"):
        said = [turn["value"] for turn in llava_mix.without_format_prompts(EXAMPLES[name])["conversations"]]
        assert not any("Answer" in text for text in said)
        assert said[0] == EXAMPLES[name]["conversations"][0]["value"].split("\nAnswer")[0]
        assert said[1:] == [turn["value"] for turn in EXAMPLES[name]["conversations"][1:]]
    for name in ("llava", "sharegpt", "textcaps", "refcoco", "vg"):
        assert llava_mix.without_format_prompts(EXAMPLES[name]) == EXAMPLES[name]
    alone = record(f"<image>{SHORT}", f"It says:{SHORT}")
    assert llava_mix.without_format_prompts(alone) == alone  # a question that is nothing else, and an answer
    vizwiz = "When the provided information is insufficient, respond with 'Unanswerable'."
    both = record(f"<image>\nWhat?\n{vizwiz}{SHORT}", "a")
    assert llava_mix.without_format_prompts(both)["conversations"][0]["value"] == "<image>\nWhat?"


# ---------------------------------------------------------------------------------------------------------- the loader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three of each kind of record, and their pictures."""
    folder = tmp_path_factory.mktemp("mix")
    llama_tokenizer(folder / "tokenizer")
    records = [example | {"id": f"{name}{i}"} for i in range(3) for name, example in EXAMPLES.items()]
    for example in EXAMPLES.values():
        if "image" in example:
            (folder / example["image"]).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), "teal").save(folder / example["image"])
    (folder / "mix.json").write_text(json.dumps(records))
    (folder / "more.json").write_text(json.dumps([record(f"text {i}", "yes", id=f"m{i}") for i in range(5)]))
    return folder


def loader(folder, *sources, **options):
    sources = [SourceConfig(**dict(path=str(folder / "mix.json"), images=str(folder)) | source) for source in sources]
    data = DataConfig(sources=tuple(sources), packing=True, **options.pop("data", {}))
    prompt = PromptConfig(str(folder / "tokenizer"), template="prism", length=512)
    model = ModelConfig(vision=VisionConfig(image_size=28, patch_size=14))
    return Loader(data, prompt, model, batch_size=2, seed=0, cache_dir=folder / "cache", **options)


def ids_of(made):
    """The ids of the samples of the run's rows, each as often as it is used."""
    return sorted(made.sample(i)["id"] for i in made._rows.samples.tolist())


def test_source_ids_follow_the_sources_inside_the_file(folder):
    made = loader(folder, dict(name="mix", mix=llava_mix.MIX), dict(name="more", path=str(folder / "more.json")))
    assert made.source_names == (*llava_mix.PARTS, "more")
    stats = made.stats()
    assert {name: one["samples"] for name, one in stats["sources"].items()} == dict.fromkeys(llava_mix.PARTS, 3) | {
        "more": 5
    }
    supervised = np.zeros(len(made.source_names), int)
    for batch in made.batches():
        scored = batch["loss_weights"] > 0
        supervised += np.bincount(batch["source_ids"][scored], minlength=len(supervised))
    assert supervised.tolist() == [one["supervised_tokens"] for one in stats["sources"].values()]
    assert stats["sources"]["vqav2"]["supervised_tokens"] > stats["sources"]["gqa"]["supervised_tokens"]
    assert loader(folder, dict(name="mix")).source_names == ("mix",)


def test_a_part_of_the_file_in_any_order_of_the_sources(folder):
    half = dict(name="mix", mix=llava_mix.MIX, keep=("vqav2", "gqa", "llava"), fraction=0.5)
    more = dict(name="more", path=str(folder / "more.json"), fraction=0.4)
    one, other = loader(folder, half, more), loader(folder, more, half)
    assert ids_of(one) == ids_of(other) and len(ids_of(one)) == 4 + 2  # round(0.5 * 9), round(0.4 * 5)
    tenth = loader(folder, half | {"fraction": 0.25})
    assert set(ids_of(tenth)) < set(ids_of(one))
    assert {name[:-1] for name in ids_of(loader(folder, half | {"fraction": 1.0}))} == {"vqav2", "gqa", "llava"}


def test_without_format_prompts_and_without_text(folder):
    mix = dict(name="mix", mix=llava_mix.MIX)

    def text(made):
        return {made.sample(i)["id"]: "".join(part for part, _ in made.sample(i)["text"]) for i in range(33 - 3)}

    given, bare = (text(loader(folder, mix | dict(text_only=False, format_prompts=keep))) for keep in (True, False))
    assert not any(name.startswith("sharegpt") for name in given) and len(given) == 30
    assert SHORT in given["gqa0"] and SHORT not in bare["gqa0"] and "Is it left?" in bare["gqa0"]
    assert given["vg1"] == bare["vg1"]


def test_weights_decide_the_shares_of_an_epoch(folder):
    made = loader(folder, dict(name="a", weight=1.0), dict(name="b", path=str(folder / "more.json"), weight=1.0))
    counts = {name: one["samples"] for name, one in made.stats()["sources"].items()}
    assert counts == {"a": 19, "b": 19}
    other = loader(folder, dict(name="a", weight=3.0), dict(name="b", path=str(folder / "more.json"), weight=1.0))
    assert (
        other.fingerprint != made.fingerprint and other.stats()["sources"]["b"]["samples"] == 9
    )  # a quarter of 38, rounded


def test_the_mixture_is_a_table(folder):
    made = loader(folder, dict(name="mix", mix=llava_mix.MIX, keep=("gqa", "vg", "sharegpt")))
    lines = mixture_table(made.stats()).splitlines()
    assert lines[0].split()[:3] == ["source", "samples", "tokens"] and len(lines) == 5
    rows = {line.split()[0]: line.split() for line in lines[1:]}
    assert rows["gqa"][1] == "3" and rows["all"][1] == "9" and rows["all"][5] == "6"
    tokens = made.stats()["sources"]["vg"]["tokens"]
    assert rows["vg"][2] == f"{tokens:,}" and len({len(line) for line in lines}) == 1
