"""Sources that hold their images: ArrayRecord shards, saved Hugging Face datasets, TFDS. All against plain files."""

import io
import json
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from data_helpers import llama_tokenizer, record
from hypothesis import given, settings
from hypothesis import strategies as st
from source_helpers import KINDS, contents, image_bytes, write_every_kind, write_shards
from tensorflow_datasets.proto import tf_example_pb2

from jaxvlm.config import DataConfig, ModelConfig, PromptConfig, SourceConfig, VisionConfig
from jaxvlm.data import DataError
from jaxvlm.data.array_records import INDEX, write_manifest, write_shard
from jaxvlm.data.conversation import record_images
from jaxvlm.data.image import load_image
from jaxvlm.data.loader import Loader
from jaxvlm.data.saved_datasets import llava_record
from jaxvlm.data.sources import addresses_fingerprint, image_address, image_at, open_source
from jaxvlm.data.tfds_builder import prepare
from jaxvlm.data.tfds_files import parse_example


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kinds")


@pytest.fixture(scope="module")
def kinds(folder):
    llama_tokenizer(folder / "tokenizer")
    return write_every_kind(folder)


def opened(path, images=""):
    return open_source(SourceConfig(path=str(path), images=str(images)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_the_same(kinds, kind):
    want = contents(open_source(kinds["json"]), range(12))
    source = pickle.loads(pickle.dumps(open_source(kinds[kind])))
    assert source.path == kinds[kind].path and len(source) == 12
    for i, (one, images) in enumerate(want):
        found = source[i]
        assert (found["id"], found["conversations"]) == (one["id"], one["conversations"])
        names = record_images(found)
        assert [image_bytes(source, name) for name in names] == images
        assert [type(found.get("image")), len(names)] == [type(one.get("image")), len(images)]
        for name, image in zip(names, images, strict=True):
            address = image_address(source, name)
            at = image_at(address)
            assert (at if isinstance(at, bytes) else Path(at).read_bytes()) == image
            assert (source.image_file(name) is None) == (kind in ("array_record", "datasets", "tfds"))
    assert [one["id"] for one in source] == [one["id"] for one, _ in want] and source[-1]["id"] == "11"
    prints = json.loads(json.dumps(source.fingerprint()))
    assert prints == open_source(kinds[kind]).fingerprint() and all(Path(file[0]).is_file() for file in prints)
    with ThreadPoolExecutor(8) as pool:
        fresh = open_source(kinds[kind])
        numbers = [i * 5 % 12 for i in range(120)]
        assert list(pool.map(lambda i: contents(fresh, [i])[0][1], numbers)) == [want[i][1] for i in numbers]


def loader(kinds, folder, kind, num_workers=0, features=None, **prompt):
    base = dict(tokenizer=str(folder / "tokenizer"), template="prism", length=96) | prompt
    data = DataConfig(sources=(kinds[kind],), packing=True, tiles_per_row=16, num_threads=1, num_workers=num_workers)
    model = ModelConfig(VisionConfig(image_size=28, patch_size=14))
    options = dict(batch_size=1, seed=0, cache_dir=folder / "cache", features=features)
    return Loader(data, PromptConfig(**base), model, **options)


def batches(*args, **options):
    return list(loader(*args, **options).batches())


@pytest.mark.parametrize("kind", KINDS[1:])
def test_every_kind_trains_the_same(kinds, folder, kind):
    for options in ({}, {"transform": "anyres"}):
        want, found = batches(kinds, folder, "json", **options), batches(kinds, folder, kind, **options)
        assert len(want) == len(found) > 1
        for a, b in zip(want, found, strict=True):
            assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_features_of_held_images(kinds, folder):
    """A loader names the images by addresses, under which their features are kept."""
    made = {}
    for kind in ("json", "array_record"):
        paths = loader(kinds, folder, kind).image_paths()
        assert paths == sorted(set(paths)) and len(paths) == {"json": 9, "array_record": 12}[kind]
        shades = [np.asarray(load_image(image_at(path), path)).mean() for path in paths]  # of each image its own
        features = [np.asarray(shades, np.float32)[:, None, None]], {path: i for i, path in enumerate(paths)}
        made[kind] = list(loader(kinds, folder, kind, features=features).batches())
        prints = addresses_fingerprint(paths)
        assert json.loads(json.dumps(prints)) == prints != addresses_fingerprint(paths[1:])
    want, found = made["json"], made["array_record"]
    assert all(np.array_equal(a["features"], b["features"]) for a, b in zip(want, found, strict=True))
    assert sum(a["tile_mask"].sum() for a in want) == 12


def test_workers_read_shards(kinds, folder):
    want, found = (batches(kinds, folder, "array_record", n) for n in (0, 1))
    assert all(np.array_equal(a[key], b[key]) for a, b in zip(want, found, strict=True) for key in a)


# -------------------------------------------------------------------------------------------------- ArrayRecord shards


def test_shards_are_plain_array_records(kinds, folder):
    """Any reader finds each record as JSON with the bytes of its images behind it."""
    source = open_source(kinds["json"])
    reader = ArrayRecordReader(str(folder / "shards" / "train-00000-of-00002.array_record"))
    assert "group_size:1" in reader.writer_options_string() and "uncompressed" in reader.writer_options_string()
    *entries, index = reader.read_all()
    want = []
    for one, images in contents(source, range(5)):
        want += [one, *images]
    assert [json.loads(e) if e[:1] == b"{" else e for e in entries] == want
    assert index.startswith(INDEX)
    assert np.frombuffer(index[len(INDEX) :], "<i4").tolist() == [0, 2, 4, 7, 8, 10]
    manifest = json.loads((folder / "shards" / "manifest.json").read_text())
    assert (manifest["records"], manifest["images"]) == (12, 12)
    assert [shard["records"] for shard in manifest["shards"]] == [5, 7]
    assert manifest["source"] == {"path": source.path, "fingerprint": source.fingerprint()}


def test_names_and_other_keys_are_kept(kinds, tmp_path):
    one = record("<image> <image>", "\ud800 é", id=None, image=["a/b.jpg", "c.png"]) | {"source": "x", "n": [1.5, None]}
    write_shard(tmp_path / "s.array_record", [(one, [b"1", b""]), ({"id": 2}, []), (one | {"image": ["d"]}, [b"3"])])
    source = opened(tmp_path / "s.array_record")
    assert source[0] == one | {"image": ["0:0", "0:1"], "image_file": ["a/b.jpg", "c.png"]}
    assert source[1] == {"id": 2} and source[2]["image"] == ["2:0"]
    assert [source.image(name) for name in ("0:0", "0:1", "2:0")] == [b"1", b"", b"3"]
    write_shard(tmp_path / "again.array_record", contents(source, range(3)))
    assert list(opened(tmp_path / "again.array_record")) == list(source)
    both = opened(tmp_path / "{s,again}.array_record")
    assert both[3]["image"] == ["3:0", "3:1"] and both.image("3:0") == b"1" and both.image("5:0") == b"3"
    for name in ("1:0", "0:2", "6:0", "x.png"):
        with pytest.raises(DataError, match=f"no image '{name}'"):
            both.parts[0].image(name)


def test_a_shard_is_whole_or_not_there(tmp_path):
    def broken():
        yield record("<image>", "a", image="x"), [b"1"]
        yield record("<image>", "a", id="few", image="x"), []

    with pytest.raises(DataError, match="record 'few' names 'x' but comes with 0 images"):
        write_shard(tmp_path / "s.array_record", broken())
    assert not list(tmp_path.iterdir())


def test_sets_that_are_not_whole(kinds, folder, tmp_path):
    for change in ("gone", "cut", "kind", "version"):
        at = tmp_path / change
        shutil.copytree(folder / "shards", at)
        shard, manifest = at / "train-00001-of-00002.array_record", json.loads((at / "manifest.json").read_text())
        if change == "gone":
            shard.unlink()
        elif change == "cut":
            shard.write_bytes(shard.read_bytes()[:70000])
        else:
            (at / "manifest.json").write_text(json.dumps(manifest | {change: 2}))
        message = (
            "is missing or not whole: .* says 131,072 bytes" if change in ("gone", "cut") else "not of a set that this"
        )
        with pytest.raises(DataError, match=message):
            opened(at)
    cut = tmp_path / "cut" / "train-00001-of-00002.array_record"
    with pytest.raises(DataError, match="is no whole ArrayRecord file"):
        opened(cut)
    writer = ArrayRecordWriter(str(tmp_path / "other.array_record"), "group_size:1")
    writer.write(b"something else")
    writer.close()
    with pytest.raises(DataError, match="other.array_record, entry 0 is no tf.train.Example"):
        opened(tmp_path / "other.array_record")
    with pytest.raises(DataError, match="ends with no index of records"):
        write_manifest(tmp_path, ["other.array_record"], open_source(kinds["json"]))


@pytest.mark.parametrize("name", ["manifest.json", "dataset_dict.json", "dataset_info.json"])
@pytest.mark.parametrize("text", ["[]", '{"kind": 1', "{}"])
def test_descriptions_that_are_none(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    if name == "dataset_info.json":
        (tmp_path / "features.json").write_text("{}")
    with pytest.raises(DataError, match=f"{name} (cannot be read|does not describe a data set)"):
        opened(tmp_path)


def test_shards_without_manifest(kinds, folder, tmp_path):
    for shard in (folder / "shards").glob("*.array_record"):
        shutil.copy(shard, tmp_path)
    assert list(opened(tmp_path)) == list(open_source(kinds["array_record"]))


@pytest.mark.parametrize(
    "kind, package", [("array_record", "array_record"), ("tfds", "array_record"), ("datasets", "datasets")]
)
def test_missing_packages_are_named(kinds, monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.python", None)
    with pytest.raises(DataError, match=r"not installed: pip install jaxvlm\[data\]"):
        open_source(kinds[kind])


# ------------------------------------------------------------------------------------------------ Hugging Face datasets


TEXT = datasets.Value("string")
PAIRS = datasets.List({"user": TEXT, "assistant": TEXT, "source": TEXT})


def pair(user, assistant):
    return {"user": user, "assistant": assistant, "source": "s"}


def png(shade):
    out = io.BytesIO()
    load_image(np.full((4, 5), shade, np.uint8)).save(out, "PNG")
    return out.getvalue()


def test_rows_of_finevision_and_the_cauldron(tmp_path):
    rows = {
        "images": [[{"bytes": png(1), "path": None}], [{"bytes": png(k), "path": None} for k in (2, 3)], [], None],
        "texts": [[pair("q", "a"), pair("r", "b")], [pair("first", "a")], [pair("no image", "a")], [pair("<b>", "")]],
        "source": ["x", "y", "z", None],
        "relevance": [[1], [], None, [2]],
    }
    features = {"images": datasets.List(datasets.Image()), "texts": PAIRS, "source": TEXT}
    features["relevance"] = datasets.List(datasets.Value("int64"))
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"a": made, "b": made}).save_to_disk(tmp_path / "two")
    source = opened(tmp_path / "one")
    assert source[0] == {"id": 0, "image": "0:0", "source": "x", "relevance": [1]} | {
        "conversations": record("<image>\nq", "a", "r", "b")["conversations"]
    }
    assert source[1]["image"] == ["1:0", "1:1"] and source[1]["conversations"][0]["value"] == "<image>\n<image>\nfirst"
    assert [one.get("image") for one in source][2:] == [None, None]
    assert source[3]["conversations"] == record("<b>", "")["conversations"]
    assert [source.image(name) for name in ("0:0", "1:1")] == [png(1), png(3)]
    with pytest.raises(DataError, match="no image '1:2': its record has 2"):
        source.image("1:2")
    with pytest.raises(DataError, match=r"holds the splits a, b. Give one as the source's `path`: .*two/a"):
        opened(tmp_path / "two")
    assert list(opened(tmp_path / "two" / "b")) == list(source)


def test_rows_say_where_images_stand_or_do_not():
    texts = [pair("see <image> and <image>", "a"), pair("b", "c")]
    assert (
        llava_record({"texts": texts, "id": "k"}, ["x", "y"], 3)["conversations"][0]["value"]
        == "see <image> and <image>"
    )
    lists = {"user": ["a", "b"], "assistant": ["c", "d"]}
    want = {"id": 3, "image": "x", "conversations": record("<image>\na", "c", "b", "d")["conversations"]}
    assert llava_record({"texts": lists}, ["x"], 3) == want
    assert (
        llava_record({"conversations": {"from": ["human"], "value": ["a"]}}, [], 3)["conversations"]
        == record("a")["conversations"]
    )
    assert llava_record({"texts": [pair(None, None)]}, [], 3)["conversations"] == record("", "")["conversations"]


@pytest.mark.parametrize("form", ["names", "several names", "bytes", "paths"])
def test_columns_of_images(tmp_path, form):
    image = {"names": "a.png", "several names": ["a.png", "b.png"], "bytes": png(1)}.get(
        form, {"bytes": None, "path": "a.png"}
    )
    feature = {"names": TEXT, "several names": datasets.List(TEXT), "bytes": datasets.Value("binary")}
    features = datasets.Features({"image": feature.get(form, datasets.Image()), "texts": PAIRS})
    rows = {"image": [image, None], "texts": [[pair("q", "a")]] * 2}
    if form == "paths":  # saving reads the files, so it must be a file while it is saved
        (tmp_path / "a.png").write_bytes(png(2))
        rows["image"][0] = {"bytes": None, "path": str(tmp_path / "a.png")}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "d")
    source = opened(tmp_path / "d", tmp_path)
    names = record_images(source[0])
    if form in ("bytes", "paths"):
        assert names == ["0:0"] and source.image("0:0") == png(1 if form == "bytes" else 2)
    else:
        assert names == (["a.png", "b.png"] if form == "several names" else ["a.png"])
        assert source.image("a.png") == source.image_file("a.png") == str(tmp_path / "a.png")
    assert "image" not in source[1]


def test_datasets_that_are_none(tmp_path):
    datasets.Dataset.from_dict({"caption": ["a"], "n": [1]}).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match="no column 'conversations' or 'texts'; its columns are caption, n"):
        opened(tmp_path / "d")
    next((tmp_path / "d").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="cannot be read as a dataset saved to disk"):
        opened(tmp_path / "d")


