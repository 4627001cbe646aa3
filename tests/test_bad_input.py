"""What a new user gets wrong: each time one clear sentence with the fix, a non-zero exit, and nothing lost."""

from __future__ import annotations

import dataclasses
import errno
import json

import pytest
import tiny

from jaxvlm import job
from jaxvlm.config import LogConfig, UserError, differences, to_dict
from jaxvlm.config_files import complete
from jaxvlm.data.assets import toy
from jaxvlm.main import load_config, main
from jaxvlm.train import checkpoint


@pytest.fixture
def world(tmp_path):
    config = tiny.run_config(toy.write_dataset(tmp_path / "data"), toy.write_tokenizer(tmp_path / "tok"))
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, task=""))
    return tmp_path, config


def write_config(path, config):
    text = json.dumps(json.dumps(to_dict(config)))
    path.write_text(
        f"import json\nfrom jaxvlm.config_files import complete\ndef get_config(arg=None):\n"
        f"    return complete(json.loads({text}))\n"
    )
    return str(path)


def command(world, *more):
    folder, config = world
    return ["--config", write_config(folder / "config.py", config), "--workdir", str(folder / "run"), *more]


def fails(capsys, argv, *words):
    assert main(argv) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    for word in words:
        assert word in message, message


def test_unknown_config_key(world, capsys):
    fails(capsys, command(world, "--config.stages[0].batchsize=4"), "batchsize", "Did you mean 'batch_size'?")


def test_unknown_key_in_the_file(tmp_path, capsys):
    (tmp_path / "c.py").write_text(
        "from jaxvlm.config_files import complete\ndef get_config(arg=None):\n    return complete(dict(sead=1))\n"
    )
    fails(capsys, ["--config", str(tmp_path / "c.py"), "--workdir", str(tmp_path / "run")], "config.sead", "'seed'")


def test_wrong_type(world, capsys):
    fails(capsys, command(world, "--config.seed=many"), "config.seed=many")


def test_missing_config_file(tmp_path, capsys):
    fails(capsys, ["--config", "nowhere.py", "--workdir", str(tmp_path)], "nowhere.py", "configs/")


def test_unknown_verb(capsys):
    fails(capsys, ["chatt"], "chatt", "chat, generate")


def test_misspelt_stage_pattern(world, capsys):
    fails(capsys, command(world, '--config.stages[0].trainable=("conector/.*",)'), "conector", "connector")


def test_missing_image(world, capsys):
    folder, _ = world
    (folder / "data" / "images" / "3.png").unlink()
    fails(capsys, command(world), "3.png", "images")


def test_unreadable_json(world, capsys):
    folder, _ = world
    path = folder / "data" / "align.json"
    path.write_text(path.read_text()[:200])
    fails(capsys, command(world), "align.json")


def test_unreadable_json_line(world, capsys):
    folder, config = world
    lines = [json.dumps(record) for record in json.loads((folder / "data" / "align.json").read_text())]
    lines[4] = lines[4][:30]
    path = folder / "data" / "align.jsonl"
    path.write_text("\n".join(lines))
    fails(capsys, command(world, f"--config.stages[0].data.sources[0].path={path}"), "align.jsonl", "line 5")


def test_image_count_mismatch(world, capsys):
    folder, _ = world
    path = folder / "data" / "align.json"
    records = json.loads(path.read_text())
    records[7]["conversations"][0]["value"] = "<image>\n<image>\nDescribe both."
    path.write_text(json.dumps(records))
    fails(capsys, command(world), "cap7", "<image>")


def test_workdir_of_another_config(world, capsys):
    argv = command(world)
    job.claim_workdir(load_config(argv[1]), world[0] / "run")
    fails(capsys, [*argv, "--config.seed=7"], "config.seed: 0 -> 7", "--workdir")


def test_workdir_with_other_files(world, capsys):
    (world[0] / "run").mkdir()
    (world[0] / "run" / "thesis.tex").write_text("x")
    fails(capsys, command(world), "not empty")


def test_missing_tokenizer(world, capsys):
    (world[0] / "tok" / "tokenizer.json").unlink()
    fails(capsys, command(world), "tokenizer.json")


def test_full_disk(world, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp.training.Checkpointer, "save_checkpointables_async", full)
    fails(capsys, command(world), "disk is full", "run the same command again")


def test_too_little_disk_is_noticed_before_training(world, capsys, monkeypatch):
    usage = job.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(job.shutil, "disk_usage", lambda path: usage)
    fails(capsys, command(world), "needs about", "free")
    assert not (world[0] / "run" / "metrics.jsonl").exists()


def test_batch_that_does_not_divide(world, capsys):
    fails(capsys, command(world, "--config.stages[0].batch_size=12"), "batch_size = 12 rows", "multiple of 8")


def test_diverging_loss(world, capsys):
    huge = "--config.stages[0].optimizer.learning_rate=1e30"
    fails(capsys, command(world, huge), "stage 'align' became", "learning_rate")


def test_free_settings_may_change_between_runs(world):
    folder, config = world
    job.claim_workdir(config, folder / "run")
    path = folder / "run" / "config.json"
    older = json.loads(path.read_text())
    del older["stages"][0]["watch"], older["checkpoint"]["keep_every"]
    path.write_text(json.dumps(older))  # of a version that did not have them
    job.claim_workdir(dataclasses.replace(config, log=LogConfig(every_steps=9)), folder / "run")
    with pytest.raises(UserError, match="config.seed"):
        job.claim_workdir(dataclasses.replace(config, seed=1), folder / "run")


def test_differences_reach_into_lists():
    assert differences({"a": [{"b": 1}]}, {"a": [{"b": 2}]}) == ["config.a.0.b: 1 -> 2"]


def test_complete_gives_every_setting():
    values = complete(dict(stages=[dict(name="one")]))
    assert values.stages[0].optimizer.learning_rate == 2e-5
    values.stages[0].steps = 3  # None in the defaults, an int when it is set
    with pytest.raises(TypeError):
        values.stages[0].steps = "many"
