"""Compare-and-swap on the head of a subject: an author never replaces what he has not seen."""

from collections.abc import Mapping

from protocols.errors import ErrorCode, Refused
from protocols.ids import BlockId, Subject, cid_text


def require_head(
    heads: Mapping[Subject, BlockId], subject: Subject, base: BlockId | None
) -> BlockId:
    """The current head of `subject`, which the update is to name as its base.

    `base` is what the author believes to be current, None if he takes what is there. Raises
    `Refused`: `NOT_FOUND` if the model has no such subject, `STALE_BASE` with the current head in
    `data["head"]` if the head is another.
    """
    head = heads.get(subject)
    if head is None:
        raise Refused(
            ErrorCode.NOT_FOUND,
            f"no subject {subject}",
            "the model has no part of this name",
            "`blyan-node model show` lists its subjects",
            {"subject": subject},
        )
    if base is not None and base != head:
        raise Refused(
            ErrorCode.STALE_BASE,
            f"{subject} was not updated",
            f"its head is {cid_text(head)}, not {cid_text(base)}",
            "look at what replaced it, then update with --base of the current head",
            {"subject": subject, "head": cid_text(head), "base": cid_text(base)},
        )
    return head
