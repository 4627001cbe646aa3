"""Google Cloud Storage in memory, as far as gcsfs, google-cloud-storage and tensorstore use it: the JSON API of objects.

Requests are served side by side, and preconditions hold: an object that has changed under a writer is not written over,
which is what orbax's files in a bucket rest on.
"""

from __future__ import annotations

import email
import itertools
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import gmtime, strftime
from urllib.parse import parse_qsl, unquote, urlsplit

OBJECT = re.compile(
    r"/(?:download/)?storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)(?:/(?P<how>copy|rewrite|move)To/(?P<to>.+))?"
)
OBJECTS = re.compile(r"/(?P<upload>(?:resumable/)?upload/)?storage/v1/b/(?P<bucket>[^/]+)/o")
BUCKET = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)(?:/storageLayout)?")


class Refused(Exception):
    """An answer that is not 200: its status."""


class Storage:
    """Buckets, each a dict of name: (generation, time, content), and the uploads that are under way."""

    def __init__(self, *buckets: str):
        self.buckets: dict[str, dict[str, tuple[int, str, bytes]]] = {bucket: {} for bucket in buckets}
        self.uploads: dict[str, tuple[str, str, dict, bytearray]] = {}
        self.generations, self.lock = itertools.count(1), threading.Lock()

    def bucket(self, name: str) -> dict:
        if name not in self.buckets:
            raise Refused(404)
        return self.buckets[name]

    def check(self, bucket: str, name: str, query: dict) -> None:
        """The preconditions of `query`; generation 0 is an object that is not there."""
        now = self.bucket(bucket).get(name, (0, "", b""))[0]
        if int(query.get("ifGenerationMatch", now)) != now:
            raise Refused(412)
        if int(query.get("ifGenerationNotMatch", -1)) == now:
            raise Refused(304)

    def write(self, bucket: str, name: str, content: bytes, query: dict) -> dict:
        self.check(bucket, name, query)
        time = strftime("%Y-%m-%dT%H:%M:%S.000Z", gmtime())
        self.bucket(bucket)[name] = next(self.generations), time, content
        return self.describe(bucket, name)

    def read(self, bucket: str, name: str) -> bytes:
        if name not in self.bucket(bucket):
            raise Refused(404)
        return self.buckets[bucket][name][2]

    def describe(self, bucket: str, name: str) -> dict:
        size = len(self.read(bucket, name))
        generation, time, _ = self.buckets[bucket][name]
        about = {"kind": "storage#object", "id": f"{bucket}/{name}/{generation}", "bucket": bucket, "name": name}
        about |= {"generation": str(generation), "metageneration": "1", "size": str(size), "etag": str(generation)}
        return about | {"contentType": "application/octet-stream", "timeCreated": time, "updated": time}

    def listing(self, bucket: str, query: dict) -> dict:
        """A page: names from `pageToken` or `startOffset` on, those below a delimiter as prefixes."""
        prefix, delimiter, most = query.get("prefix", ""), query.get("delimiter"), int(query.get("maxResults", 1000))
        first, end = query.get("startOffset", ""), query.get("endOffset")
        items, prefixes = [], {}
        for name in sorted(self.bucket(bucket)):
            if not name.startswith(prefix) or name < max(first, query.get("pageToken", "")) or (end and name >= end):
                continue
            if len(items) + len(prefixes) == most:
                return {"items": items, "prefixes": list(prefixes), "nextPageToken": name}
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if found:
                prefixes[prefix + head + delimiter] = None
            else:
                items.append(self.describe(bucket, name))
        return {"items": items, "prefixes": list(prefixes)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    storage: Storage

    def log_message(self, *args):
        pass

    def answer(self, status: int, content: bytes | dict = b"", **headers: str) -> None:
        if isinstance(content, dict):
            content, headers = json.dumps(content).encode(), headers | {"Content-Type": "application/json"}
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def serve(self) -> None:
        url = urlsplit(self.path)
        query, body = dict(parse_qsl(url.query)), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            with self.storage.lock:
                answer = self.route(url.path, query, body)
        except Refused as refused:
            status = refused.args[0]
            answer = (status, {"error": {"code": status, "message": f"{status}"}} if status != 304 else b"", {})
        self.answer(*answer[:2], **(answer[2] if len(answer) > 2 else {}))

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = serve

    def route(self, path: str, query: dict, body: bytes) -> tuple:
        if found := OBJECT.fullmatch(path):
            bucket, name = found["bucket"], unquote(found["name"])
            return (
                self.copy(bucket, name, found["how"], found["to"], query)
                if found["how"]
                else self.object(bucket, name, query)
            )
        if (found := OBJECTS.fullmatch(path)) and self.command == "GET":
            return 200, self.storage.listing(found["bucket"], query)
        if found and found["upload"]:
            return self.upload(found["bucket"], query, body)
        if (found := BUCKET.fullmatch(path)) and self.command == "GET":
            self.storage.bucket(found["bucket"])
            return 200, {"kind": "storage#bucket", "name": found["bucket"], "location": "US", "locationType": "region"}
        raise Refused(501)

    def copy(self, bucket: str, name: str, how: str, to: str, query: dict) -> tuple:
        target, _, new = f"/{to}".rpartition("/o/")
        content = self.storage.read(bucket, name)
        made = self.storage.write(target.removeprefix("/b/") or bucket, unquote(new), content, query)
        if how == "move":
            del self.storage.buckets[bucket][name]
        size = str(len(content))
        done = {"done": True, "totalBytesRewritten": size, "objectSize": size, "resource": made}
        return 200, done if how == "rewrite" else made

    def object(self, bucket: str, name: str, query: dict) -> tuple:
        storage = self.storage
        content = storage.read(bucket, name)
        storage.check(bucket, name, query)
        if self.command == "DELETE":
            del storage.buckets[bucket][name]
            return 204, b""
        about = storage.describe(bucket, name)
        if query.get("alt") != "media":
            return 200, about
        headers = {"x_goog_generation": about["generation"], "ETag": about["etag"]}
        if not (span := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))):
            return 200, content, headers
        size = len(content)
        start = int(span[1]) if span[1] else max(0, size - int(span[2]))
        stop = min(size, int(span[2]) + 1) if span[1] and span[2] else size
        if start >= size:
            raise Refused(416)
        return 206, content[start:stop], headers | {"Content_Range": f"bytes {start}-{stop - 1}/{size}"}

    def upload(self, bucket: str, query: dict, body: bytes) -> tuple:
        storage, kind = self.storage, query.get("uploadType")
        if "upload_id" in query:
            return self.resume(query["upload_id"], body)
        if kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            meta, _ = email.message_from_bytes(head + body).get_payload()
            name = query.get("name") or json.loads(meta.get_payload(decode=True))["name"]
            mark = re.search(rb"boundary=[\"']?([^\"';]+)", self.headers["Content-Type"].encode())[1]
            part = body.split(b"--" + mark)[2]  # the parser of mail would change line ends
            content = re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1].removesuffix(b"\n").removesuffix(b"\r")
            return 200, storage.write(bucket, name, content, query)
        if kind == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            number = str(next(storage.generations))
            storage.uploads[number] = bucket, name, query, bytearray()
            return 200, b"", {"Location": f"http://{self.headers['Host']}{self.path}&upload_id={number}"}
        return 200, storage.write(bucket, query["name"], body, query)

    def resume(self, number: str, body: bytes) -> tuple:
        """A part of a file; the range's total says which is the last."""
        bucket, name, query, content = self.storage.uploads[number]
        content += body
        total = self.headers.get("Content-Range", f"/{len(content)}").rpartition("/")[2]
        if total == "*" or int(total) > len(content):
            return 308, b"", {"Range": f"bytes=0-{len(content) - 1}"} if content else {}
        del self.storage.uploads[number]
        return 200, self.storage.write(bucket, name, bytes(content), query)


@contextmanager
def served(*buckets: str) -> Iterator[str]:
    """The address of a server with these buckets, for STORAGE_EMULATOR_HOST."""
    handler = type("Handler", (Handler,), {"storage": Storage(*buckets)})
    server = ThreadingHTTPServer(("localhost", 0), handler)
    server.handle_error = lambda *_: None  # a client that is killed, or has heard enough
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()
