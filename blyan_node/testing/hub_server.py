"""A hub on loopback: model info, tree, and files by range, with the faults that a test asks for.

Speaks what huggingface_hub asks for over HTTP/1.1. Files of weights are redirected to a second
server, as to a content network; it counts what it serves.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

PIECE = 16_384


@dataclass
class Fault:
    """What is wrong with a file: each answer ends after `cut` bytes, pauses there, or is `body`."""

    cut: int | None = None
    hang: bool = False
    body: bytes | None = None
    size: int | None = None  # what the tree says
    status: int | None = None
    no_ranges: bool = False


@dataclass
class Repository:
    """Commits by id, and the names that revisions have."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: Mapping[str, bytes], *revisions: str) -> str:
        """Adds a commit; its id."""
        listed = json.dumps([[n, hashlib.sha1(d).hexdigest()] for n, d in sorted(files.items())])
        id = hashlib.sha1(listed.encode()).hexdigest()
        self.commits[id] = dict(files)
        for name in (*revisions, id):
            self.revisions[name] = id
        return id


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    network: bool  # of the content network


class HubServer:
    """A `with` block that serves `repositories`; `url` is the endpoint."""

    def __init__(self, page: int = 1_000) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: dict[str, Fault] = {}  # by file name, or `info` and `tree`
        self.served: Counter[str] = Counter()  # bytes of bodies by file name
        self.asked: list[Asked] = []
        self.hanging = threading.Event()  # set once an answer hangs
        self.page = page
        self._over = threading.Event()
        self._servers = [self._listen(network) for network in (False, True)]

    def _listen(self, network: bool) -> ThreadingHTTPServer:
        owner = self

        class Handler(_Handler):
            hub = owner
            is_network = network

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        return server

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def network_url(self) -> str:
        """Where weights are redirected to."""
        return f"http://127.0.0.1:{self._servers[1].server_address[1]}"

    def ranges(self, name: str) -> list[tuple[int, int]]:
        """What was asked of a file at the content network: [begin, end)."""
        found = [a.range for a in self.asked if a.network and a.path.endswith(f"/{name}")]
        spans = [(r or "bytes=0-0").removeprefix("bytes=").split("-") for r in found]
        return [(int(begin), int(end) + 1) for begin, end in spans]

    def forget(self) -> None:
        """Counts anew."""
        self.served.clear()
        self.asked.clear()

    def wait(self) -> None:
        """Returns when the server ends: how an answer hangs."""
        self.hanging.set()
        self._over.wait()

    def __enter__(self) -> Self:
        self._threads = [
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
            for server in self._servers
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._over.set()
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def files_of(path: Path) -> dict[str, bytes]:
    """A directory as the files of a commit."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    is_network: bool

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        """As GET, without a body."""
        self.do_GET()

    def do_GET(self) -> None:
        """One request."""
        with suppress(BrokenPipeError, ConnectionResetError):  # clients are killed in the middle
            self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.asked.append(
            Asked(
                self.command, path, self.headers["Range"], self.headers["Authorization"],
                self.is_network,
            )
        )  # fmt: skip
        parts = path.strip("/").split("/")
        if self.is_network:
            org, name, commit, file = parts
            self._file(file, self.hub.repositories[f"{org}/{name}"].commits[commit][file], {})
        elif parts[:2] == ["api", "models"] and len(parts) >= 6:
            self._api(f"{parts[2]}/{parts[3]}", parts[4], "/".join(parts[5:]), parse_qs(url.query))
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve(f"{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]))
        else:
            self._error(404, "EntryNotFound")

    def _api(self, id: str, verb: str, revision: str, query: dict[str, list[str]]) -> None:
        repository = self.hub.repositories.get(id)
        if repository is None:
            return self._error(401, "RepoNotFound")
        if repository.gated and verb == "tree":
            return self._error(403, "GatedRepo")
        commit = repository.revisions.get(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        what = "info" if verb == "revision" else "tree"
        fault = self.hub.faults.get(what, Fault())
        if fault.hang:
            return self.hub.wait()
        if fault.status is not None:
            return self._error(fault.status, "")
        if verb == "revision":
            document: Any = {
                "id": id, "modelId": id, "sha": commit, "private": repository.private,
                "gated": "manual" if repository.gated else False, "tags": [], "siblings": [],
            }  # fmt: skip
            return self._send(200, fault.body or json.dumps(document).encode())
        begin = int(query.get("cursor", ["0"])[0])
        rows = [self._entry(n, d) for n, d in sorted(repository.commits[commit].items())]
        headers = {}
        if begin + self.hub.page < len(rows):
            following = f"{self.hub.url}/api/models/{id}/tree/{commit}"
            following += f"?cursor={begin + self.hub.page}"
            headers["Link"] = f'<{following}>; rel="next"'
        page = json.dumps(rows[begin : begin + self.hub.page]).encode()
        return self._send(200, fault.body or page, headers)

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        if "/" in name:
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name.split("/")[0]}
        size = self.hub.faults.get(name, Fault()).size
        size = len(data) if size is None else size
        row: dict[str, Any] = {"type": "file", "size": size, "path": name, "oid": _blob(data)}
        if name.endswith((".safetensors", ".bin")):
            sha256 = hashlib.sha256(data).hexdigest()
            row["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
            row["xetHash"] = sha256
        return row

    def _resolve(self, id: str, revision: str, name: str) -> None:
        repository = self.hub.repositories[id]
        commit = repository.revisions[revision]
        data = repository.commits[commit].get(name)
        headers = {"X-Repo-Commit": commit}
        if data is None:
            return self._error(404, "EntryNotFound")
        if name.endswith((".safetensors", ".bin")):
            sha256 = hashlib.sha256(data).hexdigest()
            headers |= {
                "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data)),
                "X-Xet-Hash": sha256,
                "Location": f"{self.hub.network_url}/{id}/{commit}/{name}",
            }  # fmt: skip
            return self._send(302, b"", headers)
        return self._file(name, data, headers | {"ETag": f'"{_blob(data)}"'})

    def _file(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        fault = self.hub.faults.get(name, Fault())
        if fault.status is not None:
            return self._error(fault.status, "")
        data = data if fault.body is None else fault.body
        begin, end, status = 0, len(data), 200
        asked = self.headers["Range"]
        if asked and not fault.no_ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end, status = int(first), min(len(data), int(last) + 1), 206
            if begin >= len(data):
                return self._error(416, "")
            headers = headers | {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
        self._head(status, headers | {"Content-Length": str(end - begin), "Accept-Ranges": "bytes"})
        if self.command == "GET":
            self._body(name, data[begin:end], fault)

    def _body(self, name: str, data: bytes, fault: Fault) -> None:
        end = len(data) if fault.cut is None else min(fault.cut, len(data))
        for at in range(0, end, PIECE):
            piece = data[at : min(at + PIECE, end)]
            self.wfile.write(piece)
            self.hub.served[name] += len(piece)
        self.wfile.flush()
        if end < len(data):
            if fault.hang:
                self.hub.wait()
            self.close_connection = True
            self.connection.close()

    def _error(self, status: int, code: str) -> None:
        """Says what it was sent, as servers do that are meant for finding errors."""
        said = {"X-Error-Message": f"you are {self.headers['Authorization']}"}
        self._send(
            status, json.dumps(said).encode(), said | ({"X-Error-Code": code} if code else {})
        )

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] = {}) -> None:
        self._head(status, {"Content-Length": str(len(body)), **headers})
        if self.command == "GET":
            self.wfile.write(body)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
