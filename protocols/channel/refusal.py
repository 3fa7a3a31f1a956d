"""The text of a REFUSAL: an `errors.Refused` on the wire."""

import msgspec

from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.limits import refusal_bytes_max
from protocols.wire import decode, encode


class Refusal(msgspec.Struct, frozen=True):
    """What `Refused` says; a text is cut, `data` dropped, where it is too long."""

    code: int
    what: str
    why: str
    next: str
    data: dict[str, object]


CANCELLED = Refused(ErrorCode.CANCELLED, "cancelled", "")
_TEXT_MAX = 1000


def encode_refusal(refused: Refused) -> bytes:
    """`refused` as bytes, within `refusal_bytes_max`."""
    kept = dict(refused.data)
    try:
        if len(encode(kept)) > refusal_bytes_max // 4:
            kept = {}
    except (TypeError, ValueError, OverflowError):  # something that has no place on a wire
        kept = {}
    return encode(
        Refusal(
            code=int(refused.code),
            what=refused.what[:_TEXT_MAX],
            why=refused.why[:_TEXT_MAX],
            next=refused.next[:_TEXT_MAX],
            data=kept,
        )
    )


def decode_refusal(data: bytes) -> Refused:
    """What the answerer refused; raises `RemoteProtocolError`."""
    refusal = decode(data, Refusal, where="channel refusal", bytes_max=refusal_bytes_max)
    try:
        code = ErrorCode(refusal.code)
    except ValueError:
        raise RemoteProtocolError("channel refusal", f"unknown code {refusal.code}") from None
    return Refused(code, refusal.what, refusal.why, refusal.next, refusal.data)
