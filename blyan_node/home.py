"""A node's home: made by `init`, read by everything else.

HOME/               0700
  identity.key      0600, the node's secret seed
  network.json      the genesis of its network
  config.toml       what the operator may change, with comments
  swarm.key         0600, the key of a private swarm, where there is one
  data/             the store
  downloads/        models from the hub, until they are published
  rpc.sock          while the node runs
"""

import os
from pathlib import Path

from blyan_node import config
from blyan_node.config import Config
from blyan_node.config_file import FILE, config_text, read_file
from blyan_node.identity import create_identity, load_psk, write_secret
from blyan_node.settings import Role, Settings
from protocols import limits
from protocols.dag.genesis import DEVELOPMENT, Genesis
from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.ids import cid_text
from protocols.psk import psk_text

HOME_FOLDER_MODE = 0o700


def is_home(home: Path) -> bool:
    """Whether a node has been made here, even if only in part."""
    return any((home / name).exists() for name in (config.KEY_FILE, FILE))


def create_home(
    home: Path, *, role: Role, network: Path | None, psk: Path | None = None
) -> dict[str, str]:
    """Makes a home; refuses to overwrite one. What it says of it is `init`'s answer.

    It keeps a copy of `network`, and of `psk`, the key of a private swarm.
    """
    if is_home(home):
        raise Refused(
            ErrorCode.CONFLICT,
            f"{home} is a node's home already",
            "`init` never overwrites a key or a configuration",
            "start it with `blyan-node start`, or give another --home",
            {"path": str(home)},
        )
    if home.exists() and not home.is_dir():
        raise Refused(
            ErrorCode.CONFLICT,
            f"{home} is a file",
            "a node's home is a folder",
            "give another --home",
            {"path": str(home)},
        )
    genesis = read_genesis(network) if network else DEVELOPMENT
    swarm_key = load_psk(psk) if psk else None
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(HOME_FOLDER_MODE)
    (home / config.DATA_FOLDER).mkdir(mode=HOME_FOLDER_MODE, exist_ok=True)
    write_whole(home / config.GENESIS_FILE, genesis.to_json())
    write_whole(home / FILE, config_text(role))
    if swarm_key is not None:
        write_secret(home / config.PSK_FILE, psk_text(swarm_key))
    identity = create_identity(home / config.KEY_FILE)
    return {
        "home": str(home),
        "peer_id": identity.peer_id,
        "role": role,
        "network": cid_text(genesis.id),
    }


def open_home(home: Path, *, rpc: Path | None, network: Path | None, options: Settings) -> Config:
    """Reads a home; raises `Refused` or `RemoteProtocolError` saying what is wrong with it."""
    for name in (FILE, config.KEY_FILE, config.GENESIS_FILE):
        if not (home / name).is_file():
            raise Refused(
                ErrorCode.NOT_FOUND,
                f"{home} is no node's home",
                f"{name} is missing",
                "restore it, or make a new node elsewhere with `blyan-node init --home DIR`",
                {"path": str(home)},
            )
    genesis = read_genesis(home / config.GENESIS_FILE)
    if network is not None and read_genesis(network).id != genesis.id:
        raise Refused(
            ErrorCode.CONFLICT,
            f"{home} belongs to another network",
            f"it is in {genesis.name!r} ({cid_text(genesis.id)})",
            "give another --home for another network",
            {"path": str(home)},
        )
    with (home / FILE).open("rb") as file:
        written = read_file(file.read(limits.node_config_bytes_max + 1))
    return config.make_config(home, genesis, rpc, written, options)


def read_genesis(path: Path) -> Genesis:
    """Reads a genesis file; raises `RemoteProtocolError` that names it."""
    with path.open("rb") as file:
        data = file.read(limits.genesis_file_bytes_max + 1)
    try:
        return Genesis.from_json(data)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"{path}: {error.where}", error.why) from None


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a crash leaves the old content or the new, never a part."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
