"""What a block must be by itself, in named stages, cheap first.

    size → decode → network → signature → kind      this module: needs nothing but the block
    parents → base → author → body → release        `protocols.dag.admission`: needs the chain

Each stage has its own error: a `RemoteProtocolError` whose `where` is `block/STAGE`. Every honest
node refuses what fails here before it passes it on, so the peer that sent it is at fault; whether a
block fits what is already here is another question, and there "not yet" is never "bad".
"""

import re
from collections.abc import Iterable
from enum import StrEnum
from operator import ge
from typing import Never

from protocols import limits
from protocols.dag.header import CHAIN_OF, HEADER_VERSION, Block, Header, Kind
from protocols.errors import NotYet, RemoteProtocolError
from protocols.ids import NetworkId, Subject, is_cid, parse_subject

COUNTER_MAX = 2**53 - 1  # what every JSON reader keeps exactly
MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
FAMILY_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,63}")
META_KEY_BYTES_MAX = 64


class Stage(StrEnum):
    """The stages of validation in their order."""

    SIZE = "size"
    DECODE = "decode"
    NETWORK = "network"
    SIGNATURE = "signature"
    KIND = "kind"
    PARENTS = "parents"
    BASE = "base"
    AUTHOR = "author"
    BODY = "body"
    RELEASE = "release"


def refuse(stage: Stage, why: str) -> Never:
    """Raises the error of a stage."""
    raise RemoteProtocolError(f"block/{stage}", why)


def stage_of(error: RemoteProtocolError) -> Stage | None:
    """The stage that refused a block; None for errors of other surfaces."""
    surface, _, name = error.where.partition("/")
    return Stage(name) if surface == "block" and name in set(Stage) else None


def decode_block(data: bytes | memoryview, *, network: NetworkId, now_ms: int) -> Block:
    """A block from its wire form, through all the stages that need nothing but the block."""
    (block,) = decode_blocks((data,), network=network, now_ms=now_ms)
    return block


def decode_blocks(
    page: Iterable[bytes | memoryview], *, network: NetworkId, now_ms: int
) -> list[Block]:
    """As `decode_block`, for many: each stage for all of them before the next.

    What is malformed is found before a signature is looked at, and signatures are checked one right
    behind another, which keeps the tables of the curve in the processor's cache.
    """
    blocks = [_decode(data) for data in page]
    for block in blocks:
        _check_network(block.header, network)
    for block in blocks:
        _check_signature(block)
    for block in blocks:
        _check_kind(block.header)
    for block in blocks:
        _check_time(block.header, now_ms)
    return blocks


def validate_header(block: Block, *, network: NetworkId, now_ms: int) -> None:
    """The stages network to kind for a decoded block; raises `RemoteProtocolError`."""
    _check_network(block.header, network)
    _check_signature(block)
    _check_kind(block.header)
    _check_time(block.header, now_ms)


def kind_of(subject: Subject) -> Kind:
    """The kind of the blocks of a subject; raises `RemoteProtocolError` if it is not one."""
    match parse_subject(subject).kind:
        case "expert":
            return Kind.EXPERT
        case "router":
            return Kind.ROUTER
        case _:
            return Kind.TRUNK


def is_staged(header: Header) -> bool:
    """Whether a parameter block takes effect only when an accepted release lists it."""
    return header.meta.get("staged") == 1


def _decode(data: bytes | memoryview) -> Block:
    if len(data) > limits.signed_header_bytes_max:
        refuse(Stage.SIZE, f"{len(data)} bytes, at most {limits.signed_header_bytes_max}")
    try:
        return Block.decode(data)
    except RemoteProtocolError as error:
        refuse(Stage.DECODE, str(error))


def _check_network(header: Header, network: NetworkId) -> None:
    if header.net != network:
        refuse(Stage.NETWORK, "it belongs to another network")
    if header.v != HEADER_VERSION:
        refuse(Stage.NETWORK, f"header version {header.v}, this node reads {HEADER_VERSION}")


def _check_signature(block: Block) -> None:
    if not block.signature_holds():
        refuse(Stage.SIGNATURE, "the signature is not the author's")


