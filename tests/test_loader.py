"""The loader: planning, resume, host and worker independence, bad records."""

import json
import pickle

import numpy as np
import pytest
from data_helpers import llama_tokenizer, record, turns
from PIL import Image

from jaxvlm.config import DataConfig, ModelConfig, PromptConfig, SourceConfig, VisionConfig
from jaxvlm.data import DataError
from jaxvlm.data.image import load_image, transform
from jaxvlm.data.loader import Loader, epoch_rows
from jaxvlm.data.packing import plan
from jaxvlm.data.samples import Samples

VISION = VisionConfig(image_size=28, patch_size=14)  # 4 visual tokens
MODEL = ModelConfig(vision=VISION)
KEYS = {"tokens", "visual_index", "positions", "segment_ids", "targets", "loss_weights", "source_ids"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sources: 24 records with an image (8 distinct), 10 of text only."""
    folder = tmp_path_factory.mktemp("data")
    llama_tokenizer(folder / "tokenizer")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    with_images = [
        record(f"<image>\nquestion {i}?", "answer " * (1 + i % 7), id=f"a{i}", image=f"{i % 8}.png") for i in range(24)
    ]
    (folder / "a.json").write_text(json.dumps(with_images))
    text = [record(f"text {i}", "yes " * (1 + i % 5), id=i) for i in range(10)]
    (folder / "b.jsonl").write_text("\n\n".join(map(json.dumps, text)) + "\n")
    return folder


def loader(folder, *, names="ab", data=None, prompt=None, fraction=1.0, **options):
    files = {"a": "a.json", "b": "b.jsonl"}
    sources = [
        SourceConfig(
            name=name,
            path=str(folder / files.get(name, name)),
            images=str(folder / "images"),
            fraction=fraction,
        )
        for name in names
    ]
    settings = dict(packing=True, tiles_per_row=3, num_threads=2) | (data or {})
    base = dict(tokenizer=str(folder / "tokenizer"), template="prism", length=128)
    prompt = PromptConfig(**base | (prompt or {}))
    options = dict(batch_size=4, seed=0, cache_dir=folder / "cache") | options
    return Loader(DataConfig(sources=tuple(sources), **settings), prompt, MODEL, **options)


def same(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)
        for x, y in zip(a, b, strict=True)
    )


def test_batches_are_the_contract(folder):
    batches = list(loader(folder).batches())
    assert len(batches) == loader(folder).num_steps
    for batch in batches:
        assert batch.keys() == KEYS | {"pixels", "tile_mask"}
        assert batch["pixels"].shape == (4, 3, 28, 28, 3) and batch["pixels"].dtype == np.uint8
        assert batch["tile_mask"].shape == (4, 3) and batch["tile_mask"].dtype == bool
        assert batch["tokens"].shape == (4, 128)
        visual = batch["visual_index"].max(1) + 1
        np.testing.assert_array_equal(visual, 4 * batch["tile_mask"].sum(1))
        assert not batch["pixels"][~batch["tile_mask"]].any() and batch["pixels"][batch["tile_mask"]].any()


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_holds_every_record_once(folder, packing):
    """Each conversation is found in the batches, with its own image, labels and source."""
    made = loader(folder, data=dict(packing=packing))
    assert made.stats()["samples"] == 34 and made.num_rows == (made.num_rows if packing else 34)
    seen = []
    for batch in made.batches():
        for row in range(4):
            segments = batch["segment_ids"][row]
            assert packing or segments.max() <= 1
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                tokens, index = batch["tokens"][row][here], batch["visual_index"][row][here]
                text = made.tokenizer.decode(tokens[index < 0]).strip()
                number = int("".join(c for c in text.split("?")[0].split(" Out")[0] if c.isdigit()))
                source = int(batch["source_ids"][row][here][0])
                seen.append((source, number))
                assert source == (0 if "question" in text else 1)
                if source == 0:
                    tile = index[index >= 0] // 4
                    assert len(tile) == 4 and len(set(tile)) == 1
                    image = load_image(folder / "images" / f"{number % 8}.png")
                    want = transform(image, "letterbox", 28, VISION.mean)
                    np.testing.assert_array_equal(batch["pixels"][row, tile[0]], want)
                targets = batch["targets"][row][here][batch["loss_weights"][row][here] > 0]
                word, times = ("answer", 1 + number % 7) if source == 0 else ("yes", 1 + number % 5)
                assert made.tokenizer.decode(targets, skip_special=False) == " ".join([word] * times) + "</s>"
    assert sorted(seen) == [(0, i) for i in range(24)] + [(1, i) for i in range(10)]


def test_resume_at_any_step_is_exact(folder):
    made = loader(folder, steps=9, batch_size=2)
    everything = list(made.batches())
    assert len(everything) == 9
    for start in (0, 1, 4, 8, 9):
        assert same(list(loader(folder, steps=9, batch_size=2).batches(start)), everything[start:])
    longer = loader(folder, steps=12, batch_size=2)
    assert longer.fingerprint == made.fingerprint and same(list(longer.batches())[:9], everything)


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_share_the_global_batch(folder, count):
    whole = list(loader(folder, epochs=2).batches())
    parts = [list(loader(folder, epochs=2, process_index=p, process_count=count).batches()) for p in range(count)]
    joined = [{k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in zip(*parts, strict=True)]
    assert same(joined, whole)


def test_worker_processes_change_nothing(folder):
    whole = list(loader(folder).batches(1))
    assert same(list(loader(folder, data=dict(num_workers=2)).batches(1)), whole)


def test_closing_early_is_quiet(folder):
    batches = loader(folder, epochs=20).batches()
    next(batches)
    batches.close()


def test_epochs_differ_and_fractions_count(folder):
    one, two = loader(folder, data=dict(packing=False)), loader(folder, data=dict(packing=False), epochs=2)
    assert two.num_rows == 68 and loader(folder, data=dict(packing=False), epochs=1.5).num_rows == 51
    rows = two._rows.samples
    np.testing.assert_array_equal(rows[:34], one._rows.samples)
    assert not np.array_equal(rows[:34], rows[34:]) and sorted(rows[34:]) == list(range(34))
    other = loader(folder, data=dict(packing=False), seed=1)
    assert not np.array_equal(one._rows.samples, other._rows.samples) and one.fingerprint != other.fingerprint


def test_an_epoch_is_packed_in_its_own_random_order():
    """Row after row as `plan` makes them of the epoch's permutation, whatever the sizes."""
    rng = np.random.default_rng(0)
    zeros = np.zeros(300, np.int32)
    lengths, tiles = rng.integers(5, 60, 300, np.int32), rng.integers(0, 2, 300, np.int32)
    samples = Samples(zeros, zeros, zeros, lengths, tiles, tiles, zeros, zeros, zeros)
    data = DataConfig(sources=(SourceConfig(),), packing=True)
    rows = epoch_rows(samples, data, 64, 4, seed=1, epoch=2)
    order = np.random.default_rng([1, 2]).permutation(300)
    planned = plan(lengths[order], tiles[order], 64, 4)
    np.testing.assert_array_equal(rows.samples, order[planned.samples])
    np.testing.assert_array_equal(rows.offsets, planned.offsets)
    alone = epoch_rows(samples, DataConfig(sources=(SourceConfig(),)), 64, 4, seed=1, epoch=2)
    np.testing.assert_array_equal(alone.samples, order)
    np.testing.assert_array_equal(alone.offsets, np.arange(301))


def test_the_last_batch_is_padded_with_empty_rows(folder):
    made = loader(folder, data=dict(packing=False), batch_size=10)
    assert made.num_steps == 4
    last = list(made.batches())[-1]
    empty = last["segment_ids"].max(1) == 0
    assert empty.tolist() == [False] * 4 + [True] * 6
    assert (
        not last["loss_weights"][empty].any() and not last["tile_mask"][empty].any() and not last["pixels"][empty].any()
    )


def test_text_only_loaders_have_no_image_arrays(folder):
    made = loader(folder, names="b")
    assert all(batch.keys() == KEYS for batch in made.batches()) and made.image_paths() == []


def test_features_take_the_place_of_pixels(folder, tmp_path):
    paths = loader(folder).image_paths()
    assert paths == sorted(str(folder / "images" / f"{i}.png") for i in range(8))
    array = np.lib.format.open_memmap(tmp_path / "f.npy", "w+", np.float16, (8, 4, 5))
    array[:] = np.arange(8)[:, None, None] + 1
    index = {path: i for i, path in enumerate(paths)}
    array = np.load(tmp_path / "f.npy", mmap_mode="r")
    made = loader(folder, features=([array], index))
    workers = loader(folder, features=([array], index), data=dict(num_workers=1))
    assert same(list(workers.batches()), list(made.batches()))
    assert len(pickle.dumps(made._reader)) < 30_000
    for pixels, features in zip(loader(folder).batches(), made.batches(), strict=True):
        assert features.keys() == KEYS | {"features", "tile_mask"}
        assert features["features"].shape == (4, 3, 4, 5) and features["features"].dtype == np.float16
        np.testing.assert_array_equal(features["tile_mask"], pixels["tile_mask"])
        for row, tile in np.argwhere(features["tile_mask"]):
            image = load_image(paths[int(features["features"][row, tile, 0, 0]) - 1])
            np.testing.assert_array_equal(pixels["pixels"][row, tile], transform(image, "letterbox", 28, VISION.mean))
    with pytest.raises(DataError, match="1 image files are missing or empty.*0.png"):
        loader(folder, features=([array], {path: i for path, i in index.items() if "0.png" not in path}))


def test_the_second_start_reads_the_cache(folder, tmp_path, monkeypatch):
    first = loader(folder, cache_dir=tmp_path)
    monkeypatch.setattr("jaxvlm.data.table.encode_all", None)  # would raise if anything were tokenised again
    second = loader(folder, cache_dir=tmp_path)
    assert second.fingerprint == first.fingerprint and same(list(second.batches()), list(first.batches()))


def test_overrides_of_the_stage(folder):
    made = loader(folder, names="a", data=dict(template="plain", transform="crop", length=64, packing=False))
    batch = next(made.batches())
    assert batch["tokens"].shape == (4, 64)
    piece = made.sample(0)["text"]
    assert piece[0] == ("<s>", False) and piece[1] == ("<image>", False) and piece[2][1] and len(piece) == 3
    assert made.prompt.transform == "crop"


def test_fraction_takes_a_seeded_part(folder):
    assert loader(folder, fraction=0.5, names="a").stats()["records"] == 12
    double = loader(folder, fraction=2.0, names="a")
    assert (double.stats()["records"], double.stats()["samples"]) == (24, 48) and len(double.image_paths()) == 8
    assert loader(folder, fraction=0.5, names="a").fingerprint == loader(folder, fraction=0.5, names="a").fingerprint
    with pytest.raises(DataError, match="leaves none"):
        loader(folder, fraction=0.001)


def test_sample_and_stats(folder):
    made = loader(folder)
    sample = made.sample(3)
    assert sample["id"] == "a3" and sample["images"] == [str(folder / "images" / "3.png")] and sample["source"] == "a"
    said = [text for text, supervised in sample["text"] if supervised]
    assert said == ["answer answer answer answer</s>"] and ("<image>", False) in sample["text"]
    stats = made.stats()
    batches = list(made.batches())
    assert stats["tokens"] == sum((b["segment_ids"] > 0).sum() for b in batches)
    assert stats["supervised_tokens"] == sum((b["loss_weights"] > 0).sum() for b in batches)
    assert stats["images"] == stats["tiles"] == 24 == sum(b["tile_mask"].sum() for b in batches)
    assert stats["fill"] == stats["tokens"] / (128 * stats["rows"]) and stats["skipped"] == 0
    assert stats["sources"]["b"]["records"] == 10
    json.dumps(stats)


BAD = [
    record("<image>\nq", "a", id="fine", image="0.png"),
    record("<image>\nq", "a", id="gone", image="nope.png"),
    record("q", "a", id="count", image="1.png"),
    {"id": "keys", "text": "x"},
    record("<image> <image> <image> <image>", "a", id="many", image=["1.png"] * 4),
    record("long " * 300, "a", id="long"),
    ["a list"],
]


def test_bad_records_are_reported_before_the_first_step(folder):
    (folder / "bad.json").write_text(json.dumps(BAD))
    with pytest.raises(DataError) as error:
        loader(folder, names=["bad.json"])
    text = str(error.value)
    assert (
        "1 image files are missing or empty, the first: " in text and "nope.png" in text and "`images` folder" in text
    )
    assert "5 records cannot be used" in text and "bad.json, record number 2: record 'count' has 1 image but 0" in text
    assert "record 'many' has 4 images, but a row holds 3; raise `tiles_per_row`" in text
    assert "record 'long' has no supervised token within `length` (128)" in text
    assert "bad_records = 'skip'" in text


def test_skipped_records_are_listed(folder, tmp_path):
    (folder / "bad.json").write_text(json.dumps(BAD))
    made = loader(
        folder,
        names=["bad.json"],
        data=dict(bad_records="skip", max_bad_share=1.0),
        skipped_path=tmp_path / "s" / "skipped.jsonl",
    )
    assert made.stats()["records"] == 1 and made.stats()["skipped"] == 6 and made.sample(0)["id"] == "fine"
    lines = [json.loads(line) for line in open(made.skipped_path)]
    assert sorted(line["record"] for line in lines) == [1, 2, 3, 4, 5, 6]
    assert all(line["reason"] and line["file"].endswith("bad.json") for line in lines)


def test_a_missing_image_that_arrives_is_used(folder, tmp_path):
    (tmp_path / "late.json").write_text(json.dumps([record("<image>", "a", image=str(tmp_path / "late.png")), BAD[0]]))
    options = dict(names=[str(tmp_path / "late.json")], data=dict(bad_records="skip", max_bad_share=1.0))
    assert loader(folder, **options).stats()["records"] == 1
    (tmp_path / "late.png").touch()
    assert loader(folder, **options).stats()["records"] == 1  # still empty
    Image.new("RGB", (4, 4)).save(tmp_path / "late.png")
    assert loader(folder, **options).stats()["records"] == 2


def test_an_image_that_breaks_later_is_left_out_of_the_loss(folder, tmp_path):
    (tmp_path / "cut.png").write_bytes((folder / "images" / "0.png").read_bytes()[:300])
    (tmp_path / "c.json").write_text(json.dumps([record("<image>", "a", image=str(tmp_path / "cut.png")), BAD[0]]))
    options = dict(names=[str(tmp_path / "c.json")], batch_size=1)
    with pytest.raises(DataError, match="cut.png cannot be read"):
        list(loader(folder, **options).batches())
    with pytest.warns(UserWarning, match="Left out of the loss: .*cut.png"):
        (batch,) = loader(folder, data=dict(bad_records="skip", max_bad_share=1.0), **options).batches()
    kept = batch["segment_ids"][batch["loss_weights"] > 0]
    assert len(set(kept)) == 1 and batch["segment_ids"].max() == 2 and batch["tile_mask"].sum() == 2


def test_bad_json_names_the_line(folder, tmp_path):
    good = json.dumps(record("q", "a"))
    (tmp_path / "x.jsonl").write_text(f"{good}\n\n{good[:-2]}\n{good}\n")
    with pytest.raises(DataError, match="x.jsonl, record number 1: line 3 is not JSON: column"):
        loader(folder, names=[str(tmp_path / "x.jsonl")])
    skipping = dict(bad_records="skip", max_bad_share=1.0)
    assert loader(folder, names=[str(tmp_path / "x.jsonl")], data=skipping).stats()["records"] == 2
    (tmp_path / "x.json").write_text(f"[{good},\n{good}")
    with pytest.raises(DataError, match="x.json is not JSON: line 2, column .*incomplete download"):
        loader(folder, names=[str(tmp_path / "x.json")])
    (tmp_path / "x.json").write_text(" ")
    with pytest.raises(DataError, match="x.json is empty"):
        loader(folder, names=[str(tmp_path / "x.json")])
    (tmp_path / "x.json").write_bytes(b'[{"id": "\xff"}]')
    with pytest.raises(DataError, match="not UTF-8"):
        loader(folder, names=[str(tmp_path / "x.json")])
    with pytest.raises(DataError, match="nowhere.json' does not exist"):
        loader(folder, names=[str(tmp_path / "nowhere.json")])


def test_byte_order_mark_and_pretty_lists_are_read(folder, tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([record("q", "a")], indent=1).encode())
    assert loader(folder, names=[str(tmp_path / "x.json")]).stats()["records"] == 1
    (tmp_path / "y.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(record("q", "a")).encode())  # JSONL by content
    assert loader(folder, names=[str(tmp_path / "y.json")]).stats()["records"] == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(names=""), "data.sources` is empty"),
        (dict(steps=1, epochs=1.0), "`steps` or `epochs`, not both"),
        (dict(epochs=0.0), "must be positive"),
        (dict(process_count=3), "batch_size 4 must be a multiple of the 3 processes"),
        (dict(data=dict(bad_records="ignore")), "bad_records must be"),
        (dict(data=dict(transform="pad")), "no image transform 'pad'"),
        (dict(prompt=dict(layout="cambrian")), "no layout 'cambrian'"),
        (dict(prompt=dict(truncation="cut")), "no truncation 'cut'"),
        (dict(prompt=dict(truncation="before_splice", length=12)), "length 12 leaves no room"),
        (dict(data=dict(template="chatml")), r"template 'chatml' needs the special token"),
    ],
)
def test_settings_that_cannot_be_used(folder, options, message):
    with pytest.raises(DataError, match=message):
        loader(folder, **options)


def test_truncation_is_counted(folder, tmp_path):
    long = [record("q", "word " * 300), record("r", "x", "<image> s", "y", image="0.png")]
    long[0]["conversations"] += turns("<image>", "late")
    long[0]["image"] = "0.png"
    (tmp_path / "t.json").write_text(json.dumps(long))
    stats = loader(folder, names=[str(tmp_path / "t.json")]).stats()
    assert (stats["truncated"], stats["dropped_images"], stats["images"]) == (1, 1, 1)
