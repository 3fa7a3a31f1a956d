"""A node's home: made by `init`, read by everything else.

HOME/               0700
  identity.key      0600, the node's secret seed
  network.json      the genesis of its network
  config.toml       what the operator may change, with comments
  data/             the store
  downloads/        models from the hub, until they are published
  rpc.sock          while the node runs
"""

import os
from pathlib import Path

import tomlkit

from blyan_node import config
from blyan_node.config import Config, Role, Settings
from blyan_node.identity import create_identity
from protocols import limits
from protocols.dag.genesis import DEVELOPMENT, Genesis
from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.ids import cid_text

HOME_FOLDER_MODE = 0o700


def is_home(home: Path) -> bool:
    """Whether a node has been made here, even if only in part."""
    return any((home / name).exists() for name in (config.KEY_FILE, config.FILE))


def create_home(home: Path, *, role: Role, network: Path | None) -> dict[str, str]:
    """Makes a home; refuses to overwrite one. What it says of it is `init`'s answer."""
    if is_home(home):
        raise Refused(
            ErrorCode.CONFLICT,
            f"{home} is a node's home already",
            "`init` never overwrites a key or a configuration",
            "start it with `blyan-node start`, or give another --home",
            {"path": str(home)},
        )
    genesis = read_genesis(network) if network else DEVELOPMENT
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(HOME_FOLDER_MODE)
    (home / config.DATA_FOLDER).mkdir(mode=HOME_FOLDER_MODE, exist_ok=True)
    write_whole(home / config.GENESIS_FILE, genesis.to_json())
    write_whole(home / config.FILE, config_text(role))
    identity = create_identity(home / config.KEY_FILE)
    return {
        "home": str(home),
        "peer_id": identity.peer_id,
        "role": role,
        "network": cid_text(genesis.id),
    }


def open_home(home: Path, *, rpc: Path | None, network: Path | None, options: Settings) -> Config:
    """Reads a home; raises `Refused` or `RemoteProtocolError` saying what is wrong with it."""
    for name in (config.FILE, config.KEY_FILE, config.GENESIS_FILE):
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
    with (home / config.FILE).open("rb") as file:
        settings = config.read_settings(file.read(limits.node_config_bytes_max + 1))
    return config.make_config(home, genesis, rpc, settings, options)


def read_genesis(path: Path) -> Genesis:
    """Reads a genesis file; raises `RemoteProtocolError` that names it."""
    with path.open("rb") as file:
        data = file.read(limits.genesis_file_bytes_max + 1)
    try:
        return Genesis.from_json(data)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"{path}: {error.where}", error.why) from None


def config_text(role: Role) -> str:
    """A `config.toml` with every key, its meaning, and its default where it is not set."""
    document = tomlkit.document()
    document.add(tomlkit.comment("Blyan node. `blyan-node start` reads this; its options win."))
    for key, value, *lines in _EXPLAINED:
        document.add(tomlkit.nl())
        for line in lines:
            document.add(tomlkit.comment(line))
        if key == "role":
            document.add(key, tomlkit.item(role))
        else:
            document.add(tomlkit.comment(f"{key} = {value}"))
    return tomlkit.dumps(document)


_EXPLAINED = (
    ("role", "", "main: answers prompts. gpu: holds experts and computes with them for others."),
    ("listen", '["/ip4/0.0.0.0/tcp/4040"]', "Addresses to listen on; port 0: any free one."),
    ("announce", "[]", "Addresses to tell others instead of those of the interfaces."),
    ("bootstrap", "[]", "Nodes to find the others through, each ending in /p2p/PEER_ID."),
    (
        "hold",
        '"auto"',
        "Experts to hold: auto (the rarest that fit), none, or a list of experts such as",
        '["layer0.expert3", "layer0.expert4"]. A main node holds none if not told.',
    ),
    ("memory", '"8GiB"', "Memory for weights and caches; half of what is free at start."),
    ("disk", '"50GiB"', "The most that the store may take; if not set, there is no bound."),
    ("threads", "4", "Threads that compute; if not set, as many as there are cores."),
    ("replicas", "2", "Live holders that every expert should have."),
    (
        "authors",
        '"all"',
        "Whose models a gpu node takes by itself, besides its own: all, or a list of peer ids. If",
        "not set: all in a network of one's own, nobody's in the built-in network.",
    ),
    (
        "precision",
        '"as-published"',
        "Precision in which matrices are held for computing: as-published, float32, bfloat16,",
        "float16, fp8 or int8. Never wider than published; only nodes with the same one compute",
        "for each other.",
    ),
    (
        "hub_endpoint",
        '"https://huggingface.co"',
        "Where models called hf:ORG/NAME come from; HF_ENDPOINT if that is set.",
    ),
    (
        "kernels",
        '"auto"',
        "What computes: auto (the best that the processor runs); avx512, avx2 or fma, which have",
        "the same bits, to compare them; or torch, to work with nodes whose processors run none of",
        "them.",
    ),
)


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a crash leaves the old content or the new, never a part."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
