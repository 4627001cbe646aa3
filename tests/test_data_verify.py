"""`jaxvlm data verify`: every fault is found, blamed on the right records, and comes with its repair."""

import dataclasses
import io
import json
import random
import struct
import threading
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_helpers import llama_tokenizer
from mix_helpers import SOURCES, write_image, write_mix
from PIL import Image

from jaxvlm.config import SourceConfig
from jaxvlm.data import DataError, llava_mix
from jaxvlm.data.loader import Loader
from jaxvlm.data.sources import open_source
from jaxvlm.data.tools import images as image_checks
from jaxvlm.data.tools.images import in_threads, look
from jaxvlm.data.tools.verify import verify
from jaxvlm.main import load_config, main


@pytest.fixture
def mix(tmp_path):
    return write_mix(tmp_path / "data", each=4)


def run(path, *more, capsys):
    """The exit code of the command and what it printed."""
    with pytest.raises(SystemExit) as stop:
        main(["data", "verify", str(path), "--images", str(Path(path).parent), *more])
    return stop.value.code, capsys.readouterr().out


def quarantined(file) -> dict[int, dict]:
    return {entry["record"]: entry for entry in map(json.loads, Path(file).read_text().splitlines())}


def users(path, image) -> set[int]:
    return {i for i, record in enumerate(json.loads(Path(path).read_text())) if record.get("image") == image}


