"""What a new user does wrong on the way to a model: one sentence each, a failing exit code, and nothing written."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from weights_helpers import saver, tokenizer_folder

from jaxvlm.main import main

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saver(tmp_path_factory)


@pytest.fixture
def llava(saved, tmp_path):
    """A whole, sound llava-hf folder of this test's own, with a tokenizer."""
    folder = tmp_path / "model"
    shutil.copytree(saved("llava")[0], folder)
    tokenizer_folder(folder)
    return folder


def complaint(capsys, tmp_path, *argv) -> str:
    """The one line on stderr of an import that fails and leaves nothing behind."""
    before = sorted(path.name for path in tmp_path.iterdir())
    capsys.readouterr()
    assert main(["import", *map(str, argv), str(tmp_path / "new" / "out")]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def reconfigure(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] | values.pop("text_config", {})
    (folder / "config.json").write_text(json.dumps(config | {"text_config": text} | values))


def test_a_sound_folder_is_imported(llava, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert main(["import", str(llava), str(out)]) == 0
    assert "into" in capsys.readouterr().out and (out / "manifest.json").is_file()
    assert main(["import", str(llava), str(out)]) == 1  # a second time, into what is there
    assert f"{out} is not empty" in capsys.readouterr().err


def test_dry_run_shows_every_tensor(llava, tmp_path, capsys):
    rewrite(llava, lambda t: t.update({"model.surprise": np.zeros(2, np.float32)}))
    assert main(["import", str(llava), "--dry-run"]) == 1  # the strict check speaks after the table
    shown = capsys.readouterr()
    for line in (
        "Mapped, ",
        "Transformed, ",
        "Left at initialisation: none",
        "Unused, ",
        "Unmapped, 1:",
        "model.surprise",
    ):
        assert line in shown.out
    assert "language_model.model.layers.{0-1}.mlp.up_proj.weight" in shown.out and "D F" in shown.out
    assert "In the file but unknown" in shown.err
    rewrite(llava, lambda t: t.pop("model.surprise"))
    assert main(["import", str(llava), "--dry-run"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("keep", [0.3, 0.98])
def test_truncated_safetensors(llava, tmp_path, capsys, keep):
    file = llava / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    error = complaint(capsys, tmp_path, llava)
    assert str(file) in error and "ends" in error and "Download it again" in error


def test_missing_shard(llava, tmp_path, capsys):
    tensors = load_file(llava / "model.safetensors")
    (llava / "model.safetensors").unlink()
    halves = dict(list(tensors.items())[:20]), dict(list(tensors.items())[20:])
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, llava / name)
    (llava / names[1]).unlink()
    error = complaint(capsys, tmp_path, llava)  # the files count themselves
    assert names[1] in error and "Download" in error
    where = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (llava / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    error = complaint(capsys, tmp_path, llava)  # the index names a file that is not there
    assert names[1] in error and "Download" in error
    save_file(halves[1], llava / "other.safetensors")
    (llava / "model.safetensors.index.json").write_text("{}")
    assert "is not an index of weight files" in complaint(capsys, tmp_path, llava)


def test_wrong_shape_vocabulary_and_type(llava, tmp_path, capsys):
    up = "language_model.model.layers.1.mlp.up_proj.weight"
    sound = load_file(llava / "model.safetensors")
    rewrite(llava, lambda t: t.update({up: t[up][:, :16].copy()}))
    error = complaint(capsys, tmp_path, llava)
    assert f"{up} is [48, 16], llm/layers/mlp/up/kernel needs [48, 32]" in error
    rewrite(llava, lambda t: t.update({up: sound[up].astype(np.int8)}))
    error = complaint(capsys, tmp_path, llava)
    assert f"{up} is int8, for llm/layers/mlp/up/kernel" in error and "Quantised" in error
    rewrite(llava, lambda t: t.update(sound))
    reconfigure(llava, text_config={"vocab_size": 72})
    error = complaint(capsys, tmp_path, llava)
    assert "embed_tokens.weight is [64, 32], llm/embed/embedding needs [72, 32]" in error
    assert "correct vocab_size in config.json" in error
    reconfigure(llava, text_config={"vocab_size": 64})
    tokenizer_folder(tmp_path / "other", size=80)
    error = complaint(capsys, tmp_path, llava, "--tokenizer", tmp_path / "other")
    assert "goes up to token 79" in error and "64 tokens" in error


def test_an_unknown_type_of_tensor(llava, tmp_path, capsys):
    file = llava / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"F32"', b'"F4 "', 1))
    error = complaint(capsys, tmp_path, llava)
    assert "is stored as F4" in error


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle(llava, tmp_path, capsys, monkeypatch, zipped):
    (llava / "model.safetensors").unlink()
    bad = {"w": torch.zeros(2), "x": Hostile()}
    torch.save(bad, llava / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    monkeypatch.chdir(tmp_path)
    error = complaint(capsys, tmp_path, llava)
    assert "posix.system" in error and "pytorch_model.bin" in error and not (tmp_path / "hacked").exists()


def test_old_and_new_torch_files(llava, tmp_path, capsys):
    tensors = {name: torch.tensor(value) for name, value in load_file(llava / "model.safetensors").items()}
    (llava / "model.safetensors").unlink()
    for zipped in (False, True):
        torch.save(tensors, llava / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert main(["import", str(llava), "--dry-run"]) == 0
    (llava / "pytorch_model.bin").write_bytes(b"PK\x03\x04 not really")
    assert "pytorch_model.bin is cut short" in complaint(capsys, tmp_path, llava)


def test_nothing_there(llava, saved, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "it is empty" in complaint(capsys, tmp_path, tmp_path / "empty")
    assert "does not exist" in complaint(capsys, tmp_path, tmp_path / "none")
    (llava / "model.safetensors").unlink()
    error = complaint(capsys, tmp_path, llava)
    assert f"{llava} holds no weights" in error
    (llava / "config.json").write_text("{")
    assert "config.json is not valid JSON" in complaint(capsys, tmp_path, llava)


def test_a_part_where_a_whole_model_is_asked_for(saved, tmp_path, capsys):
    error = complaint(capsys, tmp_path, saved("llama")[0])
    assert "a language model alone" in error and "--vision FOLDER --llm FOLDER" in error
    error = complaint(capsys, tmp_path, "--vision", saved("llama")[0], "--llm", saved("llama")[0])
    assert "holds a 'llm' part, not 'vision'" in error


def test_no_tokenizer(llava, tmp_path, capsys):
    (llava / "tokenizer.json").unlink()
    (llava / "tokenizer.model").write_bytes(b"")
    error = complaint(capsys, tmp_path, llava)
    assert "no tokenizer.json" in error and "--tokenizer FOLDER" in error and "AutoTokenizer" in error


def test_wrong_command_line(tmp_path, capsys):
    for argv in ([], ["a", "b", "c"], ["a"]):
        assert main(["import", *argv]) == 1
        assert "jaxvlm import PATH OUT" in capsys.readouterr().err
