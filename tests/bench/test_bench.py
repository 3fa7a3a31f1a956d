"""The bench harness: rows are honest, chains validate, models are models."""

import importlib
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import trio.testing

from blyan_node.bench import __main__ as command
from blyan_node.bench import links, opening, publishing
from blyan_node.bench.chains import NOW_MS, Author
from blyan_node.bench.models import write_model
from blyan_node.bench.rows import alternate, alternate_async, row
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.testing.trio_tests import trio_test
from protocols.dag.admission import Accepted, Staged, admit
from protocols.dag.genesis import DEVELOPMENT
from protocols.dag.validate import decode_block
from protocols.dag.view import MemoryView
from protocols.errors import RemoteProtocolError
from protocols.limits import chunk_bytes
from protocols.tensors.manifest import Dtype, Manifest
from storage.leveldb import LevelDBEngine


def test_measures_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    values = iter([1e9, 1e9, 3.0, 30.0, 1.0, 10.0, 2.0, 20.0])

    def measure(name: str) -> float:
        calls.append(name)
        return next(values)

    medians = alternate(3, a=lambda: measure("a"), b=lambda: measure("b"))
    assert "".join(calls) == "abababab"
    assert medians == {"a": 2.0, "b": 20.0}


@trio_test
async def test_awaiting_measures_take_turns_too() -> None:
    values = {"a": iter([9.0, 1.0, 3.0, 2.0]), "b": iter([9.0, 5.0, 5.0, 5.0])}

    async def measure(name: str) -> float:
        return next(values[name])

    medians = await alternate_async(3, a=lambda: measure("a"), b=lambda: measure("b"))
    assert medians == {"a": 2.0, "b": 5.0}


def test_the_ratio_is_to_the_first_peer_that_is_installed() -> None:
    made = row("x", "s", 3.0, beside={"gone": None, "limit": 1.5, "other": 1.0}, goal="", runs=1)
    assert made.ratio == 2.0
    assert row("x", "s", 3.0, beside={"gone": None}, goal="", runs=1).ratio is None


def test_the_report_is_one_json_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = ModuleType("fake")
    made = row("idle", "s", 1.0, beside={"limit": None}, goal="< 2", runs=1)
    fake.measure = lambda: [made]  # type: ignore[attr-defined]
    monkeypatch.setattr(importlib, "import_module", lambda name: fake)
    assert command.main(["idle", "--json"]) == 0
    (printed,) = json.loads(capsys.readouterr().out)["rows"]
    assert printed == {
        "name": "idle", "value": 1.0, "unit": "s", "beside": {"limit": None},
        "ratio": None, "goal": "< 2", "runs": 1,
    }  # fmt: skip
    assert command.main(["idle"]) == 0
    assert "limit not on this machine" in capsys.readouterr().out


@pytest.mark.parametrize("name", command.MEASUREMENTS)
def test_every_measurement_can_be_taken(name: str) -> None:
    assert callable(command.measurement(name))
    assert command.meant(name) == [name]


def test_a_name_means_what_begins_with_it() -> None:
    assert {"decode-float32", "decode-16bit", "decode-8bit"} <= set(command.meant("decode"))
    assert command.meant("kernels") == ["kernels"]
    with pytest.raises(RemoteProtocolError, match="there is none; there are verify-1000"):
        command.meant("deco")


def test_a_peer_that_is_missing_is_said_to_be_and_how_to_get_it() -> None:
    made = row("x", "s", 1.0, beside={"llama.cpp F32": None}, goal="", runs=1)
    assert "node-llama-cpp" in command.line(made)


def test_what_is_measured_validates() -> None:
    author, view = Author(), MemoryView()
    model = author.model()
    parts = author.parts(model.id, 40)
    updates = list(islice(author.updates(parts), 90))
    view.manifests |= {id: Manifest.decode(data) for id, data in author.manifests.items()}
    for block in (model, *parts):
        decoded = decode_block(block.encode(), network=DEVELOPMENT.id, now_ms=NOW_MS)
        assert isinstance(admit(decoded, view), Staged)
        view.stage(decoded)
    release = author.release(model.id, parts)
    view.manifests |= {id: Manifest.decode(data) for id, data in author.manifests.items()}
    view.bodies[release.id] = {p.header.subject: p.id for p in parts if p.header.subject}
    for block in (release, *updates):
        decoded = decode_block(block.encode(), network=DEVELOPMENT.id, now_ms=NOW_MS)
        verdict = admit(decoded, view)
        assert isinstance(verdict, Accepted)
        view.accept(verdict.blocks, {model.id: verdict.heads})
    assert len(view.log) == 1 + 40 + 1 + 90


def test_a_store_to_open_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "BLOCKS", 300)
    monkeypatch.setattr(opening, "SUBJECTS", 98)
    monkeypatch.setattr(opening, "BATCH", 50)
    (made,) = opening.measure()
    assert made.name == "open-100000"
    assert made.value > 0


@pytest.mark.parametrize("dtype", [Dtype.F32, Dtype.BF16])
def test_the_model_is_one_that_can_be_published(dtype: Dtype, tmp_path: Path) -> None:
    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    checkpoint = Checkpoint.open(write_model(tmp_path / "once", dtype, **small))
    assert len(checkpoint.subjects) == 2 * (1 + 1 + 4) + 2
    write_model(tmp_path / "again", dtype, **small)
    for file in (tmp_path / "once").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_publish_is_measured_beside_what_writes_the_same_bytes(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "a.safetensors").write_bytes(os.urandom(3 * chunk_bytes + 5))
    (model / "config.json").write_bytes(b"{}")
    publishing.copy(model, tmp_path / "copy")
    publishing.fill_leveldb(model, tmp_path / "leveldb")
    engine = LevelDBEngine(tmp_path / "leveldb", buffer_bytes=1 << 20, cache_bytes=1 << 20)
    pieces = [data for _, data in engine.iterate(b"")]
    engine.close()
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()} == files
    assert sorted(map(len, pieces)) == [2, 5, chunk_bytes, chunk_bytes, chunk_bytes]
    assert sorted(b"".join(pieces)) == sorted(b"".join(files.values()))


class _Pipe:
    """A `ByteStream` in memory."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._rest = b""

    async def read(self, size: int) -> bytes:
        while len(self._rest) < size:
            part = await self._stream.receive_some()
            if not part:
                raise EOFError
            self._rest += part
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    async def write(self, data: bytes) -> None:
        await self._stream.send_all(data)


def _bodies() -> Iterator[bytes]:
    yield from (b"", b"a", b"b" * 70_000)


@trio_test
async def test_a_link_answers_in_order() -> None:
    near, far = trio.testing.memory_stream_pair()
    link = links.Link(_Pipe(near))
    replies: dict[bytes, bytes] = {}

    async def ask(body: bytes) -> None:
        replies[body] = await link.ask(links.ECHO, body)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(links.answer, _Pipe(far), b"chunks")
        async with trio.open_nursery() as asking:
            for body in _bodies():
                asking.start_soon(ask, body)
        assert replies == {body: body for body in _bodies()}
        assert await link.ask(links.CHUNKS, b"which") == b"chunks"
        await near.aclose()