def bomb(width=20_000, height=20_000) -> bytes:
    """The start of a PNG that unpacks to 400 million pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 2501)) + chunk(b"IEND", b"")


# --------------------------------------------------------------------------------------------------------- good and bad


def test_a_clean_mix(mix, capsys):
    code, out = run(mix, capsys=capsys)
    assert code == 0 and "All is well." in out and "problem" not in out
    gifs = sum(Image.open(file).format == "GIF" for file in (mix.parent / "ocr_vqa/images").iterdir())
    assert gifs and f"GIF named .jpg: {gifs}, as" in out
    table = {
        line.split()[0]: line.split()[1] for line in out.splitlines() if line.split()[:1] and line.split()[0] in SOURCES
    }
    assert table == dict.fromkeys(SOURCES, "4")
    assert "157,712" in out and "665,298" in out and "a part or a variant of it" in out


def test_counts_of_the_published_mix(mix, capsys, monkeypatch):
    monkeypatch.setattr(llava_mix, "COUNTS", dict.fromkeys(llava_mix.COUNTS, 4))
    assert run(mix, capsys=capsys)[0] == 0
    records = json.loads(mix.read_text())
    gone = next(i for i, record in enumerate(records) if llava_mix.source_of(record) == "textcaps")
    mix.write_text(json.dumps(records[:gone] + records[gone + 1 :]))
    code, out = run(mix, capsys=capsys)
    assert code == 1 and "other counts than published: textcaps" in out


FAULTS = {
    "missing": None,
    "empty": b"",
    "page": b"  <!DOCTYPE html><html><body>404</body></html>",
    "unknown": b"neither fish nor fowl",
    "too large": bomb(),
}


@pytest.mark.parametrize("fault", [*FAULTS, "broken"])
def test_a_fault_is_blamed_on_the_records_that_use_the_image(mix, tmp_path, capsys, fault):
    name = "coco/train2017/000000000101.jpg"
    file = mix.parent / name
    if fault == "broken":
        write_image(file, 1, size=(300, 300))
        file.write_bytes(file.read_bytes()[:-400])
    elif FAULTS[fault] is None:
        file.unlink()
    else:
        file.write_bytes(FAULTS[fault])
    code, out = run(mix, "--quarantine", str(tmp_path / "bad.jsonl"), capsys=capsys)
    found = quarantined(tmp_path / "bad.jsonl")
    records = json.loads(mix.read_text())
    assert code == 1 and f"problem {fault}" in out
    assert found.keys() == users(mix, name) and len(found) > 2
    for number, entry in found.items():
        assert entry["id"] == records[number]["id"] and entry["file"] == str(mix) and entry["source"] == "mix"
        assert entry["image"] == str(file) and str(file) in entry["reason"] and "0x" not in entry["reason"]
    fetch = tmp_path / "bad.jsonl.images.txt"
    assert (fetch.read_text().split() == [name]) if fault != "too large" else not fetch.exists()


def test_malformed_records(tmp_path, capsys):
    good = {"id": "a", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
    lines = {
        "ends with a human turn": good | {"conversations": good["conversations"][:1]},
        "roles must alternate": good | {"conversations": good["conversations"][:1] + good["conversations"]},
        "0 images but 1 <image>": good
        | {"conversations": [{"from": "human", "value": "<image>"}, good["conversations"][1]]},
        "the conversation is empty": good | {"conversations": []},
        "must be an object": ["no", "record"],
        "'image' must be a file name": good | {"image": 3},
        "turn 0 must be": good | {"conversations": ["hi", "ho"]},
    }
    text = [json.dumps(line) for line in lines.values()]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join([json.dumps(good), *text, "{broken", json.dumps(good)]))
    code, out = run(path, "--quarantine", str(tmp_path / "bad.jsonl"), capsys=capsys)
    found = quarantined(tmp_path / "bad.jsonl")
    assert code == 1 and f"{len(lines) + 1} malformed" in out
    assert list(found) == list(range(1, len(lines) + 2))
    for reason, entry in zip([*lines, "line 9 is not JSON"], found.values(), strict=True):
        assert reason in entry["reason"], entry
    assert "repeat another record, image and text: 1" in out
    assert "LLaVA's 665K" not in out


def test_a_file_that_cannot_be_opened(tmp_path, capsys):
    assert main(["data", "verify", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err


def test_quick_reads_headers_only(mix, capsys):
    file = mix.parent / "gqa/images/2370001.jpg"
    write_image(file, 1, size=(300, 300))
    file.write_bytes(file.read_bytes()[:-400])
    assert run(mix, "--quick", capsys=capsys)[0] == 0
    assert run(mix, capsys=capsys)[0] == 1


# ------------------------------------------------------------------------------------------------------------- repairs


def repaired(mix, out, arrow):
    """Runs the command that the line with `arrow` advises."""
    import subprocess

    (line,) = {line for line in out.splitlines() if arrow in line}
    command = line.split(". ", 1)[1] if ". " in line else line.split(": ", 1)[1]
    subprocess.run(command, shell=True, check=True, cwd=mix.parent)


def test_a_folder_in_the_wrong_place(mix, capsys):
    (mix.parent / "coco/train2017").rename(mix.parent / "train2017")
    code, out = run(mix, capsys=capsys)
    assert code == 1 and "cocodataset" not in out
    repaired(mix, out, "It lies in")
    assert run(mix, capsys=capsys)[0] == 0


@pytest.mark.parametrize("whole", [True, False])
def test_both_parts_of_visual_genome_in_one_folder(mix, capsys, whole):
    first, second = mix.parent / "vg/VG_100K", mix.parent / "vg/VG_100K_2"
    files = sorted(first.iterdir())
    for file in files if whole else files[:1]:
        file.rename(second / file.name)
    if whole:
        first.rmdir()
    code, out = run(mix, capsys=capsys)
    assert code == 1
    repaired(mix, out, "both parts were unpacked in one folder")
    assert run(mix, capsys=capsys)[0] == 0


def test_other_endings_archives_and_what_to_fetch(mix, capsys):
    data = mix.parent
    gif = next(file for file in (data / "ocr_vqa/images").iterdir() if Image.open(file).format == "GIF")
    gif.rename(gif.with_suffix(".GIF"))
    (data / "gqa/images").rename(data / "elsewhere")
    (data / "gqa/images.zip").write_bytes(b"PK")
    (data / "textvqa/train_images/0000000000000000.jpg").unlink()
    out = run(mix, capsys=capsys)[1]
    assert "There as *.GIF: 1 of 1." in out
    assert f"{data}/gqa/images.zip may hold it, not unpacked yet." in out
    assert "The folder holds 3 files; a complete one has 25,119." in out and "train_val_images.zip" in out


def test_the_wrong_folder_of_images(mix, tmp_path, capsys):
    out = run(mix, "--images", str(tmp_path / "nowhere"), capsys=capsys)[1]
    assert out.count("problem missing") == 1 and f"They lie in {mix.parent}: give --images {mix.parent}" in out
    mix = mix.rename(tmp_path / "mix.json")
    code, out = run(mix, "--images", str(tmp_path / "nowhere"), capsys=capsys)
    assert f"They lie in {tmp_path / 'data'}" in out
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    code, out = run(mix, "--images", str(tmp_path / "nowhere"), capsys=capsys)
    assert code == 1 and f"There is no folder {tmp_path}/nowhere" in out and out.count("problem missing") == 1
    assert run(mix, capsys=capsys)[1].count("There is no folder") == 6


# ------------------------------------------------------------------------------------------------------------ the looks


def test_types_are_read_from_the_content(tmp_path):
    """PIL's own writers are the oracle: each type under each ending."""
    source = open_source(_one_record(tmp_path))
    picture = Image.new("RGB", (30, 20), "red")
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
        data = io.BytesIO()
        picture.save(data, kind)
        for end in ("jpg", "png", "gif", "webp"):
            (tmp_path / f"a.{end}").write_bytes(data.getvalue())
            seen = look(source, f"a.{end}")
            assert (seen.fault, seen.kind, seen.size) == ("", kind, (30, 20))
            wrong = image_checks.misnamed(f"a.{end}", seen.kind)
            assert wrong == ("" if kind.startswith(end[:2].upper()) else f"{kind} named .{end}")


