"""Attention of the next rows of a session, as the trunk computes it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from blyan_node.moe import numerics
from blyan_node.moe.cache import KVCache
from blyan_node.moe.config import GroupedAttention


class Grouped:
    """Grouped attention of one layer, loaded."""

    def __init__(
        self,
        config: GroupedAttention,
        tensors: Mapping[str, Tensor],
        rope: numerics.RopeTable,
        norm_eps: float,
    ) -> None:
        """`tensors` by role (`blyan_node.moe.layout`)."""
        self._config, self._rope, self._eps = config, rope, norm_eps
        self._tensors = tensors

    def apply(self, layer: int, x: Tensor, cache: KVCache) -> Tensor:
        """Normed rows x [n, hidden] → [n, hidden]; their keys and values go into the cache."""
        c, n = self._config, x.shape[0]
        q, k, v = (self._project(name, x) for name in "qkv")
        start = cache.length_of(layer)
        turns = [self._rope.at(start + row) for row in range(n)]
        k = torch.stack([numerics.rotate(k[row], *turns[row]) for row in range(n)])
        cache.append(layer, k, v)
        out = numerics.aligned(n, c.heads * c.head_dim)
        for row in range(n):
            last = start + row + 1
            first = 0 if c.window is None else max(0, last - c.window)
            keys, values = cache.seen(layer, first, last)
            query = numerics.rotate(q[row], *turns[row])
            seen = numerics.attention_row(
                query, keys, values, c.head_dim**-0.5, self._tensors.get("sinks")
            )
            out[row] = seen.reshape(-1)
        return numerics.linear(out, self._tensors["o"], self._tensors.get("o_bias"))

    def _project(self, name: str, x: Tensor) -> Tensor:
        """Queries, keys or values [n, heads, head_dim], not yet rotated."""
        c, w = self._config, self._tensors
        rows = numerics.linear(x, w[name], w.get(f"{name}_bias"))
        norm = w.get(f"{name}_norm")
        if norm is not None and c.qk_norm == "whole":
            rows = numerics.rms_norm(rows, norm, self._eps)
        heads = rows.reshape(x.shape[0], -1, c.head_dim)
        if norm is not None and c.qk_norm == "head":
            heads = numerics.rms_norm(heads, norm, self._eps)
        return heads if c.clip is None else heads.clamp(min=-c.clip, max=c.clip)
