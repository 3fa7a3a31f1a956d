"""Feed-forward networks, as experts hold them and the trunk computes them."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from blyan_node.moe.arithmetic import Arithmetic, Product
from blyan_node.moe.config import Activation, ClampedGate
from blyan_node.moe.contract import Steps
from blyan_node.moe.stored import Weight


class FeedForward:
    """A gated network: down(activation(gate(x), up(x))). A row's result depends on it alone."""

    def __init__(
        self, activation: Activation, tensors: Mapping[str, Weight], arithmetic: Arithmetic
    ) -> None:
        """`tensors` by role (`blyan_node.moe.layout`): gate and up by themselves or in one."""
        products = {
            role: arithmetic.product(weight, _bias(tensors, role))
            for role, weight in tensors.items()
            if not role.endswith("_bias")
        }
        # No method of this: the weights go when it does, and do not wait to be collected.
        self._steps = arithmetic.steps(partial(_compute, arithmetic, activation, products))

    @property
    def described(self) -> int:
        """What `describe` has given, or 0."""
        return self._steps.described if isinstance(self._steps, Steps) else 0

    def describe(self, width: int) -> int:
        """The address of its steps for one row (`Steps.describe`), which kernels have."""
        assert isinstance(self._steps, Steps)
        return self._steps.describe(width)

    def apply(self, x: Tensor) -> Tensor:
        """x [n, hidden] → [n, hidden]."""
        return self._steps(x)[0]


def _compute(
    arithmetic: Arithmetic, activation: Activation, products: Mapping[str, Product], x: Tensor
) -> tuple[Tensor]:
    if isinstance(activation, ClampedGate):
        both = products["gate_up_interleaved"](x)
        active = arithmetic.clamped(both, activation.limit, activation.alpha)
    else:
        if "gate" in products:
            gate, up = products["gate"](x), products["up"](x)
        else:
            gate, up = products["gate_up"](x).chunk(2, dim=1)
        active = arithmetic.swiglu(gate, up)
    return (products["down"](active),)


def _bias(tensors: Mapping[str, Weight], role: str) -> Tensor | None:
    bias = tensors.get(f"{role.removesuffix('_interleaved')}_bias")
    assert bias is None or isinstance(bias, Tensor)
    return bias
