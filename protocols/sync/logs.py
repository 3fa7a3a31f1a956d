"""Walking through the log of one peer, page by page, from where the last walk ended.

    first request   LogRequest(0, 0): which log is it, and how long
    then            LogRequest(cursor, page) until the cursor is at its end

The shell persists a cursor only when all that the page names is here, so a walk that is cut off
goes on where it was and repeats at most one page. A log that became shorter under the same id (a
store that was put back from a copy) is walked again from its beginning.
"""

from collections.abc import Callable
from dataclasses import dataclass

from protocols import limits
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import BlockId, is_cid
from protocols.sync.messages import LOG_ID_BYTES, SYNC_PROTOCOL, LogPage, LogRequest

BEGINNINGS_MAX = 3


@dataclass(frozen=True, slots=True)
class Page:
    """What a page of a log names: the cursor becomes `next` once `ids` are all here."""

    log_id: bytes
    ids: tuple[BlockId, ...]
    next: int


class LogWalk:
    """The state of one walk: `kept_cursor(log_id)` says how far earlier walks came, 0 if none."""

    def __init__(
        self, kept_cursor: Callable[[bytes], int], page_ids: int = limits.sync_page_ids_max
    ) -> None:
        self._kept_cursor = kept_cursor
        self._page_ids = page_ids
        self._log_id: bytes | None = None
        self._pending: Page | None = None
        self._begun = 0
        self.cursor = 0
        self.end = 0

    @property
    def ended(self) -> bool:
        """Whether all of the log, as far as it was known at the last page, was walked."""
        return self._log_id is not None and self._pending is None and self.cursor >= self.end

    @property
    def left(self) -> int:
        """How many entries are between the cursor and the end."""
        return max(0, self.end - self.cursor)

    def request(self) -> LogRequest:
        """What to ask next; the last page must be done."""
        if self._pending is not None:
            raise LocalProtocolError("the page before is not done")
        if self._log_id is None:
            return LogRequest(0, 0)
        return LogRequest(self.cursor, self._page_ids)

    def page(self, reply: LogPage) -> Page | None:
        """Takes the reply to `request`; None if it names nothing new.

        Raises `RemoteProtocolError` for a page that cannot be one of a log.
        """
        asked = self.request()
        self._check(reply, asked)
        self.end = reply.end
        if self._log_id != reply.log_id:
            self._begin()
            self._log_id = reply.log_id
            self.cursor = self._kept_cursor(reply.log_id)
            if self.cursor > reply.end:
                self.cursor = 0
            return None
        if reply.end < self.cursor:
            self._begin()
            self.cursor = 0
            return None
        if not reply.ids:
            return None
        self._pending = Page(reply.log_id, tuple(BlockId(id) for id in reply.ids), reply.next)
        return self._pending

    def done(self) -> Page:
        """All that the pending page names is here: its cursor is to be persisted."""
        page = self._pending
        if page is None:
            raise LocalProtocolError("there is no page to be done with")
        self._pending = None
        self.cursor = page.next
        return page

    def _begin(self) -> None:
        """Counts beginnings: one is usual, and a second one happens."""
        self._begun += 1
        if self._begun > BEGINNINGS_MAX:
            raise RemoteProtocolError(f"{SYNC_PROTOCOL} log", "another log at every page")

    def _check(self, reply: LogPage, asked: LogRequest) -> None:
        where = f"{SYNC_PROTOCOL} log"
        if len(reply.log_id) != LOG_ID_BYTES:
            raise RemoteProtocolError(where, "a log id is 16 bytes")
        if len(reply.ids) > asked.limit or not all(map(is_cid, reply.ids)):
            raise RemoteProtocolError(where, "more ids than asked for, or malformed ones")
        if len(set(reply.ids)) != len(reply.ids):
            raise RemoteProtocolError(where, "an id is in the log twice")
        if not 0 <= reply.end < 2**63 or (reply.ids and reply.next > reply.end):
            raise RemoteProtocolError(where, "its numbers do not fit")
        if reply.log_id != self._log_id:
            return  # another log than the one that was asked about: its ids are not used
        if reply.ids and reply.next != asked.after + len(reply.ids):
            raise RemoteProtocolError(where, "its numbers do not fit")
        if not reply.ids and asked.limit and reply.end > asked.after:
            raise RemoteProtocolError(where, "an empty page before the end")
