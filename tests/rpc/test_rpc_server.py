"""The server on a real socket: replies, batches, streams, cancelling, clients that misbehave."""

import json
import os
import random
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blyan_node.rpc import calls
from blyan_node.rpc.connection import Bound, same_user
from blyan_node.rpc.context import Context
from blyan_node.rpc.server import RpcServer, listen
from blyan_node.testing.trio_tests import trio_test
from protocols import limits
from protocols.errors import ErrorCode, LocalProtocolError, Refused, RemoteProtocolError
from protocols.rpc.generate import Token
from protocols.rpc.table import METHODS

FLOOD_LINE = "x" * 64 * limits.KIB


class Services:
    """What the handlers of these tests do, and what they have seen."""

    def __init__(self) -> None:
        self.cancelled = trio.Event()
        self.started = trio.Event()
        self.running = 0

    async def answer(self, request: object, context: Context) -> dict[str, Any]:
        return {"kind": type(request).__name__}

    async def hang(self, request: object, context: Context) -> None:
        self.running += 1
        self.started.set()
        try:
            await trio.sleep_forever()
        finally:
            self.running -= 1
            self.cancelled.set()

    async def count(self, request: Any, context: Context) -> dict[str, int]:
        """Sends `max_tokens` tokens."""
        for number in range(request.max_tokens):
            context.notify(Token(token_id=number, text="t"))
            await trio.lowlevel.checkpoint()
        return {"sent": request.max_tokens}

    async def gentle(self, request: object, context: Context) -> dict[str, str]:
        ended = trio.Event()
        context.on_cancel(ended.set)
        self.started.set()
        await ended.wait()
        return {"finish": "cancelled"}

    async def flood(self, request: object, context: Context) -> None:
        """Sends for as long as anybody might listen."""
        self.started.set()
        try:
            while True:
                context.notify(Token(token_id=0, text=FLOOD_LINE))
                await trio.lowlevel.checkpoint()
        finally:
            self.cancelled.set()

    async def refuse(self, request: object, context: Context) -> None:
        raise Refused(ErrorCode.NOT_FOUND, "no such model", "nowhere", "publish it", {"model": "x"})

    async def refuse_in_a_group(self, request: object, context: Context) -> None:
        async with trio.open_nursery():
            raise Refused(ErrorCode.BUSY, "busy", "too much")

    async def malformed(self, request: object, context: Context) -> None:
        raise RemoteProtocolError("id", "not an id")

    async def missing_file(self, request: object, context: Context) -> None:
        Path("/nowhere/at/all").read_text()

    async def bug(self, request: object, context: Context) -> None:
        raise ZeroDivisionError("a bug")

    def handlers(self) -> dict[str, Bound]:
        async def cancel(request: Any, context: Context) -> object:
            return await calls.cancel(None, request, context)  # type: ignore[arg-type]

        return dict.fromkeys(METHODS, self.answer) | {
            "rpc.cancel": cancel,
            "model.wait": self.hang,
            "generate.run": self.count,
            "forward.run": self.gentle,
            "events.subscribe": self.flood,
            "model.show": self.refuse,
            "model.list": self.refuse_in_a_group,
            "block.show": self.malformed,
            "node.id": self.missing_file,
            "node.peers": self.bug,
        }