def test_sizes_are_upright_and_oddities_noted(tmp_path, capsys):
    path = _one_record(tmp_path).path
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (400, 12)).save(tmp_path / "a.jpg", exif=exif)
    assert look(open_source(_one_record(tmp_path)), "a.jpg").size == (12, 400)
    Image.new("RGB", (400, 12)).save(tmp_path / "a.jpg")
    code, out = run(path, capsys=capsys)
    assert code == 0 and "under 14 pixels wide or high: 1" in out and "over 20 times as long as wide: 1" in out


def _one_record(folder: Path) -> SourceConfig:
    record = {
        "id": 1,
        "image": "a.jpg",
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}],
    }
    (folder / "one.json").write_text(json.dumps([record]))
    return SourceConfig(name="one", path=str(folder / "one.json"), images=str(folder))


def test_every_image_is_decoded_once(mix, monkeypatch):
    names = Counter()
    lock = threading.Lock()
    real = image_checks.load_image

    def counted(content, name):
        with lock:
            names[name] += 1
        return real(content, name)

    monkeypatch.setattr(image_checks, "load_image", counted)
    verify(SourceConfig(name="mix", path=str(mix), images=str(mix.parent)), workers=3, out=lambda line: None)
    used = {record["image"] for record in json.loads(mix.read_text()) if "image" in record}
    assert names == dict.fromkeys((str(mix.parent / name) for name in used), 1)


def test_threads_keep_order_and_never_run_far_ahead():
    handed = []

    def items():
        for i in range(200):
            handed.append(i)
            yield i

    delays = random.Random(0)
    results = in_threads(lambda i: (threading.Event().wait(delays.random() / 500), i)[1], items(), 2)
    for k, value in enumerate(results):
        assert value == k and len(handed) <= k + 1 + 8 * 2
    assert len(handed) == 200


