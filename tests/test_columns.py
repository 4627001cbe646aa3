"""Columns on disk, and what tables do with them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from data_helpers import chatml_tokenizer, llama_tokenizer, record
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxvlm.config import DataConfig, ModelConfig, PromptConfig, SourceConfig, VisionConfig
from jaxvlm.data import DataError, table
from jaxvlm.data.columns import Columns, Texts, cached, new_folder, open_array, release_maps
from jaxvlm.data.loader import Loader
from jaxvlm.data.processes import in_order

TEXTS = st.lists(st.text() | st.just("\ud800"), max_size=8)


@given(TEXTS, st.lists(st.integers(0, 8), max_size=3))
@settings(max_examples=50, deadline=None)
def test_texts_stay_what_they_are(tmp_path_factory, texts, cuts):
    """However they are cut into parts, which the digest does not show."""
    folder, digests = tmp_path_factory.mktemp("columns"), []
    for name, places in {"a": [], "b": sorted(cuts)}.items():
        (folder / name).mkdir()
        columns = Columns(folder / name)
        for start, end in zip([0, *places], [*places, len(texts)], strict=True):
            columns.append_texts("text", texts[start:end])
            columns.append_parts("flat", "flat_offsets", [np.arange(len(text)) for text in texts[start:end]], np.int32)
            columns.append("pairs", np.asarray([[len(text), 1] for text in texts[start:end]], np.int16).reshape(-1, 2))
        digests.append(columns.close())
        found = Texts(folder / name, "text")
        assert list(found) == texts == [found[i] for i in range(len(found))]
        assert [found[-i] for i in range(1, len(texts) + 1)] == texts[::-1]
        flat, ends = open_array(folder / name / "flat.npy"), open_array(folder / name / "flat_offsets.npy")
        assert [flat[a:b].tolist() for a, b in zip(ends, ends[1:], strict=False)] == [
            list(range(len(t))) for t in texts
        ]
        pairs = open_array(folder / name / "pairs.npy")
        assert pairs.dtype == np.int16 and pairs.tolist() == [[len(text), 1] for text in texts]
    assert digests[0] == digests[1]
    (folder / "c").mkdir()
    other = Columns(folder / "c")
    other.append_texts("text", [*texts, ""])
    assert other.close() != digests[0]


def test_memory_of_maps_is_given_back(tmp_path):
    """What is looked at is counted as this process's memory, until it is released; and may be looked at again."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("needs Linux's /proc")
    columns = Columns(tmp_path)
    columns.append("numbers", np.arange(8_000_000, dtype=np.int32))
    columns.close()

    def mapped():  # MB
        return int(re.search(r"RssFile:\s+(\d+)", status.read_text())[1]) / 1024

    numbers, before = open_array(tmp_path / "numbers.npy"), mapped()
    for _ in range(2):
        assert int(numbers.sum()) == 8_000_000 * 7_999_999 // 2 and mapped() > before + 25
        release_maps()
        assert mapped() < before + 5
    with pytest.raises(ValueError, match="read-only"):
        numbers[0] = 1


def test_folders_are_whole_or_not_there(tmp_path):
    place = cached(tmp_path, ["x", 1, None])
    assert place != cached(tmp_path, ["x", 2, None])
    with pytest.raises(RuntimeError), new_folder(place) as new:
        (new / "half").touch()
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with new_folder(place) as new:
        (new / "one").touch()
        with new_folder(place) as other:  # another process is first
            (other / "two").touch()
    assert [file.name for file in place.iterdir()] == ["two"] and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "file").touch()
    with (
        pytest.raises(DataError, match="The cache .*file cannot be written: .*Set JAXVLM_CACHE"),
        new_folder(tmp_path / "file" / "x"),
    ):
        pass


def test_processes_keep_the_order():
    items = [[i] * (i % 3) for i in range(60)]
    assert list(in_order(sum, items, 2)) == list(in_order(sum, iter(items), 0)) == [sum(item) for item in items]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=30))
def test_first_appearances(keys):
    first, index = table.first_seen(np.asarray(keys, np.uint64).reshape(-1, 2))
    known = {}
    assert index.tolist() == [known.setdefault(key, len(known)) for key in keys]
    assert first.tolist() == [keys.index(key) for key in known]


