"""`jaxvlm data convert`: what is in the shards is what was in the source, whatever happens on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mix_helpers import write_image, write_mix

from jaxvlm.config import SourceConfig
from jaxvlm.data import DataError
from jaxvlm.data.conversation import record_images
from jaxvlm.data.sources import open_source
from jaxvlm.data.tools import convert as tool
from jaxvlm.data.tools.convert import BadRecords
from jaxvlm.main import main

pytest.importorskip("array_record")


@pytest.fixture
def mix(tmp_path):
    return write_mix(tmp_path / "data", each=4)


def source_of(mix) -> SourceConfig:
    return SourceConfig(name="mix", path=str(mix), images=str(mix.parent))


def holds(folder, mix, without=()) -> None:
    """Asserts that the shards hold the JSON file's records and the files' bytes, in order."""
    records = [record for i, record in enumerate(json.loads(Path(mix).read_text())) if i not in without]
    source = open_source(SourceConfig(path=str(folder)))
    assert len(source) == len(records)
    for i, want in enumerate(records):
        got = source[i]
        assert (got["id"], got["conversations"]) == (want["id"], want["conversations"])
        assert got.get("image_file") == want.get("image")
        for name, file in zip(record_images(got), record_images(want), strict=True):
            assert source.image(name) == (Path(mix).parent / file).read_bytes()


def shards(folder) -> dict[str, int]:
    """Time of change of each shard, of a whole set or an unfinished one."""
    folder = Path(folder) if Path(folder).exists() else Path(f"{folder}.unfinished")
    return {file.name: file.stat().st_mtime_ns for file in sorted(folder.glob("*.array_record"))}


def convert(*where, workers=1, **options):
    return tool.convert(*where, workers=workers, **options)


def test_the_shards_hold_the_source(mix, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "data",
                "convert",
                str(mix),
                str(tmp_path / "out"),
                "--images",
                str(mix.parent),
                "--shards",
                "3",
                "--workers",
                "1",
            ]
        )
    assert not stop.value.code
    assert "40 records with 36 images in 3 shards of" in capsys.readouterr().out
    holds(tmp_path / "out", mix)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*shards(tmp_path / "out"), "manifest.json"}
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert [shard["records"] for shard in manifest["shards"]] == [13, 13, 14]
    before = shards(tmp_path / "out")
    assert convert(source_of(mix), tmp_path / "out") == manifest and shards(tmp_path / "out") == before
    with pytest.raises(SystemExit) as stop:
        main(["data", "verify", str(tmp_path / "out")])
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "36 of 36 decode" in out and "ocrvqa" in out and "All is well." in out


def test_a_damaged_image_inside_the_shards(mix, tmp_path, capsys):
    """Converting reads headers; what does not decode is found by verifying the set, and inspect names it as it was."""
    records = json.loads(mix.read_text())
    number, name = next((i, r["image"]) for i, r in enumerate(records) if r.get("image", "").startswith("textvqa"))
    write_image(mix.parent / name, 1, size=(300, 300))
    (mix.parent / name).write_bytes((mix.parent / name).read_bytes()[:-400])
    convert(source_of(mix), tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        main(["data", "verify", str(tmp_path / "out"), "--quarantine", str(tmp_path / "bad.jsonl")])
    assert stop.value.code == 1 and "inside the data set" in capsys.readouterr().out
    (entry,) = map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
    assert entry["record"] == number and entry["image"] == f"{tmp_path / 'out'}#{number}:0"
    with pytest.raises(SystemExit):
        main(["data", "inspect", str(tmp_path / "out"), "--sample", str(number)])
    assert f"{name}: broken" in capsys.readouterr().out


def test_shards_of_shards(mix, tmp_path):
    convert(source_of(mix), tmp_path / "one", shards=3)
    convert(SourceConfig(path=str(tmp_path / "one")), tmp_path / "two", shards=2)
    holds(tmp_path / "two", mix)


def test_a_stop_in_the_middle(mix, tmp_path, monkeypatch):
    written = []
    real = tool.write_shard

    def stops(path, records):
        if len(written) == 2:
            next(iter(records))
            raise KeyboardInterrupt
        written.append(Path(path).name)
        return real(path, records)

    monkeypatch.setattr(tool, "write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        convert(source_of(mix), tmp_path / "out", shards=5)
    assert written == sorted(shards(tmp_path / "out")) and len(written) == 2
    before = shards(tmp_path / "out")
    assert not (tmp_path / "out").exists()  # it is not whole, and nobody may take it for that
    monkeypatch.setattr(tool, "write_shard", real)
    convert(source_of(mix), tmp_path / "out", shards=5)
    after = shards(tmp_path / "out")
    assert before.items() <= after.items() and len(after) == 5
    holds(tmp_path / "out", mix)


def test_processes_and_a_kill(tmp_path):
    """Two processes, the parent killed when the first shards are there; then the same command again."""
    mix, out = write_mix(tmp_path / "data", each=60), tmp_path / "out"
    command = [sys.executable, "-m", "jaxvlm.main", "data", "convert", str(mix), str(out), "--images", str(mix.parent)]
    command += ["--shards", "60", "--workers", "2"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    work = tmp_path / "out.unfinished"
    while len(list(work.glob(".*.array_record.json"))) < 3 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not out.exists()
    before = shards(out)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "of 60 shards are there already." in done.stdout and "600 records" in done.stdout
    assert len(set(before.items()) & set(shards(out).items())) >= 3
    holds(out, mix)
    assert not list(out.glob(".*")) and not work.exists()


def spoil(mix) -> tuple[int, int]:
    """A malformed record, and one with an image of its own that is gone; their numbers."""
    records = json.loads(mix.read_text())
    del records[5]["conversations"][-1]
    gone = max(i for i, record in enumerate(records) if record.get("image", "").startswith("textvqa"))
    (mix.parent / records[gone]["image"]).rename(mix.parent / "away.jpg")
    mix.write_text(json.dumps(records))
    return 5, gone


def test_bad_records_are_an_error_and_the_rest_is_kept(mix, tmp_path):
    five, gone = spoil(mix)
    assert gone > 8
    with pytest.raises(BadRecords, match="2 records cannot be converted") as caught:
        convert(source_of(mix), tmp_path / "out", shards=10)
    assert [entry["record"] for entry in caught.value.entries] == [five, gone]
    assert "ends with a human turn" in str(caught.value) and "is missing or empty" in str(caught.value)
    before = shards(tmp_path / "out")
    assert len(before) == 8 and f"{five // 4:05d}-of-00010.array_record" not in before
    with pytest.raises(BadRecords):  # still so
        convert(source_of(mix), tmp_path / "out", shards=10)
    convert(source_of(mix), tmp_path / "out", shards=10, skip_bad=True)
    assert before.items() <= shards(tmp_path / "out").items()
    holds(tmp_path / "out", mix, without=(five, gone))
    left = [json.loads(line) for line in (tmp_path / "out/left_out.jsonl").read_text().splitlines()]
    assert [entry["record"] for entry in left] == [five, gone] and "image" in left[1]


def test_repaired_images_need_no_second_conversion_of_the_rest(mix, tmp_path):
    records = json.loads(mix.read_text())
    name = next(record["image"] for record in records if record.get("image", "").startswith("gqa"))
    (mix.parent / name).rename(mix.parent / "away.jpg")
    with pytest.raises(BadRecords):
        convert(source_of(mix), tmp_path / "out", shards=10)
    before = shards(tmp_path / "out")
    (mix.parent / "away.jpg").rename(mix.parent / name)
    convert(source_of(mix), tmp_path / "out", shards=10)
    assert len(before) == 9 and before.items() <= shards(tmp_path / "out").items()
    holds(tmp_path / "out", mix)


def test_the_quarantine_list_of_verify(mix, tmp_path, capsys):
    five, gone = spoil(mix)
    listed = tmp_path / "bad.jsonl"
    with pytest.raises(SystemExit):
        main(["data", "verify", str(mix), "--images", str(mix.parent), "--quarantine", str(listed)])
    convert(source_of(mix), tmp_path / "out", shards=4, quarantine=str(listed))
    holds(tmp_path / "out", mix, without=(five, gone))
    assert (tmp_path / "out/left_out.jsonl").read_text() == listed.read_text()


def test_another_list_makes_the_shards_anew_that_it_is_about(mix, tmp_path, monkeypatch):
    records = json.loads(mix.read_text())

    def listed(*numbers):
        entries = [
            {"source": "mix", "file": str(mix), "record": n, "id": records[n]["id"], "reason": "no"} for n in numbers
        ]
        (tmp_path / "bad.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return str(tmp_path / "bad.jsonl")

    monkeypatch.setattr(tool, "write_manifest", lambda *rest: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        convert(source_of(mix), tmp_path / "out", shards=4, quarantine=listed(3, 12))
    monkeypatch.undo()
    before = shards(tmp_path / "out")
    convert(source_of(mix), tmp_path / "out", shards=4, quarantine=listed(3, 25))
    assert [a == b for a, b in zip(before.values(), shards(tmp_path / "out").values(), strict=True)].count(True) == 2
    holds(tmp_path / "out", mix, without=(3, 25))
    records[3]["id"] = "another"
    with pytest.raises(DataError, match="made for another"):
        convert(source_of(mix), tmp_path / "new", quarantine=listed(3))


def test_what_is_in_the_way(mix, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("dear")
    with pytest.raises(DataError, match="is there already, and no set of shards"):
        convert(source_of(mix), tmp_path / "full")
    with pytest.raises(DataError, match="do not make 41 shards"):
        convert(source_of(mix), tmp_path / "out", shards=41)
    assert not list(tmp_path.glob("out*"))
    five, _ = spoil(mix)
    with pytest.raises(BadRecords):
        convert(source_of(mix), tmp_path / "out", shards=2)
    with pytest.raises(DataError, match="another number of shards"):
        convert(source_of(mix), tmp_path / "out", shards=3)
    convert(source_of(mix), tmp_path / "out", shards=2, skip_bad=True)
    mix.write_text(mix.read_text() + "\n")
    with pytest.raises(DataError, match="of another source, or of an older state of it"):
        convert(source_of(mix), tmp_path / "out", shards=2)


def test_the_sources_of_a_config(tmp_path, capsys):
    out, config = str(tmp_path / "out"), ["--config", "configs/quickstart.py:tiny"]
    assert main(["data", "convert", *config, out]) == 1
    assert "different names" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["data", "convert", *config, "--stage", "instruct", out, "--workers=1"])
    assert not stop.value.code and "96 records with 80 images in 1 shard of" in capsys.readouterr().out
    assert main(["data", "convert", "a.json"]) == 1
    assert "Give PATH and OUT (or --config CONFIG)." in capsys.readouterr().err
