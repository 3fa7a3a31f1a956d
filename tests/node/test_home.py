"""A home: made once, private, and refused by name when something about it is wrong."""

import json
import stat
from pathlib import Path

import pytest

from blyan_node.home import create_home, open_home, write_whole
from blyan_node.identity import create_identity, load_identity, parse_seed
from blyan_node.settings import Settings
from protocols.dag.genesis import DEVELOPMENT, Genesis
from protocols.errors import Refused, RemoteProtocolError
from protocols.ids import cid_text

OTHER = Genesis("other", bytes(16), {})


def _open(home: Path, network: Path | None = None) -> object:
    return open_home(home, rpc=None, network=network, options=Settings())


def test_a_home_is_private_and_whole(tmp_path: Path) -> None:
    home = tmp_path / "alice"
    made = create_home(home, role="gpu", network=None)
    assert made["network"] == cid_text(DEVELOPMENT.id)
    assert made["role"] == "gpu"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "identity.key").stat().st_mode) == 0o600
    config = open_home(home, rpc=None, network=None, options=Settings())
    assert config.role == "gpu"
    assert load_identity(config.key_file).peer_id == made["peer_id"]


def test_a_home_is_never_overwritten(tmp_path: Path) -> None:
    create_home(tmp_path, role="main", network=None)
    key = (tmp_path / "identity.key").read_bytes()
    with pytest.raises(Refused, match="never overwrites"):
        create_home(tmp_path, role="main", network=None)
    assert (tmp_path / "identity.key").read_bytes() == key


def test_a_home_stays_in_its_network(tmp_path: Path) -> None:
    genesis = tmp_path / "other.json"
    genesis.write_text(OTHER.to_json())
    home = tmp_path / "alice"
    assert create_home(home, role="main", network=genesis)["network"] == cid_text(OTHER.id)
    assert _open(home, genesis)
    development = tmp_path / "development.json"
    development.write_text(DEVELOPMENT.to_json())
    with pytest.raises(Refused, match="belongs to another network"):
        _open(home, development)


@pytest.mark.parametrize("name", ["config.toml", "identity.key", "network.json"])
def test_a_home_that_lacks_something_is_refused_by_name(tmp_path: Path, name: str) -> None:
    create_home(tmp_path, role="main", network=None)
    (tmp_path / name).unlink()
    with pytest.raises(Refused, match=name):
        _open(tmp_path)


def test_an_edited_genesis_is_refused(tmp_path: Path) -> None:
    document = json.loads(OTHER.to_json()) | {"name": "mine"}
    path = tmp_path / "network.json"
    path.write_text(json.dumps(document))
    with pytest.raises(RemoteProtocolError, match=r"network\.json.*id"):
        create_home(tmp_path / "home", role="main", network=path)
    assert not (tmp_path / "home").exists()


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    create_identity(path)
    path.chmod(0o644)
    with pytest.raises(Refused, match="chmod 600"):
        load_identity(path)


@pytest.mark.parametrize("text", ["", "zz", "00" * 31, "00" * 33, "00" * 32 + "\n\n", "0" * 1000])
def test_a_key_file_is_64_hex_digits(text: str) -> None:
    with pytest.raises(RemoteProtocolError, match="64 hex"):
        parse_seed(text)


def test_a_key_file_of_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(b"\xff" * 32)
    path.chmod(0o600)
    with pytest.raises(RemoteProtocolError, match="64 hex"):
        load_identity(path)


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_whole(path, "one")
    write_whole(path, "two")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_no_home(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="is a file") as caught:
        create_home(tmp_path / "file", role="main", network=None)
    assert caught.value.next