def _check_kind(header: Header) -> None:
    _check_fields(header)
    _check_meta(header)
    if header.kind is Kind.MODEL:
        _check_model(header)
    elif header.kind is Kind.RELEASE:
        _check_release(header)
    else:
        _check_parameters(header)


def _check_time(header: Header, now_ms: int) -> None:
    """Raises `NotYet` for a time that is in range by the clock of a peer which is ahead of ours.

    A peer whose clock is off by no more than a block's may be passes such a block on honestly: only
    beyond both together it is to blame. The last of all checks, so whoever is excused is right in
    everything else.
    """
    ahead = header.time - now_ms
    if ahead <= limits.clock_drift_ms_max:
        return
    where, why = f"block/{Stage.KIND}", f"its time is {ahead} ms in the future"
    if ahead <= 2 * limits.clock_drift_ms_max:
        raise NotYet(where, why)
    raise RemoteProtocolError(where, why)


def _check_fields(header: Header) -> None:
    """Numbers in range, ids in form, parents sorted."""
    if CHAIN_OF[header.kind] is not header.chain:
        refuse(Stage.KIND, f"a {header.kind} block does not belong in chain {header.chain}")
    for name, value in (("seq", header.seq), ("time", header.time), ("size", header.size)):
        if not 0 <= value <= COUNTER_MAX:
            refuse(Stage.KIND, f"{name} is out of range")
    parents = header.depends_on
    if len(parents) > limits.depends_on_max:
        refuse(Stage.KIND, f"{len(parents)} parents, at most {limits.depends_on_max}")
    if not all(map(is_cid, parents)):
        refuse(Stage.KIND, "a parent is not a block id")
    if any(map(ge, parents, parents[1:])):
        refuse(Stage.KIND, "parents are not sorted or are repeated")
    if header.body is None or not is_cid(header.body):
        refuse(Stage.KIND, "body is not a manifest id")
    if header.model is not None and header.model not in parents:
        refuse(Stage.KIND, "its model is not among its parents")
    if header.base is not None and header.base not in parents:
        refuse(Stage.KIND, "its base is not among its parents")


def _check_meta(header: Header) -> None:
    if len(header.meta) > limits.meta_entries_max:
        refuse(Stage.KIND, f"{len(header.meta)} entries in meta")
    for key, value in header.meta.items():
        if not 0 < len(key.encode()) <= META_KEY_BYTES_MAX:
            refuse(Stage.KIND, f"meta key {key[:80]!r} is empty or too long")
        if isinstance(value, str) and len(value.encode()) > limits.meta_value_bytes_max:
            refuse(Stage.KIND, f"meta {key!r} has {len(value)} characters")
        if isinstance(value, int) and abs(value) > COUNTER_MAX:
            refuse(Stage.KIND, f"meta {key!r} is out of range")


def _check_model(header: Header) -> None:
    if header.model is not None or header.subject is not None or header.base is not None:
        refuse(Stage.KIND, "a model block has no model, subject or base")
    for key, form in (("name", MODEL_NAME), ("family", FAMILY_NAME)):
        value = header.meta.get(key)
        if not isinstance(value, str) or not form.fullmatch(value):
            refuse(Stage.KIND, f"a model needs a {key} of the form {form.pattern}")
    if "staged" in header.meta:
        refuse(Stage.KIND, "only parameters are staged")


def _check_release(header: Header) -> None:
    if header.model is None or header.subject is not None:
        refuse(Stage.KIND, "a release has a model and no subject")
    if "staged" in header.meta:
        refuse(Stage.KIND, "only parameters are staged")


def _check_parameters(header: Header) -> None:
    if header.model is None or header.subject is None:
        refuse(Stage.KIND, f"a {header.kind} block has a model and a subject")
    try:
        kind = kind_of(header.subject)
    except RemoteProtocolError as error:
        refuse(Stage.KIND, str(error))
    if kind is not header.kind:
        refuse(Stage.KIND, f"{header.subject} is not the subject of a {header.kind} block")
    if "staged" in header.meta and header.meta["staged"] != 1:
        refuse(Stage.KIND, "staged is 1 or absent")
    if header.base is None and not is_staged(header):
        refuse(Stage.KIND, "parameters without a base take effect by a release alone")
