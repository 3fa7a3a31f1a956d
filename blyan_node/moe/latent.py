"""Multi-head latent attention, as the trunk computes it over a compressed cache.

A head's keys and values are products of the latent of a position. Instead of making them, which
would take `heads` times the memory or the work, the key's matrix is applied to the query and the
value's to the attention's result: in the latent's space all heads attend over the same rows, the
latent with the rotated key behind it (arXiv 2405.04434, 2.1.2). That is done alike for every row,
prefill or decode, so that a row's bits depend on the row and its sequence alone.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from blyan_node.moe.arithmetic import Arithmetic
from blyan_node.moe.cache import KVCache, stride_bytes
from blyan_node.moe.config import LatentAttention
from blyan_node.moe.kernels.program import Program
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

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Normed rows x [n, hidden] → queries [n, heads * head_dim], latents [n, kv_rank], keys.

        The keys [n, rope_dim] are not yet rotated, and neither are the queries.
        """
        c, products, rms_norm = self._config, self._products, self._arithmetic.rms_norm
        both = products["kv_a"](x)
        assert self._norm is not None
        latents = rms_norm(both[:, : c.kv_rank], self._norm, c.norm_eps)
        if self._query_norm is None:
            return products["q"](x), latents, both[:, c.kv_rank :]
        rows = rms_norm(products["q_a"](x), self._query_norm, c.norm_eps)
        return products["q_b"](rows), latents, both[:, c.kv_rank :]

    def mix(self, layer: int, projected: Sequence[Tensor], cache: KVCache) -> Tensor:
        """What `project` gives → [n, heads * value_dim]; the latents go into the cache."""
        queries, latents, keys = projected
        c, n = self._config, queries.shape[0]
        start = cache.length_of(layer)
        turns = self._rope.rows(start, start + n)
        kept = torch.cat((latents[:, None], self._rotated(keys[:, None], turns)), dim=2)
        cache.append(layer, kept)
        (seen,) = cache.seen(layer, 0, start + n)
        attended = self._arithmetic.attend(
            self._absorbed(queries, turns), seen, seen[..., : c.kv_rank], self._scale
        )
        values = [product(attended[:, head]) for head, product in enumerate(self._values)]
        return torch.cat(values, dim=1)

    def record(self, program: Program, slot: int, projected: Sequence[Tensor]) -> Tensor:
        """`mix` for one row, recorded; `slot` is the layer's in the cache."""
        c, (queries, latent, key) = self._config, projected
        stride = stride_bytes(c.kv_rank + c.rope_dim)
        program.keep(slot, stride, latent)
        program.keep(slot, stride, program.turn(key, interleaved=c.interleaved), c.kv_rank)
        heads = queries.view(c.heads, c.head_dim)
        absorbed = program.empty(c.heads, c.kv_rank + c.rope_dim)
        for head, product in enumerate(self._keys):
            here = slice(head, head + 1)
            program.copy(absorbed[here, : c.kv_rank], product(heads[here, : c.plain_dim]))
        turned = absorbed[:, c.kv_rank :]
        program.turn(heads[:, c.plain_dim :], turned, interleaved=c.interleaved)
        places = (slot, stride), (slot, stride, c.kv_rank)
        attended = program.attend(absorbed, *places, 1, self._scale)
        out = program.empty(1, c.heads * c.value_dim)
        for head, product in enumerate(self._values):
            here = slice(head * c.value_dim, (head + 1) * c.value_dim)
            program.copy(out[:, here], product(attended[head : head + 1]))
        return out

    def output(self, mixed: Tensor) -> Tensor:
        """What `mix` gives → [n, hidden]."""
        return self._products["o"](mixed)

    def _absorbed(self, queries: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Queries [n, heads * head_dim] in the latent's space: [n, heads, kv_rank + rope_dim]."""
        c = self._config
        heads = queries.reshape(-1, c.heads, c.head_dim)
        plain, turned = heads[..., : c.plain_dim], heads[..., c.plain_dim :]
        absorbed = [product(plain[:, head]) for head, product in enumerate(self._keys)]
        return torch.cat((torch.stack(absorbed, 1), self._rotated(turned, turns)), dim=2)

    def _rotated(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Rows x [n, heads, rope_dim], each turned by its position."""
        return self._arithmetic.rotate(x, *turns, interleaved=self._config.interleaved)
