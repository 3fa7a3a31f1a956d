"""The arithmetic that every path shares: float32, and one row at a time where order matters.

The contract: a row's bits depend on that row, on the weights and on how they are stored, and on
nothing else: not on the other rows of a batch, on the number of threads, or on how a prompt was
cut. Matrix products of several rows break it (their blocking depends on the number of rows and
the row's place among them), so a product is done row by row with a matrix-vector product, whose
order of summation is fixed once both sides are aligned. What was measured is in
docs/decisions/0004-row-invariance.md. Every function here keeps the contract; another operation
with a sum or a transcendental function must be shown to keep it.
"""

import math

import torch
from torch import Tensor

from blyan_node.moe.config import Rope
from blyan_node.moe.stored import Weight, tiles

ALIGNED_FLOATS = 16
_TABLE_POSITIONS = 512


def aligned(rows: int, columns: int) -> Tensor:
    """Uninitialised float32 [rows, columns] whose rows begin at multiples of 64 bytes."""
    stride = -(-columns // ALIGNED_FLOATS) * ALIGNED_FLOATS
    return torch.empty(rows, stride)[:, :columns]


def align(x: Tensor) -> Tensor:
    """`x` [rows, columns] itself if its rows are aligned, else an aligned copy."""
    if x.stride(1) == 1 and x.stride(0) % 4 == 0 and x.data_ptr() % 16 == 0:
        return x
    copy = aligned(*x.shape)
    copy.copy_(x)
    return copy


def align_matrix(matrix: Tensor) -> Tensor:
    """A piece of a matrix where its address changes no bit of its products: itself or a copy."""
    if matrix.dtype != torch.float32 or matrix.data_ptr() % 16 == 0:
        return matrix
    return matrix.clone()


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [n, k] times weight [m, k] transposed, plus bias [m]: float32 [n, m], row by row.

    `weight` is as it is stored, by rows or by columns (a transposed view); the result's bits are
    those of its float32 values so stored, whatever the tiles in which it is walked.
    """
    x, n = align(x), x.shape[0]
    out = aligned(n, weight.shape[0])
    if isinstance(weight, Tensor) and weight.stride(1) != 1:
        _add_up(x, weight.t(), out)
    else:
        for first, tile in tiles(weight, n):
            last = first + tile.shape[0]
            for row in range(n):
                torch.mv(tile, x[row], out=out[row, first:last])
    return out if bias is None else out.add_(bias.float())


def _add_up(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """x [n, k] times weight [k, m] into out [n, m]: such a product adds up in the order of k."""
    for first, tile in tiles(weight, x.shape[0]):
        last = first + tile.shape[0]
        for row in range(x.shape[0]):
            if first:
                out[row].addmv_(tile.t(), x[row, first:last])
            else:
                torch.mv(tile.t(), x[row, :last], out=out[row])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of each row of x [n, hidden]."""
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x). (torch.sigmoid treats the last elements of a buffer differently.)"""
    return 1.0 / (1.0 + torch.exp(-x))


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position for each pair of a head's dimensions: [head_dim / 2]."""
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    plain = 1.0 / powers
    if rope.factor is None:
        return plain
    low, high = (
        head_dim * math.log(rope.original_positions / (turns * 2 * math.pi))
        / (2 * math.log(rope.theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    )  # fmt: skip
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high if high != low else high + 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


class RopeTable:
    """Cosine and sine by position, made in pieces of a fixed size when they are first needed."""

    def __init__(self, rope: Rope, head_dim: int) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim)
        self._factor = rope.attention_factor
        self.score_factor = rope.score_factor
        self._pieces: dict[int, tuple[Tensor, Tensor]] = {}

    def at(self, position: int) -> tuple[Tensor, Tensor]:
        """cos and sin, each [head_dim / 2], times YaRN's attention factor."""
        number, place = divmod(position, _TABLE_POSITIONS)
        if number not in self._pieces:
            positions = torch.arange(_TABLE_POSITIONS, dtype=torch.float32)
            angles = (positions + number * _TABLE_POSITIONS)[:, None] * self._frequencies
            self._pieces[number] = (angles.cos() * self._factor, angles.sin() * self._factor)
        cos, sin = self._pieces[number]
        return cos[place], sin[place]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [heads, head_dim] of one position; pairs are (i, i + head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def pairs_apart(x: Tensor) -> Tensor:
    """The last dimension's pairs (2i, 2i + 1) moved to (i, i + half), where `rotate` has them."""
    return torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)


def attention_row(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, sinks: Tensor | None
) -> Tensor:
    """Attention of one token: query [heads, head_dim] over keys [kv heads, seen, head_dim].

    Values are [kv heads, seen, value_dim]. `seen` holds the positions that the token may see and no
    other; sinks [heads] take part in the softmax and have no value. Rows of keys and values are
    aligned. Returns [heads, value_dim].
    """
    heads, group, seen = query.shape[0], query.shape[0] // keys.shape[0], keys.shape[1]
    query, out = align(query), aligned(heads, values.shape[2])
    scores = aligned(heads, seen + 1)
    for head in range(heads):
        torch.mv(keys[head // group], query[head], out=scores[head, :seen])
    scores *= scale
    scores[:, seen] = -math.inf if sinks is None else sinks
    weights = align(torch.softmax(scores, dim=-1))
    for head in range(heads):
        torch.mv(values[head // group].t(), weights[head, :seen], out=out[head])
    return out


def route(
    logits: Tensor, top_k: int, *, over_chosen: bool, renormalise: bool = True
) -> tuple[Tensor, Tensor]:
    """The experts of each row of logits [n, experts] and their weights, best first: [n, top_k].

    Equal logits go to the smaller expert. The softmax is over the chosen or over all experts; of
    all, the chosen weights may be renormalised, which is the same up to rounding.
    """
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k]
    if over_chosen:
        return order, torch.softmax(logits.gather(1, order), dim=-1)
    chosen = torch.softmax(logits, dim=-1).gather(1, order)
    if not renormalise:
        return order, chosen
    total = chosen[:, 0]
    for rank in range(1, top_k):
        total = total + chosen[:, rank]
    return order, chosen / total[:, None]


def combine(residual: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """residual [n, h] plus the experts' rows [n, k, h] by weights [n, k], in ascending rank."""
    total = weights[:, 0, None] * rows[:, 0]
    for rank in range(1, weights.shape[1]):
        total = total + weights[:, rank, None] * rows[:, rank]
    return residual + total


def use_threads(count: int) -> None:
    """Threads that one product may use; left to itself torch takes every core for every node."""
    torch.set_num_threads(count)
