"""What a testnet's folder remembers: `testnet.json`, written whole before and after every step.

DIR/testnet.json     the nodes, their ports and their processes
DIR/network.json     the genesis
DIR/alice/           a node's home
DIR/alice.log        what its daemon wrote
"""

from pathlib import Path
from typing import Any

import msgspec

from blyan_node.home import write_whole
from blyan_node.settings import Role
from blyan_node.testnet.process import Process
from protocols.errors import ErrorCode, Refused

FILE = "testnet.json"
GENESIS_FILE = "network.json"
NAMES = (
    "alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi", "ivan", "judy", "kate",
    "leo", "mallory", "nina", "olivia", "peggy", "quentin", "rupert", "sybil", "trent", "ursula",
    "victor", "wendy", "xavier", "yvonne", "zoe",
)  # fmt: skip
NODES_MAX = len(NAMES)


class Member(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One node. `addrs` and `peer_id` are known once it has been ready; `pid` None when down."""

    name: str
    role: Role
    rpc: str
    peer_id: str = ""
    addrs: list[str] = []
    pid: int | None = None
    started: str = ""

    @property
    def process(self) -> Process | None:
        """The node's process if it runs."""
        if self.pid is None:
            return None
        process = Process(self.pid, self.started)
        return process if process.alive else None


class Testnet(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A testnet; `settings` are the keys of `config.toml` that its nodes are started with."""

    __test__ = False

    network: str
    members: list[Member]
    settings: dict[str, Any] = {}

    def member(self, name: str) -> Member:
        """The node called `name`; raises `Refused`."""
        for member in self.members:
            if member.name == name:
                return member
        raise Refused(
            ErrorCode.NOT_FOUND,
            f"there is no node {name!r}",
            f"there are {', '.join(member.name for member in self.members)}",
            "",
            {"name": name},
        )


def load(folder: Path) -> Testnet:
    """Reads the state; raises `Refused` if there is no testnet here."""
    path = folder / FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Testnet)
    except FileNotFoundError:
        raise Refused(
            ErrorCode.NOT_FOUND,
            f"no testnet in {folder}",
            f"{FILE} is not there",
            "make one with `blyan-node testnet up`",
            {"path": str(folder)},
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refused(
            ErrorCode.CORRUPT, f"cannot read {path}", str(error), "", {"path": str(path)}
        ) from None


def save(folder: Path, testnet: Testnet) -> None:
    """Writes the state."""
    write_whole(folder / FILE, msgspec.json.encode(testnet).decode())


def document(folder: Path, testnet: Testnet) -> dict[str, Any]:
    """What `up` and `status` answer."""
    return {
        "dir": str(folder),
        "network": testnet.network,
        "nodes": [_row(folder, member) for member in testnet.members],
    }


def _row(folder: Path, member: Member) -> dict[str, Any]:
    up = member.process is not None
    return {
        "name": member.name,
        "role": member.role,
        "state": "up" if up else "down",
        "home": str(folder / member.name),
        "rpc": member.rpc,
        "peer_id": member.peer_id,
        "addrs": member.addrs,
        "pid": member.pid if up else None,
    }
