"""`testnet up|status|kill|restart|down`."""

import argparse
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec

from blyan_node.home import create_home, is_home, write_whole
from blyan_node.rpc.ask import ask
from blyan_node.settings import Role, Settings
from blyan_node.sizes import free_memory_bytes
from blyan_node.testnet import process, state
from blyan_node.testnet.state import Member, Testnet
from protocols.dag.genesis import NONCE_BYTES, Genesis
from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.rpc.address import socket_path

LOOPBACK_ANY_PORT = "/ip4/127.0.0.1/tcp/0"
READY_S_MAX = 120.0
CONNECTED_S_MAX = 120.0
DOWN_S_MAX = 11.0
LOG_TAIL_BYTES = 2_000


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Does one verb and prints the testnet as it is then."""
    folder = Path(arguments.dir).absolute()
    verbs: dict[str, Callable[[], Testnet]] = {
        "up": lambda: up(folder, arguments.nodes, arguments.roles, settings),
        "status": lambda: state.load(folder),
        "kill": lambda: kill(folder, arguments.name or ""),
        "restart": lambda: restart(folder, arguments.name or ""),
        "down": lambda: down(folder),
    }
    _print(state.document(folder, verbs[arguments.action]()), arguments.json)
    return 0


def up(folder: Path, nodes: int | None, roles: str | None, settings: Settings) -> Testnet:
    """Starts the daemons; returns when every node is connected to every other.

    A testnet that is down is started again as it was. If a daemon fails, or on Ctrl-C, all are
    ended. Raises `Refused`, `RemoteProtocolError`.
    """
    wanted = parse_roles(nodes, roles)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    testnet = _made_before(folder, wanted) or _make(folder, wanted, settings)
    try:
        # The first node alone, so that the others do not dial an address where nobody listens yet.
        for group in (testnet.members[:1], testnet.members[1:]):
            for member in group:
                _spawn(folder, testnet, member)
            for member in group:
                _await_ready(folder, testnet, member)
        _await_connected(testnet)
    except BaseException:
        down(folder)
        raise
    return testnet


def kill(folder: Path, name: str) -> Testnet:
    """SIGKILL for one daemon; returns when it is gone."""
    testnet = state.load(folder)
    member = testnet.member(name)
    running = member.process
    if running is None:
        raise Refused(ErrorCode.CONFLICT, f"{name} is down", "", "", {"name": name})
    running.signal(signal.SIGKILL)
    process.wait_for_end([running], DOWN_S_MAX)
    _forget_process(folder, testnet, member)
    return testnet


def restart(folder: Path, name: str) -> Testnet:
    """Starts one daemon again, ending it first if it is up; returns when it is connected."""
    testnet = state.load(folder)
    member = testnet.member(name)
    running = member.process
    if running is not None:
        process.end([running], patience_s=DOWN_S_MAX)
    _spawn(folder, testnet, member)
    _await_ready(folder, testnet, member)
    _await_connected(testnet)
    return testnet


def down(folder: Path) -> Testnet:
    """Ends all daemons; returns when no process is left."""
    testnet = state.load(folder)
    running = [running for member in testnet.members if (running := member.process)]
    process.end(running, patience_s=DOWN_S_MAX)
    for member in testnet.members:
        _forget_process(folder, testnet, member)
    return testnet


def parse_roles(nodes: int | None, roles: str | None) -> list[Role]:
    """The role of each node, main nodes first; raises `RemoteProtocolError`."""
    named = [role.strip() for role in roles.split(",")] if roles else []
    for role in named:
        if role not in get_args(Role):
            raise RemoteProtocolError("--roles", f"{role[:40]!r} is neither main nor gpu")
    count = nodes if nodes is not None else len(named)
    if not 1 <= count <= state.NODES_MAX:
        raise RemoteProtocolError("--nodes", f"{count} is not between 1 and {state.NODES_MAX}")
    if len(named) not in (0, count):
        raise RemoteProtocolError("--roles", f"{len(named)} roles for {count} nodes")
    chosen: list[Role] = named or ["main", *["gpu"] * (count - 1)]  # type: ignore[assignment]
    return sorted(chosen, key=lambda role: role != "main")


def _made_before(folder: Path, roles: Sequence[Role]) -> Testnet | None:
    """The testnet that this folder has, if it is down and has these nodes."""
    if not (folder / state.FILE).exists():
        return None
    testnet = state.load(folder)
    if any(member.process for member in testnet.members):
        raise Refused(
            ErrorCode.CONFLICT,
            f"the testnet in {folder} is up",
            "",
            "end it with `blyan-node testnet down`",
            {"path": str(folder)},
        )
    if [member.role for member in testnet.members] != list(roles):
        raise Refused(
            ErrorCode.CONFLICT,
            f"{folder} has another testnet",
            f"of {len(testnet.members)} nodes",
            "give another --dir",
            {"path": str(folder)},
        )
    return testnet


def _make(folder: Path, roles: Sequence[Role], settings: Settings) -> Testnet:
    genesis = Genesis("testnet", secrets.token_bytes(NONCE_BYTES), {})
    network = folder / state.GENESIS_FILE
    write_whole(network, genesis.to_json())
    testnet = Testnet(
        network=str(network),
        members=[
            Member(name=name, role=role, rpc=socket_path(str(folder / name), os.getuid()))
            for name, role in zip(state.NAMES, roles, strict=False)
        ],
        settings={
            # Each node would take half of what is free and count on having it alone.
            "memory": free_memory_bytes() // 2 // len(roles),
            "threads": 1,
            "device": "cpu",  # one machine stands for several: they are to have the same bits
            **{key: value for key, value in msgspec.structs.asdict(settings).items() if value},
        },
    )
    state.save(folder, testnet)
    return testnet


def _spawn(folder: Path, testnet: Testnet, member: Member) -> None:
    home = folder / member.name
    if not is_home(home):
        create_home(home, role=member.role, network=Path(testnet.network))
    settings: dict[str, Any] = {
        "role": member.role,
        "listen": [addr.split("/p2p/")[0] for addr in member.addrs] or [LOOPBACK_ANY_PORT],
        "bootstrap": [addr for m in testnet.members if m is not member for addr in m.addrs],
        **testnet.settings,
    }
    if member.role == "main" and any(m.role == "gpu" for m in testnet.members):
        settings.pop("hold", None)  # a main node leaves the experts to the others, if there are any
    line = ["start", "--home", str(home), "--rpc", member.rpc, "--json"]
    for key, value in settings.items():
        line += ["--set", f"{key}={json.dumps(value)}"]
    # Between the start of a daemon and the note of it, Ctrl-C would leave one that nobody knows.
    with process.interrupt_later():
        started = process.spawn(line, _log(folder, member))
        member.pid, member.started = started.pid, started.started
        state.save(folder, testnet)


def _await_ready(folder: Path, testnet: Testnet, member: Member) -> None:
    """Waits until the daemon answers, then remembers its id and addresses."""
    deadline = time.monotonic() + READY_S_MAX
    while True:
        process.reap()
        if member.process is None:
            raise _failed(folder, member, "it ended before it was ready")
        try:
            told = ask(Path(member.rpc), "node.id", {})
        except OSError:
            told = {"addrs": []}
        if told["addrs"]:
            member.peer_id, member.addrs = told["peer_id"], told["addrs"]
            state.save(folder, testnet)
            return
        if time.monotonic() > deadline:
            raise _failed(folder, member, f"it was not ready after {READY_S_MAX:.0f} s")
        time.sleep(process.POLL_S)


def _await_connected(testnet: Testnet) -> None:
    """Waits until every node that is up is connected to every other."""
    members = [member for member in testnet.members if member.process]
    everybody = {member.peer_id for member in members}
    deadline = time.monotonic() + CONNECTED_S_MAX
    for member in members:
        while missing := everybody - {member.peer_id} - _peers(member):
            if time.monotonic() > deadline:
                raise Refused(
                    ErrorCode.TIMEOUT,
                    f"{member.name} is not connected to everybody",
                    f"it lacks {', '.join(m.name for m in members if m.peer_id in missing)} "
                    f"after {CONNECTED_S_MAX:.0f} s",
                    "look into the logs of both",
                    {"name": member.name},
                )
            time.sleep(process.POLL_S)


def _peers(member: Member) -> set[str]:
    try:
        return {peer["peer_id"] for peer in ask(Path(member.rpc), "node.peers", {})["peers"]}
    except OSError:
        return set()


def _failed(folder: Path, member: Member, why: str) -> Refused:
    log = _log(folder, member)
    tail = log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace") if log.exists() else ""
    print(tail, file=sys.stderr)
    return Refused(
        ErrorCode.TIMEOUT,
        f"{member.name} did not start",
        why,
        f"its log is {log}",
        {"name": member.name, "log": str(log)},
    )


def _forget_process(folder: Path, testnet: Testnet, member: Member) -> None:
    member.pid, member.started = None, ""
    state.save(folder, testnet)


def _log(folder: Path, member: Member) -> Path:
    return folder / f"{member.name}.log"


def _print(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(document))
        return
    print(f"network {document['network']}")
    for node in document["nodes"]:
        about = f"pid {node['pid']}  rpc {node['rpc']}" if node["pid"] else node["home"]
        print(f"{node['name']:<8} {node['role']:<4} {node['state']:<4} {node['peer_id']}  {about}")
