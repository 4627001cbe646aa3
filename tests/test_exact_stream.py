"""The stream of batches is a function of (config, seed, step): real processes, killed and started in other numbers.

Each process has its share of the global batch and agrees on every step with the others through a coordinator on the loopback
interface, as hosts do through their collectives. What they hand over is a digest of each row, of all its arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_helpers import llama_tokenizer, record
from PIL import Image

from jaxvlm.config import DataConfig, ModelConfig, PromptConfig, SourceConfig, VisionConfig
from jaxvlm.data.loader import Loader

ROOT = Path(__file__).resolve().parent.parent
BATCH, STEPS = 6, 12


def make_loader(folder: str, index: int = 0, count: int = 1, workers: int = 0) -> Loader:
    """Two epochs of packed rows from two sources by weight, with pictures."""
    here = Path(folder)
    sources = [
        SourceConfig("a", str(here / "a.json"), str(here), weight=2.0),
        SourceConfig("b", str(here / "b.json"), str(here), fraction=0.5, weight=1.0),
    ]
    data = DataConfig(sources=tuple(sources), packing=True, tiles_per_row=3, num_workers=workers)
    prompt = PromptConfig(str(here / "tokenizer"), template="prism", length=96)
    model = ModelConfig(vision=VisionConfig(image_size=28, patch_size=14))
    split = dict(process_index=index, process_count=count, cache_dir=here / "cache")
    return Loader(data, prompt, model, batch_size=BATCH, seed=3, steps=STEPS, **split)


def digests(batch: dict[str, np.ndarray]) -> list[str]:
    """Of each row, over the bytes, types and shapes of all its arrays."""
    rows = []
    for row in range(len(batch["tokens"])):
        digest = hashlib.sha256()
        for key in sorted(batch):
            digest.update(f"{key} {batch[key].dtype} {batch[key].shape[1:]}".encode())
            digest.update(np.ascontiguousarray(batch[key][row]))
        rows.append(digest.hexdigest())
    return rows


def member(port: int, folder: str, index: int, count: int, workers: int) -> None:
    """One process of a run: starts at the step it is told, and makes a batch whenever all others have made theirs."""
    with socket.create_connection(("127.0.0.1", port)) as link, link.makefile("rw") as line:
        loader = make_loader(folder, index, count, workers)
        print(json.dumps({"index": index, "fingerprint": loader.fingerprint}), file=line, flush=True)
        step = json.loads(line.readline())["step"]
        for batch in loader.batches(step):
            print(json.dumps({"step": step, "rows": digests(batch)}), file=line, flush=True)
            step += 1
            if not line.readline():
                break
        line.readline()  # stays until it is killed, its workers too


class Group:
    """`count` processes that have started, in the order of their index."""

    def __init__(self, folder: Path, count: int, workers: int):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            command = [sys.executable, str(Path(__file__)), str(port), str(folder)]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
            self.processes = [
                subprocess.Popen([*command, str(i), str(count), str(workers)], env=environment, start_new_session=True)
                for i in range(count)
            ]
            server.settimeout(120)
            links = [server.accept()[0].makefile("rw") for _ in range(count)]
        hello = [json.loads(link.readline()) for link in links]
        assert len({one["fingerprint"] for one in hello}) == 1
        self.fingerprint = hello[0]["fingerprint"]
        self.links = [link for _, link in sorted(zip(hello, links, strict=True), key=lambda pair: pair[0]["index"])]

    def run(self, state: dict, steps: int) -> list[list[str]]:
        """The next `steps` global batches as digests of their rows, from the state on."""
        assert state["fingerprint"] in (None, self.fingerprint)
        batches = []
        for step in range(state["step"], state["step"] + steps):
            for link in self.links:
                print(json.dumps({"step": step}), file=link, flush=True)
            made = [json.loads(link.readline()) for link in self.links]
            assert {one["step"] for one in made} == {step}
            batches.append([row for one in made for row in one["rows"]])
        return batches

    def kill(self) -> None:
        """kill -9, workers included: the others have made the next batch by then, or are at it."""
        for link in self.links:
            print(json.dumps({}), file=link, flush=True)
        for process in self.processes:
            os.killpg(process.pid, signal.SIGKILL)
        assert [process.wait() for process in self.processes] == [-signal.SIGKILL] * len(self.processes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    llama_tokenizer(folder / "tokenizer")
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    images = [record(f"<image>\nquestion {i}?", "answer " * (1 + i % 7), id=i, image=f"{i % 5}.png") for i in range(60)]
    (folder / "a.json").write_text(json.dumps(images))
    (folder / "b.json").write_text(json.dumps([record(f"text {i}", "yes " * (1 + i % 5), id=i) for i in range(40)]))
    return folder


def test_killed_and_started_in_other_numbers(folder):
    """3 processes, then 2, then 1 with two workers: the union of their batches is that of one process left alone."""
    expected = [digests(batch) for batch in make_loader(str(folder)).batches()]
    assert len(expected) == STEPS and len({row for batch in expected for row in batch}) > STEPS * BATCH - BATCH
    state, seen = {"step": 0, "fingerprint": None}, []
    for count, workers, steps in ((3, 0, 5), (2, 0, 3), (1, 2, 4)):
        group = Group(folder, count, workers)
        try:
            seen += group.run(state, steps)
        finally:
            group.kill()
        state = json.loads(json.dumps({"step": len(seen), "fingerprint": group.fingerprint}))
        assert len(json.dumps(state)) < 1024
    assert seen == expected


@pytest.mark.parametrize("step", [0, 1, 7, STEPS - 1])
def test_restoring_decodes_only_what_is_left(folder, monkeypatch, step):
    """Images of the rows before `step` are not opened again."""
    opened = []
    real = __import__("jaxvlm.data.rows", fromlist=["load_image"]).load_image
    monkeypatch.setattr("jaxvlm.data.rows.load_image", lambda *given: opened.append(given) or real(*given))
    loader = make_loader(str(folder))
    left = list(loader.batches(step))
    assert len(left) == STEPS - step
    assert len(opened) == sum(int(batch["tile_mask"].sum()) for batch in left)


if __name__ == "__main__":
    port, folder, *numbers = sys.argv[1:]
    member(int(port), folder, *map(int, numbers))