def test_an_interrupt_ends_the_threads():
    done = []

    def work(i):
        if i == 20:
            raise KeyboardInterrupt
        done.append(i)

    with pytest.raises(KeyboardInterrupt):
        list(in_threads(work, range(100_000), 2))
    assert len(done) < 100
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def test_several_images_and_shared_ones(tmp_path):
    """Random records over a few images, some of them broken: the bad records are those that use a broken one."""
    rng = np.random.default_rng(0)
    for i in range(8):
        write_image(tmp_path / f"{i}.jpg", i)
    for i in (2, 5):
        (tmp_path / f"{i}.jpg").write_bytes(b"nothing")
    records = []
    for i in range(60):
        chosen = [f"{k}.jpg" for k in rng.integers(0, 8, rng.integers(0, 4))]
        turns = [{"from": "human", "value": "<image>" * len(chosen) + "?"}, {"from": "gpt", "value": str(i)}]
        records.append({"id": i, "conversations": turns} | ({"image": chosen} if chosen else {}))
    (tmp_path / "r.json").write_text(json.dumps(records))
    config = SourceConfig(name="r", path=str(tmp_path / "r.json"), images=str(tmp_path))
    found = verify(config, out=lambda line: None)
    broken = [i for i, record in enumerate(records) if {"2.jpg", "5.jpg"} & set(record.get("image", ()))]
    assert [entry["record"] for entry in found.bad] == broken and 5 < len(broken) < 50
    assert sorted(found.fetch) == ["2.jpg", "5.jpg"] and found.problems


# ---------------------------------------------------------------------------------------------------- before a training


def test_the_list_lets_a_training_begin(mix, tmp_path, capsys):
    """Verify a config, then load with its list: what is left is what training takes, with nothing to skip."""
    records = json.loads(mix.read_text())
    (mix.parent / records[0].get("image", "gqa/images/2370000.jpg")).unlink()
    records[7]["conversations"][1]["value"] = "word " * 300  # too long for the row
    del records[9]["conversations"][-1]
    mix.write_text(json.dumps(records))
    source = dict(name="mix", path=str(mix), images=str(mix.parent), mix=llava_mix.MIX)
    tokenizer = str(llama_tokenizer(tmp_path / "tokenizer"))
    values = dict(
        model=dict(vision=dict(image_size=28, patch_size=14)),
        prompt=dict(tokenizer=tokenizer, length=256, truncation="error"),
        stages=[dict(name="only", data=dict(sources=[source], max_bad_share=1.0))],
    )
    config = tmp_path / "config.py"
    config.write_text(
        f"from jaxvlm.config_files import complete\ndef get_config(arg=None):\n    return complete({values!r})\n"
    )
    listed = str(tmp_path / "bad.jsonl")
    with pytest.raises(SystemExit) as stop:
        main(["data", "verify", "--config", str(config), "--quarantine", listed])
    out = capsys.readouterr().out
    assert stop.value.code == 1 and "1 that training refuses, beside those above" in out and "the sequence has" in out
    found = quarantined(listed)
    assert {7, 9} < found.keys() and len(found) >= 3
    for number in (1, len(records) // 2, len(records) - 1):  # whether a record is trained on or held out
        one, few = f"--config.stages[0].data.sources[0].held_out={number}", f"{listed}-{number}"
        with pytest.raises(SystemExit):
            main(["data", "verify", "--config", str(config), one, "--quarantine", few])
        assert quarantined(few) == found
    capsys.readouterr()

    with pytest.raises(SystemExit):
        main(
            ["data", "verify", "--config", str(config), "--config.prompt.truncation=drop", "--quarantine", listed + "2"]
        )
    assert "longer than a row, as `truncation` asks: 1" in capsys.readouterr().out
    assert found.keys() - quarantined(listed + "2").keys() == {7}

    run_config = load_config(str(config))
    data = run_config.stages[0].data
    kept = dict(batch_size=1, seed=0, epochs=1, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match="cannot be used"):
        Loader(data, run_config.prompt, run_config.model, **kept)
    data = dataclasses.replace(data, bad_records="quarantine", quarantine=listed)
    stats = Loader(data, run_config.prompt, run_config.model, **kept).stats()
    assert stats["records"] == len(records) - len(found) and stats["quarantined"] == len(found) and not stats["skipped"]
