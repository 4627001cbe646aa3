"""The whole command line on the toy preset: train, evaluate, report, and every verb on the result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import jaxvlm
from jaxvlm.main import main
from jaxvlm.train.metrics import read_events, read_metrics

CONFIG = str(Path(__file__).resolve().parent.parent / "configs" / "quickstart.py") + ":tiny"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("job") / "run"
    changes = ["--config.mesh.fsdp=1", "--config.mesh.data=8"]  # the tests' eight simulated devices
    changes += ["--config.stages[0].batch_size=8", "--config.stages[1].batch_size=8", "--config.stages[1].steps=90"]
    assert main(["--config", CONFIG, "--workdir", str(workdir), *changes]) == 0
    return workdir


def test_report_holds_what_it_promises(finished):
    report = json.loads((finished / "report.json").read_text())
    for category in ("left", "right", "all"):
        assert {"sighted", "blind", "majority", "chance", "n"} <= report["eval"][category].keys()
        for key in ("sighted", "blind", "majority", "chance"):
            assert 0 <= report["eval"][category][key] <= 1
    assert report["eval"]["all"]["n"] == 36
    assert [stage["name"] for stage in report["stages"]] == ["align", "instruct"]
    for stage in report["stages"]:
        assert {"name", "steps", "first_loss", "final_loss", "tokens_per_second"} <= stage.keys()
    assert report["stages"][1]["final_loss"] < 0.7 * report["stages"][1]["first_loss"]
    assert report["wall_seconds"] > 0 and report["peak_memory_bytes"] > 1e8
    assert len(report["samples"]) == 6


def test_metrics_and_page(finished):
    entries = read_metrics(finished / "metrics.jsonl")
    assert [e["step"] for e in entries if e["stage"] == "instruct"] == list(range(1, 91))
    assert all(e["tokens_per_second"] > 0 and 0 < e["mfu"] < 1 for e in entries)
    assert all(0 < e["fill"] <= 1 and 0 <= e["data_wait_share"] <= 1 and 0 < e["goodput"] <= 1 for e in entries)
    assert 0 < entries[0]["compile_seconds"] < entries[0]["seconds"] and "compile_seconds" not in entries[10]
    events = read_events(finished / "metrics.jsonl")
    assert [(event["event"], event["stage"]) for event in events] == [("data", "align"), ("data", "instruct")]
    for event in events:
        (one,) = event["sources"].values()
        assert one["samples"] > 0 and one["truncated"] == one["dropped_images"] == one["lost"] == 0
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_run_writes_what_reproduces_it(finished):
    assert json.loads((finished / "config.json").read_text())["name"] == "quickstart-tiny"
    assert json.loads((finished / "environment.json").read_text())["jax"]
    manifest = json.loads((finished / "model" / "manifest.json").read_text())
    assert manifest["kind"] == "jaxvlm-model" and manifest["prompt"]["template"] == "vicuna_v1"


def test_loaded_model_answers(finished):
    vlm = jaxvlm.load(finished)
    image = np.zeros((20, 28, 3), np.uint8)
    request = {"messages": [{"role": "user", "content": "<image>\nWhat colour is the left half?"}], "images": [image]}
    [answer] = vlm.generate([request], max_new_tokens=4)
    assert isinstance(answer, str)
    assert vlm.logits([request]).values.shape[2] == 512


def test_generate_verb(finished, tmp_path, capsys):
    assert main(["generate", "--run", str(finished), "What is it?", "--max_new_tokens", "3"]) == 0
    assert capsys.readouterr().out.strip() is not None
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join(json.dumps({"question_id": i, "text": f"Question {i}?"}) + "\n" for i in range(3)))
    out = tmp_path / "a.jsonl"
    argv = [
        "generate",
        "--run",
        str(finished),
        "--input",
        str(questions),
        "--output",
        str(out),
        "--max_new_tokens",
        "3",
    ]
    assert main(argv) == 0
    assert [json.loads(line)["question_id"] for line in out.read_text().splitlines()] == [0, 1, 2]
    assert main(["generate", "--run", str(finished)]) == 1
    assert "Give either a question" in capsys.readouterr().err


def test_eval_verb_goes_on_with_the_answers(finished, capsys):
    assert main(["eval", "--run", str(finished), "--limit", "left=30", "--blind", "none"]) == 0
    out = capsys.readouterr().out
    assert "eval sighted: 30 questions, 24 already answered in" in out
    assert json.loads((finished / "eval" / "scores.json").read_text())["scores"]["left"]["n"] == 30


def test_report_verb(finished, capsys):
    (finished / "report.html").unlink()
    assert main(["report", "--run", str(finished)]) == 0
    assert (finished / "report.html").is_file()
    assert "sighted" in capsys.readouterr().out


def test_export_refuses_what_has_no_hugging_face_class(finished, tmp_path, capsys):
    hf = tmp_path / "hf"
    # The preset's linear connector has no Hugging Face class, and the refusal says so.
    assert main(["export", str(finished), str(hf)]) == 1
    assert "connector" in capsys.readouterr().err
    assert not hf.exists()


@pytest.mark.parametrize("verb", ["chat", "generate", "eval", "import", "export", "report", "doctor"])
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"jaxvlm {verb}" in capsys.readouterr().out


def test_unfinished_run_is_named(tmp_path, capsys):
    assert main(["chat", "--run", str(tmp_path)]) == 1
    assert f"{tmp_path} holds no weights" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(dict.fromkeys(("model", "prompt", "stages", "checkpoint"))))
    assert main(["chat", "--run", str(tmp_path)]) == 1
    assert "has not finished training" in capsys.readouterr().err
