"""Sigmoid routing with groups of experts (DeepSeek-V3, arXiv 2412.19437, 2.1.2)."""

import math

import torch
from torch import Tensor

from blyan_node.moe.config import Routing
from blyan_node.moe.numerics import sigmoid

_LEAST = 1e-20  # keeps the division of weights that are all 0 defined


def route_sigmoid(
    logits: Tensor, top_k: int, routing: Routing, correction: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The experts of each row of logits [n, experts] and their weights, best first: [n, top_k].

    Scores are sigmoids. `correction` [experts] takes part in choosing groups and experts, and not
    in the weights, which are the scores of the chosen. Of equal ones the smaller number wins.
    """
    scores = sigmoid(logits)
    choosing = scores if correction is None else scores + correction.float()
    if routing.groups > 1:
        choosing = _in_best_groups(choosing, routing)
    order = _best(choosing, top_k)
    weights = scores.gather(1, order)
    if routing.renormalise:
        total = weights[:, 0]
        for rank in range(1, top_k):
            total = total + weights[:, rank]
        weights = weights / (total + _LEAST)[:, None]
    return order, weights * routing.scaling


def _in_best_groups(scores: Tensor, routing: Routing) -> Tensor:
    """Scores [n, experts], -inf outside the groups that are best by the sum of their two best."""
    grouped = scores.view(scores.shape[0], routing.groups, -1)  # [n, groups, experts of each]
    two = torch.sort(grouped, dim=-1, descending=True).values
    chosen = _best(two[..., 0] + two[..., 1], routing.groups_chosen)
    left_out = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter_(1, chosen, False)
    return grouped.masked_fill(left_out[..., None], -math.inf).view(scores.shape)


def _best(values: Tensor, count: int) -> Tensor:
    """The places of the greatest values of each row, best first."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :count]
