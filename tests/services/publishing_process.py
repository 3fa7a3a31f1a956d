"""A process that publishes a directory, to be killed or to run out of room by the tests.

Run as `python publishing_process.py MODEL DATA [LIMIT]`: opens the store DATA, publishes MODEL and
prints the result as JSON; LIMIT bounds the size of each file it may write. It says "ready" once the
store is open. `serve MODEL DIR` is a parent that forks such processes on demand, so that fifty of
them cost no fifty imports; `kill SECONDS` on its standard input kills the next one in the middle,
and so does the name of one of `MOMENTS`.
"""

import dataclasses
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import trio

import storage.tensors
from blyan_node.services.authoring import Author
from blyan_node.services.chain import Chain
from blyan_node.services.drafting import Drafting
from blyan_node.services.publish import Publish
from blyan_node.testing.blocks import identity
from protocols import limits
from protocols.dag.genesis import DEVELOPMENT
from protocols.errors import Refused
from storage.blocks import Blocks
from storage.chunks import Chunks
from storage.fsck import check
from storage.store import Store, open_store

BATCH_BYTES = 4 * limits.KIB
# A step of a publish: who takes it, under which name, and which of its calls is the last.
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "hash": (storage.tensors, "chunk_hash", 30),
    "write": (Chunks, "put", 9),
    "enter": (Chunks, "_enter", 9),  # the bytes are in their file, and no row says so
    "stage": (Blocks, "stage", 3),
    "sign": (Author, "block", 9),
    "release": (Drafting, "_release", 1),
    "pin": (Store, "pin", 1),
    "submit": (Chain, "submit", 1),
    "commit": (Blocks, "accept", 1),
    "tidy": (Publish, "_tidy", 1),
}


def dies_at(moment: str) -> None:
    """This process is killed before the step `moment` is taken, or after it: "after commit"."""
    after = moment.startswith("after ")
    owner, name, last = MOMENTS[moment.removeprefix("after ")]
    limits.ingest_batch_bytes = limits.ingest_unsynced_bytes_max = BATCH_BYTES
    step, calls = getattr(owner, name), 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        done = step(*args, **options)
        if calls == last and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(owner, name, counted)


def publish(model: Path, data: Path, limit: int | None = None) -> dict[str, Any]:
    """Publishes `model` into the store at `data`; what it said, or how it was refused."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def now_ms() -> int:
        return time.time_ns() // 1_000_000

    async def run() -> dict[str, Any]:
        chain = Chain(store, DEVELOPMENT.id, now_ms)
        author = Author(store, identity("alice"), DEVELOPMENT.id, now_ms)
        service = Publish(store, chain, author, trio.CapacityLimiter(1))
        found = dataclasses.asdict(await service.publish(model, "killed"))
        return {k: v.hex() if isinstance(v, bytes) else v for k, v in found.items()}

    try:
        with open_store(data) as store:
            return trio.run(run)
    except Refused as refused:
        return {"refused": refused.code.name, "message": str(refused)}


def look(data: Path) -> dict[str, Any]:
    """What fsck says of a store, and what is in it."""
    with open_store(data) as store:
        report = check(store)
        return {"bad": [str(fault) for fault in report.bad], **dataclasses.asdict(store.stats())}


def publish_and_die(model: Path, data: Path, when: float | str) -> dict[str, Any]:
    """Publishes in a process of its own that is killed, then looks.

    `when` is how many seconds it has, or a step as `dies_at` takes it.
    """
    child = os.fork()
    if child == 0:
        if isinstance(when, str):
            dies_at(when)
        publish(model, data)
        os._exit(0)
    if not isinstance(when, str):
        time.sleep(when)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return {"killed": os.WIFSIGNALED(status), **look(data)}


def main(verb: str, model: str, *rest: str) -> None:
    """`publish`, `look`, or `serve`: reads one JSON list [data, when] a line, None for never."""
    if verb == "publish":
        data, *limit = rest
        print(json.dumps(publish(Path(model), Path(data), *map(int, limit))))
    elif verb == "look":
        print(json.dumps(look(Path(model))))
    for line in sys.stdin if verb == "serve" else ():
        name, when = json.loads(line)
        if when is None:
            started = time.monotonic()
            answer = publish(Path(model), Path(name)) | look(Path(name))
            answer["seconds"] = time.monotonic() - started
        else:
            answer = publish_and_die(Path(model), Path(name), when)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
