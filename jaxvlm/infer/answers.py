"""Answering many requests into an append-only JSONL file that an interrupted run, or several processes, go on with."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxvlm.config import UserError

if TYPE_CHECKING:
    from jaxvlm.infer.engine import Engine

IMAGE_MARK = "<image>"
CHOOSING = {"candidates", "options"}  # of a record: it is answered by one of these; see `choices`
RECORDED = ("jax", "device")  # of an answer's metadata: what may round otherwise and is written down, not refused


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


# ------------------------------------------------------------------------------------------------------ append-only files


def iterate_records(path: Path) -> Iterator[dict]:
    """The records of an append-only JSONL file, one at a time; a torn last line, which its writer has not finished, is none.

    Raises `RequestError` naming the line if any other line is not JSON.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError:
                raise RequestError(f"{path}:{number} is not JSON; delete that line or the file.") from None


def read_records(path: Path, mend: bool = True) -> list[dict]:
    """As `iterate_records`, at once; none of a file that is not there. A torn last line is cut off the file.

    Without `mend` the line is only passed over: another process may still be writing it.
    """
    if not path.exists():
        return []
    if mend:
        cut_torn_line(path)
    return list(iterate_records(path))


def cut_torn_line(path: Path) -> None:
    """Cuts off the last line of a file if its writer was killed before it was whole."""
    with path.open("r+b") as file:
        end = place = file.seek(0, 2)
        while place:
            start = max(0, place - (1 << 16))
            file.seek(start)
            found = file.read(place - start).rfind(b"\n")
            if found >= 0:
                place = start + found + 1
                break
            place = start
        if place < end:
            file.truncate(place)


