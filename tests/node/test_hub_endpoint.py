"""Where the hub is: the option, the file, HF_ENDPOINT, the public one."""

from pathlib import Path

import pytest

from blyan_node.config import HUB_ENDPOINT, make_config
from blyan_node.config_file import ConfigError, Written, read_settings
from blyan_node.settings import Settings
from protocols.dag.genesis import DEVELOPMENT

NOTHING = Settings()
FILE = Settings(hub_endpoint="https://mirror.example")
OPTION = Settings(hub_endpoint="http://127.0.0.1:8080/hub/")


def endpoint(file: Settings = NOTHING, option: Settings = NOTHING) -> str:
    written = Written(file)
    return make_config(Path("/home/alice"), DEVELOPMENT, None, written, option).hub_endpoint


def test_the_nearest_word_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert endpoint() == HUB_ENDPOINT
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example/")
    assert endpoint() == "https://hub.example"
    assert endpoint(FILE) == "https://mirror.example"
    assert endpoint(FILE, OPTION) == "http://127.0.0.1:8080/hub"


@pytest.mark.parametrize(
    "text", ["hub.example", "file:///etc/passwd", "https://user:secret@hub.example", "https://", ""]
)
def test_what_is_no_hub_is_refused_by_the_name_of_the_key(text: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.toml line 1, column 16: hub_endpoint"):
        read_settings(f'hub_endpoint = "{text}"')
