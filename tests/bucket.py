"""A stand-in for Google Cloud Storage: objects in memory, for epath (through fsspec) and tensorstore (over HTTP).

What speaks to it is real: epath's backend, orbax, tensorstore's driver. HTTP: cloud.google.com/storage/docs/json_api.
"""

from __future__ import annotations

import http.server
import importlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

NAME = "bucket"
registry = importlib.import_module("fsspec.registry")  # fsspec.registry is a dict of that name


class Files(MemoryFileSystem):
    """What gcsfs would be: paths are BUCKET/OBJECT."""

    protocol = ("gcs", "gs")
    store: dict[str, Any] = {}  # noqa: RUF012 - one bucket for the process, as one Google
    pseudo_dirs: list[str] = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        _, _, bare = str(path).rpartition("://")
        return f"/{bare.strip('/')}" if bare else ""


class Handler(http.server.BaseHTTPRequestHandler):
    """The few requests that tensorstore makes: list, read, write, delete."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        """Silence."""

    def answer(self, code: int, body: bytes = b"", generation: int | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        if generation is not None:
            self.send_header("x-goog-generation", str(generation))
        self.end_headers()
        self.wfile.write(body)

    def asked(self) -> tuple[str, dict[str, str]]:
        """(the path in the store, the query)."""
        url = urllib.parse.urlsplit(self.path)
        name = urllib.parse.unquote(url.path.partition("/o/")[2])
        return f"/{NAME}/{name}", dict(urllib.parse.parse_qsl(url.query))

    def described(self, path: str) -> dict[str, str]:
        file = Files.store[path]
        return {"name": path.removeprefix(f"/{NAME}/"), "generation": str(id(file)), "size": str(file.size)}

    def do_GET(self) -> None:
        path, query = self.asked()
        if path == f"/{NAME}/":
            start = f"/{NAME}/{query.get('prefix', '')}"
            items = [self.described(p) for p in sorted(Files.store) if p.startswith(start)]
            return self.answer(200, json.dumps({"items": items}).encode())
        if path not in Files.store:
            return self.answer(404)
        content, wanted = Files.store[path].getvalue(), self.headers.get("Range")
        generation = id(Files.store[path])
        if wanted is None:
            return self.answer(200, content, generation)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None] if first else content[-int(last) :]
        self.send_response(206)
        start = int(first) if first else len(content) - len(part)
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("x-goog-generation", str(generation))
        self.end_headers()
        self.wfile.write(part)

    def do_POST(self) -> None:
        _, query = self.asked()
        path = f"/{NAME}/{query['name']}"
        Files.store[path] = MemoryFile(Files(), path, self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(200, json.dumps(self.described(path)).encode())

    def do_DELETE(self) -> None:
        path, _ = self.asked()
        self.answer(204 if Files.store.pop(path, None) else 404)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """gs://bucket, empty."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    for name in Files.protocol:
        monkeypatch.setitem(registry._registry, name, Files)
    Files.store.clear()
    Files.pseudo_dirs[:] = ["", f"/{NAME}"]
    yield f"gs://{NAME}"
    server.shutdown()
    thread.join()
    server.server_close()
