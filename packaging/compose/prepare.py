"""Makes the homes of a compose testnet: a network, an identity each, and how they find each other.

usage: prepare.py FOLDER NAME=ROLE…

The first node named is the one that the others start from, reached by its name. Each home is
FOLDER/NAME, and the network's genesis FOLDER/network.json, for more nodes to join with. Safe to run
again, and to interrupt: what is there stays, and so does what an operator wrote in a config.toml,
except the address of the first node, which is kept true to its key.
"""

import os
import secrets
import sys
from pathlib import Path
from typing import get_args

import tomlkit

from blyan_node.config import GENESIS_FILE, KEY_FILE
from blyan_node.config_file import FILE, config_text
from blyan_node.home import create_home, read_genesis, write_whole
from blyan_node.identity import load_identity
from blyan_node.settings import Role
from protocols.dag.genesis import NONCE_BYTES, Genesis
from protocols.errors import Refused, RemoteProtocolError
from protocols.rpc import telling

PORT = 4040


def main(arguments: list[str]) -> int:
    """Prepares every home; returns the exit code."""
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 3
    folder, roles = Path(arguments[0]), dict(map(_named, arguments[1:]))
    try:
        prepare(folder, roles)
    except PermissionError as error:
        print(
            f"error: cannot write {error.filename}\n"
            f"  why: this runs as user {os.getuid()}, and the folder is of another\n"
            "  next: export BLYAN_UID=$(id -u) BLYAN_GID=$(id -g)",
            file=sys.stderr,
        )
        return 1
    except Refused as refused:
        print("\n".join(telling.lines(refused)), file=sys.stderr)
        return 1
    except RemoteProtocolError as error:
        print(f"error: cannot use {error.where}\n  why: {error.why}", file=sys.stderr)
        return 1
    return 0


def prepare(folder: Path, roles: dict[str, Role]) -> None:
    """Makes what is missing of the network and of each home in `folder`."""
    first, *others = roles
    network = folder / GENESIS_FILE
    if not network.exists():
        made = [home for name in roles if (home := folder / name / GENESIS_FILE).exists()]
        genesis = read_genesis(made[0]) if made else _new_genesis()
        write_whole(network, genesis.to_json())
    for name, role in roles.items():
        _make_home(folder / name, role, network)
    start_from = f"/dns4/{first}/tcp/{PORT}/p2p/"
    peer_id = load_identity(folder / first / KEY_FILE).peer_id
    for name in others:
        _point_at(folder / name / FILE, start_from, peer_id)


def _new_genesis() -> Genesis:
    return Genesis("compose", secrets.token_bytes(NONCE_BYTES), {})


def _make_home(home: Path, role: Role, network: Path) -> None:
    if not (home / KEY_FILE).exists():
        config = home / FILE
        # The key is what is made last: this is the rest of a run that was interrupted before it.
        if config.exists() and config.read_text() == config_text(role):
            config.unlink()
        made = create_home(home, role=role, network=network)
        print(f"{home.name}: {role} node {made['peer_id']}")


def _point_at(config: Path, start_from: str, peer_id: str) -> None:
    """Has `bootstrap` name the node `peer_id` at `start_from`, and nobody else there."""
    document = tomlkit.parse(config.read_text())
    before = list(document.get("bootstrap", []))
    after = [address for address in before if not address.startswith(start_from)]
    after.append(start_from + peer_id)
    if sorted(after) != sorted(before):
        document["bootstrap"] = after
        write_whole(config, tomlkit.dumps(document))


def _named(argument: str) -> tuple[str, Role]:
    name, _, role = argument.partition("=")
    if not name or role not in get_args(Role):
        sys.exit(f"{argument!r} is not NAME=main or NAME=gpu")
    return name, role  # type: ignore[return-value]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
