"""The server: a real one over loopback, with a tiny random model, and plain HTTP clients."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import uvicorn
from PIL import Image

from jaxvlm.evals import judges
from jaxvlm.infer.engine import Engine
from jaxvlm.main import main
from jaxvlm.serve import server
from jaxvlm.serve.worker import Sampling

NEW = 12
DEFAULTS = Sampling(max_new_tokens=NEW, temperature=0.0, top_p=1.0, seed=None, stop=())


def data_url(path, form="png") -> str:
    return f"data:image/{form};base64,{base64.b64encode(path.read_bytes()).decode()}"


def image_part(path, **more) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(path), **more}}


def text_part(text) -> dict:
    return {"type": "text", "text": text}


def user(content) -> dict:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, engine, pictures)"""
    folder = tmp_path_factory.mktemp("served")
    return folder, *tiny.saved_engine(folder)


class Slow(Engine):
    """The engine, with a record of the batches it is asked for, and a gate that holds them back."""

    def __init__(self, engine: Engine):
        self.__dict__ |= engine.__dict__
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.pieces = 0

    def token_batches(self, requests, **options):
        self.gate.wait(20)
        self.batches.append(len(requests))
        if any("explode" in str(request["messages"]) for request in requests):
            raise RuntimeError("out of memory")
        return super().token_batches(requests, **options)

    def stream(self, messages, images=(), **options):
        pieces = super().stream(messages, images, **options)
        while True:
            self.gate.wait(20)
            if "explode" in str(messages):
                raise RuntimeError("out of memory")
            try:
                yield next(pieces)
            except StopIteration as end:
                return end.value
            self.pieces += 1


@contextlib.contextmanager
def serving(engine, batch_size=4):
    """An address at which the engine is served."""
    bound = server.open_port("127.0.0.1", 0)
    app = server.create(engine, "toy", DEFAULTS, batch_size)
    running = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=running.run, args=([bound],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not running.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield bound.getsockname()[:2]
    finally:
        running.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def slow(world):
    return Slow(world[1])


@pytest.fixture(scope="module")
def address(slow):
    with serving(slow) as found:
        yield found


def send(address, body, method="POST", path="/v1/chat/completions") -> tuple[int, dict]:
    connection = http.client.HTTPConnection(*address, timeout=60)
    sent = body if isinstance(body, bytes) else json.dumps(body)
    connection.request(method, path, sent, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def said(address, **body) -> str:
    status, answer = send(address, {"model": "toy", **body})
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"]


def events(address, **body) -> list:
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps({"stream": True, **body}))
    response = connection.getresponse()
    assert response.status == 200 and response.headers["content-type"].startswith("text/event-stream")
    parts = response.read().decode().split("\n\n")
    assert parts[-1] == "" and all(part.startswith("data: ") for part in parts[:-1])
    assert parts[-2] == "data: [DONE]"
    return [json.loads(part[6:]) for part in parts[:-2]]


def test_what_is_served(address):
    assert send(address, b"", "GET", "/health") == (200, {"status": "ok"})
    status, found = send(address, b"", "GET", "/v1/models")
    assert status == 200 and found["object"] == "list"
    assert [(model["id"], model["object"]) for model in found["data"]] == [("toy", "model")]


def test_answers_are_the_engines(address, world):
    _, engine, pictures = world
    marked = "<image>\nWhat is it?"
    request = {"messages": [{"role": "user", "content": marked}], "images": [str(pictures[0])]}
    [expected] = engine.generate([request], max_new_tokens=NEW)
    content = [image_part(pictures[0]), text_part("What is it?")]
    status, answer = send(address, {"model": "toy", **user(content)})
    assert status == 200 and answer["object"] == "chat.completion" and answer["model"] == "toy"
    assert answer["system_fingerprint"] == engine.fingerprint
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"] == expected
    length = len(engine._prompt(request, 0).tokens)
    [tokens] = [row for batch in engine.token_batches([request], max_new_tokens=NEW) for _, row in batch]
    assert tokens[-1] not in engine.end_ids and choice["finish_reason"] == "length"
    usage = {"prompt_tokens": length, "completion_tokens": NEW, "total_tokens": length + NEW}
    assert answer["usage"] == usage
    for limit in ({"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 7, "max_completion_tokens": 5}):
        [short] = engine.generate([request], max_new_tokens=5)
        assert said(address, **user(content), **limit) == short
    assert said(address, **user(content), max_tokens=10**6) == expected  # the server's own limit


def test_conversations_and_several_images(address, world):
    _, engine, pictures = world
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\n<image>\nThe same?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "<image>\nAnd this?"},
    ]
    [expected] = engine.generate([{"messages": turns, "images": list(map(str, pictures[:3]))}], max_new_tokens=NEW)
    asked = [
        {"role": "developer", "content": [text_part("Be brief.")]},
        {"role": "user", "content": [image_part(pictures[0]), image_part(pictures[1]), text_part("The same?")]},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": [image_part(pictures[2]), text_part("And this?")]},
    ]
    assert said(address, messages=asked) == expected
    assert said(address, messages=asked[1:]) != expected


def test_requests_that_wait_together_share_a_batch(address, slow, world):
    _, engine, pictures = world
    contents = [[image_part(pictures[i % 4]), text_part("What colour? " + "x" * i)] for i in range(6)]
    alone = [said(address, **user(content)) for content in contents]
    assert len(set(alone)) > 2
    slow.gate.clear()
    del slow.batches[:]
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(said, address, **user("First!"))
        time.sleep(0.5)  # it is being answered: the others wait
        together = [pool.submit(said, address, **user(content)) for content in contents]
        other = [pool.submit(said, address, **user(contents[0]), max_tokens=n) for n in (5, 6)]
        time.sleep(1.0)
        slow.gate.set()
        assert [future.result() for future in together] == alone
        assert first.result() == said(address, **user("First!"))
        assert all(future.result() for future in other)
    assert sorted(slow.batches[:-1]) == [1, 1, 1, 2, 4]  # never more than four, never of different settings


def test_streaming_gives_the_same_text(address, world):
    content = [image_part(world[2][1]), text_part("What is it?")]
    for more in ({}, {"temperature": 1.5, "seed": 5, "top_p": 0.9}, {"max_tokens": 3}):
        _, whole = send(address, {**user(content), **more})
        chunks = events(address, **user(content), **more, stream_options={"include_usage": True})
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk["id"] for chunk in chunks}) == 1
        *written, last, usage = chunks
        assert written[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in written)
        assert text == whole["choices"][0]["message"]["content"]
        assert more or len(written) > 4
        assert {chunk["choices"][0]["finish_reason"] for chunk in written} == {None}
        assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
        assert last["choices"][0]["delta"] == {} and usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert all("usage" not in chunk for chunk in events(address, **user("Hm?")))


