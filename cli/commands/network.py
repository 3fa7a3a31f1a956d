"""`network new`: the birth of a network."""

import json
import os
import secrets

import click

from cli.shared import Group, absolute, emit
from protocols.dag.genesis import NONCE_BYTES, Genesis
from protocols.errors import ErrorCode, Refused


@click.group(cls=Group)
def network() -> None:
    """Networks and their genesis files."""


@network.command()
@click.option("--name", metavar="N", required=True, help="What people call the network.")
@click.option("--out", metavar="FILE", required=True, help="The genesis file to write.")
def new(name: str, out: str) -> None:
    """Found a network: write the genesis file that its nodes are given."""
    text = Genesis(name, secrets.token_bytes(NONCE_BYTES), {}).check().to_json()
    path = absolute(out)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        raise Refused(
            ErrorCode.CONFLICT,
            f"{path} exists",
            "a genesis file is never overwritten",
            "give another --out",
            {"path": path},
        ) from None
    with os.fdopen(handle, "w") as file:
        file.write(text)
    emit(json.loads(text), lambda made: click.echo(f"{made['name']}  {made['id']}\n  {path}"))
