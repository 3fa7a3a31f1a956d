"""Says who is turned away before it has said who it is: often, in few words.

Anybody can dial a node as often as the line allows. So there is one line in the log for each
reason, and then at most one every `turned_away_said_every_s` with the number of those meanwhile.
"""

import logging
from dataclasses import dataclass

from protocols.limits import turned_away_said_every_s

log = logging.getLogger("blyan.network")


@dataclass
class _Reason:
    said_at: float
    since: int = 0  # turned away for it since it was said


class Doorkeeper:
    """Counts those who are turned away, by reason; there is a fixed number of reasons."""

    def __init__(self, level: int) -> None:
        self.turned_away = 0
        self._level = level
        self._reasons: dict[str, _Reason] = {}

    def turn_away(self, who: str, why: str, now: float) -> None:
        """`who` (an address) was not let in because of `why`; `now` in seconds, any clock."""
        self.turned_away += 1
        reason = self._reasons.get(why)
        if reason is not None and now - reason.said_at < turned_away_said_every_s:
            reason.since += 1
            return
        more = f" ({reason.since} more since the last such line)" if reason and reason.since else ""
        self._reasons[why] = _Reason(now)
        log.log(self._level, "turned away %s: %s%s", who, why, more, extra={"addr": who})
