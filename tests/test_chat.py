"""The chat and the answering of files, with an engine that answers at once."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from jaxvlm.config import PromptConfig
from jaxvlm.infer.answers import RequestError, clock, generate_file
from jaxvlm.infer.chat import chat


class Parrot:
    """Streams the last question back; says how many images it saw. Questions with 'stop' are interrupted by Ctrl-C."""

    fingerprint, prompt, exact = "parrot-1", PromptConfig(), False

    def __init__(self):
        self.calls = []

    def stream(self, messages, images, **options):
        self.calls.append((messages, list(images), options))
        text = messages[-1]["content"]
        if "too long" in text:
            raise RequestError("Request 0 is too long.")
        if "never" in text:
            raise KeyboardInterrupt
        yield f"{len(images)} images, "
        if "stop" in text:
            raise KeyboardInterrupt
        yield text.replace("<image>\n", "").upper()

    def generate_batches(self, requests, *, batch_size, **options):
        for start in range(0, len(requests), 2):
            self.calls.append(options)
            part = requests[start : start + 2]
            yield [(start + i, f"answer to {request['id']}") for i, request in enumerate(part)][::-1]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "my cat.png"
    Image.new("RGB", (30, 20), "red").save(path)
    return path


def converse(*lines, engine=None, **options):
    out, engine = io.StringIO(), engine or Parrot()
    talk = chat(engine, source=io.StringIO("".join(line + "\n" for line in lines)), out=out, **options)
    return talk, out.getvalue(), engine


def test_a_conversation_with_an_image(picture, tmp_path):
    saved = tmp_path / "talk.json"
    talk, shown, engine = converse(
        f'/image "{picture}"', "what is it?", "", "are you sure?", f"/save {saved}", "/quit", "never asked", seed=3
    )
    assert "30 x 20, goes with your next message." in shown
    assert "model> 1 images, WHAT IS IT?" in shown and "model> 1 images, ARE YOU SURE?" in shown
    assert "NEVER ASKED" not in shown and f"Saved 2 turn(s) to {saved}." in shown
    assert engine.calls[1][1] == [str(picture)] and engine.calls[1][2]["seed"] == 3
    [record] = json.loads(saved.read_text())
    assert record["image"] == str(picture) and record["conversations"][0] == {
        "from": "human",
        "value": "<image>\nwhat is it?",
    }
    assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt", "human", "gpt"]


def test_several_images_and_clear(picture):
    talk, shown, engine = converse(
        f"/image {picture}", f"/image {picture}", "same?", "/clear", "hello", image=str(picture)
    )
    assert "(3 images)" in shown and "model> 3 images, SAME?" in shown
    assert "Forgotten." in shown and engine.calls[-1][:2] == (
        [{"role": "user", "content": "hello"}, talk.messages[1]],
        [],
    )


def test_ctrl_c_keeps_what_was_said_or_undoes_the_turn(picture):
    talk, shown, _ = converse("please stop", "never", "go on")
    assert "0 images,  (stopped)" in shown and shown.count("(stopped)") == 2
    assert [turn["content"] for turn in talk.messages] == ["please stop", "0 images, ", "go on", "0 images, GO ON"]


def test_an_error_keeps_the_conversation_and_the_image(picture):
    talk, shown, _ = converse(f"/image {picture}", "too long", "short")
    assert "Request 0 is too long." in shown and "1 images, SHORT" in shown
    assert len(talk.messages) == 2 and talk.images == [str(picture)]


def test_commands_that_go_wrong(tmp_path):
    (tmp_path / "notes.txt").write_text("not a picture")
    _, shown, engine = converse(
        "/image", "/image nowhere.png", f"/image {tmp_path}/notes.txt", "/save", "/save x.json", "/what", "/help"
    )
    for text in ("Say which: /image PATH", "nowhere.png does not exist", "cannot be read as an image", "Say where"):
        assert text in shown
    assert "nothing to save" in shown and "There is no /what." in shown and not engine.calls
    _, shown, _ = converse("hi", f"/save {tmp_path}/no/such/folder.json")
    assert "could not be written: No such file or directory." in shown


def write_requests(folder, count=5, **more):
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps({"question_id": i, "text": f"q{i}", **more}) + "\n" for i in range(count)))
    return path


def test_a_file_is_answered_and_resumed(tmp_path, picture):
    source, out = write_requests(tmp_path, image=picture.name), tmp_path / "deep" / "out.jsonl"
    logged = []
    assert generate_file(Parrot(), source, out, images=tmp_path, model_id="m", log=logged.append) == 5
    lines = out.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["question_id"]: record["text"] for record in records} == {i: f"answer to {i}" for i in range(5)}
    about = {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}  # LLaVA's fields
    assert set(records[0]) == about | {"request", "pictures", "seconds"}
    assert records[0]["prompt"] == "q1" and records[0]["model_id"] == "m" and "5/5" in logged[-1]
    out.write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])  # killed while it wrote the third
    assert generate_file(Parrot(), source, out, images=tmp_path, model_id="m", log=logged.append) == 3
    assert sorted(json.loads(line)["question_id"] for line in out.read_text().splitlines()) == [0, 1, 2, 3, 4]
    assert generate_file(Parrot(), source, out, images=tmp_path, log=logged.append) == 0
    with pytest.raises(RequestError, match=r"with another temperature \(None, now 0.5\), another top_p"):
        generate_file(Parrot(), source, out, images=tmp_path, temperature=0.5, log=logged.append)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "in.jsonl:6 is not a line of JSON"),
        ('{"text": "x"}', "in.jsonl:6 needs a 'text' and a 'question_id'"),
        ('{"id": 3, "text": "x"}', "in.jsonl:6: the id 3 occurs twice"),
        ('{"id": 9, "text": "x", "image": "gone.png"}', "in.jsonl:6: the image .*gone.png does not exist"),
    ],
)
def test_bad_request_lines(tmp_path, line, message):
    source = write_requests(tmp_path)
    source.write_text(source.read_text() + line + "\n")
    with pytest.raises(RequestError, match=message):
        generate_file(Parrot(), source, tmp_path / "out.jsonl", log=lambda text: None)


def test_clock():
    assert [clock(5), clock(65), clock(3725)] == ["0:05", "1:05", "1:02:05"]
