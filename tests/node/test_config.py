"""The configuration: every wrong value is one error that names its key."""

import os
import random
from pathlib import Path

import pytest
import tomlkit
from hypothesis import given
from hypothesis import strategies as st

from blyan_node import config
from blyan_node.config import Settings, make_config, read_settings, settings_of
from blyan_node.home import config_text
from blyan_node.sizes import free_memory_bytes, parse_size
from protocols import limits
from protocols.dag.genesis import DEVELOPMENT
from protocols.errors import RemoteProtocolError
from protocols.rpc.address import SOCKET_PATH_BYTES_MAX, socket_path
from protocols.signing import Identity

PEER = Identity.from_seed(bytes(32)).peer_id
FULL = f"""
role = "gpu"
listen = ["/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/4040"]
announce = ["/dns4/node.example.org/tcp/4040"]
bootstrap = ["/ip4/192.0.2.1/tcp/4040/p2p/{PEER}"]
hold = ["layer0.expert3", "layer1.expert0"]
memory = "8GiB"
disk = "50 GB"
threads = 3
replicas = 2
authors = ["{PEER}"]
hub_endpoint = "https://hub.example.org"
kernels = "fma"
precision = "int8"
"""


def _config(file: str = "", options: Settings | None = None) -> config.Config:
    return make_config(
        Path("/home/alice"), DEVELOPMENT, None, read_settings(file), options or Settings()
    )


def test_every_key_is_taken_over() -> None:
    made = _config(FULL)
    assert made.role == "gpu"
    assert made.listen == ("/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/4040")
    assert made.announce == ("/dns4/node.example.org/tcp/4040",)
    assert made.bootstrap == (f"/ip4/192.0.2.1/tcp/4040/p2p/{PEER}",)
    assert made.hold == ("layer0.expert3", "layer1.expert0")
    assert (made.memory_bytes, made.disk_bytes) == (8 * 2**30, 50 * 10**9)
    assert (made.threads, made.replicas, made.authors) == (3, 2, (PEER,))
    assert made.hub_endpoint == "https://hub.example.org"
    assert (made.kernels, made.precision) == ("fma", "int8")
    assert made.rpc == Path("/home/alice/rpc.sock")


def test_the_full_file_knows_every_key() -> None:
    assert set(tomlkit.parse(FULL)) == set(config.KEYS)


def test_the_defaults_are_those_of_the_role() -> None:
    main, gpu = _config('role = "main"'), _config('role = "gpu"')
    assert (main.hold, gpu.hold) == ("none", "auto")
    assert main.listen == ("/ip4/0.0.0.0/tcp/4040",)
    assert main.disk_bytes is None
    assert 0 < main.memory_bytes <= free_memory_bytes()
    assert main.threads >= 1


def test_an_option_wins_over_the_file() -> None:
    options = settings_of({"memory": "1GiB", "hold": "none"}, "--{}")
    made = _config(FULL, options)
    assert (made.memory_bytes, made.hold, made.threads) == (2**30, "none", 3)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('role = "boss"', "role"),
        ("role = 1", "role"),
        ("listen = []", "listen"),
        ('listen = "/ip4/127.0.0.1/tcp/0"', "listen"),
        ('listen = ["/ip4/127.0.0.1/udp/1"]', "listen"),
        ('listen = ["/ip4/127.0.0.1/tcp/70000"]', "listen"),
        ('announce = ["nowhere"]', "announce"),
        ('bootstrap = ["/ip4/192.0.2.1/tcp/4040"]', "bootstrap"),
        ('bootstrap = ["/ip4/192.0.2.1/tcp/4040/p2p/12D3"]', "bootstrap"),
        ('hold = "some"', "hold"),
        ('hold = ["layer0.router"]', "hold"),
        ("hold = []", "hold"),
        ('memory = "lots"', "memory"),
        ("memory = -1", "memory"),
        ('disk = "1XiB"', "disk"),
        ("threads = 0", "threads"),
        ('threads = "2"', "threads"),
        ("replicas = 100", "replicas"),
        ('authors = "some"', "authors"),
        ('precision = "int4"', "precision"),
        ("precision = 8", "precision"),
        ('authors = ["bob"]', "authors"),
        ("speed = 1", "speed"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_key(line: str, key: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        read_settings(line)
    assert caught.value.where == f"config.toml: {key}"
    assert caught.value.why


@pytest.mark.parametrize(
    "text", ["role = ", "[" * 5000, "a.b.c = 1", "\x00", "x" * (limits.node_config_bytes_max + 1)]
)
def test_what_is_no_toml_is_the_same_error(text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=r"config\.toml"):
        read_settings(text)


def test_an_option_is_named_as_it_is_typed() -> None:
    with pytest.raises(RemoteProtocolError, match="--memory"):
        settings_of({"memory": "lots"}, "--{}")


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("1.5 kb", 1500), (7, 7), ("0", 0), ("512MiB", 2**29), ("2T", None)],
)
def test_sizes(text: str | int, size: int | None) -> None:
    if size is None:
        with pytest.raises(RemoteProtocolError, match="no size"):
            parse_size(text)
    else:
        assert parse_size(text) == size


@given(st.text() | st.integers())
def test_any_text_is_a_size_or_one_error(text: str | int) -> None:
    try:
        assert 0 <= parse_size(text) <= 2**60
    except RemoteProtocolError as error:
        assert error.where == "size"


def test_10_000_broken_files_are_settings_or_one_error() -> None:
    rng = random.Random(3)
    for _ in range(10_000):
        text = bytearray(FULL.encode())
        for _ in range(rng.randint(1, 5)):
            at = rng.randrange(len(text))
            match rng.randrange(4):
                case 0:
                    text[at : at + 1] = rng.randbytes(rng.randint(1, 3))
                case 1:
                    del text[at : at + rng.randint(1, 30)]
                case 2:
                    text[at:at] = rng.choice([b'"', b"[", b"]", b"=", b"\n", b"9" * 400, b"1979-"])
                case _:
                    text[at:at] = text[: rng.randint(0, 60)]
        try:
            make_config(
                Path("/h"), DEVELOPMENT, None, read_settings(bytes(text)), Settings(threads=1)
            )
        except RemoteProtocolError as error:
            assert error.where.startswith("config.toml")


def test_the_written_file_explains_every_key_and_reads_back() -> None:
    for role in ("main", "gpu"):
        text = config_text(role)
        assert read_settings(text) == Settings(role=role)
        for key in config.KEYS:
            assert f"{key} = " in text
        # Each commented example is a value that is taken.
        shown = [line[2:] for line in text.splitlines() if line.startswith("# ") and " = " in line]
        assert len(shown) == len(config.KEYS) - 1
        for line in shown:
            read_settings(line)


def test_a_long_home_gets_a_short_socket() -> None:
    long = "/" + "very" * 30
    path = socket_path(long, 1000)
    assert len(path) <= SOCKET_PATH_BYTES_MAX
    assert path.startswith("/tmp/blyan-1000/")
    assert path != socket_path(long + "x", 1000)
    assert socket_path("/home/alice", os.getuid()) == "/home/alice/rpc.sock"
