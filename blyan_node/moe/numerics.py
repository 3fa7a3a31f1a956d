"""torch's arithmetic: float32, and one row at a time where order matters.

For processors that the kernels (`blyan_node.moe.contract`) do not run on. The contract holds here
too: a row's bits depend on that row, on the weights and on how they are stored, and on nothing
else: not on the other rows of a batch, on the number of threads, or on how a prompt was cut. They
do depend on the processor and on torch's version. Matrix products of several rows break the
contract (their blocking depends on the number of rows and the row's place among them), so a product
is done row by row with a matrix-vector product, whose order of summation is fixed once both sides
are aligned. What was measured is in docs/decisions/0004-row-invariance.md. Another operation with a
sum or a transcendental function must be shown to keep it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from blyan_node.moe.stored import Scaled, Weight, tiles

Rows = Callable[..., tuple[Tensor, ...]]

ALIGNED_FLOATS = 16
_ALIGNED_BYTES = 16


def aligned(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Uninitialised float32 [rows, columns] whose rows begin at multiples of 64 bytes."""
    stride = -(-columns // ALIGNED_FLOATS) * ALIGNED_FLOATS
    return torch.empty(rows, stride, device=device)[:, :columns]


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
    those of its float32 values so stored, whatever the tiles in which it is walked. The scales of
    one that has them are applied to the sums.
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
    if isinstance(weight, Scaled):
        out.mul_(weight.scales)
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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [heads, head_dim] of one position; pairs are (i, i + head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


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


class Plain:
    """`blyan_node.moe.arithmetic.Arithmetic`, by torch."""

    aligned_bytes = _ALIGNED_BYTES
    device = recorded_by = None

    def __init__(self, threads: int = 1) -> None:
        use_threads(threads)
        version = ".".join(torch.__version__.split(".")[:2])
        capability = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "")
        self.name = f"torch{version}-{capability}-mv"

    def __str__(self) -> str:
        return "torch"

    def product(self, weight: Weight, bias: Tensor | None = None) -> "PlainProduct":
        """A matrix where it lies, unless it is float32 whose address would change bits."""
        return PlainProduct(align_matrix(weight) if isinstance(weight, Tensor) else weight, bias)

    def steps(self, function: Rows) -> Rows:
        """The function itself."""
        return function

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y."""
        return x + y

    def combine(self, residual: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        """residual [n, h] plus the experts' rows [n, k, h] by weights [n, k], in ascending rank."""
        total = weights[:, 0, None] * rows[:, 0]
        for rank in range(1, weights.shape[1]):
            total = total + weights[:, rank, None] * rows[:, rank]
        return residual + total

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm of each row of x [n, width]."""
        return rms_norm(x, weight, eps)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        return gate * sigmoid(gate) * up

    def clamped(self, both: Tensor, limit: float, alpha: float) -> Tensor:
        """(up + 1) * gate * sigmoid(alpha * gate), clamped, of [n, 2 * width] in turn."""
        gate, up = both[:, ::2].clamp(max=limit), both[:, 1::2].clamp(min=-limit, max=limit)
        return (up + 1) * (gate * sigmoid(gate * alpha))

    def softmax(self, x: Tensor) -> Tensor:
        """The softmax of each row of x [n, width]."""
        return torch.softmax(x, dim=-1)

    def sigmoid(self, x: Tensor) -> Tensor:
        """1 / (1 + e^-x)."""
        return sigmoid(x)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        """Rotary embedding of x [n, heads, dim], row by row by cos and sin [n, dim / 2]."""
        x = torch.cat((x[..., ::2], x[..., 1::2]), dim=-1) if interleaved else x
        return torch.stack([rotate(x[row], cos[row], sin[row]) for row in range(x.shape[0])])

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        *,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of the last n positions: query [n, heads, dim] → [n, heads, value dim]."""
        n, seen = query.shape[0], keys.shape[1]
        rows = []
        for row in range(n):
            last = seen - n + row + 1
            here = slice(0 if window is None else max(0, last - window), last)
            rows.append(attention_row(query[row], keys[:, here], values[:, here], scale, sinks))
        return torch.stack(rows)


class PlainProduct:
    """A matrix and its bias."""

    def __init__(self, weight: Weight, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        self.outs = weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """Rows x [n, depth] times the matrix, transposed, plus its bias: float32 [n, outs]."""
        return linear(x, self._weight, self._bias)


def use_threads(count: int) -> None:
    """Threads that one product may use; left to itself torch takes every core for every node."""
    torch.set_num_threads(count)
