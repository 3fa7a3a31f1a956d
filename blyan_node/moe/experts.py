"""One expert: a feed-forward network that a node holds for others."""

import torch
from torch import Tensor

from blyan_node.moe import numerics
from blyan_node.moe.config import ModelConfig
from blyan_node.moe.layout import expert_layout
from blyan_node.moe.weights import Weights, load_part, resident_bytes


class Expert:
    """A loaded expert of either family; a row's result depends on that row alone."""

    def __init__(self, config: ModelConfig, tensors: Weights) -> None:
        """Loads the tensors by local name; raises `Refused` (BAD_MODEL) for what does not fit."""
        self.config = config
        self._tensors = load_part(expert_layout(config), tensors)
        self.bytes = resident_bytes(self._tensors)

    @torch.inference_mode()
    def apply(self, rows: Tensor) -> Tensor:
        """The unweighted results float32 [n, hidden] of rows [n, hidden]."""
        if self.config.family == "gpt_oss":
            return self._gpt_oss(rows)
        return self._mixtral(rows)

    def _mixtral(self, x: Tensor) -> Tensor:
        w = self._tensors
        gate = numerics.linear(x, w["w1.weight"])
        up = numerics.linear(x, w["w3.weight"])
        return numerics.linear(gate * numerics.sigmoid(gate) * up, w["w2.weight"])

    def _gpt_oss(self, x: Tensor) -> Tensor:
        w, c = self._tensors, self.config
        both = numerics.linear(x, w["gate_up_proj"].t(), w["gate_up_proj_bias"])
        gate = both[:, ::2].clamp(max=c.swiglu_limit)
        up = both[:, 1::2].clamp(min=-c.swiglu_limit, max=c.swiglu_limit)
        active = (up + 1) * (gate * numerics.sigmoid(gate * c.swiglu_alpha))
        return numerics.linear(active, w["down_proj"].t(), w["down_proj_bias"])
