"""Answering many requests into an append-only JSONL file that an interrupted run goes on with."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxvlm.config import UserError

if TYPE_CHECKING:
    from jaxvlm.infer.engine import Engine

IMAGE_MARK = "<image>"
CHOOSING = {"candidates", "options"}  # of a record: it is answered by one of these; see `choices`


class RequestError(UserError):
    """A request that cannot be answered; the message names the record and the fix."""


class Progress:
    """Logs `label 32/400  8.1/s  ETA 0:45` at most every few seconds, and once at the end."""

    def __init__(self, label: str, total: int, log: Callable[[str], None], every: float = 5.0):
        self.label, self.total, self.log, self.every = label, total, log, every
        self.done = 0
        self.started = self.shown = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def add(self, count: int, note: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if self.done < self.total and now - self.shown < self.every:
            return
        self.shown = now
        rate = self.done / max(self.seconds, 1e-9)
        left = (
            f"ETA {clock((self.total - self.done) / rate)}" if self.done < self.total else f"in {clock(self.seconds)}"
        )
        self.log(f"{self.label} {self.done}/{self.total}  {rate:.1f}/s  {left}{note and '  ' + note}")


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def read_records(path: Path) -> list[dict]:
    """The records of an append-only JSONL file; a torn last line (the writer was killed) is cut off the file.

    Raises `RequestError` naming the line if any other line is not JSON.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise RequestError(f"{path}:{number} is not JSON; delete that line or the file.") from None
    return records


def append_records(path: Path, records: Iterable[dict]) -> None:
    """Appends records, one write for all of them, and closes the file so that nothing is left in a buffer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def generate_file(
    engine: Engine,
    source: str | Path,
    out: str | Path,
    *,
    images: str | Path = "",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    model_id: str = "jaxvlm",
    log: Callable[[str], None] = print,
) -> int:
    """Answers every record of the JSONL file `source` into `out` and returns how many were new.

    A record is `{"question_id" | "id", "text", "image"?: path or list of paths}`, paths relative to `images`. An answer
    is LLaVA's `{"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}`. Where a record has `candidates`, short
    answers, the likeliest first token's is the text and `probabilities` holds all shares; where it has `options`, the one
    of least loss is the text and `losses` holds them all; sampling touches neither. Records whose id `out` already holds
    are skipped. Raises `RequestError` for a bad record, or if `out` was written by another model or sampling, or answers
    another prompt.
    """
    source, out = Path(source), Path(out)
    requests = read_requests(source, Path(images))
    metadata = {"model": engine.fingerprint, "max_new_tokens": max_new_tokens}
    if temperature > 0:
        metadata |= {"temperature": temperature, "top_p": top_p, "seed": seed}
    answered = read_records(out)
    for record in answered:
        if record.get("metadata") != metadata:
            raise RequestError(
                f"{out} holds answers of another model or other sampling settings ({record.get('metadata')} instead of "
                f"{metadata}). Name another output file, or delete this one."
            )
    done = {str(record["question_id"]): record["prompt"] for record in answered}
    todo = [request for request in requests if str(request["id"]) not in done]
    for request in requests:
        if done.get(str(request["id"]), _prompt(request)) != _prompt(request):
            raise RequestError(
                f"{out} answers another prompt to {request['id']}: {done[str(request['id'])]!r}, now {_prompt(request)!r}. "
                "Name another output file, or delete this one."
            )
    log(f"{source}: {len(requests)} records, {len(requests) - len(todo)} already answered in {out}.")
    progress = Progress("generate", len(todo), log)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    for batch in _answered(engine, todo, batch_size, sampling):
        append_records(out, [_answer(request, text, model_id, metadata) | more for request, text, more in batch])
        progress.add(len(batch))
    return len(todo)


def _answered(
    engine: Engine, requests: list[dict], batch_size: int | None, sampling: dict
) -> Iterator[list[tuple[dict, str, dict]]]:
    """Batches of (request, its text, what more its record holds), those that choose among answers first."""
    written = [request for request in requests if not CHOOSING & request.keys()]
    if len(written) < len(requests):
        from jaxvlm.infer.choices import choose

        yield from choose(engine, [request for request in requests if CHOOSING & request.keys()], batch_size)
    for batch in engine.generate_batches(written, batch_size=batch_size, **sampling):
        yield [(written[index], text, {}) for index, text in batch]


def _prompt(request: dict) -> str:
    return request["messages"][0]["content"].replace(IMAGE_MARK, "").strip()


def _answer(request: dict, text: str, model_id: str, metadata: dict) -> dict:
    digest = hashlib.sha256(f"{metadata} {request['id']}".encode()).hexdigest()[:22]
    return {
        "question_id": request["id"],
        "prompt": _prompt(request),
        "text": text,
        "answer_id": digest,
        "model_id": model_id,
        "metadata": metadata,
    }


def read_requests(path: Path, images: Path) -> list[dict]:
    """Reads `{"question_id" | "id", "text", "image"?, "candidates"?, "options"?}` lines into engine requests.

    Images go in front of a text that has no `<image>` of its own. Raises `RequestError` naming file and line.
    """
    if not path.is_file():
        raise RequestError(f"The input file {path} does not exist.")
    requests, seen = [], set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise RequestError(f"{where} is not a line of JSON: {error}.") from None
        name = record.get("question_id", record.get("id"))
        if name is None or "text" not in record:
            raise RequestError(f"{where} needs a 'text' and a 'question_id' (or 'id').")
        if str(name) in seen:
            raise RequestError(f"{where}: the id {name} occurs twice; answers are matched by id.")
        seen.add(str(name))
        paths = record.get("image") or []
        paths = [str(images / item) for item in ([paths] if isinstance(paths, str) else paths)]
        for item in paths:
            if not Path(item).is_file():
                raise RequestError(f"{where}: the image {item} does not exist.")
        text = str(record["text"])
        marks = "" if IMAGE_MARK in text else f"{IMAGE_MARK}\n" * len(paths)
        more = {name: tuple(map(str, record[name])) for name in CHOOSING & record.keys()}
        requests.append({"id": name, "messages": [{"role": "user", "content": marks + text}], "images": paths} | more)
    return requests
