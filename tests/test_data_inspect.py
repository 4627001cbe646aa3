"""`jaxvlm data inspect`: the text shown is what is trained on, and the marks are where the loss is."""

import io
import json
import re
from html.parser import HTMLParser

import pytest
from data_helpers import byte_tokenizer, chatml_tokenizer, llama_tokenizer, record, turns
from hypothesis import given, settings
from hypothesis import strategies as st
from mix_helpers import write_image, write_mix
from PIL import Image

from jaxvlm.config import ModelConfig, PromptConfig, SourceConfig, VisionConfig
from jaxvlm.data.conversation import IMAGE_MARK, encode, render_record
from jaxvlm.data.sources import open_source
from jaxvlm.data.table import splicing_for
from jaxvlm.data.tiles import tiling
from jaxvlm.data.tokenizer import Tokenizer
from jaxvlm.data.tools.samples import Viewer, show_sample
from jaxvlm.main import main

MODEL = ModelConfig(vision=VisionConfig(image_size=28, patch_size=14))  # 4 visual tokens
TOKENIZERS = {
    "chatml": chatml_tokenizer,
    "vicuna_v1": llama_tokenizer,
    "plain": llama_tokenizer,
    "prism": lambda folder: byte_tokenizer(folder, ("<s>", "</s>"), "<s>", "</s>"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    for template, make in TOKENIZERS.items():
        make(folder / template)
    for i in range(2):
        write_image(folder / f"{i}.jpg", i)
    return folder


def viewer(folder, template, **prompt):
    tokenizer = Tokenizer(folder / template)
    settings = PromptConfig(tokenizer=str(folder / template), template=template, **prompt)
    return Viewer(template, settings.layout, tokenizer, splicing_for(settings, tokenizer, tiling(MODEL, settings), 4))


def sample(folder, view, *records, number=0):
    path = folder / "records.json"
    path.write_text(json.dumps(records))
    config = SourceConfig(name="some", path=str(path), images=str(folder))
    return view.sample(config, open_source(config), number)


def shown(made, colour=False):
    lines = []
    show_sample(made, lines.append, colour)
    return "\n".join(lines)


TEXTS = st.text(st.sampled_from("ab 12\n.<>é漢🙂\u200d\x07</s>"), min_size=1, max_size=12).filter(
    lambda text: text.strip() and IMAGE_MARK not in text
)


@settings(max_examples=40)
@given(
    template=st.sampled_from(["chatml", "prism"]),
    texts=st.lists(TEXTS, min_size=1, max_size=3).map(lambda some: [t for text in some for t in (text, text[::-1])]),
    images=st.integers(0, 2),
)
def test_runs_are_the_rendered_text(folder, template, texts, images):
    """Byte-level tokenizers lose nothing, so the runs must join to the rendered text and mark exactly its spans."""
    texts[0] = " ".join([IMAGE_MARK] * images + [texts[0]])
    one = record(*texts, image=[f"{i}.jpg" for i in range(images)])
    view = viewer(folder, template)
    made = sample(folder, view, one)
    assert not made.error
    rendered = render_record(one, template, tokenizer=view.tokenizer)
    bos = view.tokenizer.bos if view.tokenizer.adds_bos else ""
    runs = made.runs[bool(bos) :]
    assert "".join(IMAGE_MARK if run.kind == "image" else run.text for run in runs) == rendered.text
    supervised = "".join(run.text for run in runs if run.supervised)
    assert supervised == "".join(rendered.text[a:b] for a, b in rendered.spans)
    assert [run.text for run in runs if run.kind == "image"] == [str(i + 1) for i in range(images)]
    encoded = encode(one, view.tokenizer, template)
    assert made.length == len(encoded.tokens) + 3 * images and made.visual == 4 * images
    assert made.supervised == int(encoded.weights.sum())
    special = view.tokenizer.special_tokens
    assert all(
        run.kind == "image" or (run.kind == "special") == (run.text in special) or run.text == "" for run in runs
    )


@pytest.mark.parametrize(
    ("template", "want"),
    [
        ("vicuna_v1", "USER: <image 1>↵\nWhat? ASSISTANT:[[ a cat</s>]] USER: And? ASSISTANT:[[ no</s>]]"),
        ("chatml", "<|im_start|>assistant↵\n[[a cat<|im_end|>]]↵\n<|im_start|>user↵\nAnd?<|im_end|>↵\n"),
        ("prism", "<image 1>In: What?↵\nOut:[[ a cat</s>]]In: And?↵\nOut:[[ no</s>]]"),
    ],
)
def test_what_a_terminal_shows(folder, template, want):
    made = sample(folder, viewer(folder, template), record("<image>\nWhat?", "a cat", "And?", "no", image="0.jpg"))
    text = shown(made)
    assert want in text.replace("> ↵", ">↵")  # Llama's tokenizer puts a space in front of every chunk
    assert "image 1   0.jpg: 64 x 48, JPEG, 4 tokens" in text and "--- some, record 0, id r1" in text
    assert f"{made.length} tokens: 4 visual, {made.length - 4} of text; {made.supervised} supervised" in text


def test_stage_1_supervises_the_newline(folder):
    made = sample(folder, viewer(folder, "plain"), record("Describe it.\n<image>", "a cat", image="0.jpg"))
    assert shown(made).rstrip().endswith("<s><image 1>[[ a cat↵\n]]")  # Llama's tokenizer puts a space in front


def test_prismatic_shows_images_first(folder):
    made = sample(folder, viewer(folder, "prism", layout="prismatic"), record("What is <image>?", "a", image="0.jpg"))
    assert [run.kind for run in made.runs][:1] == ["image"] or made.runs[1].kind == "image"


def test_colours_lie_on_what_is_supervised(folder):
    made = sample(folder, viewer(folder, "vicuna_v1"), record("What?", "two\nlines", image=None))
    text = shown(made, colour=True)
    green = "".join(re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", text))
    assert re.sub(r"\x1b\[\d+m", "", green).replace(" ", "") == "two↵lines</s>"
    assert re.sub(r"\x1b\[[\d;]+m", "", text).replace("\n", "") == shown(made).replace("[[", "").replace(
        "]]", ""
    ).replace("\n", "")


def test_a_record_cannot_command_the_terminal(folder):
    nasty = "\x1b[2J\x1b]0;owned\x07 \u202etxt\r"
    made = sample(folder, viewer(folder, "chatml"), record(nasty, nasty, id=nasty))
    assert not set("\x1b\x07\r\u202e") & set(shown(made))
    assert r"\x1b[2J" in shown(made)


def test_what_length_cuts_off_is_said(folder):
    texts = ["<image>\none", "yes", "<image> two", "no"]
    one = record(*texts, image=["0.jpg", "1.jpg"])
    whole = sample(folder, viewer(folder, "chatml"), one)
    made = sample(folder, viewer(folder, "chatml", length=whole.length - 20), one)
    assert made.length <= whole.length - 20 and not made.error
    assert made.notes == [
        f"cut to length {whole.length - 20}: {whole.length - made.length} of {whole.length} tokens, 1 images among them, are lost"
    ]
    made = sample(folder, viewer(folder, "chatml", length=12), one)
    assert "no supervised token" in made.error
    assert "'drop'" in sample(folder, viewer(folder, "chatml", length=20, truncation="drop"), one).error


def test_bad_records_are_shown_as_written(folder):
    records = [
        record("no image here", "yes", image="0.jpg"),
        record("<image>", "yes", image="gone.jpg"),
        {"id": 3},
        "text",
    ]
    for template in ("chatml", None):
        view = viewer(folder, template) if template else Viewer("vicuna_v1")
        made = [sample(folder, view, *records, number=i) for i in range(4)]
        assert [bool(one.error) for one in made] == [True] * 4
        assert "human: no image here" in shown(made[0]) and "1 image but 0 <image>" in shown(made[0])
        assert "gone.jpg: missing" in shown(made[1]) and "is missing or empty" in made[1].error
        assert "no 'conversations'" in shown(made[2]) and "unusable" in shown(made[3])


# --------------------------------------------------------------------------------------------------------- the command


class Page(HTMLParser):
    """Checks that elements are closed in order; collects tags, text and what is marked."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.marked, self.text = [], [], [], "", ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        self.marked += data if "mark" in self.open else ""


@pytest.fixture
def mix(tmp_path):
    return write_mix(tmp_path / "data", each=3)


def run(*argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", "inspect", *map(str, argv)])
    assert not stop.value.code
    return capsys.readouterr().out


def test_random_samples(mix, capsys):
    first = run(mix, "--images", mix.parent, "--random", 5, capsys=capsys)
    assert first.count("--- mix, record") == 5 and "\x1b" not in first
    assert first == run(mix, "--images", mix.parent, "--random", 5, capsys=capsys)
    assert first != run(mix, "--images", mix.parent, "--random", 5, "--seed", 1, capsys=capsys)
    assert run(mix, "--images", mix.parent, "--random", 99, capsys=capsys).count("--- mix, record") == 30
    assert "record 29, id" in run(mix, "--images", mix.parent, "--sample", 29, capsys=capsys)


def test_colours_only_for_a_person(mix, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    run(mix, "--images", mix.parent, capsys=capsys)
    assert "\x1b[1;32m" in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    run(mix, "--images", mix.parent, capsys=capsys)
    assert "\x1b" not in terminal.getvalue() and "[[" in terminal.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_contact_sheet(mix, tmp_path, capsys):
    records = json.loads(mix.read_text())
    records[0] |= {"conversations": turns("<script>alert(1)</script>", "<b>bold</b>\nnew line"), "id": "<i>"}
    records[0].pop("image", None)
    records[1] = record("<image> and <image>", "two", image=["gqa/images/2370000.jpg", "gone.jpg"])
    mix.write_text(json.dumps(records))
    llama_tokenizer(tmp_path / "tokenizer")
    out = tmp_path / "sheets" / "sheet.html"
    options = ("--tokenizer", tmp_path / "tokenizer", "--random", 30, "--html", out)
    assert "30 records" in run(mix, "--images", mix.parent, *options, capsys=capsys)
    text = out.read_text()
    page = Page(text)
    assert "script" not in page.tags and "http" not in text.replace("http-equiv", "")
    assert "<b>bold</b>" in page.marked.replace("> ", ">") and "alert(1)" not in page.marked
    assert page.tags.count("article") == 30
    pictures = sum(
        len(record.get("image", [])) if isinstance(record.get("image"), list) else "image" in record
        for record in records
    )
    assert page.tags.count("img") == pictures - 1 and page.tags.count("figure") == pictures  # one is gone
    assert all(value.startswith("data:image/") for _, name, value in page.attributes if name == "src")
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes


def test_thumbnails_are_small(tmp_path, capsys):
    Image.effect_noise((3000, 2000), 60).convert("RGB").save(tmp_path / "big.jpg", quality=95)
    (tmp_path / "r.json").write_text(json.dumps([record("<image>", "noise", image="big.jpg")]))
    run(tmp_path / "r.json", "--images", tmp_path, "--html", tmp_path / "s.html", capsys=capsys)
    assert (tmp_path / "s.html").stat().st_size < 200_000 < (tmp_path / "big.jpg").stat().st_size


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["inspect"], ["Give PATH (or --config CONFIG)"]),
        (["inspect", "{mix}", "--config", "x.py"], ["Give no PATH beside --config"]),
        (["inspect", "{mix}", "--stage", "a"], ["--stage goes with --config"]),
        (["inspect", "{mix}", "--sample", "30"], ["There is no record 30", "has 30, from 0 on"]),
        (["inspect", "{mix}", "--source", "other"], ["no source 'other'", "'mix'"]),
        (["inspect", "{mix}", "--bogus"], ["Unknown argument '--bogus'"]),
        (["inspect", "{mix}", "--config.seed=1"], ["Unknown argument"]),
        (["inspect", "{mix}", "--template", "vicuna"], ["no template 'vicuna'", "vicuna_v1"]),
        (["inspect", "{mix}", "--tokenizer", "nowhere"], ["no tokenizer folder nowhere"]),
        (
            ["inspect", "--config", "configs/quickstart.py:tiny", "--stage", "x"],
            ["no stage 'x'", "'align', 'instruct'"],
        ),
        (["inspect", "--config", "configs/quickstart.py:tiny", "--images", "x"], ["--images goes with a PATH"]),
        (["look", "{mix}"], ["no `jaxvlm data look`", "verify, inspect"]),
    ],
)
def test_mistakes(mix, capsys, argv, words):
    assert main(["data", *(arg.format(mix=mix) for arg in argv)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and all(word in message for word in words), message


def test_a_config_says_how_the_data_is_seen(capsys):
    out = run("--config", "configs/quickstart.py:tiny", "--stage", "align", "--sample", "0", capsys=capsys)
    assert "Template plain, images naive, layout llava, length 128." in out and "4 visual" in out
    out = run("--config", "configs/quickstart.py:tiny", "--config.prompt.length=60", "--random", "20", capsys=capsys)
    assert "vicuna_v1" in out and "cut to length 60" in out