def test_stop_texts_end_both_kinds_of_answer(address, world):
    content = [image_part(world[2][0]), text_part("What is it?")]
    full = said(address, **user(content))
    stop = full[3:5]
    _, whole = send(address, {**user(content), "stop": stop})
    assert whole["choices"][0]["message"]["content"] == full[: full.index(stop)].strip()
    assert whole["choices"][0]["finish_reason"] == "stop" and whole["usage"]["completion_tokens"] < NEW
    *_, last, usage = events(address, **user(content), stop=["zzz", stop], stream_options={"include_usage": True})
    assert last["choices"][0]["finish_reason"] == "stop" and usage["usage"] == whole["usage"]


def test_an_answer_that_ends_by_itself(world):
    _, engine, _ = world
    ending = Engine(engine.config, engine.prompt, engine.params)
    [tokens] = [row for batch in engine.token_batches([user("Hm?")], max_new_tokens=NEW) for _, row in batch]
    ending.end_ids = (tokens[4],)
    with serving(ending) as address:
        _, whole = send(address, user("Hm?"))
        *written, last = events(address, **user("Hm?"))
    assert whole["choices"][0]["finish_reason"] == last["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] == tokens.index(tokens[4]) + 1
    text = whole["choices"][0]["message"]["content"]
    assert text == "".join(chunk["choices"][0]["delta"]["content"] for chunk in written)
    assert text == ending.generate([user("Hm?")], max_new_tokens=NEW)[0]


def test_seeds(address, world):
    _, engine, _ = world
    hot = {**user("Say a colour."), "temperature": 1.5, "top_p": 0.95}
    with ThreadPoolExecutor(4) as pool:
        seeded = set(pool.map(lambda _: said(address, **hot, seed=3), range(4)))
        drawn = set(pool.map(lambda _: said(address, **hot), range(4)))
    assert seeded == set(
        engine.generate([user("Say a colour.")], max_new_tokens=NEW, temperature=1.5, top_p=0.95, seed=3)
    )
    assert len(drawn) > 1 and said(address, **hot, seed=2**40 + 4) != seeded.pop()


PICTURE = "data:image/png;base64,"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "not JSON"),
        (b"[1]", 400, "must be a JSON object"),
        ({"messages": []}, 400, "'messages' must be a list"),
        ({"messages": ["hello"]}, 400, "messages[0] must have the role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0] must have the role"),
        ({"messages": [{"role": "user"}]}, 400, "a message's content is a text or a list of parts"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "The last message must be by the user"),
        (user("x") | {"model": "gpt-4"}, 404, "The model 'gpt-4' is not served here; 'toy' is."),
        (user("x") | {"n": 2}, 400, "'n' is not supported here: it can only be 1."),
        (user("x") | {"frequency_penalty": 0.5}, 400, "'frequency_penalty' is not supported"),
        (user("x") | {"tools": [{"type": "function"}]}, 400, "'tools' is not supported"),
        (user("x") | {"response_format": {"type": "json_object"}}, 400, "'response_format' is not supported"),
        (user("x") | {"temprature": 1}, 400, "There is no parameter 'temprature'."),
        (user("x") | {"temperature": 3}, 400, "'temperature' must be a number from 0 to 2, not 3"),
        (user("x") | {"temperature": "hot"}, 400, "'temperature' must be a number"),
        (user("x") | {"top_p": True}, 400, "'top_p' must be a number"),
        (user("x") | {"max_tokens": 0}, 400, "'max_tokens' must be an integer from 1, not 0"),
        (user("x") | {"max_completion_tokens": 1.5}, 400, "'max_completion_tokens' must be an integer"),
        (user("x") | {"stop": ["a", ""]}, 400, "'stop' must be"),
        (user("x") | {"stream": "yes"}, 400, "'stream' must be true or false"),
        (user("x " * 4000), 400, "tokens long; the model has 4096 positions, and the answer needs some. Shorten"),
        (user("A <image>?"), 400, "1 <image> in its messages but 0 image(s)"),
        (user([{"type": "video_url"}]), 400, "a part must be of type text or image_url, not 'video_url'"),
        (user([{"type": "image", "path": __file__}]), 400, "a part must be of type text or image_url, not 'image'"),
        (user([{"type": "text"}]), 400, "a content part is"),
        (user([{"type": "image_url"}]), 400, "must be the picture itself"),
        (user([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}]), 400, "are not fetched"),
        (user([{"type": "image_url", "image_url": {"url": f"file://{__file__}"}}]), 400, "must be the picture itself"),
        (user([{"type": "image_url", "image_url": {"url": PICTURE + "!!!!"}}]), 400, "base64 of an image_url cannot"),
        (user([{"type": "image_url", "image_url": PICTURE + "AAAA"}]), 400, "cannot be read as an image"),
        (
            {"messages": [{"role": "system", "content": [{"type": "image_url"}]}]},
            400,
            "only a user's message can have an image",
        ),
    ],
)
def test_refusals_say_what_is_wrong(address, body, status, words):
    found, answer = send(address, body)
    assert found == status and words in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"