# ---------------------------------------------------------------------------------------------------------------- TFDS


def test_tfds_reads_the_same(kinds):
    """Its own reader, which decodes the images."""
    path = Path(kinds["tfds"].path)
    source, theirs = open_source(kinds["tfds"]), tfds.builder_from_directory(path).as_data_source(split="train")
    assert len(theirs) == len(source)
    for i in range(len(source)):
        ours, want = source[i], theirs[i]
        assert ours["id"] == want["id"].decode()
        turns = want["conversations"]
        turns = [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
        assert ours["conversations"] == [{key: value.decode() for key, value in turn.items()} for turn in turns]
        images = [np.asarray(load_image(source.image(name))) for name in record_images(ours)]
        assert len(images) == len(want["images"])
        for a, b in zip(images, want["images"], strict=True):
            np.testing.assert_array_equal(a, b)
    one = opened(next(path.glob("*array_record*")))  # a file alone
    assert list(one) == list(source) == list(opened(path / "train"))
    with pytest.raises(DataError, match="exists already"):
        prepare(source, path.parents[1], "mix")


LISTS = (
    st.lists(st.binary(max_size=300), max_size=4)
    | st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4)
    | st.lists(st.floats(width=32, allow_nan=False), max_size=4)
)


@given(st.dictionaries(st.text(max_size=5), LISTS, max_size=5))
@settings(max_examples=100, deadline=None)
def test_examples_are_parsed(features):
    message = tf_example_pb2.Example()
    for name, values in features.items():
        kind = {bytes: "bytes_list", int: "int64_list", float: "float_list"}[type(values[0]) if values else bytes]
        getattr(message.features.feature[name], kind).value.extend(values)
    assert parse_example(message.SerializeToString()) == features


