"""From a router's logits to experts and weights."""

import math

import torch
from torch import Tensor

from blyan_node.moe.arithmetic import Arithmetic
from blyan_node.moe.config import Routing
from blyan_node.moe.kernels.program import Program

_LEAST = 1e-20  # keeps the division of weights that are all 0 defined


def route(
    arithmetic: Arithmetic,
    logits: Tensor,
    top_k: int,
    routing: Routing,
    correction: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The experts of each row of logits [n, experts] and their weights, best first: [n, top_k].

    `correction` [experts] is for routing by sigmoids.
    """
    if routing.score == "sigmoid":
        return route_sigmoid(arithmetic, logits, top_k, routing, correction)
    over_chosen = routing.score == "softmax_chosen"
    renormalise = routing.renormalise
    return route_softmax(
        arithmetic, logits, top_k, over_chosen=over_chosen, renormalise=renormalise
    )


def record(
    program: Program,
    logits: Tensor,
    top_k: int,
    routing: Routing,
    correction: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`route` for the one row of logits [1, experts], recorded."""
    if routing.score == "softmax_chosen":
        return program.route(routing.score, logits, top_k)
    variant = f"{routing.score}_renormalised" if routing.renormalise else routing.score
    if routing.score == "softmax":
        return program.route(variant, logits, top_k)
    widened = None if correction is None else correction.float().contiguous()
    place = 0 if widened is None else widened.data_ptr()
    more = (place, routing.groups, routing.groups_chosen, float(routing.scaling))
    return program.route(variant, logits, top_k, *more, kept=widened)


def route_softmax(
    arithmetic: Arithmetic,
    logits: Tensor,
    top_k: int,
    *,
    over_chosen: bool,
    renormalise: bool = True,
) -> tuple[Tensor, Tensor]:
    """The experts of each row of logits [n, experts] and their weights, best first: [n, top_k].

    Equal logits go to the smaller expert. The softmax is over the chosen or over all experts; of
    all, the chosen weights may be renormalised, which is the same up to rounding.
    """
    order = _best(logits, top_k)
    if over_chosen:
        return order, arithmetic.softmax(logits.gather(1, order))
    chosen = arithmetic.softmax(logits).gather(1, order)
    return order, chosen / _total(chosen) if renormalise else chosen


def route_sigmoid(
    arithmetic: Arithmetic,
    logits: Tensor,
    top_k: int,
    routing: Routing,
    correction: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by sigmoids, in groups of experts (DeepSeek-V3, arXiv 2412.19437, 2.1.2).

    Scores are sigmoids. `correction` [experts] takes part in choosing groups and experts, and not
    in the weights, which are the scores of the chosen. Of equal ones the smaller number wins.
    """
    scores = arithmetic.sigmoid(logits)
    choosing = scores if correction is None else scores + correction.float()
    if routing.groups > 1:
        choosing = _in_best_groups(choosing, routing)
    order = _best(choosing, top_k)
    weights = scores.gather(1, order)
    if routing.renormalise:
        weights = weights / (_total(weights) + _LEAST)
    return order, weights * routing.scaling


def _in_best_groups(scores: Tensor, routing: Routing) -> Tensor:
    """Scores [n, experts], -inf outside the groups that are best by the sum of their two best."""
    grouped = scores.view(scores.shape[0], routing.groups, -1)  # [n, groups, experts of each]
    two = torch.sort(grouped, dim=-1, descending=True).values
    chosen = _best(two[..., 0] + two[..., 1], routing.groups_chosen)
    left_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, chosen, False)
    return grouped.masked_fill(left_out[..., None], -math.inf).view(scores.shape)


def _total(weights: Tensor) -> Tensor:
    """The sum of each row of weights [n, k], in ascending rank: [n, 1]."""
    total = weights[:, :1]
    for rank in range(1, weights.shape[1]):
        total = total + weights[:, rank, None]
    return total


def _best(values: Tensor, count: int) -> Tensor:
    """The places of the greatest values of each row, best first."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :count]
