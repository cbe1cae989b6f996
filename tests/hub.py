"""A small hub on loopback that the real client talks to: gated, unauthorized, missing, slow, cut off and resumable."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GATED = {
    "": (401, "Access to model {} is restricted. You must have access to it and be authenticated to access it."),
    "other": (403, "Access to model {} is restricted and you are not in the authorized list."),
    "narrow": (403, "Please enable access to public gated repositories in your fine-grained token settings."),
    "expired": (401, "Invalid credentials in Authorization header"),
}
"""Token -> status and message of a gated repository, as huggingface.co words them; "member" has access."""


@dataclass
class Hub:
    """What is on the hub, how it misbehaves, and what was asked of it.

    ``cut`` ends the transfer of a file of that name after so many bytes, once; ``short`` sends so many bytes less than
    it has, always, as if that were all; ``busy`` refuses to send a file of that name with these answers (status,
    Retry-After), one after the other; ``delay_s`` comes before every answer.
    """

    repos: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    short: dict[str, int] = field(default_factory=dict)
    busy: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    delay_s: float = 0.0
    endpoint: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Range header)."""

    def fetched(self) -> set[str]:
        """Names of the files whose bytes were asked for."""
        return {path.split(f"/resolve/{COMMIT}/")[-1] for method, path, _ in self.requests if "GET" in method} - {
            path for _, path, _ in self.requests if path.startswith("/api/")
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        time.sleep(self.hub.delay_s)
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if is_api else parts[:2])
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo not in self.hub.repos:
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif repo in self.hub.gated and token != "member" and (not is_api or token == "expired"):
            status, message = GATED[token]
            self._refuse(status, "" if token == "expired" else "GatedRepo", message.format(repo))
        elif is_api:
            self._list(repo, parts[4], parts[5])
        else:
            self._file(self.hub.repos[repo], parts[3], Path(*parts[4:]))

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _list(self, repo: str, what: str, revision: str) -> None:
        if revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
            return
        folder = self.hub.repos[repo]
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        if what == "tree":
            entries = [
                {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": _tag(folder / name)}
                for name in files
            ]
            self._json(entries)
        else:
            self._json({"_id": "0", "id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _file(self, folder: Path, revision: str, name: Path) -> None:
        path = folder / name
        if revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
            return
        if not path.is_file():
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        if self.command == "GET" and self.hub.busy.get(name.name):
            status, after = self.hub.busy[name.name].pop(0)
            self.send_response(status)
            if after:
                self.send_header("Retry-After", after)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = path.read_bytes()
        if self.command == "GET":
            body = body[: len(body) - self.hub.short.get(name.name, 0)]
        size, start = len(body), 0
        asked = self.headers.get("Range", "")
        if self.command == "GET" and asked.startswith("bytes="):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("ETag", f'"{_tag(path)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cut.pop(name.name, None)
        self.wfile.write(body[start : size if cut is None else start + cut])
        if cut is not None:
            self.close_connection = True


def _tag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve on a free port of 127.0.0.1 while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
