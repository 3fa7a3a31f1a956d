"""What the store refuses, each in words that an operator can act on."""

import errno

from protocols.errors import ErrorCode, Refused
from protocols.ids import BlockId, Subject, cid_text

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what the system says when it takes no more


class DiskFull(Refused):
    """There is no room for what was to be written; nothing acknowledged is lost."""

    def __init__(self, why: str, what: str = "nothing more was stored", **data: object) -> None:
        super().__init__(
            ErrorCode.DISK_FULL,
            what,
            why,
            "Everything acknowledged is kept. Free some space or raise --disk, then try again.",
            data,
        )


class Corrupt(Refused):
    """Something stored is not what was written."""

    def __init__(self, what: str, why: str, **data: object) -> None:
        super().__init__(
            ErrorCode.CORRUPT,
            what,
            why,
            "Stop the node and run `blyan-node fsck --repair`: what is broken is dropped and "
            "comes back from the network.",
            data,
        )


class BlockMissing(Refused):
    """The bytes of a block are needed and are not all here."""

    def __init__(self, block: BlockId, subject: Subject | None, why: str) -> None:
        named = f"{subject or 'a block'} is not stored here"
        data = {"block": cid_text(block)} | ({"subject": str(subject)} if subject else {})
        super().__init__(
            ErrorCode.BLOCK_MISSING,
            named,
            f"{cid_text(block)}: {why}",
            "Fetch it from a peer that has it.",
            data,
        )


class StoreInUse(Refused):
    """Another process has this store open."""

    def __init__(self, path: str, holder: str) -> None:
        super().__init__(
            ErrorCode.BUSY,
            f"{path} is in use by process {holder}: end it first with `blyan-node stop`",
            "",
            data={"path": path},
        )


class UnknownSchema(Refused):
    """The store was written by another version of the program."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(
            ErrorCode.NOT_ALLOWED,
            f"{path} cannot be opened",
            why,
            "Use the version of blyan-node that wrote it, or another --home; nothing was changed.",
            {"path": path},
        )
