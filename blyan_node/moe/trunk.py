"""What the main node computes itself: embedding, attention, routing, combining, logits.

A pass goes layer by layer: `attend` gives the rows that the experts must see, whoever holds them;
`combine` takes their results. A dense layer, and the shared experts of another, are computed here.
Rows of one call are consecutive positions of one session. Which rows go together changes no bit
(`blyan_node.moe.arithmetic`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blyan_node.moe.arithmetic import Arithmetic
from blyan_node.moe.attention import Grouped
from blyan_node.moe.cache import KVCache, bytes_of
from blyan_node.moe.config import (
    DenseFeed,
    LatentAttention,
    LayerConfig,
    ModelConfig,
    MoeFeed,
)
from blyan_node.moe.families import layout
from blyan_node.moe.feed import FeedForward
from blyan_node.moe.here import Here
from blyan_node.moe.latent import Latent
from blyan_node.moe.layer import Attended, Layer, Passed, Routed
from blyan_node.moe.precision import hold
from blyan_node.moe.rope import RopeTable
from blyan_node.moe.routing import route
from blyan_node.moe.stored import Weight, rows_of
from blyan_node.moe.token_pass import token_pass
from blyan_node.moe.weights import ReadWeights, vector
from protocols.dag.header import Kind
from protocols.errors import ErrorCode, Refused
from protocols.ids import Subject
from protocols.precision import PUBLISHED, Precision

PREFILL_ROWS = 256  # an expert that sees a fourth of them still has many (`kernels.blocks`)
Parts = dict[str, dict[str, Weight]]


class Trunk:
    """The trunk and routers of one model at one root, loaded."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: ReadWeights,
        arithmetic: Arithmetic,
        precision: Precision = PUBLISHED,
    ) -> None:
        """Loads everything but the experts; raises `Refused` (BAD_MODEL) for what does not fit.

        `bytes` is what it takes in memory, `copied` how much of that was copied to load it;
        `converted` are the subjects whose published form is not needed any more.
        """
        self.config = config
        self._arithmetic = arithmetic
        self.bytes = self.copied = 0
        self.converted: list[Subject] = []
        parts: Parts = {}
        for part in layout(config):
            if part.kind is not Kind.EXPERT:
                looked_up = part.subject == "embed" and not config.tied  # a row of it: no product
                device = None if looked_up else arithmetic.device
                given = tensors(part.subject)
                held = hold(part, given, precision, arithmetic.aligned_bytes, device)
                self.bytes += held.bytes
                self.copied += held.copied
                self.converted += [part.subject] if held.converted else []
                parts[part.subject] = held.tensors
        self._embedding = embedding = parts["embed"]["weight"]
        self._final_norm = _norm(parts["final"], "weight")
        self._head = arithmetic.product(embedding if config.tied else parts["head"]["weight"])
        self._ropes: dict[int, RopeTable] = {}
        self._layers = [self._layer(n, one, parts) for n, one in enumerate(config.layers)]
        ropes = list(self._ropes.values())
        here = (config, arithmetic, self._layers, ropes, self.combine, self.logits)
        self.token = token_pass(*here)

    def _layer(self, number: int, layer: LayerConfig, parts: Parts) -> Layer:
        given, feed, arithmetic = parts[f"layer{number}.attention"], layer.feed, self._arithmetic
        dim = layer.attention.rope_dim
        if dim not in self._ropes:
            self._ropes[dim] = RopeTable(self.config.rope, dim)
        rope, attention = self._ropes[dim], layer.attention
        loaded: Grouped | Latent
        if isinstance(attention, LatentAttention):
            loaded = Latent(attention, given, rope, arithmetic)
        else:
            loaded = Grouped(attention, given, rope, self.config.norm_eps, arithmetic)
        here = f"layer{number}.mlp" if isinstance(feed, DenseFeed) else f"layer{number}.shared"
        network = FeedForward(feed.activation, parts[here], arithmetic) if here in parts else None
        router = parts.get(f"layer{number}.router")
        chooser = arithmetic.product(router["weight"], vector(router, "bias")) if router else None
        norms, eps = (_norm(given, "input_norm"), _norm(given, "output_norm")), self.config.norm_eps

        def before(x: Tensor) -> tuple[Tensor, ...]:
            return loaded.project(arithmetic.rms_norm(x, norms[0], eps))

        def after(x: Tensor, mixed: Tensor) -> tuple[Tensor, ...]:
            residual = arithmetic.add(x, loaded.output(mixed))
            normed = arithmetic.rms_norm(residual, norms[1], eps)
            here = () if network is None else (network.apply(normed),)
            if chooser is None:
                return (arithmetic.add(residual, *here),)
            return residual, normed, chooser(normed), *here

        return Layer(
            before=arithmetic.steps(before),
            attention=loaded,
            after=arithmetic.steps(after),
            feed=feed,
            correction=vector(router, "correction") if router else None,
        )

    def new_cache(self, positions: int | None = None) -> KVCache:
        """An empty cache for one session, with room for so many positions."""
        device = self._arithmetic.device
        if positions is None:
            return KVCache(self.config, device=device)
        return KVCache(self.config, positions, device)

    def cache_bytes(self, positions: int) -> int:
        """The memory of such a cache."""
        return bytes_of(self.config, positions)

    @staticmethod
    def prefill_cuts(start: int, count: int) -> list[tuple[int, int]]:
        """Cuts the positions [start, start + count) at multiples of `PREFILL_ROWS`."""
        cuts, end = [], start + count
        while start < end:
            cut = min(end, (start // PREFILL_ROWS + 1) * PREFILL_ROWS)
            cuts.append((start, cut))
            start = cut
        return cuts

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> Tensor:
        """The rows [n, hidden] of n token ids; raises `Refused` (BAD_INPUT) for unknown ids."""
        for one in ids:
            if not 0 <= one < self.config.vocab:
                raise Refused(
                    ErrorCode.BAD_INPUT,
                    f"token id {one}",
                    f"the model's vocabulary has {self.config.vocab} tokens",
                )
        rows = rows_of(self._embedding, list(ids))
        device = self._arithmetic.device
        return rows if device is None else rows.to(device)

    @torch.inference_mode()
    def attend(self, layer: int, x: Tensor, cache: KVCache) -> Attended:
        """Attention and routing of one layer for the next rows x [n, hidden] of a session."""
        part = self._layers[layer]
        residual, *more = part.after(x, part.mix(layer, part.before(x), cache))
        if not isinstance(part.feed, MoeFeed):
            return Attended(layer, residual, None)
        normed, logits, *shared = more
        feed, arithmetic = part.feed, self._arithmetic
        chosen = route(arithmetic, logits, feed.top_k, feed.routing, part.correction)
        if arithmetic.device is not None:  # experts may be anywhere
            normed, chosen = normed.cpu(), (chosen[0].cpu(), chosen[1].cpu())
        return Attended(layer, residual, Routed(normed, *chosen), *shared)

    @torch.inference_mode()
    def walk(self, layer: int, x: Tensor, cache: KVCache) -> Attended:
        """As `attend` from `layer` on, through dense layers, to the next layer with experts.

        If none is left, `residual` is the output of the last layer, and `layer` their number.
        """
        while layer < len(self._layers):
            attended = self.attend(layer, x, cache)
            if attended.routed is not None:
                return attended
            layer, x = layer + 1, attended.residual
        return Attended(layer, x, None)

    @torch.inference_mode()
    def enter(
        self,
        ids: Sequence[int],
        cache: KVCache,
        here: Here | None,
        rows: slice | None,
        ready: Callable[[], None] = lambda: None,
    ) -> Passed:
        """Passes the next tokens on to the first layer whose experts are not all `here`.

        One token may have experts here. Behind the last layer it gives the logits of `rows` [n,
        vocab], or None if those are of none. `ready` is called when all is prepared. Raises
        `Refused` (BAD_INPUT) for unknown ids.
        """
        x, token = self.embed(ids), self.token
        if token is None or here is None or not token.lock.acquire(blocking=False):
            ready()
            return self._on(self.walk(0, x, cache), cache, here, rows)
        try:
            found = token.enter(x, cache, here, ready, last=rows is not None)
        finally:
            token.lock.release()
        return found if isinstance(found, Attended) or rows is not None else None

    @torch.inference_mode()
    def leave(
        self,
        attended: Attended,
        outputs: Tensor,
        cache: KVCache,
        here: Here | None,
        rows: slice | None,
    ) -> Passed:
        """As `enter`, from behind such a layer with its experts' rows [n, top_k, hidden]."""
        token = self.token
        if token is None or here is None or not token.lock.acquire(blocking=False):
            return self._on(self._behind(attended, outputs, cache), cache, here, rows)
        try:
            found = token.leave(attended, outputs, cache, here, last=rows is not None)
        finally:
            token.lock.release()
        return found if isinstance(found, Attended) or rows is not None else None

    def _on(
        self, attended: Attended, cache: KVCache, here: Here | None, rows: slice | None
    ) -> Passed:
        """Layer by layer, while the experts of one row are here."""
        while attended.routed is not None:
            routed, outputs = attended.routed, None
            if here is not None:
                numbers = routed.experts[0].tolist()
                outputs = here.compute(attended.layer, routed.normed, numbers)
            if outputs is None:
                return attended
            attended = self._behind(attended, outputs, cache)
        return None if rows is None else self.logits(attended.residual[rows])

    def _behind(self, attended: Attended, outputs: Tensor, cache: KVCache) -> Attended:
        return self.walk(attended.layer + 1, self.combine(attended, outputs), cache)

    @torch.inference_mode()
    def combine(self, attended: Attended, rows: Tensor) -> Tensor:
        """The layer's output [n, hidden] from the experts' rows [n, top_k, hidden].

        The sum's order: (residual + experts in ascending rank) + shared experts.
        """
        assert attended.routed is not None
        weights = attended.routed.weights.contiguous()
        out = self._arithmetic.combine(attended.residual, weights, rows)
        return out if attended.shared is None else self._arithmetic.add(out, attended.shared)

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Logits float32 [n, vocab] of the last layer's rows x [n, hidden]."""
        normed = self._arithmetic.rms_norm(x, self._final_norm, self.config.norm_eps)
        return self._head(normed).cpu()


def _norm(tensors: dict[str, Weight], role: str) -> Tensor:
    """A norm's weights, which every layer has."""
    weight = vector(tensors, role)
    assert weight is not None
    return weight
