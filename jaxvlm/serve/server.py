"""`jaxvlm serve`: OpenAI's chat completions over HTTP, as far as a model of images and text has them.

The form is that of OpenAI's reference (POST /v1/chat/completions, GET /v1/models). What would change the answer and is
not supported is refused by name; what would not is let pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any

from jaxvlm.config import ConfigError, UserError
from jaxvlm.infer.engine import Engine
from jaxvlm.infer.requests import plain
from jaxvlm.serve.worker import Answer, Sampling, Worker

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

MAX_BODY = 64 * 2**20  # bytes of a request: some dozens of photographs in base64
USED = {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop"}
USED |= {"stream", "stream_options"}
# Parameters that change an answer unless they are one of these.
NEUTRAL: dict[str, tuple] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
}
IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"}


class Refused(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


FAILED = Refused("The server failed; its log says why.", status=500)


def open_port(host: str, port: int) -> socket.socket:
    """A socket at the address, before the model is read; 0 takes any free port.

    Raises `ConfigError` if the address is taken, or a package of the server is missing.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"The server needs {error.name}. In the clone of jaxvlm: pip install -e '.[serve]'") from None
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise ConfigError(f"{host} port {port} cannot be used: {error}. Choose another --port or --host.") from None
    return bound


def serve(app: FastAPI, bound: socket.socket) -> None:
    """Answers at the socket until SIGTERM or Ctrl-C, and then what is under way; a second Ctrl-C drops that."""
    import uvicorn

    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it once more when all is answered
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[bound])


def create(engine: Engine, name: str, defaults: Sampling, batch_size: int) -> FastAPI:
    """The application that serves `engine` as the model `name`.

    Args:
        defaults: of requests that do not say; its `max_new_tokens` is also the most that a request may have.
        batch_size: the most requests that are computed at once.
    """
    from fastapi import FastAPI
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import JSONResponse, Response, StreamingResponse

    started, fingerprint = int(time.time()), engine.fingerprint

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.worker = Worker(engine, batch_size)
        yield
        await run_in_threadpool(app.state.worker.close)

    app = FastAPI(title="jaxvlm", lifespan=lifespan, openapi_url=None)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(request: Request) -> Response:
        model = {"id": name, "object": "model", "created": started, "owned_by": "jaxvlm"}
        return JSONResponse({"object": "list", "data": [model]})

    async def chat(request: Request) -> Response:
        body = await _body(request)
        asked, sampling, stream, include_usage = await run_in_threadpool(_asked, body, name, defaults)
        made = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        made |= {"system_fingerprint": fingerprint}
        if stream:
            pieces: asyncio.Queue[str | None] = asyncio.Queue()
            put, gone = _threadsafe(pieces.put_nowait), threading.Event()

            def say(piece: str) -> bool:
                put(piece)
                return not gone.is_set()

            future = await run_in_threadpool(app.state.worker.submit, asked, sampling, say)
            future.add_done_callback(lambda _: put(None))
            events = _events(pieces, future, gone, made, include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        future = asyncio.wrap_future(await run_in_threadpool(app.state.worker.submit, asked, sampling))
        while not (await asyncio.wait([future], timeout=1.0))[0]:
            if await request.is_disconnected():
                future.cancel()
                return Response(status_code=499)  # nobody reads it
        answer = future.result()
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _reason(answer)}
        return JSONResponse({"object": "chat.completion", **made, "choices": [choice], "usage": _usage(answer)})

    async def explain(request: Request, error: Exception) -> Response:
        if isinstance(error, UserError):
            error = Refused(str(error))
        elif status := getattr(error, "status_code", None):  # no such address, or another method
            error = Refused(error.detail, status=status)
        elif not isinstance(error, Refused):
            error = FAILED
        return JSONResponse({"error": _error(error)}, error.status)

    for kind in (Refused, UserError, 404, 405, Exception):
        app.add_exception_handler(kind, explain)
    app.add_route("/health", health, ["GET"])
    app.add_route("/v1/models", models, ["GET"])
    app.add_route("/v1/chat/completions", chat, ["POST"])
    return app


def _threadsafe(put: Callable[[Any], None]) -> Callable[[Any], None]:
    """`put` of this thread's event loop, to be called from another thread."""
    loop = asyncio.get_running_loop()
    return lambda item: loop.call_soon_threadsafe(put, item)


async def _body(request: Request) -> bytes:
    """The request's body; one that is too large is read to its end, so that its sender comes to read the refusal."""
    data, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= MAX_BODY:
            data += chunk
    if size > MAX_BODY:
        raise Refused(f"The request has {size:,} bytes; {MAX_BODY:,} are the most. Send smaller images.", status=413)
    return bytes(data)


