"""The report: its JSON, its page, and the terminal's table."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from jaxvlm.config import RunConfig, to_dict
from jaxvlm.evals import page
from jaxvlm.evals.report import percent, sample_blocks, terminal_table, write_report

NASTY = "<script>alert(\"1\")</script> & 'so' on"
VOID = {"meta", "img", "br", "path", "circle"}


class Page(HTMLParser):
    """Checks that every element is closed in order, and collects text and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data if not self.open or self.open[-1] != "style" else ""


def entry(sighted, blind, n=100):
    return {
        "sighted": sighted,
        "blind": blind,
        "majority": 0.25,
        "chance": 0.1,
        "n": n,
        "sighted_interval": (sighted - 0.1, sighted + 0.1),
        "blind_interval": (0.1, 0.3),
        "gain": sighted - 0.2,
        "gain_interval": (0.3, 0.5),
    }


@pytest.fixture
def inputs(tmp_path):
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "tiny.png")
    Image.new("RGB", (900, 500), "teal").save(tmp_path / "large.png")
    images = [str(tmp_path / "tiny.png"), str(tmp_path / "large.png"), str(tmp_path / "gone.png"), None]
    samples = [
        {
            "question_id": str(i),
            "category": "what",
            "image": image,
            "question": NASTY,
            "prediction": NASTY if i else "",
            "answer": "teal",
            "right": i % 2 == 0,
        }
        for i, image in enumerate(images)
    ]
    scores = {"what": entry(0.78, 0.2), "yesno": entry(0.81, 0.8), "all": entry(0.79, 0.4)}
    info = {"blind": "noimage", "majority": "training answers", "interval": "95 % bootstrap"}
    metrics = [
        {
            "stage": stage,
            "step": i + 1,
            "loss": 5 * math.exp(-i / 100) + 0.01,
            "tokens_per_second": 100.0,
            "seconds": 1.0,
        }
        for stage, steps in (("align", 3), ("instruct", 700))
        for i in range(steps)
    ]
    stages = [
        {"name": "align", "steps": 3, "first_loss": 5.0, "final_loss": 4.9, "tokens_per_second": 100.0},
        {"name": "instruct", "steps": 700, "first_loss": 5.0, "final_loss": 0.01, "tokens_per_second": 100.0},
    ]
    return {
        "results": {"scores": scores, "samples": samples, "info": info},
        "stages": stages,
        "metrics": metrics,
        "wall_seconds": 700.5,
        "peak_memory_bytes": 4 * 2**30,
        "config": to_dict(RunConfig(name=NASTY, description=NASTY)),
        "devices": ["cpu"],
    }


def test_report_json_has_the_promised_form(inputs, tmp_path):
    returned = write_report(tmp_path / "run", **inputs)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert json.loads(json.dumps(returned)) == report
    assert set(report["eval"]) == {"what", "yesno", "all"}
    for scores in report["eval"].values():
        assert {"sighted", "blind", "majority", "chance", "n", "sighted_interval"} <= set(scores)
        assert all(0 <= scores[key] <= 1 for key in ("sighted", "blind", "majority", "chance"))
    for stage in report["stages"]:
        assert {"name", "steps", "first_loss", "final_loss", "tokens_per_second"} <= set(stage)
    assert report["wall_seconds"] == 700.5 and report["peak_memory_bytes"] == 4 * 2**30
    assert report["versions"]["jax"]


def test_page_is_well_formed_self_contained_and_escapes_text(inputs, tmp_path):
    write_report(tmp_path, **inputs)
    text = (tmp_path / "report.html").read_text()
    parsed = Page(text)
    assert "script" not in parsed.tags and NASTY in parsed.text
    assert parsed.tags.count("svg") == 2 and parsed.tags.count("img") == 2 and parsed.tags.count("article") == 4
    links = [value for _, name, value in parsed.attributes if name in ("src", "href")]
    assert all(link.startswith("data:image/") for link in links) and "http" not in text.replace("http-equiv", "")
    assert "the image file is gone" in parsed.text and "no image" in parsed.text and "(nothing)" in parsed.text
    assert all(dict_has_alt(parsed, "img"))
    assert len(text) < 100_000