def test_harmless_parameters_are_let_pass(address):
    more = {"user": "me", "metadata": {"a": "b"}, "n": 1, "presence_penalty": 0.0, "logit_bias": None, "tools": []}
    assert said(address, **user("Hm?"), **more, logprobs=False, seed=None) == said(address, **user("Hm?"))


def test_other_addresses_and_large_bodies(address, monkeypatch):
    status, answer = send(address, b"", "GET", "/v1/nothing")
    assert status == 404 and answer["error"]["message"] == "Not Found"
    assert send(address, b"", "GET")[0] == 405
    monkeypatch.setattr(server, "MAX_BODY", 2**20)
    status, answer = send(address, user("x" * 2**21))
    assert status == 413 and "1,048,576 are the most" in answer["error"]["message"]
    assert said(address, **user("Hm?"))


def test_a_batch_that_fails_does_not_stop_the_server(address):
    status, answer = send(address, user("explode"))
    assert status == 500 and answer["error"] == {
        "message": "The server failed; its log says why.",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps({**user("explode"), "stream": True}))
    response = connection.getresponse()
    lines = [response.readline() for _ in range(3)]  # the role, an empty line, the error
    assert json.loads(lines[2][6:]) == answer
    assert said(address, **user("Hm?"))


def test_a_client_that_leaves(address, slow):
    """One that streams ends its own stream, one that waits is not answered, and the next is served."""
    slow.pieces = 0
    connection = http.client.HTTPConnection(*address, timeout=60)
    slow.gate.clear()
    connection.request("POST", "/v1/chat/completions", json.dumps({**user("Hm?"), "stream": True}))
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    response.close()
    connection.close()
    waiting = http.client.HTTPConnection(*address, timeout=60)
    waiting.request("POST", "/v1/chat/completions", json.dumps(user("Nobody waits for this.")))
    time.sleep(0.5)
    waiting.close()
    time.sleep(1.6)  # a server that polls once a second has seen it
    del slow.batches[:]
    slow.gate.set()
    assert said(address, **user("And this?"))
    assert slow.pieces == 0 and slow.batches == [1]


