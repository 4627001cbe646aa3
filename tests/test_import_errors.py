"""What a new user does wrong on the way to a model: one sentence each, a failing exit code, and nothing written."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from weights_helpers import saver, tokenizer_folder

import jaxvlm
from jaxvlm.config import UserError
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
    """Changes config.json; `text_config` and `vision_config`, if objects, are what to change in those."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in values.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))


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


def test_hostile_pickle(llava, tmp_path, capsys, monkeypatch):
    """One of many (test_hostile_files.py), by the command line."""
    (llava / "model.safetensors").unlink()
    torch.save({"w": torch.zeros(2), "x": Hostile()}, llava / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    error = complaint(capsys, tmp_path, llava)
    assert "posix.system" in error and "pytorch_model.bin" in error and not (tmp_path / "hacked").exists()


def test_a_storage_that_is_cut_short(llava, tmp_path, capsys):
    """Found when the tensor is read, after the folder for the result was begun."""
    tensors = {name: torch.tensor(value) for name, value in load_file(llava / "model.safetensors").items()}
    (llava / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "sound.bin")
    with zipfile.ZipFile(tmp_path / "sound.bin") as old, zipfile.ZipFile(llava / "pytorch_model.bin", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[: -4 if name.endswith("/data/7") else None])
    (tmp_path / "sound.bin").unlink()
    error = complaint(capsys, tmp_path, llava)
    assert "pytorch_model.bin is cut short" in error and "is not all there" in error


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
    (tmp_path / "notes.txt").write_text("hello")
    assert "notes.txt: '.txt' is not a known format" in complaint(capsys, tmp_path, tmp_path / "notes.txt")
    (llava / "config.json").unlink()
    (llava / "model.safetensors").mkdir()
    assert "Is a directory" in complaint(capsys, tmp_path, llava)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_git_has_not_fetched(llava, tmp_path, capsys, name):
    (llava / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    error = complaint(capsys, tmp_path, llava)
    assert f"{llava / name} is a Git LFS pointer" in error and "git lfs pull" in error


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_may_not_be_read(llava, tmp_path, capsys, name):
    (llava / name).chmod(0)
    if os.access(llava / name, os.R_OK):
        pytest.skip("this user may read everything")
    assert f"Permission denied: '{llava / name}'" in complaint(capsys, tmp_path, llava)


def test_two_checkpoints_in_one_folder(llava, tmp_path, capsys):
    shutil.copy(llava / "model.safetensors", llava / "model-old.safetensors")
    error = complaint(capsys, tmp_path, llava)
    assert "(model-old.safetensors, model.safetensors) hold the same tensors" in error
    save_file({"other.weight": np.zeros(2, np.float32)}, llava / "model-old.safetensors")
    assert "In the file but unknown, 1:\n  other.weight" in complaint(capsys, tmp_path, llava)


@pytest.mark.parametrize("name", ["../sound.safetensors", "/etc/passwd", "", ".", "..", 3])
def test_an_index_that_points_elsewhere(llava, tmp_path, capsys, name):
    weight_map = dict.fromkeys(load_file(llava / "model.safetensors"), name)
    (llava / "model.safetensors").rename(tmp_path / "sound.safetensors")
    (llava / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    error = complaint(capsys, tmp_path, llava)
    assert "is not an index of weight files" in error or "the index names files that are not there" in error


def test_a_part_where_a_whole_model_is_asked_for(saved, tmp_path, capsys):
    error = complaint(capsys, tmp_path, saved("clip")[0])
    assert "a vision tower alone" in error and "--vision FOLDER --llm FOLDER" in error
    error = complaint(capsys, tmp_path, saved("llama")[0])
    assert "a language model alone" in error and "--vision FOLDER --llm FOLDER" in error
    error = complaint(capsys, tmp_path, "--vision", saved("llama")[0], "--llm", saved("llama")[0])
    assert "holds a 'llm' part, not 'vision'" in error


def test_adapters_without_their_base(llava, tmp_path, capsys):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 2}')
    error = complaint(capsys, tmp_path, folder, "--base", llava)
    assert "has an adapter_config.json but none of adapter_model.safetensors" in error
    save_file({}, folder / "adapter_model.safetensors")
    for named in ({}, {"base_model_name_or_path": "acme/model"}):
        (folder / "adapter_config.json").write_text(json.dumps({"r": 2} | named))
        assert "holds adapters" in (error := complaint(capsys, tmp_path, folder)) and "--base PATH" in error
    for values, words in (
        ([], "is not a JSON object but a list"),
        ({}, "adapter_config.json lacks 'r'"),
        ({"r": 2, "modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', and has to be a list of texts or null"),
        ({"r": 2, "base_model_name_or_path": 3}, "base_model_name_or_path is 3, and has to be a text or null"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(values))
        assert words in complaint(capsys, tmp_path, folder, "--base", llava)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", "[" * 100_000])
def test_a_config_that_is_no_object(llava, tmp_path, capsys, text):
    (llava / "config.json").write_text(text)
    error = complaint(capsys, tmp_path, llava)
    assert f"{llava}/config.json is not " in error and "Get the file again" in error
    with pytest.raises(UserError, match="config.json is not "):  # the same in Python
        jaxvlm.load(llava)
    (llava / "manifest.json").write_text(text)  # of a model of our own
    assert f"{llava}/manifest.json is not " in complaint(capsys, tmp_path, llava)


WRONG = {
    "text_config": ["llama", 3, []],
    "vision_config": ["clip", []],
    "text_config.hidden_size": ["32", 32.5, None, 0, -4, True, 10**30],
    "text_config.num_hidden_layers": ["2", 0, -1, 1.5, None, 10**7],
    "text_config.num_attention_heads": [0, "4", None],
    "text_config.num_key_value_heads": [0, "2", [1]],
    "text_config.head_dim": ["8", 0],
    "text_config.vocab_size": ["64", 0, None],
    "text_config.rms_norm_eps": ["1e-6", None, -1],
    "text_config.hidden_act": [3, None],
    "text_config.attention_bias": ["no", 1],
    "text_config.tie_word_embeddings": ["no"],
    "text_config.rope_parameters": ["x", 3],
    "text_config.rope_parameters.rope_theta": ["x", 0],
    "text_config.rope_parameters.factor": ["8", 0],
    "vision_config.image_size": ["28", 0, None, {"a": 1}],
    "vision_config.patch_size": [0, "7"],
    "vision_feature_layer": ["-2", None, [1, "2"], 1.5],
    "vision_feature_select_strategy": [3],
    "multimodal_projector_bias": ["x"],
}


@pytest.mark.parametrize(("entry", "value"), [(entry, value) for entry, values in WRONG.items() for value in values])
def test_a_value_of_another_kind_is_named(llava, tmp_path, capsys, entry, value):
    config = json.loads((llava / "config.json").read_text())
    *path, last = entry.split(".")
    inner = config
    for name in path:
        inner = inner[name]
    inner[last] = value
    (llava / "config.json").write_text(json.dumps(config))
    error = complaint(capsys, tmp_path, llava)
    assert f"{llava}/config.json: {entry} is {value!r:.60}, and has to be" in error.replace("\n", " ")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": ["llava"]}, "config.json is not as it has to be"),
        ({"model_type": None}, "model_type 'None' is not supported. Known: llava"),
        (
            {"text_config": {"model_type": "bert"}},
            "config.json: a language model of model_type 'bert' is not supported",
        ),
        ({"text_config": {"hidden_act": "swish9"}}, "config.json: activation 'swish9' is not supported"),
        ({"text_config": {"num_attention_heads": 3}}, "self_attn.q_proj.weight is [32, 32]"),
        ({"text_config": {"num_hidden_layers": 3}}, "Missing from the file, 9:"),
        ({"vision_config": {"image_size": [28, 35]}}, "config.json: image_size [28, 35] is not square"),
        ({"vision_config": {"image_size": 27}}, "position_embedding.weight is [17, 24]"),
        ({"vision_feature_layer": 99}, "config.json: vision.feature_layers: 99 names no layer"),
        ({"vision_feature_layer": []}, "config.json: vision.feature_layers is empty"),
        ({"vision_feature_select_strategy": "all"}, "vision_feature_select_strategy 'all' is not default or full"),
        ({"model_type": "llava_next", "image_grid_pinpoints": [[28]]}, "image_grid_pinpoints is [[28]], and has to be"),
    ],
)
def test_a_value_that_no_model_has_is_named(llava, tmp_path, capsys, values, words):
    reconfigure(llava, **values)
    error = complaint(capsys, tmp_path, llava)
    assert words in error and str(llava) in error


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("preprocessor_config.json", "{", "is not valid JSON"),
        ("preprocessor_config.json", '{"image_mean": 3}', "image_mean is 3, and has to be a list of three numbers"),
        (
            "preprocessor_config.json",
            '{"image_std": [0, 1, 1]}',
            "image_std is [0, 1, 1], and has to be a list of three",
        ),
        ("processor_config.json", '{"image_processor": 3}', "image_processor is 3, and has to be an object"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is 3, and has to be a text"),
        ("tokenizer.json", "{}", "is not a tokenizer that can be read"),
        ("tokenizer.json", '{"model": {"vocab": {}}}', "is not a tokenizer that can be read"),
        ("tokenizer.json", '{"model": {"vocab": {"a": "x"}}}', "is not a tokenizer that can be read"),
    ],
)
def test_the_files_beside_are_named_too(llava, tmp_path, capsys, file, text, words):
    (llava / file).write_text(text)
    error = complaint(capsys, tmp_path, llava)
    assert words in error and str(llava / file) in error


def test_in_a_process_of_its_own(llava, tmp_path):
    """What a shell sees: the exit code, one line on stderr, nothing written."""
    reconfigure(llava, vision_feature_layer="-2")
    command = [sys.executable, "-m", "jaxvlm.main", "import", str(llava), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_no_tokenizer(llava, tmp_path, capsys):
    (llava / "tokenizer.json").unlink()
    (llava / "tokenizer.model").write_bytes(b"")
    error = complaint(capsys, tmp_path, llava)
    assert "no tokenizer.json" in error and "--tokenizer FOLDER" in error and "AutoTokenizer" in error


def test_wrong_command_line(llava, tmp_path, capsys):
    assert "There is no template 'nope'; the templates are" in complaint(capsys, tmp_path, llava, "--template", "nope")
    for argv in ([], ["a", "b", "c"], ["a"]):
        assert main(["import", *argv]) == 1
        assert "jaxvlm import PATH OUT" in capsys.readouterr().err
