"""JSON lists and JSONL as sources: what the index finds, what is said of broken files, several files as one."""

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from data_helpers import record
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvlm.config import SourceConfig
from jaxvlm.data import DataError, json_files
from jaxvlm.data.sources import image_address, image_at, image_stats, open_source


def opened(path, **options):
    return open_source(SourceConfig(path=str(path), images=str(options.pop("images", ""))), **options)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('"\\{}[],:\n é漢😀a', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('"\\{}[],a', max_size=3), inner, max_size=3),
    max_leaves=8,
)
DUMPS = st.fixed_dictionaries(
    {
        "ensure_ascii": st.booleans(),
        "indent": st.sampled_from([None, 0, 2]),
        "separators": st.sampled_from([None, (",", ":"), (" ,\t", " : ")]),
    }
)
BLOCKS = st.sampled_from([1, 2, 3, 7, 50, 1 << 20])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("json") / "x.json"


@pytest.fixture
def block(monkeypatch):
    return lambda size: monkeypatch.setattr(json_files, "BLOCK", size)


@given(st.lists(VALUES, min_size=1, max_size=5), DUMPS, BLOCKS, st.booleans(), st.sampled_from(["", "\n", " \r\n "]))
@settings(max_examples=100, deadline=None)
def test_a_list_is_what_json_reads(file, values, dumps, size, mark, around):
    text = around + json.dumps(values, **dumps) + around
    file.write_bytes(b"\xef\xbb\xbf" * mark + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "BLOCK", size)
        source = opened(file)
        assert list(source) == values and len(source) == len(values)


@given(st.lists(VALUES, min_size=1, max_size=4), DUMPS, BLOCKS, st.data())
@settings(max_examples=100, deadline=None)
def test_a_broken_list_is_reported_as_json_does(file, values, dumps, size, data):
    """Cut anywhere, or with something put in anywhere: line, column and words are those of `json.loads`."""
    text = json.dumps(values, **dumps)
    at = data.draw(st.integers(1, len(text)))
    text = text[:at] + data.draw(
        st.sampled_from(["", "x", "]", "{", '"', "\\", ",{}", "\n"]) if at < len(text) else st.just("]")
    )
    text += data.draw(st.sampled_from(["", json.dumps(values, **dumps)[at:]]))
    file.write_bytes(text.encode())
    try:
        wanted = json.loads(text)
    except json.JSONDecodeError as error:
        wanted = error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "BLOCK", size)
        try:
            found = list(opened(file))
        except DataError as error:
            if wanted == []:
                return
            assert isinstance(wanted, json.JSONDecodeError), text
            if wanted.msg.startswith("Illegal trailing comma"):  # of Python 3.13, and at the comma
                return
            words = wanted.msg, wanted.msg.replace("Expecting ',' delimiter", "Extra data")  # of a record read alone
            where = (
                f"line {wanted.lineno}, column {wanted.colno}: ",
                f"line {wanted.lineno} is not JSON: column {wanted.colno}: ",
            )
            assert any(place + said in str(error) for place in where for said in words), text
        else:
            assert found == wanted


@given(
    st.lists(VALUES, min_size=1, max_size=6),
    st.lists(st.sampled_from(["\n", "\n\n", "\r\n", "\n \t\n"]), min_size=6, max_size=6),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_lines_are_what_json_reads(file, values, ends, last):
    records = [{"value": value} for value in values]
    text = "".join(json.dumps(one) + end for one, end in zip(records, ends, strict=False))
    file.write_text(text if last else text.rstrip(), newline="")
    assert list(opened(file)) == records


def test_large_files_are_indexed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "SMALL", 0)
    path, cache, said = tmp_path / "a.json", tmp_path / "cache", []
    path.write_text(json.dumps([record(f"q {i}", "a", id=i) for i in range(50)], indent=1))
    first = opened(path, cache_dir=cache, log=said.append)
    assert "50 records in 0 MB, indexed at" in said[0] and len(list((cache / "indices").iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(json_files, "_scan", None)  # would raise
        again = pickle.loads(pickle.dumps(opened(path, cache_dir=cache)))
        assert list(again) == list(first) and again.fingerprint() == first.fingerprint()
        assert len(pickle.dumps(again)) < 1000
    with ThreadPoolExecutor(8) as pool:
        numbers = [i * 7 % 50 for i in range(500)]
        assert [one["id"] for one in pool.map(again.__getitem__, numbers)] == numbers
    path.write_text(json.dumps([record("q", "a")]))
    os.utime(path, ns=(1, 1))
    other = opened(path, cache_dir=cache)
    assert len(other) == 1 and other.fingerprint() != first.fingerprint()


def test_an_index_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "SMALL", 0)
    (tmp_path / "a.json").write_text('[{"id": 1}, {"id": 2')
    with pytest.raises(DataError, match="line 1, column 21: Expecting ',' delimiter"):
        opened(tmp_path / "a.json", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "indices").iterdir())