def append_records(path: Path, records: Iterable[dict]) -> None:
    """Appends records, one write for all of them, and closes the file so that nothing is left in a buffer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def parts(out: Path) -> list[Path]:
    """The files that hold the answers of `out`: itself, and those of processes that shared the work."""
    name = re.compile(re.escape(out.stem) + r"-\d{5}-of-\d{5}" + re.escape(out.suffix))
    shared = [path for path in out.parent.glob(f"*{out.suffix}") if name.fullmatch(path.name)]
    return [path for path in (out, *sorted(shared)) if path.is_file()]


# -------------------------------------------------------------------------------------------------------------- answering


def generate_file(
    engine: Engine, source: str | Path, out: str | Path, *, images: str | Path = "", **options: Any
) -> int:
    """Answers every record of the JSONL file `source` into `out`; `options` are those of `answer_requests`, which see.

    A record is `{"question_id" | "id", "text", "image"?: path or list of paths}`, paths relative to `images`. Where it has
    `candidates`, short answers, the likeliest first token's is the text and `probabilities` holds all shares; where it has
    `options`, the one of least loss is the text and `losses` holds them all; sampling touches neither. Raises
    `RequestError` for a bad record too.
    """
    return answer_requests(engine, read_requests(Path(source), Path(images)), out, **options)


def answer_requests(
    engine: Engine,
    requests: Sequence[dict],
    out: str | Path,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    model_id: str = "jaxvlm",
    part: tuple[int, int] = (0, 1),
    label: str = "generate",
    log: Callable[[str], None] = print,
) -> int:
    """Answers requests (as `read_requests` gives them) into the JSONL file `out` and returns how many answers were new.

    As `part` (i, n) of n processes it answers every n-th request, into a file beside `out` (`parts`); however many processes
    there were before, what any of them answered is not asked again. Once all are done, (0, 1) answers what is missing.
    Greedy requests that are alike are asked once.

    An answer is LLaVA's `{"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}` with digests of the
    `request` and of its `pictures`, and the `seconds` that it took (a batch's, shared out; 0 for a copy of an answer to the same).
    Raises `RequestError`, naming what changed, if `out` was written by another model or with other settings
    (`answer_key`), or answers another request under one of these ids.
    """
    out = Path(out)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    metadata = answer_key(engine, sampling, batch_size)
    mine = out if part == (0, 1) else out.with_name(f"{out.stem}-{part[0]:05}-of-{part[1]:05}{out.suffix}")
    if mine.exists():
        cut_torn_line(mine)
    share = requests[part[0] :: part[1]]
    pictures: dict[str, str] = {}  # digests by path: of many questions about one picture it is read once
    done = _answered_before(out, metadata, {str(request["id"]): request for request in share}, pictures)
    groups: dict[Any, list[dict]] = {}
    for number, request in enumerate(share):
        if str(request["id"]) not in done:
            alike = (_digest(_asked(request)), *request["images"]) if temperature <= 0 else number
            groups.setdefault(alike, []).append(request)
    todo = sum(map(len, groups.values()))
    log(f"{label}: {len(share)} questions, {len(share) - todo} already answered in {out}.")
    progress, then = Progress(label, todo, log), time.monotonic()
    for batch in _batches(engine, list(groups.values()), batch_size, sampling):
        took = max((time.monotonic() - then) / len(batch), 1e-6)
        records = [
            _answer(request, text, model_id, metadata, pictures) | more | {"seconds": 0.0 if copy else round(took, 6)}
            for group, text, more in batch
            for copy, request in enumerate(group)
        ]
        append_records(mine, records)
        then = time.monotonic()
        progress.add(len(records))
    return todo


def answer_key(engine: Engine, sampling: dict, batch_size: int | None) -> dict:
    """All that an answer depends on beside its request, and what is `RECORDED`. The model's digest is of the weights, their
    type, the config and the tokenizers. Rounding differs by batch size, so that it counts in the exact mode too.
    """
    import jax  # here: scoring answers on file needs none

    from jaxvlm.data.image import transform_version

    about = engine.prompt
    key = {
        "model": engine.fingerprint,
        "template": about.template,
        "transform": transform_version(about.transform),
        "layout": about.layout,
        "tiles": repr((about.grids, about.max_tiles, about.tile_several)),
        "exact": engine.exact,
        "batch_size": batch_size or "default",
        "backend": jax.default_backend(),
        "precision": jax.config.jax_default_matmul_precision or "default",
        "max_new_tokens": sampling["max_new_tokens"],
    }
    if sampling["temperature"] > 0:
        key |= sampling
    return key | {"jax": jax.__version__, "device": jax.devices()[0].device_kind}


def _answered_before(out: Path, metadata: dict, requests: dict[str, dict], pictures: dict[str, str]) -> set[str]:
    """Ids that any part of `out` answers. Checks all settings, and of `requests` (by id) that they were asked as now."""
    done, fix = set(), "Mixed they would mean nothing. Name another output, or delete this one to start over."
    for path in parts(out):
        for record in iterate_records(path):
            found, name = record.get("metadata") or {}, str(record.get("question_id"))
            changed = [
                f"another {key} ({found.get(key)!r}, now {metadata.get(key)!r})"
                for key in {**metadata, **found}
                if key not in RECORDED and found.get(key) != metadata.get(key)
            ]
            if changed:
                raise RequestError(f"{path} holds answers with {', '.join(changed)}. {fix}")
            if name in requests:
                request = requests[name]
                if record["prompt"] != _prompt(request):
                    was, now = record["prompt"], _prompt(request)
                    raise RequestError(f"{path} answers another prompt to {name}: {was!r}, now {now!r}. {fix}")
                if record["pictures"] != _pictures(request, pictures):
                    raise RequestError(
                        f"{path} answers {name} about another picture than {', '.join(request['images']) or 'none'}. {fix}"
                    )
                if record["request"] != _digest(_asked(request)):
                    raise RequestError(
                        f"{path} answers {name} with other candidates or options, or its picture elsewhere. {fix}"
                    )
            done.add(name)
    return done


def merged(out: Path, ids: Collection[str]) -> list[dict]:
    """The answers to `ids`, in their order, of all `parts` of `out`; others may lie there too.

    Raises `RequestError` unless each has exactly one.
    """
    found: dict[str, dict] = dict.fromkeys(map(str, ids), {})
    for path in parts(out):
        for record in iterate_records(path):
            name = str(record["question_id"])
            if found.get(name):
                raise RequestError(f"{path} answers {name}, which another line answers too; delete one of the two.")
            if name in found:
                found[name] = record | {"part": path.stem.removeprefix(out.stem).removeprefix("-") or "all"}
    lacking = [name for name, record in found.items() if not record]
    if lacking:
        raise RequestError(
            f"{len(lacking)} of {len(found)} questions have no answer in {out}, {lacking[0]} among them."
        )
    return list(found.values())


def settings(answers: Iterable[dict]) -> dict:
    """What all answers' metadata says; of several versions or devices each is named."""
    found: dict[str, dict] = {}
    for answer in answers:
        for name, value in answer["metadata"].items():
            found.setdefault(name, {})[value] = None
    return {name: next(iter(v)) if len(v) == 1 else " + ".join(map(str, v)) for name, v in found.items()}


def speed(answers: Iterable[dict]) -> dict:
    """Of `merged` answers: how many, how many were asked (the others are copies), the seconds that took, and the rate; and
    these by part. Seconds of processes that ran side by side add up; loading the model is not among them, compiling is.
    """
    found: dict[str, dict] = {}
    for answer in answers:
        for name in ("", answer["part"]):
            one = found.setdefault(name, {"answered": 0, "asked": 0, "seconds": 0.0})
            one["answered"] += 1
            one["asked"] += answer["seconds"] > 0
            one["seconds"] += answer["seconds"]
    for one in found.values():  # of some that were drawn, copies alone may be left
        one["per_second"] = one["asked"] / one["seconds"] if one["asked"] else None
    return found.pop("") | {"parts": found}


def speed_in_words(taken: dict | None) -> str:
    """`speed` on one line, its parts named where there are several; empty where a result does not say, as of older versions."""
    if not taken or not taken.get("asked"):
        return ""
    line = f"{taken['per_second']:.2f} questions/s, {taken['asked']:,} in {clock(taken['seconds'])}"
    if taken["answered"] > taken["asked"]:
        line += f" and {taken['answered'] - taken['asked']:,} more like them"
    if len(taken["parts"]) > 1:
        rates = {name: one["per_second"] for name, one in taken["parts"].items() if one["asked"]}
        line += "; by part: " + ", ".join(f"{name} {rate:.2f}/s" for name, rate in rates.items())
    return line


def _batches(
    engine: Engine, groups: Sequence[list[dict]], batch_size: int | None, sampling: dict
) -> Iterator[list[tuple[list[dict], str, dict]]]:
    """Batches of (requests that are alike, their text, what more a record holds), those that choose among answers first."""
    written = [group for group in groups if not CHOOSING & group[0].keys()]
    if len(written) < len(groups):
        from jaxvlm.infer.choices import choose

        choosing = {str(group[0]["id"]): group for group in groups if CHOOSING & group[0].keys()}
        for batch in choose(engine, [group[0] for group in choosing.values()], batch_size):
            yield [(choosing[str(request["id"])], text, more) for request, text, more in batch]
    for batch in engine.generate_batches([group[0] for group in written], batch_size=batch_size, **sampling):
        yield [(written[index], text, {}) for index, text in batch]


def _prompt(request: dict) -> str:
    return request["messages"][0]["content"].replace(IMAGE_MARK, "").strip()


def _asked(request: dict) -> list:
    """A request but for its pictures."""
    return [request["messages"], *(request.get(name) for name in sorted(CHOOSING))]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _pictures(request: dict, known: dict[str, str]) -> str:
    """Digests of the bytes of a request's pictures; those in `known` are not read again."""
    for path in request["images"]:
        if path not in known:
            with open(path, "rb") as file:
                known[path] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return " ".join(known[path] for path in request["images"])


def _answer(request: dict, text: str, model_id: str, metadata: dict, pictures: dict[str, str]) -> dict:
    digest = hashlib.sha256(f"{metadata} {request['id']}".encode()).hexdigest()[:22]
    return {
        "question_id": request["id"],
        "prompt": _prompt(request),
        "text": text,
        "answer_id": digest,
        "model_id": model_id,
        "metadata": metadata,
        "request": _digest(_asked(request)),
        "pictures": _pictures(request, pictures),
    }


def read_requests(path: Path, images: Path) -> list[dict]:
    """Reads `{"question_id" | "id", "text", "image"?, "candidates"?, "options"?}` lines into engine requests.

    Images go in front of a text that has no `<image>` of its own. Raises `RequestError` naming file and line.
    """
    if not path.is_file():
        raise RequestError(f"The input file {path} does not exist.")
    requests, seen = [], set()
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):  # splitlines() splits at U+2028
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