def _asked(body: bytes, name: str, defaults: Sampling) -> tuple[dict, Sampling, bool, bool]:
    """(request of the engine, its sampling, whether to stream, whether with usage) of a request's JSON.

    Raises `Refused` or `UserError` saying what is wrong.
    """
    try:
        asked = json.loads(body)
        json.dumps(asked, ensure_ascii=False).encode()  # fails for half of a surrogate pair, which is no text
    except (ValueError, RecursionError) as error:
        raise Refused(f"The request is not JSON: {error}.") from None
    if not isinstance(asked, dict):
        raise Refused("The request must be a JSON object.")
    asked = {key: value for key, value in asked.items() if value is not None}
    for key, value in asked.items():
        if key not in USED | IGNORED and key not in NEUTRAL:
            raise Refused(f"There is no parameter '{key}'.", key, code="unknown_parameter")
        if key in NEUTRAL and value not in NEUTRAL[key]:
            only = " or ".join(map(json.dumps, NEUTRAL[key]))
            raise Refused(f"'{key}' is not supported here: it can only be {only}.", key, code="unsupported_value")
    if asked.get("model", name) != name:
        known = f"The model '{asked['model']}' is not served here; '{name}' is."
        raise Refused(known, "model", 404, "model_not_found")
    options = asked.get("stream_options", {})
    stream, usage = asked.get("stream", False), options.get("include_usage") if isinstance(options, dict) else options
    if not isinstance(stream, bool) or not isinstance(usage, bool | None):
        raise Refused("'stream' must be true or false, 'stream_options' {\"include_usage\": true or false}.", "stream")
    messages, images = plain({"messages": _messages(asked)}, "The request")
    return {"messages": messages, "images": images}, _sampling(asked, defaults), stream, bool(usage)


def _messages(asked: Mapping) -> list[dict]:
    """The messages, checked as far as the engine would understand what OpenAI's form does not have: a path, say."""
    messages = asked.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("'messages' must be a list of messages.", "messages")
    found = []
    for place, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "developer", "user", "assistant"):
            raise Refused(f"messages[{place}] must have the role system, user or assistant.", "messages")
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else part
            if kind not in ("text", "image_url"):
                raise Refused(f"messages[{place}]: a part must be of type text or image_url, not {kind!r}.", "messages")
            if kind == "image_url" and role != "user":
                raise Refused(f"messages[{place}]: only a user's message can have an image.", "messages")
        found.append({"role": "system" if role == "developer" else role, "content": content})
    return found


def _sampling(asked: Mapping, defaults: Sampling) -> Sampling:
    most = defaults.max_new_tokens
    limit = _number(asked, "max_tokens", most, 1, None, int)
    limit = _number(asked, "max_completion_tokens", limit, 1, None, int)  # the newer name
    temperature = _number(asked, "temperature", defaults.temperature, 0, 2, float)
    top_p = _number(asked, "top_p", defaults.top_p, 0, 1, float)
    seed = _number(asked, "seed", defaults.seed, None, None, int)
    if temperature == 0:  # nothing is drawn, so that all seeds can share a batch
        seed = 0
    elif seed is not None:
        seed %= 2**31
    stop = asked.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise Refused("'stop' must be a text or a list of texts, none of them empty.", "stop")
    return Sampling(min(limit, most), temperature, top_p, seed, tuple(stop))


def _number(asked: Mapping, key: str, default: Any, low: float | None, high: float | None, kind: type) -> Any:
    value = asked.get(key, default)
    fine = value is None or not isinstance(value, bool) and isinstance(value, int if kind is int else (int, float))
    if not fine or low is not None and value < low or high is not None and not value <= high:
        bounds = f" from {low}" * (low is not None) + f" to {high}" * (high is not None)
        raise Refused(f"'{key}' must be a{'n integer' if kind is int else ' number'}{bounds}, not {value!r}.", key)
    return value


async def _events(
    pieces: asyncio.Queue, future: Any, gone: threading.Event, made: dict, include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: the role, the pieces, why it ended, the usage if asked for, and [DONE]."""

    def event(choices: list[dict], **more: Any) -> str:
        return f"data: {json.dumps({'object': 'chat.completion.chunk', **made, 'choices': choices, **more})}\n\n"

    def choice(reason: str | None = None, **delta: str) -> list[dict]:
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]

    try:
        yield event(choice(role="assistant", content=""))
        while (piece := await pieces.get()) is not None:
            yield event(choice(content=piece))
        if future.exception():
            yield f"data: {json.dumps({'error': _error(FAILED)})}\n\n"
            raise future.exception()
        yield event(choice(_reason(future.result())))
        if include_usage:
            yield event([], usage=_usage(future.result()))
        yield "data: [DONE]\n\n"
    finally:  # also when the client has gone
        gone.set()
        future.cancel()


def _reason(answer: Answer) -> str:
    return "stop" if answer.ended else "length"


def _usage(answer: Answer) -> dict:
    used = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.tokens}
    return used | {"total_tokens": sum(used.values())}


def _error(error: Refused) -> dict:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"message": str(error), "type": kind, "param": error.param, "code": error.code}
