"""How results look to people. With `--json` nothing here runs."""

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import click

from cli.terminal import console, shown

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_WIDE = 10_000


def size(count: int) -> str:
    """Bytes as people read them: `1.5 GiB`."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def say(text: str, err: bool = False) -> None:
    """A line for people; names in it may come from anybody."""
    click.echo(shown(text, sys.stderr if err else sys.stdout), err=err)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """A table on stdout; `empty` says what it means if there are no rows."""
    from rich.table import Table
    from rich.text import Text

    listed = [
        [Text("" if cell is None else shown(str(cell), sys.stdout)) for cell in row] for row in rows
    ]
    if not listed:
        say(empty)
        return
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in listed:
        drawn.add_row(*row)
    console(sys.stdout, _WIDE).print(drawn)


def pairs(rows: Iterable[tuple[str, object]]) -> None:
    """Named values, one a line; those that are None are left out."""
    told = [(name, str(value)) for name, value in rows if value is not None]
    width = max((len(name) for name, _ in told), default=0)
    for name, value in told:
        say(f"{name:<{width}}  {value}")


def status(document: dict[str, Any]) -> None:
    """`node.status`."""
    syncing, held = document["syncing"], document["held"]
    pairs(
        [
            ("peer", document["peer_id"]),
            ("role", document["role"]),
            ("network", document["network"]),
            ("version", document["version"]),
            ("profile", document["profile"]),
            ("precision", document["precision"]),
            *(("address", addr) for addr in document["addrs"]),
            ("peers", document["peers"]),
            ("blocks", document["blocks"]),
            ("models", document["models"]),
            ("holds", f"{held['experts']} experts, {size(held['bytes'])}"),
            ("stored", size(document["stored_bytes"])),
            ("syncing", None if syncing is None else _syncing(syncing)),
        ]
    )


def _syncing(syncing: dict[str, Any]) -> str:
    eta = syncing["eta_s"]
    left = "" if eta is None else f", about {eta:.0f} s left"
    return f"{syncing['have']} of {syncing['want']} blocks{left}"


def identity(document: dict[str, Any]) -> None:
    """`node.id`."""
    say(document["peer_id"])
    for addr in document["addrs"]:
        say(f"  {addr}")


def peers(document: dict[str, Any]) -> None:
    """`node.peers`."""
    table(
        ("peer", "role", "rtt", "since", "addresses"),
        (
            (peer["peer_id"], peer["role"], _rtt(peer), _when(peer["since"]), _first(peer["addrs"]))
            for peer in document["peers"]
        ),
        "no peers",
    )


def _rtt(holder: dict[str, Any]) -> str:
    return "" if holder["rtt_ms"] is None else f"{holder['rtt_ms']:.1f} ms"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _first(addrs: Sequence[str]) -> str:
    return addrs[0].split("/p2p/")[0] if addrs else ""


def models(document: dict[str, Any]) -> None:
    """`model.list`."""
    table(
        ("name", "family", "experts", "held", "size", "root", "model"),
        (
            (m["name"], m["family"], m["experts"], m["held"], size(m["bytes"]), m["root"][:16],
             m["model"])
            for m in document["models"]
        ),
        "no models",
    )  # fmt: skip


def model(document: dict[str, Any]) -> None:
    """`model.show`."""
    pairs(
        [
            ("name", document["name"]),
            ("model", document["model"]),
            ("author", document["author"]),
            ("family", document["family"]),
            ("root", document["root"]),
            ("experts", f"{document['experts']}, {document['held']} of them held"),
            ("size", size(document["bytes"])),
        ]
    )
    table(
        ("subject", "size", "block", "tensors"),
        (
            (name, size(subject["bytes"]), subject["block"], _tensors(subject))
            for name, subject in document["subjects"].items()
        ),
        "",
    )


def _tensors(subject: dict[str, Any]) -> str:
    if subject["computed"]:
        return " ".join(subject["tensors"])
    return f"{len(subject['tensors'])} tensors, kept and exported but never computed"


def verified(document: dict[str, Any]) -> None:
    """`model.verify`, `chain.verify` and `fsck`."""
    what = f"{document['blocks']} blocks"
    if "chunks" in document:
        what += f", {document['chunks']} chunks"
    if "bytes" in document:
        what += f", {size(document['bytes'])}"
    say(f"{'all is well' if document['ok'] else 'NOT well'}: {what}")
    for bad in document["bad"]:
        say("  " + "  ".join(str(value) for value in bad.values() if value is not None))


def experts(document: dict[str, Any]) -> None:
    """`expert.list` and `expert.where`."""
    table(
        ("subject", "block", "holders"),
        (
            (expert["subject"], expert["block"], _holders(expert["holders"]))
            for expert in document["experts"]
        ),
        "no experts",
    )


def _holders(holders: list[dict[str, Any]]) -> str:
    if not holders:
        return "nobody"
    return ", ".join(
        f"{h['peer_id']} ({_far(h)}, {h['queue']} waiting, {h['profile'] or 'profile unknown'})"
        for h in holders
    )


def _far(holder: dict[str, Any]) -> str:
    """How far a holder is: the node that was asked is at 0, a new peer was not measured yet."""
    return "here" if holder["rtt_ms"] == 0 else _rtt(holder) or "distance unknown"


def held(document: dict[str, Any]) -> None:
    """`expert.hold` and `expert.drop`."""
    say(f"{', '.join(document['subjects'])}: done")
    say(f"the node holds {document['experts']} experts, {size(document['bytes'])}")


def expert_stats(document: dict[str, Any]) -> None:
    """`expert.stats`."""
    say(
        f"{document['requests']} requests, {document['queue']} waiting, "
        f"{document['busy']} turned away"
    )
    table(
        ("subject", "block", "as", "size", "calls", "rows", "busy"),
        (
            (e["subject"], e["block"], e["storage"], size(e["bytes"]), e["calls"], e["rows"],
             f"{e['busy_s']:.3f} s")
            for e in document["experts"]
        ),
        "no experts are held here",
    )  # fmt: skip
    m = document["memory"]
    say(
        f"memory: {size(m['experts'])} of experts, {size(m['trunks'])} of trunks and "
        f"{size(m['caches'])} of caches in {size(m['budget'])}; {size(m['copied'])} copied, "
        f"{size(m['packs'])} in pack files"
    )
    if m["file"] is not None:
        say(f"process: {size(m['anonymous'])} of its own, {size(m['file'])} of files")


def stats(document: dict[str, Any]) -> None:
    """The end of `generate` and `forward`, on stderr."""
    s = document["stats"]
    peers = {peer for entry in document["trace"].values() for peer in entry["peers"]}
    nodes = f"{len(peers)} node{'' if len(peers) == 1 else 's'}"
    used = document.get("sampling")  # `forward` draws nothing
    drawn = f"seed {used['seed']}, " if used and used["seed"] is not None else ""
    say(
        f"[{s['prompt_tokens']} + {s['new_tokens']} tokens, {s['tokens_per_s']:.1f} tokens/s, "
        f"{len(document['trace'])} experts on {nodes}, {s['retries']} retries, {drawn}"
        f"root {document['root'][:16]}, {document['profile']}]",
        err=True,
    )


def chain_status(document: dict[str, Any]) -> None:
    """`chain.status`."""
    pairs(document.items())


def heads(document: dict[str, Any]) -> None:
    """`chain.heads`."""
    for found in document["models"]:
        say(f"{found['name']}  {found['model']}\n  root {found['root']}")
        table(("  subject", "head"), ((f"  {s}", b) for s, b in found["heads"].items()), "")
        for fork in found["forks"]:
            others, what = ", ".join(fork["others"]), fork["subject"] or "the first release"
            say(
                f"  fork of {what} after {fork['base'] or 'nothing'}: {fork['chosen']} is the "
                f"head, kept beside it: {others}"
            )
    if not document["models"]:
        say("no models")


def log(document: dict[str, Any]) -> None:
    """`chain.log`."""
    table(
        ("n", "time", "chain", "kind", "subject", "block", "author"),
        (
            (e["n"], _when(e["block"]["time"] / 1000), e["block"]["chain"], e["block"]["kind"],
             e["block"]["subject"] or e["block"]["meta"].get("name"), e["block"]["id"],
             e["block"]["author"])
            for e in document["entries"]
        ),
        "no blocks",
    )  # fmt: skip
    if document["next"] is not None:
        say(f"more with --after {document['next']}")


def block(document: dict[str, Any]) -> None:
    """`block.show`."""
    plain = {key: value for key, value in document.items() if key not in ("tensors", "meta")}
    plain["depends_on"] = " ".join(document["depends_on"]) or None
    plain["size"] = size(document["size"])
    pairs(plain.items())
    pairs((f"meta {key}", value) for key, value in document["meta"].items())
    if document["tensors"] is not None:
        table(
            ("tensor", "dtype", "shape", "size"),
            (
                (t["name"], t["dtype"], "x".join(map(str, t["shape"])), size(t["bytes"]))
                for t in document["tensors"]
            ),
            "no tensors",
        )
