"""What one answer has cost, and which blocks and peers it came from: its trace and its stats."""

from dataclasses import dataclass, field

from blyan_node.services.spread import Spread
from protocols.ids import BlockId, PeerId, cid_text, expert_subject
from protocols.rpc.generate import GenerateStats, Trace, TraceEntry


@dataclass
class Account:
    """The running totals of one request. Times are in s of trio's clock.

    `outcome` is how it ended; waits for tokens are counted in `first_token` and `token_gap`.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    remote_calls: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    retries: int = 0
    fetched_bytes: int = 0
    began_at: float = 0.0
    first_at: float | None = None
    last_at: float = 0.0
    max_gap_s: float = 0.0
    outcome: str = "forward"
    first_token: Spread | None = None
    token_gap: Spread | None = None
    _rows: dict[tuple[int, int], tuple[BlockId, dict[PeerId, int]]] = field(default_factory=dict)

    def computed(self, layer: int, expert: int, block: BlockId, peer: PeerId, rows: int) -> None:
        """`peer` has computed `rows` rows of an expert, and they were used."""
        _, peers = self._rows.setdefault((layer, expert), (block, {}))
        peers[peer] = peers.get(peer, 0) + rows

    def token(self, now: float) -> None:
        """A token has come."""
        self.new_tokens += 1
        if self.first_at is None:
            self.first_at = now
            spread, waited = self.first_token, now - self.began_at
        else:
            spread, waited = self.token_gap, now - self.last_at
            self.max_gap_s = max(self.max_gap_s, waited)
        if spread is not None:
            spread.observe(waited)
        self.last_at = now

    def trace(self) -> Trace:
        """Subject by subject: the block, and how many rows each peer computed."""
        return {
            str(expert_subject(layer, expert)): TraceEntry(
                block=cid_text(block), peers={str(peer): rows for peer, rows in peers.items()}
            )
            for (layer, expert), (block, peers) in sorted(self._rows.items())
        }

    def stats(self, now: float) -> GenerateStats:
        """The totals; `prefill_s` ends with the first token, `decode_s` is the rest."""
        prefill_s = (now if self.first_at is None else self.first_at) - self.began_at
        decode_s = 0.0 if self.first_at is None else self.last_at - self.first_at
        return GenerateStats(
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            prefill_s=prefill_s,
            decode_s=decode_s,
            tokens_per_s=(self.new_tokens - 1) / decode_s if decode_s > 0 else 0.0,
            max_gap_s=self.max_gap_s,
            remote_calls=self.remote_calls,
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            retries=self.retries,
            fetched_bytes=self.fetched_bytes,
        )