# --------------------------------------------------------------------------------------------------------- the tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """400 records of every form: too long, with images that are missing or broken, malformed, text only."""
    folder, rng = tmp_path_factory.mktemp("tables"), np.random.default_rng(0)
    llama_tokenizer(folder / "llama")
    chatml_tokenizer(folder / "chatml")
    (folder / "images").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (*rng.integers(5, 90, 2), 3), np.uint8)).save(
            folder / "images" / f"{i}.png"
        )
    (folder / "images" / "broken.png").write_text("no image")
    names, records = [*(f"{i}.png" for i in range(13)), "broken.png"], []
    for i in range(400):
        images = [str(name) for name in rng.choice(names, rng.choice([0, 1, 1, 2, 3]))]
        asked = "<image> " * len(images) + "what is " * rng.integers(1, 20)
        answer = "a cat " * rng.choice([1, 2, 5, 20, 60])
        more = ["q", "b"] * rng.integers(0, 2)
        one = record(asked, answer, *more, id=i if i % 3 else str(i), image=images[0] if len(images) == 1 else images)
        records.append(one if i % 20 else [{"id": i}, ["list"], record("<image>", "a"), record("q")][i // 20 % 4])
    (folder / "a.json").write_text(json.dumps(records))
    return folder


CASES = [
    ("llama", "prism", "llava", "after_splice", "anyres"),
    ("llama", "prism", "prismatic", "before_splice", "letterbox"),
    ("chatml", "chatml", "prismatic", "after_splice", "letterbox"),
    ("chatml", "chatml", "hf", "drop", "hd"),
    ("chatml", "plain", "llava", "after_splice", "letterbox"),  # no token in front of the answer
]


@pytest.mark.parametrize("tokenizer, template, layout, truncation, transform", CASES)
def test_counts_are_those_of_the_splice(folder, monkeypatch, tokenizer, template, layout, truncation, transform):
    """Records that stay whole are counted without splicing them; the tables are the same if all are spliced."""
    source = SourceConfig("a", str(folder / "a.json"), str(folder / "images"), fraction=1.5)
    data = DataConfig(sources=(source,), tiles_per_row=9, bad_records="skip", max_bad_share=1.0, packing=True)
    prompt = PromptConfig(
        str(folder / tokenizer), template, transform, layout=layout, truncation=truncation, length=120
    )
    model = ModelConfig(VisionConfig(image_size=28, patch_size=14))
    whole, spliced = table._whole_records, []

    def made(cache):
        loader = Loader(data, prompt, model, batch_size=4, seed=0, cache_dir=folder / cache)
        columns = vars(table.open_table(loader._tables[0]))
        return loader, {
            k: v.tolist() if isinstance(v, np.ndarray) else list(v) for k, v in columns.items() if k != "base"
        }

    fast, want = made("fast")
    monkeypatch.setattr(table, "splice", lambda *args, **settings: spliced.append(1) or real(*args, **settings))
    real = __import__("jaxvlm.data.layout", fromlist=["splice"]).splice
    monkeypatch.setattr(table, "_whole_records", lambda *given: (whole(*given)[0], np.zeros_like(whole(*given)[1])))
    slow, found = made(f"slow-{layout}-{truncation}")
    assert (
        len(spliced) > 150 and found == want and slow.fingerprint == fast.fingerprint and slow.stats() == fast.stats()
    )
    assert 10 < len(want["bad"]) < 400 and sum(want["copies"]) > 100
    assert [bad["record"] for bad in want["bad"]] == sorted({bad["record"] for bad in want["bad"]})


def test_tables_by_worker_processes_are_the_same(folder, monkeypatch):
    source = SourceConfig("a", str(folder / "a.json"), str(folder / "images"))
    prompt = PromptConfig(str(folder / "llama"), "prism", length=120)
    prints = []
    monkeypatch.setattr(table, "CHUNK", 100)
    for workers, large in ((0, 1), (1, 1), (1, 10**6)):
        monkeypatch.setattr(table, "LARGE", large)
        data = DataConfig(sources=(source,), bad_records="skip", max_bad_share=1.0, num_workers=workers)
        cache = folder / f"workers-{workers}-{large}"
        prints.append(Loader(data, prompt, ModelConfig(), batch_size=4, seed=0, cache_dir=cache).fingerprint)
    assert len(set(prints)) == 1
