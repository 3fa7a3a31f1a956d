"""The configuration: every wrong value is one error that names its key."""

import os
import random
from pathlib import Path

import pytest
import tomlkit
from hypothesis import given
from hypothesis import strategies as st

from blyan_node import config
from blyan_node.config import Origin, make_config
from blyan_node.config_file import ConfigError, config_text, read_file, read_settings
from blyan_node.settings import KEYS, Settings, settings_of
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
psk = "keys/swarm.key"
allowed_peers = ["{PEER}"]
metrics = "127.0.0.1:9464"
log_level = "info,rpc=debug"
device = "cuda:1"
kernels = "fma"
precision = "int8"
"""


def _config(file: str = "", options: Settings | None = None) -> config.Config:
    return make_config(
        Path("/home/alice"), DEVELOPMENT, None, read_file(file), options or Settings()
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
    assert made.psk == Path("/home/alice/keys/swarm.key")
    assert made.allowed_peers == (PEER,)
    assert (made.device, made.kernels, made.precision) == ("cuda:1", "fma", "int8")
    assert made.rpc == Path("/home/alice/rpc.sock")


def test_the_full_file_knows_every_key() -> None:
    assert set(tomlkit.parse(FULL)) == set(KEYS)


def test_the_defaults_are_those_of_the_role() -> None:
    main, gpu = _config('role = "main"'), _config('role = "gpu"')
    assert (main.hold, gpu.hold) == ("none", "auto")
    assert main.listen == ("/ip4/0.0.0.0/tcp/4040",)
    assert main.disk_bytes is None
    assert 0 < main.memory_bytes <= free_memory_bytes()
    assert main.threads >= 1


def test_an_option_wins_over_the_file() -> None:
    options = settings_of({"memory": "1GiB", "hold": "none"})
    made = _config(FULL, options)
    assert (made.memory_bytes, made.hold, made.threads) == (2**30, "none", 3)


LONG = "1" * 5000


@pytest.mark.parametrize(
    ("text", "key", "place", "why"),
    [
        ('role = "boss"', "role", (1, 8), "'boss' is not one of main, gpu"),
        ("role = 1", "role", (1, 8), "'1' is not one of main, gpu"),
        ("listen = []", "listen", (1, 10), "at least one address"),
        ('listen = "/ip4/127.0.0.1/tcp/0"', "listen", (1, 10), "must be a list, and is a text"),
        ('listen = ["/ip4/127.0.0.1/udp/1"]', "listen", (1, 11), "no address"),
        ('listen = [\n "/ip4/1.2.3.4/tcp/1",\n 7,\n]', "listen", (3, 2), "and is a whole number"),
        ('\nlisten = ["/ip4/127.0.0.1/tcp/70000"]', "listen", (2, 11), "no address"),
        ('announce = ["/ip4/1.2.3.4/tcp/1", "nowhere"]', "announce", (1, 35), "'nowhere'"),
        ('bootstrap = ["/ip4/192.0.2.1/tcp/4040"]', "bootstrap", (1, 14), "/p2p/PEER_ID"),
        ('bootstrap = ["/ip4/192.0.2.1/tcp/4040/p2p/12D3"]', "bootstrap", (1, 14), "12D3"),
        ('hold = "some"', "hold", (1, 8), ""),
        ('hold = ["layer0.expert1", "layer0.router"]', "hold", (1, 27), "no expert"),
        ("hold = []", "hold", (1, 8), "write auto, none"),
        ('memory = "lots"', "memory", (1, 10), "'lots' is no size"),
        ("memory = -1", "memory", (1, 10), "no size"),
        ("  memory\t=  1.5 # GiB", "memory", (1, 13), "and is a number with a point"),
        ('disk = "1XiB"', "disk", (1, 8), "no size"),
        ("threads = 0", "threads", (1, 11), "0 is not between 1 and 1024"),
        ('# a\n\nthreads = "2"', "threads", (3, 11), "must be a whole number, and is a text"),
        ("threads = true", "threads", (1, 11), "and is true or false"),
        ("threads = 2020-01-01", "threads", (1, 11), "and is a date"),
        ("replicas = 100", "replicas", (1, 12), "100 is not between"),
        ('authors = "some"', "authors", (1, 11), "list of peer ids"),
        ('authors = ["bob"]', "authors", (1, 12), "bob"),
        ('psk = ""', "psk", (1, 7), "not the path"),
        ('metrics = "0.0.0.0:1"', "metrics", (1, 11), ""),
        ('precision = "int4"', "precision", (1, 13), "'int4' is not one of as-published, "),
        ("precision = 8", "precision", (1, 13), "'8' is not one of as-published, "),
        ('device = "gpu"', "device", (1, 10), "'gpu' is not one of auto, cpu, cuda, cuda:N, mps"),
        ('device = "cuda:-1"', "device", (1, 10), "'cuda:-1' is not one of"),
        ('device = "cuda:01"', "device", (1, 10), "'cuda:01' is not one of"),
        ("device = 0", "device", (1, 10), "must be a text in quotes, and is a whole number"),
        ('kernels = "sse"', "kernels", (1, 11), "'sse' is not one of auto, "),
        ('log_level = "loud"', "log_level", (1, 13), "'loud' is no level"),
        ("role.x = 1", "role", (1, 10), "role"),
        ("[threads]\nx = 1", "threads", (1, 1), "and is a table"),
        (f"threads = {LONG}", "threads", (1, 11), "too long"),
        (f"threads = {'[' * 5000}{']' * 5000}", "threads", (1, 11), "nested too deeply"),
        ('role = "gpu"\nthreads = 1\nrole = "main"', "role", (3, 1), "twice, first on line 1"),
        ("speed = 1", None, (1, 1), "there is no key 'speed'; there are role, listen"),
        ('# x\nmemroy = "1GiB"', None, (2, 1), "there is no key 'memroy'; did you mean memory?"),
        ('hub-endpoint = "x"', None, (1, 1), "did you mean hub_endpoint?"),
        ("a.b.c = 1", None, (1, 1), "there is no key 'a'"),
        ("role = ", None, (1, 8), "no TOML: invalid value"),
        ('role = "gpu', None, (1, 12), "no TOML"),
        ("threads = 1\n[", None, (2, 2), "no TOML"),
        ("threads 1", None, (1, 9), "no TOML: expected '='"),
        ("[" * 5000, None, None, "no TOML"),
        ("\x00", None, (1, 1), "no TOML"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_error_with_its_place(
    text: str, key: str | None, place: tuple[int, int] | None, why: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(text)
    error = caught.value
    assert error.key == key
    assert why in error.why and error.next
    assert error.place is not None
    if place is not None:
        assert error.place == place
        assert str(error).startswith(f"config.toml line {place[0]}, column {place[1]}: ")
        assert error.data["line"] == place[0]


def test_what_to_do_is_an_example_that_works() -> None:
    for key in KEYS:
        with pytest.raises(ConfigError) as caught:
            read_settings(f"{key} = 1.5")
        example = caught.value.next.removeprefix("write it like this: ")
        assert getattr(read_settings(example), key) is not None


def test_a_file_that_is_no_text_or_too_long_is_the_same_error() -> None:
    with pytest.raises(ConfigError, match="line 2, column 10: byte 0xff is no UTF-8"):
        read_settings("# é\r\nrole = 'é".encode() + b"\xff'")
    with pytest.raises(ConfigError, match=r"config\.toml: it is over 64 KiB"):
        read_settings("#" * (limits.node_config_bytes_max + 1))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"memory": "lots"}, "--memory: 'lots' is no size"),
        ({"hub_endpoint": "x"}, "--hub-endpoint: "),
        ({"threads": "many"}, "--threads: it must be a whole number"),
    ],
)
def test_an_option_is_named_as_it_is_typed(options: dict[str, object], why: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        settings_of(options)
    assert str(caught.value).startswith(why)


def test_every_value_knows_where_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.org")
    made = _config('# x\nreplicas = 3\nmemory = "1GiB"', settings_of({"memory": "2GiB"}))
    assert made.origins.keys() == set(KEYS)
    assert made.origins["replicas"] == Origin(3, "file", 2)
    assert made.origins["memory"] == Origin("2GiB", "option")
    assert made.origins["hub_endpoint"] == Origin("https://hub.example.org", "environment")
    assert made.origins["hold"] == Origin("none", "default")
    monkeypatch.setenv("HF_ENDPOINT", "nowhere")
    with pytest.raises(RemoteProtocolError, match="HF_ENDPOINT: "):
        _config()


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
            make_config(Path("/h"), DEVELOPMENT, None, read_file(bytes(text)), Settings(threads=1))
        except ConfigError as error:
            assert error.place is not None and error.next
            at = f" line {error.place.line}, column {error.place.column}: "
            assert str(error).startswith("config.toml" + at)
            lines = bytes(text).replace(b"\r\n", b"\n").decode(errors="replace").split("\n")
            assert 1 <= error.place.column <= len(lines[error.place.line - 1]) + 1


def test_the_written_file_explains_every_key_and_reads_back() -> None:
    for role in ("main", "gpu"):
        text = config_text(role)
        assert read_settings(text) == Settings(role=role)
        for key in KEYS:
            assert f"{key} = " in text
        # Each commented example is a value that is taken.
        shown = [line[2:] for line in text.splitlines() if line.startswith("# ") and " = " in line]
        assert len(shown) == len(KEYS) - 1
        for line in shown:
            read_settings(line)


def test_a_long_home_gets_a_short_socket() -> None:
    long = "/" + "very" * 30
    path = socket_path(long, 1000)
    assert len(path) <= SOCKET_PATH_BYTES_MAX
    assert path.startswith("/tmp/blyan-1000/")
    assert path != socket_path(long + "x", 1000)
    assert socket_path("/home/alice", os.getuid()) == "/home/alice/rpc.sock"
