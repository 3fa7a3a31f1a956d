"""`network new`: the birth of a network."""

import json
import os
import secrets

import click

from cli.shared import Group, absolute, emit, files
from protocols.dag.genesis import NONCE_BYTES, PRIVATE, Genesis
from protocols.errors import ErrorCode, Refused
from protocols.psk import KEY_BYTES, fingerprint, psk_text


@click.group(cls=Group)
def network() -> None:
    """Networks and their genesis files."""


@network.command()
@click.option("--name", metavar="N", required=True, help="What people call the network.")
@click.option(
    "--out",
    metavar="FILE",
    required=True,
    shell_complete=files,
    help="The genesis file to write.",
)
@click.option("--private", is_flag=True, help="Only nodes with a key take part; needs --psk.")
@click.option(
    "--psk",
    metavar="FILE",
    shell_complete=files,
    help="The key file to write, for --private.",
)
def new(name: str, out: str, private: bool, psk: str | None) -> None:
    """Found a network: write the genesis file that its nodes are given."""
    if private != bool(psk):
        raise click.UsageError("--private and --psk FILE go together")
    genesis = Genesis(name, secrets.token_bytes(NONCE_BYTES), {PRIVATE: 1} if private else {})
    document = json.loads(text := genesis.check().to_json())
    if psk:
        key = secrets.token_bytes(KEY_BYTES)
        _write_new(absolute(psk), psk_text(key), 0o600, "a key is never overwritten")
        document |= {"psk": absolute(psk), "psk_fingerprint": fingerprint(key)}
    _write_new(absolute(out), text, 0o644, "a genesis file is never overwritten")
    emit(document, lambda made: click.echo(_show(made, absolute(out))))


def _show(made: dict[str, str], path: str) -> str:
    key = (
        f"\n  {made['psk']}  key {made['psk_fingerprint']}, keep it secret" if "psk" in made else ""
    )
    return f"{made['name']}  {made['id']}\n  {path}{key}"


def _write_new(path: str, text: str, mode: int, why: str) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise Refused(
            ErrorCode.CONFLICT,
            f"{path} exists",
            why,
            "give another name",
            {"path": path},
        ) from None
    with os.fdopen(handle, "w") as file:
        file.write(text)
