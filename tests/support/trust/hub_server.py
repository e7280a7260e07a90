"""A model hub for tests: what Hugging Face and ModelScope answer, on localhost, from bytes.

A mirror is the same server over other bytes; `drop` cuts the first answers short, as a broken line does; `instead`
answers in its own way for a file, or for the listing (""), once or for ever.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """Files of one repository, and how the server misbehaves."""

    def __init__(self, repo: str, files: Mapping[str, bytes]) -> None:
        self.repo = repo
        self.files = dict(files)
        self.drop: dict[str, int] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.instead: dict[str, Callable[[Any], None]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.address = ""

    def siblings(self) -> list[dict[str, object]]:
        out: list[dict[str, object]] = []
        for name, data in self.files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
            if name.endswith((".safetensors", ".bin", ".model")):
                lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                entry["lfs"] = lfs
            out.append(entry)
        return out

    def scope_files(self) -> list[dict[str, object]]:
        return [
            {
                "Path": name,
                "Name": name,
                "Type": "blob",
                "Size": len(data),
                "Sha256": hashlib.sha256(data).hexdigest(),
            }
            for name, data in self.files.items()
        ]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def answer(self, body: bool) -> None:
            url = urlparse(self.path)
            path = unquote(url.path)
            hub.requests.append((self.path, dict(self.headers)))
            listing = path.startswith(f"/api/models/{hub.repo}") or path == f"/api/v1/models/{hub.repo}/repo/files"
            if listing and "" in hub.instead:
                return hub.instead[""](self)
            if path.startswith(f"/api/models/{hub.repo}"):
                about = {
                    "id": hub.repo,
                    "modelId": hub.repo,
                    "sha": COMMIT,
                    "siblings": hub.siblings(),
                    "tags": [],
                }
                return self.give(json.dumps(about).encode(), body)
            if path == f"/api/v1/models/{hub.repo}/repo/files":
                found = {"Code": 200, "Success": True, "Data": {"Files": hub.scope_files()}}
                return self.give(json.dumps(found).encode(), body)
            name = path.removeprefix(f"/{hub.repo}/resolve/").partition("/")[2]
            if path == f"/api/v1/models/{hub.repo}/repo":
                name = parse_qs(url.query)["FilePath"][0]
            if name not in hub.files:
                return self.give(b"Entry not found", body, 404, {"X-Error-Code": "EntryNotFound"})
            if body:
                hub.asked.append((name, self.headers.get("Range")))
            if name in hub.instead:
                return hub.instead[name](self)
            return self.file(name, body)

        def file(self, name: str, body: bool) -> None:
            data = hub.files[name]
            tag = git_sha1(data) if name.endswith(".json") else hashlib.sha256(data).hexdigest()
            headers = {
                "ETag": f'"{tag}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            status, start = 200, 0
            wanted = self.headers.get("Range")
            if wanted:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, end = int(first), int(last) if last else len(data) - 1
                headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
                status, data = 206, data[start : end + 1]
            cut = hub.drop.pop(name, None) if body else None
            self.give(data, body, status, headers, cut)

        def give(
            self, data: bytes, body: bool, status: int = 200,
            headers: Mapping[str, str] | None = None, cut: int | None = None,
        ) -> None:  # fmt: skip
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                with suppress(OSError):  # the client went away
                    self.wfile.write(data if cut is None else data[:cut])
            if cut is not None:
                self.close_connection = True

    return Handler


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve until the block ends; `hub.address` is where."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