def dict_has_alt(parsed, tag):
    return [bool(value) for found, name, value in parsed.attributes if found == tag and name == "alt"]


def test_what_was_watched_is_drawn_and_in_the_table(inputs, tmp_path):
    """Two stages, the second of them watched; eight sources, one with a name that would end the page."""
    names = [NASTY, *"bcdefgh"]
    watched = []
    for step in (350, 700):
        loss = {name: step / 100 + i for i, name in enumerate(names)} | {"all": 12.345}
        watched.append({"event": "held_out", "stage": "instruct", "step": step, "loss": loss, "tokens": {"all": 1234}})
        scores = {"what": step / 1000, "all": step / 1000}
        watched.append({"event": "slim", "stage": "instruct", "step": step, "scores": scores, "n": 24})
    before = len(Page(page.render(write_report(tmp_path, **inputs), inputs["metrics"], inputs["config"])).tags)
    write_report(tmp_path, **inputs, watched=watched)
    parsed = Page((tmp_path / "report.html").read_text())
    assert len(parsed.tags) > before and parsed.tags.count("svg") == 4 and "script" not in parsed.tags
    assert "held-out loss per supervised token, of 1,234" in parsed.text
    assert "right, of 24 questions asked while training" in parsed.text
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in (tmp_path / "report.html").read_text().split("<tr>")]
    assert ["held-out loss", "2", "12.345", "350", "12.345", "700"] in cells
    assert ["questions right", "2", page.percent(0.35), "350", page.percent(0.7), "700"] in cells
    places = [
        tuple(float(dict(parsed_at)[axis]) for axis in ("cx", "cy"))
        for parsed_at in circles((tmp_path / "report.html").read_text())
    ]
    assert len(places) == 2 + 2 * 9 + 2  # the ends of two losses, of each source and all, and of one question type
    assert all(0 <= x <= page.WIDTH and 0 <= y <= page.HEIGHT for x, y in places)
    ends = [y for x, y in places[2:20] if x == page.WIDTH - page.RIGHT]
    assert ends[:8] == sorted(ends[:8], reverse=True)  # a larger loss stands higher


def circles(text):
    return [re.findall(r'(cx|cy)="([\d.]+)"', tag) for tag in re.findall(r"<circle[^>]*>", text)]


def test_page_without_an_evaluation_or_metrics(inputs, tmp_path):
    report = write_report(tmp_path, **inputs | {"results": None, "metrics": [], "stages": []})
    assert "Nothing was evaluated." in Page((tmp_path / "report.html").read_text()).text
    assert terminal_table(report) == "Nothing was evaluated."


@pytest.mark.parametrize(
    "points",
    [
        [(1, 2.0)],
        [(1, 0.0), (2, 0.0)],
        [(5, 3.0), (6, 3.0)],
        [(i, 10.0 / i) for i in range(1, 2000)],
        [(i, -1.0 * i) for i in range(1, 9)],
        [(1, 1e-9), (2, 1e5)],
    ],
)
def test_curves_of_any_shape_stay_in_the_picture(points):
    drawn = Page(page.loss_curve("a<b", points))
    for tag, name, value in drawn.attributes:
        if tag == "path" and name == "d" and "L" in value:
            numbers = [tuple(map(float, pair.split())) for pair in value[1:].split("L")]
            assert all(0 <= x <= page.WIDTH and 0 <= y <= page.HEIGHT for x, y in numbers)


def test_terminal_table_and_samples(inputs):
    results = inputs["results"]
    del results["scores"]["all"]["blind_interval"]
    results["scores"]["all"]["blind"] = None
    table = terminal_table({"eval": results["scores"]}).splitlines()
    assert table[0].split() == ["n", "sighted", "95", "%", "interval", "blind", "majority", "chance"]
    assert table[2].startswith("what") and "78.0 %  68.0 % to 88.0 %" in table[2]
    assert len({len(line) for line in table}) == 1 and " - " in table[-1]
    blocks = sample_blocks(results["samples"])
    assert blocks.count("model") == 4 and "(nothing)" in blocks and "teal  (wrong)" in blocks
    assert percent(0.123456) == "12.3 %"
