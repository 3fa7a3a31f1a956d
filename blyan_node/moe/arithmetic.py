"""What computes for a model: every operation whose bits another node may have to repeat.

There are three: the kernels whose sums have a written order (`blyan_node.moe.contract`), the same
bits on every x86-64 processor with a fused multiply-add; torch's own products
(`blyan_node.moe.numerics`), which every processor has and whose bits depend on it; and torch's on
another device (`blyan_node.moe.devices`). Of all a row's bits depend on the row and the weights
alone. Trunk and experts are given one and use no other.

What torch does element by element (sums, products, clamps) is rounded in the same way everywhere;
so is choosing, and widening. That much is used beside this.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from blyan_node.moe.contract import Contract
from blyan_node.moe.devices import OnDevice, find
from blyan_node.moe.kernels import library
from blyan_node.moe.kernels.library import Kernels
from blyan_node.moe.kernels.targets import Unsupported, runnable
from blyan_node.moe.numerics import Plain
from blyan_node.moe.stored import Weight
from protocols.errors import ErrorCode, Refused

log = logging.getLogger(__name__)

# `auto` is the best that this machine has.
Choice = Literal["auto", "avx512", "avx2", "fma", "torch"]


Rows = Callable[..., tuple[Tensor, ...]]


class Product(Protocol):
    """A matrix [outs, depth], ready to be multiplied with."""

    @property
    def outs(self) -> int:
        """How many outputs a row has."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """Rows x [n, depth] times the matrix, transposed, plus its bias: float32 [n, outs]."""


class Arithmetic(Protocol):
    """The operations. All results are float32; so are the operands but stored weights.

    Rows are of any stride, their elements one after another. Any thread may call.
    """

    @property
    def name(self) -> str:
        """Its part of the numeric profile."""

    @property
    def aligned_bytes(self) -> int:
        """The multiple at which a stored float32 tensor must lie; others are copied."""

    @property
    def device(self) -> torch.device | None:
        """Where matrices, and keys and values, are held if not where they were loaded."""

    def product(self, weight: Weight, bias: Tensor | None = None) -> Product:
        """A matrix as it is stored, by rows or by columns (a transposed view), and its bias."""

    def steps(self, function: Rows) -> Rows:
        """The same function, faster for one row.

        It takes rows [n, …] to rows [n, …] and does nothing but operations of this arithmetic on
        them, and views: for one row these may be done again without calling it.
        """

    @property
    def recorded_by(self) -> Kernels | None:
        """What records the operations and makes them again; None if nothing does."""

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y, both [n, width]."""

    def combine(self, residual: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        """residual [n, width] plus rows [n, k, width] by weights [n, k], in the order of k."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm of each row of x [n, width]; weight is float32 [width]."""

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, both [n, width]."""

    def clamped(self, both: Tensor, limit: float, alpha: float) -> Tensor:
        """(up + 1) * gate * sigmoid(alpha * gate) of [n, 2 * width] with gate and up in turn.

        gate is at most `limit`, up within ± `limit`.
        """

    def softmax(self, x: Tensor) -> Tensor:
        """The softmax of each row of x [n, width]."""

    def sigmoid(self, x: Tensor) -> Tensor:
        """1 / (1 + e^-x) of x [n, width]."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        """Rotary embedding of x [n, heads, dim], row by row by cos and sin [n, dim / 2].

        Pairs are (i, i + dim / 2), or (2i, 2i + 1) if interleaved; the result has them in halves.
        """

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
        """Attention of the last n positions: query [n, heads, dim] → [n, heads, value dim].

        keys [kv heads, seen, dim] and values [kv heads, seen, value dim] end with the last row's
        own; the row r before it does not see the last r, and none sees more than `window`. sinks
        [heads] take part in the softmax and have no value.
        """


def choose(
    choice: Choice = "auto", *, threads: int = 1, folder: Path | None = None, device: str = "cpu"
) -> Arithmetic:
    """The arithmetic of that name on so many threads; machine code is kept in `folder`.

    `device` is one of `devices.find`; of `auto` it is the CPU where kernels of it are chosen. Takes
    a second if there is no machine code yet. Raises `Refused` for what cannot run here.
    """
    if choice != "auto" and device not in ("auto", "cpu"):
        raise Refused(
            ErrorCode.NOT_ALLOWED,
            f"the {choice} kernels compute on the cpu, not on {device}",
            "`kernels` and `device` do not go together",
            "Leave `kernels` at auto, or choose the device cpu.",
        )
    found = None if choice != "auto" else find(device)
    return _on_cpu(choice, threads, folder) if found is None else OnDevice(found, threads)


def _on_cpu(choice: Choice, threads: int, folder: Path | None) -> Arithmetic:
    if choice == "torch":
        return Plain(threads)
    try:
        found = {target.name: target for target in runnable()}
    except Unsupported as error:
        if choice != "auto":
            raise _cannot_run(choice, str(error)) from None
        log.warning("computing with torch, which only nodes like this one can repeat: %s", error)
        return Plain(threads)
    if choice != "auto" and choice not in found:
        raise _cannot_run(choice, f"this processor runs {', '.join(found)}")
    target = next(iter(found.values())) if choice == "auto" else found[choice]
    return Contract(library.load(folder, target, threads))


def _cannot_run(choice: Choice, why: str) -> Refused:
    return Refused(
        ErrorCode.NOT_ALLOWED,
        f"the {choice} kernels do not run on this machine",
        why,
        "Leave `kernels` at auto, or set it to torch.",
    )
