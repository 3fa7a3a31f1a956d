"""`config show`: what a node goes by, running or not, and where each value came from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blyan_node.config import FIELDS, make_config
from blyan_node.config_file import read_file
from blyan_node.home import create_home
from blyan_node.in_use import InUse, told
from blyan_node.reloading import LIVE, changes
from blyan_node.settings import KEYS, Settings
from protocols.dag.genesis import DEVELOPMENT
from protocols.psk import psk_text
from protocols.rpc.config import ConfigResult, SettingInfo

PSK = bytes(range(32))


def _in_use(text: str, options: Settings | None = None) -> InUse:
    home = Path("/home/alice")
    return InUse(make_config(home, DEVELOPMENT, None, read_file(text), options or Settings()))


def _by_key(result: ConfigResult) -> dict[str, SettingInfo]:
    return {setting.key: setting for setting in result.settings}


def test_a_reload_is_remembered_by_key() -> None:
    node = _in_use('replicas = 2\nmemory = "1GiB"\n', Settings(threads=3))
    after = _in_use('\n\nreplicas = 4\nmemory = "2GiB"\n', Settings(threads=3)).config
    found = changes(node.config, after)
    node.take(after, found.live, found.waiting, 5.0)
    assert node.told().running
    told = _by_key(node.told())
    assert (told["replicas"].value, told["replicas"].line, told["replicas"].reloaded) == (4, 3, 5.0)
    assert (told["memory"].value, told["memory"].line, told["memory"].waiting) == ("1GiB", 2, True)
    assert (told["threads"].source, told["hold"].source) == ("option", "default")
    assert node.config.replicas == 4 and node.config.memory_bytes == 2**30
    back = _in_use('memory = "1GiB"\n', Settings(threads=3)).config
    found = changes(node.config, back)
    node.take(back, found.live, found.waiting, 9.0)
    told = _by_key(node.told())
    assert (told["replicas"].source, told["replicas"].reloaded) == ("default", 9.0)
    assert (told["memory"].line, told["memory"].waiting) == (1, False)


def test_every_key_is_a_field_or_has_one() -> None:
    config = _in_use("").config
    assert all(hasattr(config, FIELDS.get(key, key)) for key in KEYS)
    assert set(LIVE) <= set(KEYS)
    assert [setting.key for setting in told(config, running=False).settings] == list(KEYS)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "home"
    key = tmp_path / "swarm.key"
    key.write_text(psk_text(PSK))
    key.chmod(0o600)
    create_home(made, role="gpu", network=None, psk=key)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    return made


def test_a_home_whose_node_is_down_says_what_a_start_would_use(
    home: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.org")
    text = (home / "config.toml").read_text()
    (home / "config.toml").write_text("replicas = 3\n" + text)
    said = command("config", "show", "--json")
    assert said.code == 0
    assert not said.json["running"] and said.json["home"] == str(home)
    told = {setting["key"]: setting for setting in said.json["settings"]}
    assert (told["replicas"]["source"], told["replicas"]["line"]) == ("file", 1)
    role = text.splitlines().index('role = "gpu"') + 2
    assert (told["role"]["value"], told["role"]["line"]) == ("gpu", role)
    assert told["hub_endpoint"]["variable"] == "HF_ENDPOINT"
    assert told["psk"]["value"] == "swarm.key"
    plain = command("config", "show")
    lines = {line.split()[0]: line for line in plain.out.splitlines()[2:]}
    assert "config.toml line 1" in lines["replicas"]
    assert "HF_ENDPOINT" in lines["hub_endpoint"]
    assert lines["disk"].split()[1:] == ["not", "set", "default"]


def test_no_secret_is_shown(home: Path, command: Callable[..., Any]) -> None:
    seed = (home / "identity.key").read_text().strip()
    for said in (command("config", "show"), command("config", "show", "--json")):
        assert said.code == 0
        assert PSK.hex() not in said.out and seed not in said.out


def test_a_mistake_in_the_file_is_told_with_its_place(
    home: Path, command: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    (home / "config.toml").write_text('role = "gpu"\nthreads = "many"\n')
    said = command("config", "show", "--json")
    assert said.code == 3
    assert "config.toml line 2, column 11" in said.err
    assert "write it like this: threads = 4" in said.err
    data = said.json["error"]["data"]
    assert (data["line"], data["column"], data["key"]) == (2, 11, "threads")


def test_a_node_that_runs_is_asked(node: Any, command: Callable[..., Any]) -> None:
    in_use = _in_use("replicas = 3\n")
    after = _in_use('replicas = 4\nmemory = "1GiB"').config
    in_use.take(after, ["replicas"], ["memory"], 1e9)
    node.answers["node.config"] = lambda request, context: in_use.told()
    said = command("config", "show")
    assert said.code == 0
    lines = {line.split()[0]: line for line in said.out.splitlines()[2:]}
    assert "config.toml line 1, since the reload of 2001-09-0" in lines["replicas"]
    assert "waits for the next start" in lines["memory"]
    assert command("config", "show", "--json").json["running"]
    create_home(node.path.parent, role="gpu", network=None)
    stored = command("config", "show", "--stored", "--json")
    assert not json.loads(stored.out)["running"]


def test_a_socket_that_is_named_must_have_a_node(
    home: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    assert command("config", "show", "--rpc", tmp_path / "none.sock").code == 2