def test_errors_say_where(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n\n  {"id": é}\n{"id": 3}\n{"id" 4}\n')
    source = opened(tmp_path / "a.jsonl")
    for _ in range(2):  # in any order
        with pytest.raises(
            DataError, match="line 5 is not JSON: column 7: Expecting ':' delimiter. Each line must be one"
        ):
            source[3]
        with pytest.raises(DataError, match="line 3 is not JSON: column 10: Expecting value"):
            source[1]
    assert source[-2] == {"id": 3}
    with pytest.raises(IndexError):
        source[4]
    (tmp_path / "a.json").write_text('[{"id": 1},\n {"é": 1}, {"id": tru}, 4]')
    with pytest.raises(DataError, match="line 2 is not JSON: column 19: Expecting value[.]$"):
        opened(tmp_path / "a.json")[2]
    (tmp_path / "b.json").write_bytes(b'[{"id": 1},\n {"id": "\xff"}]')
    with pytest.raises(DataError, match="line 1 is not UTF-8; convert the file to UTF-8"):
        opened(tmp_path / "b.json")[1]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "x.data is empty"),
        (b" \n", "x.data is empty"),
        (b"[ \n ]", "must hold a list of records .* it is empty"),
        (b"[1]\n[2]", "line 2, column 1: Extra data"),
        (b"PAR1xxxx", "x.data is no data that can be read: it starts with b'PAR1xxxx'. Sources are JSON lists, JSONL"),
        (b"\xff\xfe[\0", "no data that can be read"),
        (b'[{"a": "\xff', "not UTF-8 at byte 8"),
    ],
)
def test_what_is_no_data(tmp_path, content, message):
    (tmp_path / "x.data").write_bytes(content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "x.data")


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(DataError, match="data file '.*x.json' does not exist. Check the source's `path`"):
        opened(tmp_path / "x.json")
    with pytest.raises(DataError, match="data file '.*b.json' does not exist"):
        (tmp_path / "a.json").write_text("[1]")
        opened(tmp_path / "{a,b}.json")
    with pytest.raises(DataError, match="No file matches"):
        opened(tmp_path / "x*.json")
    with pytest.raises(DataError, match="folder .* is no data set that can be read"):
        opened(tmp_path)


def test_several_files_are_one_source(tmp_path):
    for name, ids in {"a1": [0, 1], "a2": [2], "b": [3, 4, 5]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([record("q", "a", id=i, image=f"{i}.png") for i in ids]))
    (tmp_path / "a{1,2}.jsonl").write_text(json.dumps({"id": "braces"}))
    source = opened(tmp_path / "{a{1,2},b}.json", images=tmp_path / "i")
    assert [one["id"] for one in source] == list(range(6)) and len(source) == 6 and source[-1]["id"] == 5
    assert source.image("4.png") == source.image_file("4.png") == str(tmp_path / "i" / "4.png")
    assert source.image("7:0").endswith("7:0")  # a file of that name
    assert [os.path.basename(file[0]) for file in source.fingerprint()] == ["a1.json", "a2.json", "b.json"]
    assert [one["id"] for one in opened(tmp_path / "a*.json")] == [0, 1, 2]
    assert [one["id"] for one in opened(tmp_path / "a{1,2}.jsonl")] == ["braces"]  # the name of a file
    (tmp_path / "a2.json").write_text('{"id": 2}\n{"id"}\n["no", {}]\n')
    broken = opened(tmp_path / "{a1,a2}.json")
    with pytest.raises(DataError, match="a2.json, its record number 1: line 2 is not JSON"):
        broken[3]
    assert broken[4] == ["no", {}]


def test_images_have_addresses(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([record("q", "a")]))
    (tmp_path / "i#3:4").write_bytes(b"x")
    (tmp_path / "empty.png").touch()
    source = opened(tmp_path / "a.json", images=tmp_path)
    assert image_address(source, "i#3:4") == image_at(image_address(source, "i#3:4")) == str(tmp_path / "i#3:4")
    stats = image_stats(source, ["i#3:4", "empty.png", "gone.png", "."])
    assert stats[0].tolist() == [1, os.stat(tmp_path / "i#3:4").st_mtime_ns] and (stats[1:] == -1).all()
