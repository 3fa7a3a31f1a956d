"""How a publish, and a dry run of one, look to people."""

from typing import Any

import click

from cli.show import pairs, size


def published(document: dict[str, Any]) -> None:
    """`model.publish`."""
    new = document["bytes"] - document["reused_bytes"]
    pairs(
        [
            ("name", document["name"]),
            ("model", document["model"]),
            ("root", document["root"]),
            ("new blocks", document["blocks"]),
            ("experts", document["experts"]),
            ("size", f"{size(document['bytes'])}, {size(new)} of it new"),
            ("source", document["source"]),
        ]
    )


def dry_run(document: dict[str, Any]) -> None:
    """`model.dry_run`."""
    new, reused = document["new_bytes"], document["reused_bytes"]
    rates = [
        f"{verb} at {size(rate)}/s"
        for verb, rate in (
            ("reads", document["read_bytes_per_s"]),
            ("writes", document["write_bytes_per_s"]),
        )
        if rate is not None
    ]
    seconds, download = document["seconds"], document["download_bytes"]
    kept = document["kept_bytes"]
    takes = None if new is None else "not known: the disk had no room for a trial"
    if seconds is not None:
        takes = f"about {seconds:.1f} s ({', '.join(rates)})"
    pairs(
        [
            ("name", document["name"]),
            ("model", document["model"] or "a new one"),
            ("source", document["source"]),
            ("experts", document["experts"]),
            ("size", size(document["bytes"])),
            ("never computed", f"{size(kept)} of it, kept and exported" if kept else None),
            ("to download", size(download) if download else None),
            ("would store", None if new is None else f"{size(new)} in {document['blocks']} blocks"),
            ("would reuse", None if reused is None else size(reused)),
            ("room", f"{size(document['room_bytes'])}: it fits"),
            ("would take", takes),
        ]
    )
    if new is None:
        click.echo("what of it is stored already shows when the weights are here")
