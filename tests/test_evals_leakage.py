"""Leakage: copies of pictures in every disguise are found, other pictures are not, and the score goes without them."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.fft import dctn
from test_evals_verbs import run

from jaxvlm.data.image import load_image
from jaxvlm.evals import leakage, score, tasks


def scene(seed, size=(320, 240)):
    """A picture with smooth ground and some shapes, no two alike."""
    rng = np.random.default_rng(seed)
    ground = Image.fromarray(rng.integers(0, 255, (5, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    for _ in range(6):
        w, h = rng.integers(15, 90, 2)
        shape = Image.new("RGB", (int(w), int(h)), tuple(int(c) for c in rng.integers(0, 255, 3)))
        ground.paste(shape, (int(rng.integers(0, 300)), int(rng.integers(0, 220))))
    return ground


def jpeg(image, quality):
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return load_image(data.getvalue())


DISGUISES = {
    "same": lambda image: image,
    "half": lambda image: image.resize((160, 120), Image.Resampling.LANCZOS),
    "larger": lambda image: image.resize((900, 700), Image.Resampling.BICUBIC),
    "square": lambda image: image.resize((336, 336), Image.Resampling.BILINEAR),
    "jpeg": lambda image: jpeg(image, 40),
    "both": lambda image: jpeg(image.resize((224, 168), Image.Resampling.BICUBIC), 60),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
}


def both(image):
    return leakage.difference_hash(image), leakage.cosine_hash(image)


@pytest.mark.parametrize("disguise", DISGUISES)
def test_copies_are_found(disguise):
    training = {f"t{i}": both(scene(i)) for i in range(60)}
    disguised = {f"b{i}": both(DISGUISES[disguise](scene(i))) for i in range(60)}
    found = leakage.copies(disguised, training)
    assert all(copy.picture[1:] == copy.training[1:] for copy in found)
    assert len(found) >= 57, f"{len(found)} of 60"
    if disguise == "same":
        assert {(copy.difference_hash, copy.cosine_hash) for copy in found} == {(0, 0)}


def test_other_pictures_are_no_copies():
    """Nor are mirrored and cropped ones, whose places changed."""
    training = {f"t{i}": both(scene(i)) for i in range(300)}
    others = {f"b{i}": both(scene(i)) for i in range(300, 600)}
    others |= {f"m{i}": both(scene(i).transpose(Image.Transpose.FLIP_LEFT_RIGHT)) for i in range(50)}
    assert leakage.copies(others, training) == []
    assert leakage.copies({}, training) == leakage.copies(others, {}) == []


def test_the_hashes_are_what_they_say():
    ramp = Image.fromarray(np.tile(np.arange(0, 90, 10, np.uint8), (8, 1)))  # ever brighter to the right
    assert leakage.difference_hash(ramp) == 2**64 - 1
    assert leakage.difference_hash(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0
    image = scene(1, (32, 32))
    waves = dctn(np.asarray(image.convert("L"), float), type=2)[:8, :8].ravel()  # scipy's, whose scale does not matter
    bits = (waves > np.median(waves[1:])).astype(int)
    assert leakage.cosine_hash(image) == int("".join(map(str, bits)), 2)


def test_the_bits_are_counted_one_by_one():
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 2**63, (40, 2), np.uint64)
    near = {str(i): (int(a) ^ 0b1011, int(b) ^ 0b1) for i, (a, b) in enumerate(pairs)}
    found = leakage.copies(near, {str(i): (int(a), int(b)) for i, (a, b) in enumerate(pairs)}, distance=3)
    assert [tuple(copy) for copy in found] == [(str(i), str(i), 3, 1) for i in range(40)]
    assert leakage.copies(near, {"x": (int(pairs[0, 0]), int(pairs[0, 1]))}, distance=2) == []


def test_groups_go_together():
    """MMVP counts pairs: one seen picture takes its pair along."""
    references = [
        {"Index": i + 1, "Question": "q", "Options": "(a) x (b) y", "Correct Answer": "(a)", "image": f"{i}.jpg"}
        for i in range(8)
    ]
    answers = [{"id": str(i + 1), "text": "(b)" if i == 5 else "(a)"} for i in range(8)]
    result = score("mmvp", "cambrian", answers, references)
    found = leakage.without(result, references, {"1"}, resamples=100)
    assert [found[name]["n"] for name in ("all", "clean", "seen")] == [8, 6, 2]
    assert found["all"]["value"] == 75.0 and found["clean"]["value"] == pytest.approx(200 / 3)
    assert found["seen"]["value"] == 100.0 and found["clean"]["interval"][0] < 67 < found["clean"]["interval"][1]
    nothing = leakage.without(result, references, set(), resamples=100)
    assert nothing["seen"] == {"n": 0, "value": None, "interval": None} and nothing["clean"] == nothing["all"]


@pytest.mark.parametrize("kind", ["folder", "json"])
def test_the_verb(tmp_path, capsys, kind):
    images, training = tmp_path / "vsr", tmp_path / "train"
    images.mkdir()
    training.mkdir()
    references = [{"image": f"{i}.jpg", "caption": "it is left", "label": 1} for i in range(10)]
    for i in range(10):
        scene(i).save(images / f"{i}.jpg", quality=92)
    for i in range(20):  # 0 to 3 are copies
        DISGUISES["both"](scene(i if i < 4 else i + 100)).save(training / f"t{i:02}.jpg")
    (training / "broken.jpg").write_bytes(b"no picture")
    names = [path.name for path in sorted(training.glob("*.jpg"))]
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    records = [{"id": name, "image": name, "conversations": turns} for name in names + names[:2]]
    (tmp_path / "train.json").write_text(json.dumps(records))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in references))
    ids = [one["id"] for one in tasks.read_references("vsr", tmp_path / "test.jsonl")]
    words = ["True" if i < 4 or i % 2 else "False" for i in range(10)]
    result = score("vsr", "jaxvlm", [{"id": n, "text": w} for n, w in zip(ids, words, strict=True)], references)
    (tmp_path / "result.json").write_text(json.dumps(result))
    source = [training] if kind == "folder" else [tmp_path / "train.json", "--training-images", training]
    options = ["--task", "vsr", "--references", tmp_path / "test.jsonl", "--images", images, "--training", *source]
    options += ["--result", tmp_path / "result.json", "--out", tmp_path / "out.json"]
    code, shown, error = run(capsys, "leakage", *options)
    assert code == 0, error
    assert "4 of 10 pictures (40.00 %) are among 20 of training (1 unreadable); 4 of 10 questions" in shown
    found = json.loads((tmp_path / "out.json").read_text())
    assert [copy["picture"] for copy in found["copies"]] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert [copy["training"].rsplit("/")[-1] for copy in found["copies"]] == [
        "t00.jpg",
        "t01.jpg",
        "t02.jpg",
        "t03.jpg",
    ]
    assert found["score"]["all"]["value"] == 70.0 and found["score"]["clean"]["value"] == 50.0
    assert found["score"]["seen"]["value"] == 100.0


def test_hashes_are_kept_and_a_changed_picture_is_hashed_again(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(leakage, "load_image", lambda item: read.append(item) or load_image(item))
    for i in range(5):
        scene(i).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    files = [str(tmp_path / f"{name}.png") for name in (*range(5), "broken")]
    data = (tmp_path / "3.png").read_bytes()  # as from a source that holds its pictures itself
    pictures, kept = [*(lambda file=file: file for file in files), lambda: data], tmp_path / "kept" / "h.jsonl"

    def again(*expected):
        read.clear()
        found = leakage.hashes(pictures, "pictures", kept)
        assert sorted(map(str, read)) == sorted(map(str, (*expected, files[5])))  # the broken one each time
        return found

    first = again(*files[:5], data)
    assert first == leakage.hashes(pictures, "pictures") and first[5] is None and first[6] == first[3] == both(scene(3))
    assert again() == first
    stat = (tmp_path / "2.png").stat()
    scene(77).save(tmp_path / "2.png")
    changed = again(files[2])
    assert changed[2] == both(scene(77)) and changed[:2] + changed[3:] == first[:2] + first[3:]
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes() + b" " * 9)  # only its size is another
    os.utime(tmp_path / "2.png", ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert again(files[2]) == changed and again() == changed
    lines = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join(lines[1:])[:-9])  # the first gone, the last torn: that of 2.png
    assert again(files[0], files[2]) == changed
    kept.write_bytes(b'["x", 1\n7\n' + kept.read_bytes())  # of two that wrote at once
    assert again() == changed
    assert leakage.kept_file("a", "b") != leakage.kept_file("a", "c") == leakage.kept_file("a", "c")
