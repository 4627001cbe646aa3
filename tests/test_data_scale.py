"""100,000 records: what is held in memory is a small part of them, whichever process looks.

Bytes are those that Python and numpy allocate (tracemalloc); memory maps are not among them. In Python lists such records
take 900 bytes each, encoded ones 700, and the samples' columns took 64 bytes in every worker.
"""

import pickle
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
from data_helpers import llama_tokenizer

from jaxvlm.config import DataConfig, ModelConfig, PromptConfig, SourceConfig, VisionConfig
from jaxvlm.data import json_files, table
from jaxvlm.data.conversation import IMAGE_TOKEN, Encoded
from jaxvlm.data.loader import Loader
from jaxvlm.data.rows import saved_plan
from jaxvlm.data.sources import open_source

COUNT = 100_000
PART = 20_000  # of them for tables: tracing is slow
MB = 1 << 20


@contextmanager
def at_most(megabytes):
    """The peak of what is allocated inside is no more than this above what there was."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < megabytes * MB, f"{peak / MB:.1f} MB"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    llama_tokenizer(folder / "tokenizer")
    turns = '[{"from": "human", "value": "<image>\\nq %d"}, {"from": "gpt", "value": "a"}]'
    form = f'{{"id": "%d", "image": "%d.png", "conversations": {turns}}}'
    lines = [form % (i, i, i) for i in range(COUNT)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "a.json").write_text("[" + ",\n".join(lines) + "]")
    (folder / "part.jsonl").write_text("\n".join(lines[:PART]))
    return folder


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_source_is_not_held_in_memory(folder, monkeypatch, name):
    monkeypatch.setattr(json_files, "SMALL", 0)
    monkeypatch.setattr(json_files, "BLOCK", 1 << 18)
    config, numbers = SourceConfig(path=str(folder / name)), np.random.default_rng(0).integers(0, COUNT, 500).tolist()
    with at_most(6):
        assert len(open_source(config, folder / "cache")) == COUNT
    with at_most(0.3):
        again = open_source(config, folder / "cache")
        copy = pickle.loads(pickle.dumps(again))
        assert [int(copy[i]["id"]) for i in numbers] == numbers
    assert len(pickle.dumps(again)) < 1000


def test_tables_and_workers(folder, monkeypatch):
    """The table as a stream, the loader with columns of a few bytes a record, a worker with next to nothing."""
    monkeypatch.setattr(json_files, "SMALL", 0)
    one = Encoded(np.asarray([1, IMAGE_TOKEN, *range(3, 20)], np.int32), np.asarray([0.0] * 10 + [1.0] * 9, np.float32))
    monkeypatch.setattr(table, "encode_all", lambda records, *_: [one] * len(records))
    monkeypatch.setattr("jaxvlm.data.samples.image_stats", lambda source, names: np.ones((len(names), 2), np.int64))
    source = SourceConfig("a", str(folder / "part.jsonl"), str(folder))
    data = DataConfig(sources=(source,), packing=False)
    prompt, model = (
        PromptConfig(str(folder / "tokenizer"), "prism", length=32),
        ModelConfig(VisionConfig(image_size=28, patch_size=14)),
    )

    def load():
        return Loader(data, prompt, model, batch_size=2, seed=0, cache_dir=folder / "cache")

    with at_most(9):  # much of it sorts the names of the images
        load()
    with at_most(4):
        loader = load()
    reader = loader._reader
    reader.plan = saved_plan(reader.plan, folder / "cache" / "plans")
    pickled = pickle.dumps(reader)
    assert len(pickled) < 5000
    with at_most(0.5):
        reader = pickle.loads(pickled)
        reader.has_images = False  # there are no files
        rows = [reader.row(i) for i in range(0, PART, PART // 100)]
    assert all(row["segment_ids"].max() == 1 for row in rows)
    assert loader.stats()["records"] == PART