class Peer:
    """A client that speaks plain bytes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = b""

    async def send(self, *messages: dict[str, Any] | bytes) -> None:
        lines = [m if isinstance(m, bytes) else json.dumps(m).encode() for m in messages]
        await self.stream.send_all(b"".join(line + b"\n" for line in lines))

    async def receive(self) -> Any:
        """The next line; raises `EndOfChannel` when the server has closed."""
        while b"\n" not in self._buffer:
            data = await self.stream.receive_some()
            if not data:
                raise trio.EndOfChannel
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    async def ask(self, method: str, params: dict[str, Any] | None = None) -> Any:
        await self.send(_request(1, method, params))
        return await self.receive()


def _request(
    request_id: object, method: str, params: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params or {}}


Connect = Callable[[], Any]


@asynccontextmanager
async def _serving(folder: Path) -> AsyncIterator[tuple[Services, Connect]]:
    services = Services()
    folder.chmod(0o700)
    path = folder / "rpc.sock"

    @asynccontextmanager
    async def connect() -> AsyncIterator[Peer]:
        async with await trio.open_unix_socket(path) as stream:
            yield Peer(stream)

    async with trio.open_nursery() as nursery:
        await nursery.start(RpcServer(path, services.handlers()).run)
        yield services, connect
        nursery.cancel_scope.cancel()


@trio_test
async def test_a_request_is_answered_under_its_id(tmp_path: Path) -> None:
    async with _serving(tmp_path) as (_, connect), connect() as peer:
        await peer.send(_request("a", "node.status"))
        assert await peer.receive() == {
            "jsonrpc": "2.0",
            "id": "a",
            "result": {"kind": "StatusRequest"},
        }


@trio_test
async def test_the_socket_is_for_its_user_alone(tmp_path: Path) -> None:
    async with _serving(tmp_path):
        assert stat.S_IMODE((tmp_path / "rpc.sock").stat().st_mode) == 0o600
    assert not (tmp_path / "rpc.sock").exists()


@pytest.mark.parametrize(
    ("method", "params", "code", "message"),
    [
        ("model.show", {"model": "x"}, ErrorCode.NOT_FOUND, "no such model: nowhere"),
        ("model.list", {}, ErrorCode.BUSY, "busy: too much"),
        ("block.show", {"id": "x"}, ErrorCode.BAD_INPUT, "cannot use id: not an id"),
        ("node.id", {}, ErrorCode.BAD_INPUT, "cannot use /nowhere/at/all: No such file"),
        ("node.peers", {}, ErrorCode.INTERNAL, "failed inside the node"),
        ("no.method", {}, ErrorCode.METHOD_NOT_FOUND, "no method 'no.method'"),
        ("model.show", {}, ErrorCode.INVALID_PARAMS, "`model`"),
        ("model.show", {"model": "x", "y": 1}, ErrorCode.INVALID_PARAMS, "`y`"),
    ],
)
def test_every_failure_is_an_error_with_its_code(
    tmp_path: Path, method: str, params: dict[str, Any], code: ErrorCode, message: str
) -> None:
    @trio_test
    async def run() -> None:
        async with _serving(tmp_path) as (_, connect), connect() as peer:
            error = (await peer.ask(method, params))["error"]
            assert error["code"] == code
            assert message in error["message"]
            assert (await peer.ask("node.status"))["result"]

    run()


@trio_test
async def test_a_batch_is_answered_as_one_array_without_its_notifications(tmp_path: Path) -> None:
    async with _serving(tmp_path) as (_, connect), connect() as peer:
        notification = {"jsonrpc": "2.0", "method": "node.status"}
        parts = [_request(1, "node.status"), notification, 5, _request(2, "model.show", {})]
        await peer.send(json.dumps(parts).encode())
        first, invalid, second = await peer.receive()
        assert first["result"] == {"kind": "StatusRequest"}
        assert invalid["error"]["code"] == ErrorCode.INVALID_REQUEST
        assert (second["id"], second["error"]["code"]) == (2, ErrorCode.INVALID_PARAMS)


@trio_test
async def test_notifications_alone_get_no_reply(tmp_path: Path) -> None:
    async with _serving(tmp_path) as (_, connect), connect() as peer:
        notification = {"jsonrpc": "2.0", "method": "node.status"}
        await peer.send(notification, json.dumps([notification]).encode())
        assert (await peer.ask("node.status"))["id"] == 1


@trio_test
async def test_a_stream_comes_before_its_answer_and_carries_its_id(tmp_path: Path) -> None:
    async with _serving(tmp_path) as (_, connect), connect() as peer:
        await peer.send(_request(7, "generate.run", {"model": "m", "prompt": "p", "max_tokens": 3}))
        for number in range(3):
            params = {"id": 7, "token_id": number, "text": "t", "reasoning": None}
            message = await peer.receive()
            assert (message["method"], message["params"]) == ("generate.token", params)
        assert (await peer.receive())["result"] == {"sent": 3}


@trio_test
async def test_cancelling_ends_a_request_and_frees_it(tmp_path: Path) -> None:
    async with _serving(tmp_path) as (services, connect), connect() as peer:
        await peer.send(_request(1, "model.wait", {"model": "m", "replicas": 1}))
        await services.started.wait()
        await peer.send(_request(2, "rpc.cancel", {"id": 1}))
        replies = {reply["id"]: reply for reply in [await peer.receive(), await peer.receive()]}
        assert replies[2]["result"] == {"cancelled": True}
        assert replies[1]["error"]["code"] == ErrorCode.CANCELLED
        assert services.running == 0


@trio_test
async def test_a_handler_may_end_a_cancelled_request_itself(tmp_path: Path) -> None:
    async with _serving(tmp_path) as (services, connect), connect() as peer:
        await peer.send(_request(1, "forward.run", {"model": "m", "prompt_ids": [1], "out": "/x"}))
        await services.started.wait()
        await peer.send(_request(2, "rpc.cancel", {"id": 1}))
        replies = {reply["id"]: reply for reply in [await peer.receive(), await peer.receive()]}
        assert replies[1]["result"] == {"finish": "cancelled"}


@trio_test
async def test_nobody_cancels_the_requests_of_another_connection(tmp_path: Path) -> None:
    async with _serving(tmp_path) as (services, connect), connect() as alice, connect() as bob:
        await alice.send(_request(1, "model.wait", {"model": "m", "replicas": 1}))
        await services.started.wait()
        await bob.send(_request(2, "rpc.cancel", {"id": 1}))
        assert (await bob.receive())["result"] == {"cancelled": False}
        assert services.running == 1


@trio_test
async def test_an_id_in_use_is_refused(tmp_path: Path) -> None:
    async with _serving(tmp_path) as (services, connect), connect() as peer:
        await peer.send(_request(1, "model.wait", {"model": "m", "replicas": 1}))
        await services.started.wait()
        assert (await peer.ask("node.status"))["error"]["code"] == ErrorCode.INVALID_REQUEST


@trio_test
async def test_too_many_requests_are_told_busy_and_can_still_be_cancelled(tmp_path: Path) -> None:
    async with _serving(tmp_path) as (_, connect), connect() as peer:
        for number in range(limits.rpc_in_flight_max):
            await peer.send(_request(number, "model.wait", {"model": "m", "replicas": 1}))
        await peer.send(_request("more", "node.status"))
        assert (await peer.receive())["error"]["code"] == ErrorCode.BUSY
        await peer.send(_request("end", "rpc.cancel", {"id": 0}))
        ended = {(await peer.receive())["id"], (await peer.receive())["id"]}
        assert ended == {"end", 0}


@trio_test
async def test_a_client_that_vanishes_takes_its_requests_with_it(tmp_path: Path) -> None:
    async with _serving(tmp_path) as (services, connect):
        async with connect() as peer:
            await peer.send(_request(1, "model.wait", {"model": "m", "replicas": 1}))
            await services.started.wait()
        await services.cancelled.wait()
        assert services.running == 0


@trio_test
async def test_a_client_that_only_stops_sending_still_gets_its_answers(tmp_path: Path) -> None:
    async with _serving(tmp_path) as (_, connect), connect() as peer:
        await peer.send(
            _request(1, "generate.run", {"model": "m", "prompt": "p", "max_tokens": 100})
        )
        await peer.stream.send_eof()
        lines = []
        with pytest.raises(trio.EndOfChannel):
            while True:
                lines.append(await peer.receive())
        assert lines[-1]["result"] == {"sent": 100}


@trio_test
async def test_a_client_that_never_reads_is_cut_off_and_delays_nobody(tmp_path: Path) -> None:
    async with _serving(tmp_path) as (services, connect), connect() as slow, connect() as quick:
        await slow.send(_request(1, "events.subscribe"))
        await services.started.wait()
        while not services.cancelled.is_set():
            assert (await quick.ask("node.status"))["result"]
        with pytest.raises((trio.EndOfChannel, trio.BrokenResourceError)):
            while True:
                await slow.receive()


@trio_test
async def test_a_client_that_asks_and_never_reads_is_not_read_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "rpc_output_bytes_max", limits.MIB)
    async with _serving(tmp_path) as (_, connect), connect() as peer, connect() as other:
        many = 200 * (json.dumps(_request(1, "no.method." + "x" * 60)).encode() + b"\n")
        sent = 0

        async def send() -> None:
            nonlocal sent
            while True:
                await peer.stream.send_all(many)
                sent += len(many)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await wait_all_tasks_blocked(0.2)  # the server reads no more, so the sender is stuck
            assert 0 < sent < 64 * limits.MIB
            nursery.cancel_scope.cancel()
        assert (await other.ask("node.status"))["result"]


@pytest.mark.parametrize("line", [b"garbage", b"\xff\x00", b"[" * 100, b'{"jsonrpc":"2.0"'])
def test_garbage_gets_an_error_and_the_connection_goes_on(tmp_path: Path, line: bytes) -> None:
    @trio_test
    async def run() -> None:
        async with _serving(tmp_path) as (_, connect), connect() as peer:
            await peer.send(line)
            reply = await peer.receive()
            assert reply["error"]["code"] == ErrorCode.PARSE
            assert reply["id"] is None
            assert (await peer.ask("node.status"))["result"]

    run()


@trio_test
async def test_a_huge_line_gets_an_error_and_ends_the_connection(tmp_path: Path) -> None:
    async with _serving(tmp_path) as (_, connect), connect() as peer, connect() as other:
        with suppress(trio.BrokenResourceError):  # the server need not take all of it
            await peer.stream.send_all(b"x" * (limits.rpc_line_bytes_max + 64 * limits.KIB))
        assert "longer than" in (await peer.receive())["error"]["message"]
        with pytest.raises((trio.EndOfChannel, trio.BrokenResourceError)):
            await peer.receive()
        assert (await other.ask("node.status"))["result"]


@trio_test
async def test_random_bytes_leave_the_server_alive(tmp_path: Path) -> None:
    rng = random.Random(11)
    async with _serving(tmp_path) as (_, connect):
        for _ in range(100):
            async with connect() as peer:
                await peer.stream.send_all(rng.randbytes(rng.randint(1, 4000)))
        async with connect() as peer:
            assert (await peer.ask("node.status"))["result"]


@trio_test
async def test_half_a_line_costs_nothing_that_lasts(tmp_path: Path) -> None:
    async with _serving(tmp_path) as (_, connect):
        for _ in range(2 * limits.rpc_connections_max):
            async with connect() as peer:
                await peer.stream.send_all(b'{"jsonrpc":')
        async with connect() as peer:
            assert (await peer.ask("node.status"))["result"]


@trio_test
async def test_connections_are_bounded(tmp_path: Path) -> None:
    async with _serving(tmp_path) as (_, connect):
        async with trio.open_nursery() as nursery:
            gate, full = trio.Event(), trio.Event()
            count = 0

            async def stay() -> None:
                nonlocal count
                async with connect() as peer:
                    await peer.ask("node.status")
                    count += 1
                    if count == limits.rpc_connections_max:
                        full.set()
                    await gate.wait()

            for _ in range(limits.rpc_connections_max):
                nursery.start_soon(stay)
            await full.wait()
            async with connect() as peer:
                assert (await peer.receive())["error"]["code"] == ErrorCode.BUSY
            gate.set()
        answer: dict[str, Any] = {}
        while "result" not in answer:  # the server may still be busy with closing
            with suppress(trio.BrokenResourceError):
                async with connect() as peer:
                    answer = await peer.ask("node.status")


@trio_test
async def test_requests_that_run_when_the_node_stops_are_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    services = Services()
    path = tmp_path / "rpc.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(RpcServer(path, services.handlers()).run)
        async with await trio.open_unix_socket(path) as stream:
            peer = Peer(stream)
            await peer.send(_request(1, "model.wait", {"model": "m", "replicas": 1}))
            await services.started.wait()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                assert "stopping" in (await peer.receive())["error"]["message"]


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(Refused, match="others may enter"):
        listen(tmp_path / "rpc.sock")


@trio_test
async def test_the_socket_of_a_node_that_is_gone_is_replaced(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "rpc.sock"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    listen(path).close()


def test_the_socket_of_a_node_that_lives_is_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "rpc.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(Refused, match="already answers"):
            listen(path)


def test_another_file_is_never_removed(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "rpc.sock"
    path.write_text("mine")
    with pytest.raises(Refused, match="cannot listen"):
        listen(path)
    assert path.read_text() == "mine"


def test_a_handler_too_few_is_our_bug(tmp_path: Path) -> None:
    handlers = Services().handlers()
    del handlers["node.stop"]
    with pytest.raises(LocalProtocolError, match=r"node\.stop"):
        RpcServer(tmp_path / "rpc.sock", handlers)


def test_the_other_end_is_told_by_its_credentials() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        wrapped = trio.socket.from_stdlib_socket(ours)
        assert same_user(wrapped, os.getuid())
        assert os.getuid() == 0 or not same_user(wrapped, os.getuid() + 1)


def test_another_user_is_turned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blyan_node.rpc.server.same_user", lambda sock, uid: False)

    @trio_test
    async def run() -> None:
        async with _serving(tmp_path) as (_, connect), connect() as peer:
            with pytest.raises((trio.EndOfChannel, trio.BrokenResourceError)):
                await peer.receive()

    run()
