"""`jaxvlm data stats`: its numbers are those of the loader and of PIL, its page is whole."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from mix_helpers import SOURCES, write_mix
from PIL import Image
from test_data_inspect import Page

from jaxvlm.data.assets import resolve_assets
from jaxvlm.data.loader import Loader
from jaxvlm.main import load_config, main


def run(*argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", "stats", *map(str, argv)])
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("length", [128, 112])  # the second cuts some records
def test_the_loader_counts_the_same(tmp_path, capsys, stage, length):
    spec, change = "configs/quickstart.py:tiny", f"--config.prompt.length={length}"
    config = resolve_assets(load_config(spec, [change]))
    chosen = config.stages[stage]
    loader = Loader(
        chosen.data, config.prompt, config.model, batch_size=1, seed=0, epochs=1, cache_dir=tmp_path / "cache"
    )
    want = loader.stats()
    run("--config", spec, change, "--stage", chosen.name, "--out", tmp_path, capsys=capsys)
    (made,) = json.loads((tmp_path / "stats.json").read_text())["groups"].values()
    assert made["length"]["total"] == want["tokens"] and made["supervised"] == want["supervised_tokens"]
    assert made["images"] == want["images"] and made["cut"] == want["truncated"]
    assert made["packed_fill"] == pytest.approx(want["fill"], rel=0.1)  # another order, so not the same rows
    assert made["length"]["max"] <= length


def test_per_source_of_the_mix(tmp_path, capsys):
    mix = write_mix(tmp_path / "data", each=3)
    out = run(mix, "--images", mix.parent, "--out", tmp_path / "out", capsys=capsys)
    made = json.loads((tmp_path / "out/stats.json").read_text())
    assert made["unit"] == "words" and made["unusable"] == 0
    assert {*made["groups"]} == {*SOURCES, "all"} and list(made["groups"])[-1] == "all"
    records = json.loads(mix.read_text())
    for name, group in made["groups"].items():
        assert group["records"] == (30 if name == "all" else 3)
        assert sum(group["length_histogram"]["records"]) == group["records"]
        assert name in out
    every = made["groups"]["all"]
    sizes = [Image.open(mix.parent / record["image"]).size for record in records if "image" in record]
    assert every["images"] == len(sizes) and every["image_size"]["median"] == np.median(sizes, 0).tolist()
    assert sum(count for *_, count in every["image_histogram"]["width_height_images"]) == len(sizes)
    assert every["images_per_record"] == {"0": 3, "1": 27}
    # What is supervised in words: the answers and the end of turn that sticks to each.
    answers = sum(len(turn["value"].split()) for r in records for turn in r["conversations"] if turn["from"] == "gpt")
    assert every["supervised"] == answers
    page = Page((tmp_path / "out/stats.html").read_text())
    assert page.tags.count("svg") == 11 + 10 and page.tags.count("tr") == 12 and "script" not in page.tags
    assert not [value for _, name, value in page.attributes if name in ("src", "href")]


def test_a_random_part_and_unusable_records(tmp_path, capsys):
    mix = write_mix(tmp_path / "data", each=3)
    assert re.search(r"\n(mix|all) +12 ", run(mix, "--images", mix.parent, "--random", 12, capsys=capsys))
    (mix.parent / "coco/train2017/000000000100.jpg").unlink()
    gone = sum(r.get("image") == "coco/train2017/000000000100.jpg" for r in json.loads(mix.read_text()))
    out = run(mix, "--images", mix.parent, capsys=capsys)
    assert f"{gone} records are left out: `jaxvlm data verify` says why." in out
    Path(mix).write_text("[1, 2]")
    assert main(["data", "stats", str(mix)]) == 1
    assert "Of 2 records none can be used" in capsys.readouterr().err


def test_every_stage_of_a_config(tmp_path, capsys):
    out = run("--config", "configs/quickstart.py:tiny", "--out", tmp_path, capsys=capsys)
    assert "stage align" in out and "stage instruct" in out
    assert {file.name for file in tmp_path.iterdir()} == {
        f"stats-{s}.{e}" for s in ("align", "instruct") for e in ("json", "html")
    }
