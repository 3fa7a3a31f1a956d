"""Feed-forward networks, as experts hold them and the trunk computes them."""

from collections.abc import Mapping

from torch import Tensor

from blyan_node.moe import numerics
from blyan_node.moe.config import Activation, ClampedGate
from blyan_node.moe.weights import matrices


class FeedForward:
    """A gated network: down(activation(gate(x), up(x))). A row's result depends on it alone."""

    def __init__(self, activation: Activation, tensors: Mapping[str, Tensor]) -> None:
        """`tensors` by role (`blyan_node.moe.layout`): gate and up by themselves or in one."""
        self._activation = activation
        self._matrices = matrices(tensors)
        self._biases = {role: tensors.get(f"{role}_bias") for role in ("gate_up", "down")}

    def apply(self, x: Tensor) -> Tensor:
        """x [n, hidden] → [n, hidden]."""
        gate, up = self._gate_and_up(x)
        active = activate(self._activation, gate, up)
        return numerics.linear(active, self._matrices["down"], self._biases["down"])

    def _gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, bias = self._matrices, self._biases["gate_up"]
        if "gate" in w:
            return numerics.linear(x, w["gate"]), numerics.linear(x, w["up"])
        if "gate_up" in w:
            gate, up = numerics.linear(x, w["gate_up"], bias).chunk(2, dim=1)
            return gate, up
        both = numerics.linear(x, w["gate_up_interleaved"], bias)
        return both[:, ::2], both[:, 1::2]


def activate(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """What goes into the last product: [n, intermediate]."""
    if isinstance(activation, ClampedGate):
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(min=-activation.limit, max=activation.limit)
        return (up + 1) * (gate * numerics.sigmoid(gate * activation.alpha))
    return gate * numerics.sigmoid(gate) * up
