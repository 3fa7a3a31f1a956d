"""How what is seen looks: one frame for the room that the terminal has.

What comes from the node is put in as plain text, never as markup or as codes for the terminal.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from cli.show import size
from cli.top.seen import Seen

_BARS = " ▁▂▃▄▅▆▇█"
_PEER_CHARS = 12
_SECTION_LINES = 2  # a rule and a header
_HEAD_LINES = 8
_SHORTEST = 3  # rows of a section, where there is more to show than room


def frame(seen: Seen, width: int, height: int | None = None) -> RenderableType:
    """The frame, at most `height` lines; None: as many as there is to show."""
    sections = [
        ("peers", _PEERS, _peers(seen)),
        ("models", _MODELS, _models(seen)),
        ("experts held here", _EXPERTS, _experts(seen)),
        ("traffic", _TRAFFIC, _traffic(seen)),
        ("events", (), _events(seen)),
    ]
    shares = _shares([len(rows) for _, _, rows in sections], height)
    parts: list[RenderableType] = [_head(seen, width)]
    for (title, columns, rows), share in zip(sections, shares, strict=True):
        if share:
            more = len(rows) - share
            shown = rows[:share] if columns else rows[-share:]
            parts.append(Rule(f"{title}{f', {more} more' if more > 0 else ''}", align="left"))
            parts.append(_table(columns, shown, width))
    return Group(*parts)


def _shares(wanted: Sequence[int], height: int | None) -> list[int]:
    """How many rows each section gets: what is short first, what is left over to the long ones."""
    if height is None:
        return list(wanted)
    room = height - _HEAD_LINES - _SECTION_LINES * sum(1 for rows in wanted if rows)
    shares = [min(rows, _SHORTEST) for rows in wanted]
    while sum(shares) > max(0, room):  # a small terminal: sections go from the last
        shares[max(i for i, share in enumerate(shares) if share)] -= 1
    while sum(shares) < room and shares != list(wanted):
        for index, rows in enumerate(wanted):
            if shares[index] < rows and sum(shares) < room:
                shares[index] += 1
    return shares


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]], width: int) -> Table:
    drawn = Table(box=None, pad_edge=False, header_style="bold", show_header=bool(columns),
                  width=width)  # fmt: skip
    for index, column in enumerate(columns or ("", "", "")):
        number = column in _NUMBERS
        drawn.add_column(
            column,
            no_wrap=True,
            overflow="ellipsis",
            justify="right" if number else "left",
            ratio=1 if index == len(columns or "   ") - 1 and not number else None,
        )
    for row in rows:
        drawn.add_row(*(Text(_printable("" if cell is None else str(cell))) for cell in row))
    return drawn


def _printable(text: str) -> str:
    """`text` without anything that a terminal would obey."""
    return "".join(char if char.isprintable() else "�" for char in text)


def _head(seen: Seen, width: int) -> RenderableType:
    status, value = seen.answers["node.status"], seen.value
    up = max(0.0, time.time() - value("blyan_start_time_seconds"))
    budget = value("blyan_memory_budget_bytes")
    used = value("blyan_memory_used_bytes")
    tokens = seen.tokens_per_s[-1] if seen.tokens_per_s else 0.0
    lines = [
        _line(("", f"{status['role']} node {status['peer_id']}"), ("up", _span(up)),
              ("version", status["version"])),
        _line(("peers", f"{status['peers']}"), ("models", status["models"]),
              ("blocks", _blocks(status)), ("store", size(status["stored_bytes"]))),
        _line(("answering", f"{value('blyan_requests_in_flight'):.0f}"),
              ("tokens/s", f"{tokens:.1f}"), ("", _spark(seen.tokens_per_s, max(8, width // 4)))),
        _line(("holds", f"{status['held']['experts']} experts, {size(status['held']['bytes'])}"),
              ("queue", f"{value('blyan_worker_queue_requests'):.0f}"),
              ("rows/s", f"{seen.rate('blyan_worker_rows_total'):.0f}"),
              ("computing", f"{100 * seen.rate('blyan_worker_compute_seconds_total'):.0f} %")),
        _line(("in", f"{size(int(seen.rate('blyan_network_bytes_total', direction='in')))}/s"),
              ("out", f"{size(int(seen.rate('blyan_network_bytes_total', direction='out')))}/s"),
              ("memory", f"{size(int(used))} of {size(int(budget))}"),
              ("errors", f"{value('blyan_errors_total'):.0f}")),
    ]  # fmt: skip
    silent = f": no answer for {seen.silent_s:.0f} s" if seen.silent_s else ""
    title = Text(f"blyan-node top{silent}", style="bold")
    return Panel(Group(*lines), title=title, title_align="left", width=width)


def _line(*pairs: tuple[str, object]) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    for name, value in pairs:
        line.append(f"{name} " if name else "", style="dim")
        line.append(_printable(str(value)), style="bold")
        line.append("   ")
    return line


def _blocks(status: dict[str, Any]) -> str:
    syncing = status["syncing"]
    return f"{status['blocks']}" if syncing is None else f"{syncing['have']} of {syncing['want']}"


_PEERS = ("peer", "role", "rtt", "in/s", "out/s", "experts", "address")
_MODELS = ("model", "family", "experts", "held", "replicas", "here", "size", "root")
_EXPERTS = ("expert", "calls", "rows", "busy", "bytes", "block")
_TRAFFIC = ("protocol", "in/s", "out/s", "asked/s", "served/s", "failed", "")
_NUMBERS = {"rtt", "in/s", "out/s", "experts", "held", "replicas", "here", "size", "calls", "rows",
            "busy", "bytes", "asked/s", "served/s", "failed"}  # fmt: skip


def _peers(seen: Seen) -> list[Sequence[object]]:
    return [
        (
            peer["peer_id"][-_PEER_CHARS:],
            peer["role"],
            "" if peer["rtt_ms"] is None else f"{peer['rtt_ms']:.1f} ms",
            size(int(seen.peer_rate(peer["peer_id"], "in"))),
            size(int(seen.peer_rate(peer["peer_id"], "out"))),
            seen.held_by(peer["peer_id"]),
            peer["addrs"][0].split("/p2p/")[0] if peer["addrs"] else "",
        )
        for peer in seen.answers["node.peers"]["peers"]
    ]


def _models(seen: Seen) -> list[Sequence[object]]:
    own = seen.answers["node.status"]["peer_id"]
    rows: list[Sequence[object]] = []
    for model in seen.answers["model.list"]["models"]:
        holders = seen.holders.get(model["model"])
        rows.append(
            (
                model["name"],
                model["family"],
                model["experts"],
                model["held"],
                "" if holders is None else holders.replicas,
                "" if holders is None else holders.by_peer.get(own, 0),
                size(model["bytes"]),
                model["root"][:16],
            )
        )
    return rows


def _experts(seen: Seen) -> list[Sequence[object]]:
    busiest = sorted(seen.answers["expert.stats"]["experts"], key=lambda e: -e["calls"])
    return [
        (e["subject"], e["calls"], e["rows"], f"{e['busy_s']:.2f} s", size(e["bytes"]), e["block"])
        for e in busiest
    ]


def _traffic(seen: Seen) -> list[Sequence[object]]:
    bytes_, requests = "blyan_network_bytes_total", "blyan_network_requests_total"
    return [
        (
            name,
            size(int(seen.rate(bytes_, protocol=name, direction="in"))),
            size(int(seen.rate(bytes_, protocol=name, direction="out"))),
            f"{seen.rate(requests, protocol=name, direction='out'):.1f}",
            f"{seen.rate(requests, protocol=name, direction='in'):.1f}",
            f"{seen.value('blyan_network_failures_total', protocol=name):.0f}",
            "",
        )
        for name in sorted(
            seen.label_values(bytes_, "protocol"), key=lambda n: -seen.value(bytes_, protocol=n)
        )
    ]


def _events(seen: Seen) -> list[Sequence[object]]:
    return [
        (
            time.strftime("%H:%M:%S", time.localtime(event["time"])),
            event["event"],
            " ".join(f"{key} {_short(value)}" for key, value in event["data"].items()),
        )
        for event in seen.events
    ]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"…{text[-_PEER_CHARS:]}"


def _span(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if minutes < 1:
        return f"{int(seconds)} s"
    if hours < 1:
        return f"{minutes} min"
    return f"{hours // 24} d {hours % 24} h" if hours >= 24 else f"{hours} h {minutes % 60} min"


def _spark(values: Iterable[float], width: int) -> str:
    """The newest values as a row of bars, the tallest as tall as the largest of them."""
    shown = list(values)[-width:]
    top = max(shown, default=0.0)
    return "".join(_BARS[round(v / top * (len(_BARS) - 1)) if top else 0] for v in shown)
