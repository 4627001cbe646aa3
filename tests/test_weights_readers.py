"""Readers against the libraries that write the files; hostile and damaged files."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weights_helpers import write_gguf

from jaxvlm.weights import WeightsError, open_source
from jaxvlm.weights import axes as layout

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")


def state_dict():
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "plain": base,
        "transposed": base.t(),
        "strided": base[1:, ::2],
        "half": torch.randn(3, 5).half(),
        "bf16": torch.randn(2, 3).bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "ids": torch.arange(5).expand(1, 5),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file_equals_torch_load(tmp_path, zipped):
    state = state_dict()
    path = tmp_path / "x.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    source = open_source(path)
    loaded = torch.load(path, weights_only=True)
    assert source.names() == list(loaded)
    for name, tensor in loaded.items():
        tensor = tensor.detach()
        got = source.read(name)
        assert source.shape(name) == tuple(tensor.shape) == got.shape
        np.testing.assert_array_equal(got.astype(np.float64), tensor.double().numpy())
    np.testing.assert_array_equal(source.read("strided", (slice(1, 3), slice(0, 2))), state["strided"][1:3, :2].numpy())


def test_torch_file_unwraps_a_training_checkpoint(tmp_path):
    linear = torch.nn.Linear(3, 2)
    torch.save({"state_dict": linear.state_dict(), "epoch": 3}, tmp_path / "x.pt")
    assert open_source(tmp_path / "x.pt").names() == ["weight", "bias"]


def test_torch_file_damaged(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"hello")
    with pytest.raises(WeightsError, match="damaged"):
        open_source(tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(WeightsError, match="not a file of torch.save"):
        open_source(tmp_path / "y.pth")


def test_gguf_equals_the_gguf_package(tmp_path):
    kinds = gguf.GGMLQuantizationType
    rng = np.random.default_rng(0)
    values = {kind.name: rng.normal(size=(6, 64)).astype(np.float32) for kind in (kinds.Q4_1, kinds.Q8_0, kinds.F16)}
    values |= {"F32": rng.normal(size=64).astype(np.float32), "BF16": rng.normal(size=(4, 32)).astype(np.float32)}
    path = tmp_path / "x.gguf"
    pairs = [("add_uint32", "llama.block_count", 2), ("add_float32", "llama.rope.freq_base", 1e4)]
    write_gguf(path, {name: (value, kinds[name]) for name, value in values.items()}, pairs)

    source, reference = open_source(path), gguf.GGUFReader(path)
    assert source.metadata["llama.block_count"] == 2 and source.metadata["general.architecture"] == "llama"
    assert source.names() == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        whole = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        assert source.shape(tensor.name) == whole.shape
        np.testing.assert_array_equal(source.read(tensor.name), whole)
        part = (slice(1, 4), slice(5, 20))[-whole.ndim :]
        np.testing.assert_array_equal(source.read(tensor.name, part), whole[part])
    np.testing.assert_allclose(source.read("Q8_0"), values["Q8_0"], atol=0.03)
    # Q4_1 by hand: blocks of 32 hold scale and minimum as float16, then 16 bytes, low nibbles first.
    block = next(t for t in reference.tensors if t.name == "Q4_1").data[2, :20]
    scale, least = block[:4].view(np.float16).astype(np.float32)
    nibbles = np.concatenate([block[4:] & 15, block[4:] >> 4])
    np.testing.assert_array_equal(source.read("Q4_1", (slice(2, 3), slice(0, 32)))[0], nibbles * scale + least)


def test_gguf_damaged(tmp_path):
    path = tmp_path / "x.gguf"
    write_gguf(path, {"w": (np.ones((4, 32), np.float32), gguf.GGMLQuantizationType.F32)})
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    with pytest.raises(WeightsError, match="not a complete GGUF"):
        open_source(path)
    path.write_bytes(whole[:-300])
    with pytest.raises(WeightsError, match="'w' cannot be read"):
        open_source(path).read("w")


def save(path, **tensors):
    from safetensors.torch import save_file

    save_file(tensors, path)


def test_safetensors_file_and_slices(tmp_path):
    path = tmp_path / "model.safetensors"
    save(path, a=torch.arange(12, dtype=torch.bfloat16).reshape(3, 4), s=torch.tensor(3.0))
    for source in (open_source(path), open_source(tmp_path)):
        assert source.shape("a") == (3, 4) and source.dtype("a").name == "bfloat16"
        np.testing.assert_array_equal(source.read("a", (slice(1, 3), slice(0, 2))).astype(int), [[4, 5], [8, 9]])
        assert source.read("s") == 3.0


def test_sharded_folder(tmp_path):
    save(tmp_path / "a.safetensors", x=torch.ones(2))
    save(tmp_path / "b.safetensors", y=torch.zeros(3))
    assert sorted(open_source(tmp_path).names()) == ["x", "y"]  # no index: all files
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert open_source(tmp_path).shape("y") == (3,)
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "z": "b.safetensors"}}))
    with pytest.raises(WeightsError, match=r"but not in the file: z \(b.*not in the index: y"):
        open_source(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "c.safetensors"}}))
    with pytest.raises(WeightsError, match="not there: c.safetensors"):
        open_source(tmp_path)
    index.unlink()
    save(tmp_path / "c.safetensors", y=torch.zeros(3))
    with pytest.raises(WeightsError, match="hold the same tensors"):
        open_source(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(WeightsError, match="does not exist"):
        open_source(tmp_path / "none")
    (tmp_path / "readme.md").write_text("hello")
    with pytest.raises(WeightsError, match=r"holds no weights .*found readme.md"):
        open_source(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(WeightsError, match="git lfs pull"):
        open_source(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    with pytest.raises(WeightsError, match="not a complete safetensors"):
        open_source(tmp_path)


AXES = [
    "(H h) D -> D H h",
    "D (H h) -> H h D",
    "(H half two) D -> D H (two half)",
    "D C p q -> p q C D",
    "1 N D -> N D",
]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(AXES), st.data())
def test_any_slice_of_any_layout_equals_the_slice_of_the_whole(axes, data):
    left, right = layout.parse(axes)
    sizes = {name: data.draw(st.integers(1, 4)) for group in left for name in group}
    shape = layout.shape(left, sizes)
    array = np.arange(np.prod(shape)).reshape(shape)
    whole = layout.convert(array, axes, sizes)
    index = []
    for size in whole.shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    read = []

    def reader(box):
        read.append(array[box].size)
        return array[box]

    part = layout.convert_slice(axes, sizes, tuple(index), reader)
    np.testing.assert_array_equal(part, whole[tuple(index)])
    assert layout.bind(axes, shape, {}) == sizes or any(len(group) > 1 for group in left)
    if axes == "(H h) D -> D H h" and index[2] == slice(0, sizes["h"]):  # sharded by heads: nothing else is read
        assert read == [part.size]


def test_reading_needs_no_torch():
    code = "import sys, jaxvlm.weights; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
