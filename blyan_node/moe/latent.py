"""Multi-head latent attention, as the trunk computes it over a compressed cache.

A head's keys and values are products of the latent of a position. Instead of making them, which
would take `heads` times the memory or the work, the key's matrix is applied to the query and the
value's to the attention's result: in the latent's space all heads attend over the same rows, the
latent with the rotated key behind it (arXiv 2405.04434, 2.1.2). That is done alike for every row,
prefill or decode, so that a row's bits depend on the row and its sequence alone.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from blyan_node.moe.arithmetic import Arithmetic
from blyan_node.moe.cache import KVCache
from blyan_node.moe.config import LatentAttention
from blyan_node.moe.rope import RopeTable
from blyan_node.moe.stored import Weight
from blyan_node.moe.weights import vector


class Latent:
    """Latent attention of one layer, loaded."""

    def __init__(
        self,
        config: LatentAttention,
        tensors: Mapping[str, Weight],
        rope: RopeTable,
        arithmetic: Arithmetic,
    ) -> None:
        """`tensors` by role (`blyan_node.moe.layout`)."""
        self._config, self._rope, self._arithmetic = config, rope, arithmetic
        self._scale = rope.score_factor / math.sqrt(config.head_dim)
        self._products = {
            name: arithmetic.product(tensors[name], vector(tensors, f"{name}_bias"))
            for name in ("q", "q_a", "q_b", "kv_a", "o")
            if name in tensors
        }
        self._query_norm = vector(tensors, "q_a_norm")
        self._norm = vector(tensors, "kv_a_norm")
        both = tensors["kv_b"]
        assert isinstance(both, Tensor)
        by_head = both.view(config.heads, -1, config.kv_rank)
        plain = config.plain_dim  # of each head there are keys [plain_dim, kv_rank] and values
        self._keys = [arithmetic.product(head.t()) for head in by_head[:, :plain]]
        self._values = [arithmetic.product(head) for head in by_head[:, plain:]]

    def apply(self, layer: int, x: Tensor, cache: KVCache) -> Tensor:
        """Normed rows x [n, hidden] → [n, hidden]; their latents go into the cache."""
        c, n = self._config, x.shape[0]
        start = cache.length_of(layer)
        turns = self._rope.rows(start, start + n)
        cache.append(layer, self._latents(x, turns))
        (seen,) = cache.seen(layer, 0, start + n)
        attended = self._arithmetic.attend(
            self._queries(x, turns), seen, seen[..., : c.kv_rank], self._scale
        )
        values = [product(attended[:, head]) for head, product in enumerate(self._values)]
        return self._products["o"](torch.cat(values, dim=1))

    def _latents(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """What is kept of rows x [n, hidden]: [n, 1, kv_rank + rope_dim]."""
        c, rows = self._config, self._products["kv_a"](x)
        assert self._norm is not None
        latents = self._arithmetic.rms_norm(rows[:, : c.kv_rank], self._norm, c.norm_eps)
        keys = self._rotated(rows[:, None, c.kv_rank :], turns)
        return torch.cat((latents[:, None], keys), dim=2)

    def _queries(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """The queries of rows x [n, hidden] in the latent's space: [n, heads, as the latents]."""
        c, products = self._config, self._products
        if self._query_norm is None:
            rows = products["q"](x)
        else:
            rows = self._arithmetic.rms_norm(products["q_a"](x), self._query_norm, c.norm_eps)
            rows = products["q_b"](rows)
        heads = rows.view(x.shape[0], c.heads, c.head_dim)
        plain, turned = heads[..., : c.plain_dim], heads[..., c.plain_dim :]
        absorbed = [product(plain[:, head]) for head, product in enumerate(self._keys)]
        return torch.cat((torch.stack(absorbed, 1), self._rotated(turned, turns)), dim=2)

    def _rotated(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Rows x [n, heads, rope_dim], each turned by its position."""
        return self._arithmetic.rotate(x, *turns, interleaved=self._config.interleaved)