def vlmevalkit_payload(path, **more) -> dict:
    """What `OpenAIWrapper.generate_inner` sends to a server that is not openai.com (VLMEvalKit e8e78f0, vlmeval/api/gpt.py)."""
    with Image.open(path) as image, io.BytesIO() as file:
        image.convert("RGB").save(file, format="JPEG")
        encoded = base64.b64encode(file.getvalue()).decode()
    picture = {"url": f"data:image/jpeg;base64,{encoded}", "detail": "low"}
    content = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": "What is it?"}]
    return {
        "model": "toy",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 2048,
        **more,
    }


def test_vlmevalkits_requests_are_answered(address, world):
    _, engine, pictures = world
    body = vlmevalkit_payload(pictures[0])
    jpeg = base64.b64decode(body["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2])
    asked = {**user("<image>\nWhat is it?"), "images": [jpeg]}
    [expected] = engine.generate([asked], max_new_tokens=NEW)
    request = urllib.request.Request(
        f"http://{address[0]}:{address[1]}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": "Bearer sk-123456"},
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
        assert json.load(response)["choices"][0]["message"]["content"].strip() == expected
    # `run.py --base-url`: its LMDeployAPI sends n, no detail, and asks for 32768 tokens.
    body["messages"][0]["content"][0]["image_url"].pop("detail")
    assert said(address, **(body | {"n": 1, "max_tokens": 2**15, "temperature": 0.0})) == expected
    body["messages"].insert(0, {"role": "system", "content": "You are a helpful assistant."})
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events(address, **body)) == said(
        address, **body
    )


def test_our_judge_client_asks_our_server(address, world, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    ask = judges.server(f"http://{address[0]}:{address[1]}/v1", "toy")
    messages = [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "Rate it."}]
    [expected] = world[1].generate([{"messages": messages}], max_new_tokens=NEW)
    assert ask(messages, 0.0, 1024) == (expected, "toy")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_verb_answers_what_is_under_way_before_it_stops(world, number):
    folder, engine, pictures = world
    command = [sys.executable, "-m", "jaxvlm.main", "serve", "--run", str(folder / "toy"), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--max_new_tokens", "200"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("Serving toy at http://127.0.0.1:"), process.stderr.read()
        address = ("127.0.0.1", int(line.split("/v1")[0].rpartition(":")[2]))
        for _ in range(100):
            with contextlib.suppress(ConnectionError):
                if send(address, b"", "GET", "/health")[0] == 200:
                    break
            time.sleep(0.1)
        content = [image_part(pictures[0]), text_part("What is it?")]
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(said, address, **user(content))
            time.sleep(0.3)
            process.send_signal(number)
            marked = {**user("<image>\nWhat is it?"), "images": [str(pictures[0])]}
            assert answer.result() == engine.generate([marked], max_new_tokens=200)[0]
        shown = process.communicate(timeout=30)[1]
        assert process.returncode == (0 if number == signal.SIGTERM else 130), shown
        assert "Traceback" not in shown
    finally:
        process.kill()


def test_a_port_that_is_taken_and_a_package_that_is_missing(address, capsys, monkeypatch):
    assert main(["serve", "--run", "nowhere", "--port", str(address[1])]) == 1
    assert f"127.0.0.1 port {address[1]} cannot be used" in capsys.readouterr().err
    assert main(["serve", "--run", "nowhere", "--port", "99999"]) == 1
    assert "Choose another --port" in capsys.readouterr().err
    assert main(["serve", "--run", "nowhere", "--temperature", "3"]) == 1
    assert "--temperature must be from 0 to 2" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--run", "nowhere"]) == 1
    assert "The server needs uvicorn. In the clone of jaxvlm: pip install -e '.[serve]'" in capsys.readouterr().err
