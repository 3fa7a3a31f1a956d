"""One token's pass through a trunk and the experts that are here, as one call of native code.

The steps are recorded once for a trunk. They stop at a layer whose experts are not all here: what
they need is handed out as if the layer had been computed by itself, and the pass goes on behind it.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blyan_node.moe.arithmetic import Arithmetic
from blyan_node.moe.cache import KVCache
from blyan_node.moe.config import ModelConfig, MoeFeed
from blyan_node.moe.here import Here, first_places
from blyan_node.moe.kernels.library import Kernels
from blyan_node.moe.kernels.program import Program
from blyan_node.moe.layer import Attended, Layer, Routed
from blyan_node.moe.rope import RopeTable
from blyan_node.moe.routing import record

Combine = Callable[[Attended, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Stop:
    """A layer's experts: the number of the step, and the rows before and behind it in the arena."""

    step: int
    attended: Attended
    rows: Tensor  # [1, top_k, hidden]


class TokenPass:
    """The steps of one trunk. `lock` is held by the thread that uses it."""

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        layers: Sequence[Layer],
        rope: RopeTable,
        combine: Combine,
        logits: Callable[[Tensor], Tensor],
    ) -> None:
        """`combine` and `logits` are the trunk's."""
        self.lock = kernels.recorder.lock
        self._config, self._rope = config, rope
        self._x = torch.empty(1, config.hidden)
        self._scores = torch.empty(0)
        self._stops: dict[int, _Stop] = {}  # by layer
        self.program = program = Program(kernels)
        first = first_places(config)
        slots = 0
        with self.lock, program.recording():
            for number, layer in enumerate(layers):
                program.layer()
                program.part("projections")
                projected = layer.before(self._x)
                program.part("attention")
                mixed = layer.attention.record(program, slots, projected)
                slots += len(config.layers[number].attention.cached)
                program.part("output and router")
                residual, *more = layer.after(self._x, mixed)
                out = residual
                if isinstance(layer.feed, MoeFeed):
                    normed, scores, *shared = more
                    feed = layer.feed
                    program.part("choosing")
                    chosen = record(program, scores, feed.top_k, feed.routing, layer.correction)
                    attended = Attended(number, residual, Routed(normed, *chosen), *shared)
                    program.part("experts")
                    step = program.next
                    rows = program.experts(first[number], chosen[0], normed)
                    self._stops[number] = _Stop(step, attended, rows)
                    program.part("combining")
                    out = combine(attended, rows)
                program.copy(self._x, out)
            self._before_logits = program.next
            program.part("head")
            self._logits = logits(self._x)
        self._layer_of = {stop.step: number for number, stop in self._stops.items()}

    def enter(
        self, x: Tensor, cache: KVCache, here: Here, ready: Callable[[], None], *, last: bool
    ) -> Attended | Tensor:
        """Passes the row x [1, hidden] on to a layer whose experts are not here, or to the end.

        There it gives the logits [1, vocab], or without `last` the last layer's row. `ready` is
        called when all is prepared.
        """
        _put(self._x, x)
        self._prepare(cache.length_of(0), cache, here)
        ready()
        return self._go(0, 0, cache, here, last=last)

    def leave(
        self, attended: Attended, rows: Tensor, cache: KVCache, here: Here, *, last: bool
    ) -> Attended | Tensor:
        """Goes on behind such a layer with its experts' rows [1, top_k, hidden]."""
        stop, routed = self._stops[attended.layer], attended.routed
        assert routed is not None and stop.attended.routed is not None
        _put(stop.rows, rows)
        _put(stop.attended.residual, attended.residual)
        _put(stop.attended.routed.weights, routed.weights)
        if stop.attended.shared is not None and attended.shared is not None:
            _put(stop.attended.shared, attended.shared)
        self._prepare(cache.length_of(attended.layer) - 1, cache, here)
        return self._go(stop.step + 1, attended.layer + 1, cache, here, last=last)

    def _go(
        self, step: int, layer: int, cache: KVCache, here: Here, *, last: bool
    ) -> Attended | Tensor:
        """From a step on, which belongs to a layer or to the end of the one before."""
        position: int = self.program.now.position
        end = self.program.count if last else self._before_logits
        while True:
            stopped = self.program.walk(step, end)
            if stopped is None:
                cache.appended(layer, len(self._config.layers), position + 1)
                return (self._logits if last else self._x).clone()
            number = self._layer_of[stopped]
            cache.appended(layer, number + 1, position + 1)
            found = self._stops[number].attended
            assert found.routed is not None
            if not here.fill(number, found.routed.experts[0].tolist()):
                return _copied(found)
            step, layer = stopped, number + 1

    def _prepare(self, position: int, cache: KVCache, here: Here) -> None:
        now, program = self.program.now, self.program
        scores = program.score_heads * (position + 2)
        if self._scores.numel() < scores:
            self._scores = torch.empty(2 * scores)
        cos, sin = self._rope.rows(position, position + 1)
        now.position, now.cos, now.sin = position, cos.data_ptr(), sin.data_ptr()
        now.cache, now.held = cache.addresses(position + 1), here.address
        now.scores = self._scores.data_ptr()


def token_pass(
    config: ModelConfig,
    arithmetic: Arithmetic,
    layers: Sequence[Layer],
    ropes: Sequence[RopeTable],
    combine: Combine,
    logits: Callable[[Tensor], Tensor],
) -> TokenPass | None:
    """The pass of one trunk; None where the arithmetic has no steps to record."""
    kernels = arithmetic.recorded_by
    if kernels is None or len(ropes) != 1:
        return None
    return TokenPass(config, kernels, layers, ropes[0], combine, logits)


def _put(place: Tensor, row: Tensor) -> None:
    """Writes a row to its place in the arena."""
    row = row.contiguous()
    assert row.numel() == place.numel() and row.dtype == place.dtype == torch.float32
    ctypes.memmove(place.data_ptr(), row.data_ptr(), 4 * row.numel())


def _copied(found: Attended) -> Attended:
    """The same rows, the caller's."""
    routed, shared = found.routed, found.shared
    assert routed is not None
    mine = Routed(routed.normed.clone(), routed.experts.clone(), routed.weights.clone())
    shared = None if shared is None else shared.clone()
    return Attended(found.layer, found.residual.clone(), mine, shared)
