"""Talks to the hub, and to nobody else: `python -m blyan_node.hub.process`.

huggingface_hub blocks, waits and retries as it likes, so it runs here: the daemon
(`blyan_node.services.hub`) asks by frames on stdin, hears of progress on stdout, and kills the
process when nobody wants the file any more. It ends by itself when its stdin does, whatever it is
doing. The library finds the repository, its commit and its files; the bytes are then asked for in
ranges, so that what an earlier run left is completed, over plain HTTP, for a file that Xet rebuilds
cannot be gone on with.
"""

import os
import queue
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from blyan_node.hub.messages import (
    LENGTH_BYTES,
    Answer,
    Get,
    Got,
    HubFile,
    Listing,
    Look,
    Open,
    Refusal,
    Request,
    Whole,
    frame,
)
from blyan_node.hub.refusals import explained, is_passing, require_token
from blyan_node.hub.transfer import CutOff, transfer
from protocols import limits
from protocols.errors import Refused

Send = Callable[[Answer], None]


class HubClient:
    """One repository at one commit."""

    def __init__(self, opened: Open) -> None:
        self._opened = opened
        # Read by the library when it is imported.
        os.environ |= {
            "HF_ENDPOINT": opened.endpoint,
            "HF_HOME": opened.home,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        from huggingface_hub import HfApi

        token: str | bool = os.environ.get("HF_TOKEN", "").strip() or False
        self._api = HfApi(endpoint=opened.endpoint, token=token, library_name="blyan-node")
        self._token = token
        self._repository = ""
        self._commit = ""
        self._files: dict[str, HubFile] = {}

    def look(self, repository: str, revision: str) -> Listing:
        """The commit that a revision is now, and the files of its root folder."""
        from huggingface_hub.hf_api import RepoFile

        if self._token:
            require_token(str(self._token))
        info = self._api.model_info(repository, revision=revision, timeout=self._opened.read_s)
        commit = str(info.sha)
        entries = self._api.list_repo_tree(repository, revision=commit)
        found = list(islice(entries, limits.hub_files_max + 1))
        if len(found) > limits.hub_files_max:
            raise ValueError(f"more than {limits.hub_files_max} files")
        files = [_file(entry) for entry in found if isinstance(entry, RepoFile)]
        self._repository, self._commit = repository, commit
        self._files = {file.name: file for file in files}
        return Listing(commit, bool(info.private) or bool(info.gated), files)

    def get(self, wanted: Get, send: Send) -> Whole:
        """Completes a file; tries again as long as something comes of it."""
        file, path, tries = self._files[wanted.name], Path(wanted.path), 0
        while True:
            before = path.stat().st_size if path.exists() else 0
            try:
                transfer(file, path, wanted.upto, self._asking(file), lambda n: send(Got(n)))
                return Whole()
            except Exception as error:  # of the library, whichever HTTP client it uses
                tries = 1 if path.stat().st_size > before else tries + 1
                if tries > self._opened.tries or not (
                    isinstance(error, CutOff) or is_passing(error)
                ):
                    raise
                time.sleep(self._opened.pause_s)

    def _asking(self, file: HubFile) -> Any:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # loaded lazily
            build_hf_headers,
            hf_raise_for_status,
        )

        url = hf_hub_url(
            self._repository, file.name, revision=self._commit, endpoint=self._opened.endpoint
        )
        headers = build_hf_headers(token=self._token, library_name="blyan-node")

        @contextmanager
        def ask(begin: int, end: int) -> Iterator[_Response]:
            asked = headers | {"Accept-Encoding": "identity", "Range": f"bytes={begin}-{end - 1}"}
            session = get_session()
            with session.stream("GET", url, headers=asked, timeout=self._opened.read_s) as got:
                hf_raise_for_status(got)
                yield _Response(got)

        return ask


class _Response:
    """A running answer of the hub."""

    def __init__(self, response: Any) -> None:
        self._response = response
        self.whole: bool = response.status_code != 206

    def pieces(self) -> Iterator[bytes]:
        """Its bytes as they come."""
        pieces: Iterator[bytes] = self._response.iter_raw()  # as asked for, not unpacked
        return pieces


def _file(entry: Any) -> HubFile:
    """A file of the library's listing."""
    lfs = entry.lfs
    plain = {
        "name": entry.path,
        "size": entry.size,
        "hash": entry.blob_id if lfs is None else lfs.sha256,
    }
    try:
        return msgspec.convert(plain, HubFile)
    except msgspec.ValidationError as error:
        raise ValueError(f"{str(entry.path)[:80]!r} has no size or hash: {error}") from None


def main() -> None:
    """Answers until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, which then ends us
    if sys.platform == "linux":
        most = limits.hub_process_bytes_max
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, requests), daemon=True).start()
    output = sys.stdout.buffer
    sys.stdout = sys.stderr  # nobody else writes where the frames go

    def send(answer: Answer) -> None:
        output.write(frame(answer))
        output.flush()

    serve(requests.get, send)


def serve(take: Callable[[], Request], send: Send) -> None:
    """Answers requests for ever; `take` does not return once there are no more."""
    client: HubClient | None = None
    while True:
        request = take()
        try:
            if isinstance(request, Open):
                client = HubClient(request)
                continue
            assert client is not None, "the first request is `Open`"
            if isinstance(request, Look):
                send(client.look(request.repository, request.revision))
            else:
                send(client.get(request, send))
        except Exception as error:  # whatever the library makes of what the hub sends
            refused = error if isinstance(error, Refused) else explained(error, request)
            data = dict(refused.data)
            send(Refusal(int(refused.code), refused.what, refused.why, refused.next, data))


def _read(source: BinaryIO, requests: "queue.SimpleQueue[Request]") -> None:
    """Puts requests into the queue; ends the process at the end, in the middle of whatever."""
    while len(length := source.read(LENGTH_BYTES)) == LENGTH_BYTES:
        data = source.read(int.from_bytes(length, "big"))
        requests.put(msgspec.msgpack.decode(data, type=Request))
    os._exit(0)


if __name__ == "__main__":
    main()
