"""What all answers of this node have cost so far: those that ended, and those that run."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from blyan_node.services.account import Account
from blyan_node.services.spread import Spread
from protocols.errors import Refused

TOTALS = (
    "prompt_tokens",
    "new_tokens",
    "remote_calls",
    "bytes_sent",
    "bytes_received",
    "retries",
)


class Work:
    """Every answer's account, summed. `outcomes` counts how answers ended."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.first_token = Spread.of("blyan_first_token_seconds")
        self.token_gap = Spread.of("blyan_token_gap_seconds")
        self._running: dict[int, Account] = {}
        self._ended: Counter[str] = Counter()

    @property
    def running(self) -> int:
        """How many answers are being generated."""
        return len(self._running)

    def total(self, name: str) -> int:
        """The sum of one of `TOTALS` over every account."""
        running = sum(getattr(account, name) for account in self._running.values())
        return self._ended[name] + int(running)

    @contextmanager
    def answer(self) -> Iterator[Account]:
        """The account of one more answer, until it has ended in whichever way."""
        account = Account(
            began_at=trio.current_time(), first_token=self.first_token, token_gap=self.token_gap
        )
        self._running[id(account)] = account
        try:
            yield account
        except BaseException as error:
            self.outcomes[_outcome(error)] += 1
            raise
        else:
            self.outcomes[account.outcome] += 1
        finally:
            del self._running[id(account)]
            self._ended.update({name: getattr(account, name) for name in TOTALS})


def _outcome(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        inside = {_outcome(leaf) for leaf in error.exceptions}
        return next((name for name in ("failed", "refused") if name in inside), "cancelled")
    if isinstance(error, Refused):
        return "refused"
    return "failed" if isinstance(error, Exception) else "cancelled"
