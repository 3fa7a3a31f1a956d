"""Attention of the next rows of a session, as the trunk computes it."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from blyan_node.moe.arithmetic import Arithmetic
from blyan_node.moe.cache import KVCache, stride_bytes
from blyan_node.moe.config import GroupedAttention
from blyan_node.moe.kernels.program import Program
from blyan_node.moe.rope import RopeTable
from blyan_node.moe.stored import Weight
from blyan_node.moe.weights import vector


class Grouped:
    """Grouped attention of one layer, loaded."""

    def __init__(
        self,
        config: GroupedAttention,
        tensors: Mapping[str, Weight],
        rope: RopeTable,
        norm_eps: float,
        arithmetic: Arithmetic,
    ) -> None:
        """`tensors` by role (`blyan_node.moe.layout`)."""
        self._config, self._rope, self._eps = config, rope, norm_eps
        self._arithmetic = arithmetic
        self._products = {
            name: arithmetic.product(tensors[name], vector(tensors, f"{name}_bias"))
            for name in "qkvo"
        }
        self._norms = {name: vector(tensors, f"{name}_norm") for name in "qkv"}
        self._sinks = vector(tensors, "sinks")
        self._scale = 1.0 / math.sqrt(config.head_dim)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Normed rows x [n, hidden] → queries, keys and values [n, heads * head_dim]."""
        return tuple(self._project(name, x) for name in "qkv")

    def mix(self, layer: int, projected: Sequence[Tensor], cache: KVCache) -> Tensor:
        """What `project` gives → [n, heads * head_dim]; keys and values go into the cache."""
        c, n = self._config, projected[0].shape[0]
        start = cache.length_of(layer)
        last = start + n
        turns = self._rope.rows(start, last)
        query, key, value = (self._by_head(rows) for rows in projected)
        cache.append(layer, self._arithmetic.rotate(key, *turns), value)
        first = 0 if c.window is None else max(0, start + 1 - c.window)
        keys, values = cache.seen(layer, first, last)
        out = self._arithmetic.attend(
            self._arithmetic.rotate(query, *turns),
            keys,
            values,
            self._scale,
            window=c.window,
            sinks=self._sinks,
        )
        return out.reshape(n, -1)

    def record(self, program: Program, slot: int, projected: Sequence[Tensor]) -> Tensor:
        """`mix` for one row, recorded; `slot` is the layer's first in the cache."""
        c, stride = self._config, stride_bytes(self._config.head_dim)
        query, key, value = (rows.view(-1, c.head_dim) for rows in projected)
        if c.clip is not None:
            for rows in (query, key, value):
                program.clip(rows, c.clip)
        program.keep(slot, stride, program.turn(key))
        program.keep(slot + 1, stride, value)
        places = (slot, stride), (slot + 1, stride, c.head_dim)
        turned, given = program.turn(query), (c.kv_heads, self._scale)
        out = program.attend(turned, *places, *given, window=c.window, sinks=self._sinks)
        return out.view(1, -1)

    def output(self, mixed: Tensor) -> Tensor:
        """What `mix` gives → [n, hidden]."""
        return self._products["o"](mixed)

    def _project(self, name: str, x: Tensor) -> Tensor:
        """Queries, keys or values, normed but not yet rotated."""
        c, norm = self._config, self._norms[name]
        rows = self._products[name](x)
        if norm is not None:
            width = rows.shape[1] if c.qk_norm == "whole" else c.head_dim
            rows = self._arithmetic.rms_norm(rows.reshape(-1, width), norm, self._eps)
        return rows.reshape(x.shape[0], -1)

    def _by_head(self, rows: Tensor) -> Tensor:
        """Rows as [n, heads, head_dim], clipped if the model does that."""
        c = self._config
        heads = rows.reshape(rows.shape[0], -1, c.head_dim)
        return heads if c.clip is None else heads.clamp(min=-c.clip, max=c.clip)
