"""Multi-head latent attention, as the trunk computes it over a compressed cache.

A head's keys and values are products of the latent of a position. Instead of making them, which
would take `heads` times the memory or the work, the key's matrix is applied to the query and the
value's to the attention's result: in the latent's space all heads attend over the same rows, the
latent with the rotated key behind it (arXiv 2405.04434, 2.1.2). That is done alike for every row,
prefill or decode, so that a row's bits depend on the row and its sequence alone.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from blyan_node.moe import numerics
from blyan_node.moe.cache import KVCache
from blyan_node.moe.config import LatentAttention


class Latent:
    """Latent attention of one layer, loaded."""

    def __init__(
        self, config: LatentAttention, tensors: Mapping[str, Tensor], rope: numerics.RopeTable
    ) -> None:
        """`tensors` by role (`blyan_node.moe.layout`)."""
        self._config, self._tensors, self._rope = config, tensors, rope
        self._scale = config.head_dim**-0.5 * rope.score_factor
        by_head = tensors["kv_b"].view(config.heads, -1, config.kv_rank)
        plain = config.plain_dim  # of each head there are keys [plain_dim, kv_rank] and values
        self._keys = [numerics.align_matrix(head) for head in by_head[:, :plain]]
        self._values = [numerics.align_matrix(head) for head in by_head[:, plain:]]

    def apply(self, layer: int, x: Tensor, cache: KVCache) -> Tensor:
        """Normed rows x [n, hidden] → [n, hidden]; their latents go into the cache."""
        c, n = self._config, x.shape[0]
        start = cache.length_of(layer)
        turns = [self._rope.at(start + row) for row in range(n)]
        cache.append(layer, self._latents(x, turns))
        queries = self._queries(x, turns)
        attended = torch.empty(n, c.heads, c.kv_rank)
        for row in range(n):
            (seen,) = cache.seen(layer, 0, start + row + 1)
            attended[row] = numerics.attention_row(
                queries[row], seen, seen[..., : c.kv_rank], self._scale, None
            )
        out = numerics.aligned(n, c.heads * c.value_dim)
        for head, values in enumerate(self._values):
            here = slice(head * c.value_dim, (head + 1) * c.value_dim)
            out[:, here] = numerics.linear(attended[:, head], values)
        return numerics.linear(out, self._tensors["o"], self._tensors.get("o_bias"))

    def _latents(self, x: Tensor, turns: list[tuple[Tensor, Tensor]]) -> Tensor:
        """What is kept of rows x [n, hidden]: [n, 1, kv_rank + rope_dim]."""
        c, w = self._config, self._tensors
        rows = numerics.linear(x, w["kv_a"], w.get("kv_a_bias"))
        latents = numerics.rms_norm(rows[:, : c.kv_rank], w["kv_a_norm"], c.norm_eps)
        keys = self._rotated(rows[:, None, c.kv_rank :], turns)
        return torch.cat((latents[:, None], keys), dim=2)

    def _queries(self, x: Tensor, turns: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The queries of rows x [n, hidden] in the latent's space: [n, heads, as the latents]."""
        c, w = self._config, self._tensors
        if c.query_rank is None:
            rows = numerics.linear(x, w["q"])
        else:
            rows = numerics.linear(x, w["q_a"], w.get("q_a_bias"))
            rows = numerics.rms_norm(rows, w["q_a_norm"], c.norm_eps)
            rows = numerics.linear(rows, w["q_b"])
        heads = rows.reshape(x.shape[0], c.heads, c.head_dim)
        plain, turned = heads[..., : c.plain_dim], heads[..., c.plain_dim :]
        absorbed = [
            numerics.linear(plain[:, head], keys.t()) for head, keys in enumerate(self._keys)
        ]
        return torch.cat((torch.stack(absorbed, 1), self._rotated(turned, turns)), dim=2)

    def _rotated(self, x: Tensor, turns: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Rows x [n, heads, rope_dim], each turned by its position."""
        if self._config.interleaved:
            x = numerics.pairs_apart(x)
        return torch.stack([numerics.rotate(x[row], *turn) for row, turn in enumerate(turns)])
