"""`config.toml`: written with every key explained, read with the line and column of every mistake.

config.toml line 7, column 11: threads: it must be a whole number, and is a text in quotes
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import tomlkit

from blyan_node.settings import Role, Settings, check
from blyan_node.toml_places import Entry, Place, entries_of, place_of
from protocols import limits
from protocols.errors import RemoteProtocolError

FILE = "config.toml"
_PLACED = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)")
_SYNTAX = "a line is `key = value`, with texts in quotes and lists in [ ]"


class ConfigError(RemoteProtocolError):
    """Something in `config.toml` is wrong: where, why, and what to do `next`.

    `place` is None for a file that was not read at all, `key` None where no key is known.
    """

    def __init__(self, place: Place | None, key: str | None, why: str, next: str) -> None:
        at = "" if place is None else f" line {place.line}, column {place.column}"
        super().__init__(FILE + at, why if key is None else f"{key}: {why}")
        self.place = place
        self.key = key
        self.next = next

    @property
    def data(self) -> dict[str, object]:
        """The same for programs."""
        place = self.place
        at = {} if place is None else {"line": place.line, "column": place.column}
        return {"path": FILE, **at, **({} if self.key is None else {"key": self.key})}


@dataclass(frozen=True)
class Written:
    """The settings of a file, and the line on which each of its keys stands."""

    settings: Settings
    lines: Mapping[str, int] = field(default_factory=dict)


def read_settings(text: str | bytes) -> Settings:
    """The keys of a `config.toml`; raises `ConfigError`."""
    return read_file(text).settings


def read_file(text: str | bytes) -> Written:
    """The keys of a `config.toml` and their lines; raises `ConfigError`."""
    if len(text) > limits.node_config_bytes_max:
        why = f"it is over {limits.node_config_bytes_max // limits.KIB} KiB"
        raise ConfigError(None, None, why, "take out what is no setting")
    decoded = text if isinstance(text, str) else _decoded(text)
    entries = entries_of(decoded)
    try:
        document = tomllib.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise _no_toml(decoded, entries, error) from None
    found = {entry.key: entry for entry in reversed(entries)}
    for key, value in document.items():
        try:
            check(key, value)
        except RemoteProtocolError as error:
            raise _wrong(found[key], value, error) from None
    settings = msgspec.convert(document, Settings)
    return Written(settings, {key: found[key].at.line for key in document})


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start].decode()
        at = place_of(before.replace("\r\n", "\n"), len(before.replace("\r\n", "\n")))
        why = f"byte {error.object[error.start]:#04x} is no UTF-8"
        raise ConfigError(at, None, why, "save the file as UTF-8") from None


def _no_toml(text: str, entries: list[Entry], error: Exception) -> ConfigError:
    """Why a text is no TOML: a key that is there twice, or what the parser says."""
    seen: dict[str, Entry] = {}
    for entry in entries:
        first = seen.setdefault(entry.key, entry)
        if first is not entry and entry.text and first.text:
            why = f"it is set twice, first on line {first.at.line}"
            return ConfigError(entry.at, entry.key[:40], why, "keep one of the two lines")
    match = _PLACED.search(str(error))
    if match is None:  # a number or a nesting that the parser gives up on, without a place
        huge = next((entry for entry in entries if _too_much(entry)), None)
        at, key = (Place(1, 1), None) if huge is None else (huge.value, huge.key[:40])
        return ConfigError(at, key, "a value that is too long or nested too deeply", _SYNTAX)
    lines = text.replace("\r\n", "\n").split("\n")
    last = Place(len(lines), len(lines[-1]) + 1)
    place = Place(int(match[1]), int(match[2])) if match[1] else last
    said = str(error)[: match.start()]
    return ConfigError(place, None, f"no TOML: {said[:1].lower()}{said[1:200]}", _SYNTAX)


def _too_much(entry: Entry) -> bool:
    try:
        tomllib.loads(f"key = {entry.text}")
    except tomllib.TOMLDecodeError:
        return False
    except (ValueError, RecursionError):
        return True
    return False


def _wrong(entry: Entry, value: Any, error: RemoteProtocolError) -> ConfigError:
    """The place of a wrong value: of the item of a list, where it is that alone."""
    key, place, example = entry.key, entry.value, _EXAMPLES.get(entry.key)
    if example is None:
        return ConfigError(entry.at, None, error.why, "correct the key, or take it out")
    if isinstance(value, list) and len(value) == len(entry.items):
        for at, item in zip(entry.items, value, strict=True):
            try:
                check(key, [item])
            except RemoteProtocolError as single:
                place, error = at, single
                break
    return ConfigError(place, key, error.why, f"write it like this: {key} = {example}")


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
    (
        "role",
        '"gpu"',
        "main: answers prompts. gpu: holds experts and computes with them for others.",
    ),
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
        "psk",
        '"swarm.key"',
        "The key of a private swarm, in a file that only its owner may read; if not set,",
        "swarm.key in this folder if it is there.",
    ),
    (
        "allowed_peers",
        '"all"',
        "Who may take part in the network: all, or a list of peer ids.",
    ),
    (
        "metrics",
        '"127.0.0.1:9464"',
        "Where Prometheus may read this node's metrics, over HTTP; off if not set. An address that",
        "other machines can reach needs public: before it.",
    ),
    (
        "log_level",
        '"info,network=debug"',
        "debug, info, warning or error, for all and for areas of the log: node, network, chain,",
        "sync, experts, models, rpc, metrics. info if not set.",
    ),
    (
        "hub_endpoint",
        '"https://huggingface.co"',
        "Where models called hf:ORG/NAME come from; HF_ENDPOINT if that is set.",
    ),
    (
        "precision",
        '"as-published"',
        "Precision in which matrices are held for computing: as-published, float32, bfloat16,",
        "float16, fp8 or int8. Never wider than published; only nodes with the same one compute",
        "for each other.",
    ),
    (
        "device",
        '"auto"',
        "Where to compute: auto (the first CUDA device, else cpu), cpu, cuda, cuda:1 or mps. Nodes",
        "on another device than the cpu compute only for nodes with the same device.",
    ),
    (
        "kernels",
        '"auto"',
        "What computes: auto (the best that the processor runs); avx512, avx2 or fma, which have",
        "the same bits, to compare them; or torch, to work with nodes whose processors run none of",
        "them.",
    ),
)

_EXAMPLES: Mapping[str, str] = {key: example for key, example, *_ in _EXPLAINED}
