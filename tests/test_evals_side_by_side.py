"""`jaxvlm report FOLDER ... --out DIR`: what the page says of benchmarks that stand-in models answered."""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
from pathlib import Path

import pytest
from PIL import Image

from jaxvlm.config import PromptConfig
from jaxvlm.infer import engine
from jaxvlm.main import main


class Says:
    """Answers in one batch by `say(request)`."""

    prompt, exact = PromptConfig(), False

    def __init__(self, name, say):
        self.fingerprint, self.say = name, say

    def generate_batches(self, requests, **sampling):
        yield [(i, self.say(request)) for i, request in enumerate(requests)]


def call(*argv) -> int:
    try:
        return main([*map(str, argv)]) or 0
    except SystemExit as stop:
        return stop.code or 0


def benchmark(monkeypatch, model, folder, task, protocol, references, images, *more):
    monkeypatch.setattr(engine, "load", lambda path, dtype: model)
    about = ["--task", task, "--protocol", protocol, "--references", references, "--images", images]
    assert call("eval", "benchmark", *about, "--run", "x", "--out", folder, *more) == 0


@pytest.fixture
def pope(tmp_path):
    """Eight pictures, of which the even ones show what is asked for."""
    records, images = [], tmp_path / "images"
    images.mkdir()
    for i in range(8):
        Image.new("RGB", (320, 240), (20 * i, 90, 160)).save(images / f"{i}.png")
        label = ("yes", "no")[i % 2]
        records.append({"question_id": i, "image": f"{i}.png", "text": f"Is <{i}> there?", "label": label})
    (tmp_path / "pope").mkdir()
    (tmp_path / "pope" / "coco_pope_random.json").write_text("".join(json.dumps(one) + "\n" for one in records))
    return tmp_path / "pope", images


def cards(page: str) -> dict[str, set[str]]:
    """Classes of each sample's card by the question's number."""
    found = re.findall(r'<article class="card sample ?([^"]*)">.*?Is &lt;(\d)&gt;', page, flags=re.S)
    return {number: set(kinds.split()) for kinds, number in found}


def test_the_page_of_two_runs(pope, tmp_path, monkeypatch, capsys):
    def sees(request):
        return "Yes" if request["images"] and int(Path(request["images"][0]).stem) % 2 == 0 else "No"

    more = ("--blind", "noimage", "--intervals", "100")
    benchmark(monkeypatch, Says("m1", sees), tmp_path / "a", "pope", "llava15", *pope, *more)
    benchmark(monkeypatch, Says("m2", lambda request: "Yes"), tmp_path / "b", "pope", "llava15", *pope)
    assert call("report", f"seeing={tmp_path}/a", f"<blind>={tmp_path}/b", "--out", tmp_path / "out") == 0
    page = (tmp_path / "out" / "runs.html").read_text(encoding="utf-8")
    table = (tmp_path / "out" / "runs.md").read_text(encoding="utf-8").splitlines()
    assert table[2].startswith(
        "| pope, llava15: f1 | seeing | 8 | 100.0 | 100.0 to 100.0 | 50.0 | 66.7 | 0.0 (noimage) | 100.0 (100.0 to 100.0) | 85.9"
    )
    assert table[3].startswith("| pope, llava15: f1 | <blind> | 8 | 66.7 | – | 50.0 | 66.7 | – | – | 85.9 / 85.9")
    assert page.count(" questions/s, 8 in 0:00") == 2 and page.count("0 of 8 texts differ (0.0 to 32.4 %)") == 2
    odd = {str(i): {"wrong", "disagree", "blind-right"} for i in (1, 3, 5, 7)}  # without a picture the first says no
    assert cards(page) == odd | {str(i): set() for i in (0, 2, 4, 6)}
    assert "<script" not in page and "<blind>" not in page and page.count("data:image/jpeg") == 8
    assert not re.search(r'(src|href)="(?!data:)', page) and "http:" not in page and "https:" not in page


def test_columns_are_those_that_say_something(pope, tmp_path, monkeypatch):
    benchmark(monkeypatch, Says("m", lambda request: "Yes"), tmp_path / "a", "pope", "official", *pope)
    head = "| benchmark | run | n | score | chance | one answer |"
    assert call("report", tmp_path / "a", "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "runs.md").read_text(encoding="utf-8").splitlines()[0] == head
    score = {"headline": "f1", "clean": {"n": 6, "value": 61.23, "interval": [50, 70]}}
    (tmp_path / "a" / "leakage.json").write_text(json.dumps({"task": "pope", "score": score}))
    assert call("report", tmp_path / "a", "--out", tmp_path / "out") == 0
    found = (tmp_path / "out" / "runs.md").read_text(encoding="utf-8").splitlines()
    assert found[0] == f"{head} unseen pictures |" and found[2].endswith("| 50.0 | 66.7 | 61.2 (n 6) |")


def test_boxes_are_drawn_where_they_are(tmp_path, monkeypatch):
    """LLaVA's boxes lie on the padded square: (0.25, 0.375) .. (0.5, 0.5) there are (0.25, 0.25) .. (0.5, 0.5) here."""
    images, folder = tmp_path / "images", tmp_path / "refs"
    images.mkdir()
    folder.mkdir()
    Image.new("RGB", (400, 200), "white").save(images / "1.jpg")
    ref = {"ref_id": 1, "ann_id": 1, "image_id": 1, "split": "val", "sentences": [{"sent_id": 1, "sent": "cup"}]}
    (folder / "refs(unc).p").write_bytes(pickle.dumps([ref]))
    instances = {
        "annotations": [{"id": 1, "image_id": 1, "bbox": [300, 20, 60, 100]}],
        "images": [{"id": 1, "width": 400, "height": 200, "file_name": "1.jpg"}],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    model = Says("m", lambda request: "[0.25, 0.375, 0.5, 0.5]")
    benchmark(monkeypatch, model, tmp_path / "a", "refcoco", "llava15", folder, images, "--split", "val")
    assert call("report", tmp_path / "a", "--out", tmp_path) == 0
    (data,) = re.findall(r"data:image/jpeg;base64,([^\"]+)", (tmp_path / "runs.html").read_text())
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (400, 200)
    red, green, blue = image.getpixel((100, 75))  # the left edge of the model's box
    assert red > 150 > green and red > 150 > blue
    red, green, blue = image.getpixel((301, 60))
    assert green > 120 > red
    assert min(image.getpixel((200 + 50, 150))) > 200 and min(image.getpixel((150, 75))) > 200


def test_what_cannot_be_shown(tmp_path, capsys):
    for argv, message in {
        ("report", str(tmp_path), "--out", str(tmp_path)): "holds no sighted-result.json",
        ("report",): "Give a trained run",
        ("report", "a"): "Give a trained run",
    }.items():
        assert call(*argv) == 1 and message in capsys.readouterr().err