def test_examples_of_others(tmp_path):
    """Image features of other forms, and sets that hold no conversations."""

    def write(path, *examples):
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for features in examples:
            message = tf_example_pb2.Example()
            for name, values in features.items():
                kind = "int64_list" if isinstance(values[0], int) else "bytes_list"
                getattr(message.features.feature[name], kind).value.extend(values)
            writer.write(message.SerializeToString())
        writer.close()

    talk = {"texts/user": [b"q", b"r"], "texts/assistant": [b"a", b"b"], "id": [-7]}
    write(
        tmp_path / "a.array_record",
        talk | {"image": ["é.png".encode()]},
        talk | {"images": [png(1), png(2)]},
        talk | {"image": [b""]},
    )
    source = opened(tmp_path / "a.array_record", tmp_path)
    assert [one.get("image") for one in source] == ["é.png", ["1:0", "1:1"], None] and source[0]["id"] == -7
    assert source.image("é.png") == str(tmp_path / "é.png") and source.image("1:1") == png(2)
    assert source[1]["conversations"] == record("<image>\n<image>\nq", "a", "r", "b")["conversations"]
    write(tmp_path / "b.array_record", {"caption": [b"a"], "image": [png(1)]})
    with pytest.raises(DataError, match="holds no conversations: .*; its features are caption, image"):
        opened(tmp_path / "b.array_record")


def test_prepared_sets_that_cannot_be_read(kinds, tmp_path):
    at = shutil.copytree(kinds["tfds"].path, tmp_path / "x")
    with pytest.raises(DataError, match="has the splits train. Give one"):
        opened(at / "test")
    info = json.loads((at / "dataset_info.json").read_text())
    (at / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(DataError, match="stored as 'tfrecord', which has no random access; prepare it with"):
        opened(at)
    (at / "dataset_info.json").write_text(json.dumps(info))
    next(at.glob("*array_record*")).unlink()
    with pytest.raises(DataError, match="has 0 of the 1 files of split 'train'. Copy it again"):
        opened(at)


def test_preparing_needs_conversations(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([record("q", "a"), {"id": 5}]))
    with pytest.raises(DataError, match="record number 1 .id 5. has no conversations"):
        prepare(opened(tmp_path / "a.json"), tmp_path / "out", "broken")


def test_kinds_go_together(kinds, folder):
    """Shards of two sets in one path, each with its own numbers inside."""
    write_shards(folder / "more", open_source(kinds["json"]), [range(2), range(3, 4)])
    both = opened(str(folder / "{shards,more}"))
    assert len(both) == 15 and both[12]["image"] == "12:0" and both.image("12:0") == both.image("0:0")
