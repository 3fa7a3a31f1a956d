"""A node under a service manager: what it is told, the watchdog, reloading, the unit files."""

import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tomlkit
import trio

from blyan_node.config import Config, make_config
from blyan_node.config_file import Written
from blyan_node.home import create_home
from blyan_node.reloading import LIVE, changes
from blyan_node.settings import KEYS, Settings
from blyan_node.supervisor import Supervisor
from blyan_node.testing.foreground import Foreground
from blyan_node.testing.virtual_time import virtual_time_test
from protocols.dag.genesis import DEVELOPMENT
from protocols.signing import Identity

UNITS = sorted((Path(__file__).parents[2] / "packaging" / "systemd").glob("*.service"))
PEER = Identity.from_seed(bytes(32)).peer_id
PATIENCE_S = 60


class Manager:
    """The receiving end of a notify socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(PATIENCE_S)

    def next(self) -> dict[str, str]:
        lines = self._socket.recv(65_536).decode().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def until(self, name: str) -> dict[str, str]:
        while name not in (said := self.next()):
            pass
        return said

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


@pytest.mark.slow
def test_a_service_tells_its_manager_of_its_life(
    manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(manager.path))
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    home = tmp_path / "alice"
    create_home(home, role="gpu", network=None)
    daemon = Foreground(home)
    with daemon as alice:
        said = manager.until("READY")
        assert said["STATUS"].startswith("gpu: 0 peers, 0 blocks, 0 experts held")
        for _ in range(3):
            assert manager.until("WATCHDOG")["WATCHDOG"] == "1"
        file = home / "config.toml"
        document = tomlkit.parse(file.read_text())
        document |= {"replicas": 3, "disk": "1GiB", "announce": ["/ip4/192.0.2.1/tcp/1"]}
        file.write_text(tomlkit.dumps(document))
        os.kill(alice.pid, signal.SIGHUP)
        assert int(manager.until("RELOADING")["MONOTONIC_USEC"]) > 0
        manager.until("READY")
        file.write_text("replicas = 'many'\n")
        os.kill(alice.pid, signal.SIGHUP)
        manager.until("RELOADING")
        manager.until("READY")
        assert alice("status")["role"] == "gpu"
        shown = alice("config", "show")
        told = {setting["key"]: setting for setting in shown["settings"]}
        assert shown["running"] and told.keys() == set(KEYS)
        assert (told["replicas"]["value"], told["replicas"]["source"]) == (3, "file")
        assert told["replicas"]["line"] and told["replicas"]["reloaded"] > 0
        assert (told["announce"]["value"], told["announce"]["waiting"]) == ([], True)
        assert (told["threads"]["value"], told["threads"]["source"]) == (1, "option")
        assert told["memory"]["reloaded"] is None
        os.kill(alice.pid, signal.SIGTERM)
        manager.until("STOPPING")
        daemon.ends()
    log = daemon.log.read_text()
    assert "changed: disk, replicas" in log
    assert "in use from the next start only: announce" in log
    assert "nothing has changed: config.toml line 1, column 12: replicas" in log


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_the_node(tmp_path: Path) -> None:
    home = tmp_path / "alice"
    line = [sys.executable, "-m", "cli.main", "start", "--home", str(home)]
    line += ["--listen", "/ip4/127.0.0.1/tcp/0", "--threads", "1"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, line)
    said = b""
    while b"rpc.sock" not in said:
        said += os.read(terminal, 65_536)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@virtual_time_test
async def test_the_watchdog_is_fed_before_its_time(manager: Manager) -> None:
    supervisor = Supervisor(str(manager.path), watchdog_s=3.0)
    with trio.move_on_after(10):
        await supervisor.report(lambda: "well")
    fed = 0
    manager._socket.setblocking(False)
    while True:
        try:
            assert manager.next() == {"WATCHDOG": "1", "STATUS": "well"}
        except BlockingIOError:
            break
        fed += 1
    assert fed == 7


def test_who_is_told() -> None:
    assert Supervisor.of({}) is None
    assert Supervisor.of({"NOTIFY_SOCKET": "relative"}) is None
    assert Supervisor.of({"NOTIFY_SOCKET": "/run/x"}) == Supervisor("/run/x")
    watched = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}
    assert Supervisor.of(watched) == Supervisor("@x", 3.0)
    assert Supervisor.of(watched | {"WATCHDOG_PID": "1"}) == Supervisor("@x")
    Supervisor("/nowhere/at/all").tell(READY=1)  # nobody there: nothing happens


def _config(**settings: object) -> Config:
    file = Settings(**{"memory": "1GiB", **settings})  # type: ignore[arg-type]
    return make_config(Path("/home/alice"), DEVELOPMENT, None, Written(file), Settings())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("role", "gpu"),
        ("listen", ["/ip4/127.0.0.1/tcp/0"]),
        ("announce", ["/ip4/192.0.2.1/tcp/1"]),
        ("bootstrap", [f"/ip4/192.0.2.1/tcp/4040/p2p/{PEER}"]),
        ("hold", "auto"),
        ("memory", "2GiB"),
        ("disk", "2GiB"),
        ("threads", 1000),
        ("replicas", 5),
        ("authors", "all"),
        ("hub_endpoint", "http://127.0.0.1:1"),
        ("psk", "/etc/blyan/swarm.key"),
        ("allowed_peers", [PEER]),
        ("metrics", "127.0.0.1:9464"),
        ("log_level", "info,network=debug"),
    ],
)
def test_a_change_takes_effect_now_or_is_said_to_wait(key: str, value: object) -> None:
    found = changes(_config(hold="none"), _config(**{"hold": "none", key: value}))
    assert (found.live, found.waiting) == (((key,), ()) if key in LIVE else ((), (key,)))
    assert set(LIVE) <= set(KEYS)


def test_an_unset_memory_is_no_change() -> None:
    before, after = (replace(_config(memory=None), disk_bytes=None) for _ in range(2))
    assert changes(before, after).waiting == ()


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_accepts_the_units(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/usr/local/bin/blyan-node", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
