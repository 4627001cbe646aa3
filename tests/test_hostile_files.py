"""Weight files made to harm, or damaged: one `WeightsError` each, nothing run, no memory or time out of proportion."""

import json
import operator
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weights_helpers import write_gguf

from jaxvlm.weights import WeightsError, open_source

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("value", "asks"),
    [
        (Calls(os.system, "touch hacked"), "posix.system"),
        (Calls(eval, "open('hacked', 'w')"), "__builtin__.eval"),
        (Calls(getattr, "", "join"), "__builtin__.getattr"),
        ({"deep": [{"inside": Calls(os.system, "touch hacked")}]}, "posix.system"),
        (operator.methodcaller("system"), "operator.methodcaller"),
        (np.zeros(2), "numpy.*_reconstruct"),
        (np.float64(1), "numpy.*scalar"),
        (Calls(np.load, "hacked.npy", None, True), "numpy.load"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
)
def test_no_global_but_a_state_dicts_is_asked_for(tmp_path, monkeypatch, value, asks, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.zeros(2), "x": value}, "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=rf"more than tensors \(it asks for {asks}\)"):
        open_source("x.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
ORDERED = b"ccollections\nOrderedDict\n"


def tensor(kind=b"ctorch\nFloatStorage\n", key=b"S'0'\n", size=b"I4\n", tag=b"S'storage'\n", **layout):
    """The pickle of a tensor of four numbers, with parts of it replaced."""
    parts = {"offset": b"I0\n", "shape": b"(I4\nt", "stride": b"(I1\nt"} | layout
    storage = b"(" + tag + kind + key + b"S'cpu'\n" + size + b"tQ"
    return REBUILD + b"(" + storage + b"".join(parts.values()) + b"I00\n" + ORDERED + b")RtR"


def written(path, value: bytes, compression=zipfile.ZIP_STORED, data=bytes(16)):
    """A torch file whose pickle says {'w': value}."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data.pkl", b"(S'w'\n" + value + b"d.")
        archive.writestr("archive/data/0", data)
    return path


def test_the_pickle_that_these_tests_change_is_sound(tmp_path):
    values = np.arange(4, dtype=np.float32)
    source = open_source(written(tmp_path / "x.pth", tensor(), data=values.tobytes()))
    np.testing.assert_array_equal(source.read("w"), values)
    assert torch.load(tmp_path / "x.pth", weights_only=False)["w"].tolist() == values.tolist()


ATTRIBUTE = b"}(S'shape'\n(I4096\ntub"  # sets one, on whatever stands before it
CRAFTED = {
    "a dotted global": (b"\x80\x04\x8c\x02os\x8c\x0bpath.system\x93", "asks for os.path.system"),
    "an attribute of an allowed one": (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93", "asks for"),
    "an instance": (b"(S'touch hacked'\nios\nsystem\n", "asks for os.system"),
    "an object": (b"(cos\nsystem\nS'touch hacked'\no", "asks for os.system"),
    "a new object": (b"\x80\x02cos\nsystem\n(S'x'\nt\x81", "asks for os.system"),
    "an extension": (b"\x80\x02\x82\x01", "extension"),
    "torch's own loader": (b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR", "asks for torch.storage._load_from_bytes"),
    "another storage": (tensor(kind=b"ctorch\nQInt8Storage\n"), "asks for torch.QInt8Storage"),
    "no storage": (tensor(tag=b"S'module'\n"), "refers to"),
    "a reference to text": (b"Px\n", "."),
    "a path": (tensor(key=b"S'../../etc/passwd'\n"), "refers to"),
    "a negative size": (tensor(size=b"I-4\n"), "refers to"),
    "a size in words": (tensor(size=b"S'4'\n"), "refers to"),
    "a negative shape": (tensor(shape=b"(I-4\nt"), "form that torch does not write"),
    "a shape of floats": (tensor(shape=b"(F4.0\nt"), "form that torch does not write"),
    "a negative offset": (tensor(offset=b"I-1\n"), "form that torch does not write"),
    "a negative stride": (tensor(stride=b"(I-1\nt"), "form that torch does not write"),
    "two strides": (tensor(stride=b"(I1\nI1\nt"), "form that torch does not write"),
    "a tensor changed after it was checked": (tensor() + ATTRIBUTE, "__dict__"),
    "a tensor changed by its slots": (tensor() + b"(}}(S'shape'\n(I4096\ntut" + b"b", "attribute"),
    "dicts in each other": (b"(S'a'\n" * 50 + b"}" + b"d" * 50, "too deep"),
    "a dict in itself": (b"}q\x00(S'a'\nh\x00u", "too deep"),
    "nothing": (b"", "."),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_pickles_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    value, message = CRAFTED[name]
    with pytest.raises(WeightsError, match=message):
        open_source(written(tmp_path / "x.pth", value))
    assert not (tmp_path / "hacked").exists()


def test_attributes_of_a_dict_are_dropped(tmp_path):
    """A state dict's `_metadata` is one; 'items' would be what the reader calls."""
    dict_of_one = b"(S'v'\n" + tensor() + b"d"
    value = ORDERED + b")R(S'v'\n" + tensor() + b"u}(S'items'\nI3\nS'get'\nI3\nub"
    for each in (dict_of_one, value):
        assert open_source(written(tmp_path / "x.pth", each)).names() == ["w.v"]


@pytest.mark.parametrize(
    "layout",
    [
        {"shape": b"(I5\nt"},
        {"offset": b"I1\n"},
        {"stride": b"(I2\nt"},
        {"size": b"L%dL\n" % 2**60},
        {"size": b"I5\n", "shape": b"(I5\nt"},
        {"key": b"S'1'\n"},
    ],
)
def test_nothing_outside_the_storage_is_read(tmp_path, layout):
    source = open_source(written(tmp_path / "x.pth", tensor(**layout)))
    with pytest.raises(WeightsError, match="x.pth is cut short: 'w' is not all there"):
        source.read("w")


def test_small_files_that_ask_for_much(tmp_path):
    """A compressed bomb, a table of 2**31 entries in the pickle's memo, and dicts that share each other 10**30 times."""
    file = written(tmp_path / "x.pth", b"S'" + b"x" * 10**7 + b"'\n", zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 10**5
    with pytest.raises(WeightsError, match="compressed after torch wrote it"):
        open_source(file)
    assert open_source(written(tmp_path / "y.pth", tensor() + b"r\xff\xff\xff\x7f")).names() == ["w"]
    levels = (b"(" + b"".join(b"S'%d'\ng%d\n" % (j, i) for j in range(10)) + b"dp%d\n0" % (i + 1) for i in range(15))
    with pytest.raises(WeightsError, match="too many"):
        open_source(written(tmp_path / "z.pth", b"}p0\n0" + b"".join(levels) + b"g15\n"))


def test_old_files_made_to_harm(tmp_path, monkeypatch):
    """Each of the pickles in a row may ask for something; the storages after them may say any size."""
    monkeypatch.chdir(tmp_path)
    start = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    old = tensor(size=b"I4\nN")  # its references have a sixth part
    start.append(b"(S'w'\n" + old + b"d.")
    evil = b"cos\nsystem\n(S'touch hacked'\ntR."
    for place in range(5):
        (tmp_path / "x.pth").write_bytes(b"".join([*start[:place], evil]))
        with pytest.raises(WeightsError, match="asks for os.system"):
            open_source("x.pth")
    for size, message in ((2**62, "offset"), (-1, "cut short at storage 0")):
        rest = pickle.dumps(["0"], 2) + struct.pack("<q", size) + bytes(16)
        (tmp_path / "x.pth").write_bytes(b"".join(start) + rest)
        with pytest.raises(WeightsError, match=message):
            open_source("x.pth")
    (tmp_path / "x.pth").write_bytes(b"".join(start) + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(8))
    with pytest.raises(WeightsError, match="cut short: 'w'"):
        open_source("x.pth").read("w")
    assert not (tmp_path / "hacked").exists()


# ---------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """{suffix: the bytes of a small file with two tensors}."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("sound")
    state = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5).half()}
    save_file(state, folder / "x.safetensors")
    torch.save(state, folder / "x.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    values = {name: (value.float().numpy(), gguf.GGMLQuantizationType.F32) for name, value in state.items()}
    write_gguf(folder / "x.gguf", values, [("add_uint32", "llama.block_count", 2)])
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "old.pth", "x.gguf"])
def test_a_damaged_file_reads_or_is_refused(sound, tmp_path, name):
    """Cut anywhere, with any bytes of it changed: no other exception than `WeightsError`, and no waiting."""
    whole, path = sound[name], tmp_path / name

    @settings(max_examples=120)
    @given(st.data())
    def check(data):
        changed = bytearray(whole)
        spots = st.integers(0, len(whole) - 1) if data.draw(st.booleans()) else st.integers(0, min(len(whole), 400) - 1)
        for _ in range(data.draw(st.integers(0, 3))):
            changed[data.draw(spots)] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            changed = changed[: data.draw(spots)]
        path.write_bytes(changed)
        try:
            source = open_source(path)
            for tensor in source.names():
                if np.prod(source.shape(tensor), dtype=float) < 1e6:
                    source.read(tensor)
        except WeightsError as error:
            assert str(path) in str(error)

    check()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "is not a complete"),
        ({"a": 3}, "its header is none"),
        ({"a": {}}, "its header is none"),
        ({"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}, "in a form that safetensors does not write"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, "in a form that safetensors does not write"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "in a form that safetensors does not write"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, "in a form that safetensors does not write"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, r"'a' is \[2\] of F32 in 4 bytes"),
        ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, "ends 4398046511096 bytes after"),
    ],
)
def test_safetensors_headers(tmp_path, entry, message):
    header = json.dumps(entry).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(WeightsError, match=message):
        open_source(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 2**63) + header)
    with pytest.raises(WeightsError, match="its header is 9223372036854775808 bytes long"):
        open_source(tmp_path / "x.safetensors")
