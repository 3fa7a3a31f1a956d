"""Sigmoid routing in groups: as `transformers` does it, and row by row the same bits."""

import itertools

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from blyan_node.moe.config import Routing
from blyan_node.moe.routing import route_sigmoid
from blyan_node.testing.arithmetic import best


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _weights_by_expert(experts: Tensor, weights: Tensor, count: int) -> Tensor:
    assert all(len(set(row.tolist())) == len(row) for row in experts)
    return torch.zeros(len(experts), count).scatter(1, experts, weights)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(
    ("experts", "groups", "groups_chosen", "top_k"),
    [(12, 4, 2, 3), (64, 1, 1, 6), (256, 8, 4, 8), (6, 3, 3, 6), (10, 5, 1, 2), (9, 3, 2, 1)],
)
@torch.inference_mode()
def test_as_transformers(
    experts: int, groups: int, groups_chosen: int, top_k: int, normed: bool
) -> None:
    router = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=24, n_routed_experts=experts, n_group=groups, topk_group=groups_chosen,
            num_experts_per_tok=top_k, norm_topk_prob=normed, routed_scaling_factor=1.7,
        )
    )  # fmt: skip
    router.weight.copy_(0.3 * _noise(experts, 24, seed=1))
    router.e_score_correction_bias.copy_(0.4 * _noise(experts, seed=2))
    x = _noise(300, 24, seed=3)
    _, expected_weights, expected = router(x)
    routing = Routing(
        "sigmoid", renormalise=normed, correction=True, groups=groups,
        groups_chosen=groups_chosen, scaling=1.7,
    )  # fmt: skip
    logits = best().product(router.weight)(x)
    chosen, weights = route_sigmoid(best(), logits, top_k, routing, router.e_score_correction_bias)
    assert torch.allclose(
        _weights_by_expert(chosen, weights, experts),
        _weights_by_expert(expected, expected_weights, experts),
        atol=1e-5,
    )


def test_groups_left_out_are_never_chosen() -> None:
    """Every score of the best group is below 0, which a mask of zeros would put first."""
    correction = torch.tensor([-2.0, -2.0, -3.0, -2.5])
    routing = Routing("sigmoid", renormalise=True, correction=True, groups=2)
    experts, weights = route_sigmoid(best(), torch.zeros(1, 4), 2, routing, correction)
    assert experts.tolist() == [[0, 1]] and weights.tolist() == [[0.5, 0.5]]


def test_equal_scores_go_to_the_smaller_number() -> None:
    routing = Routing("sigmoid", renormalise=False, groups=3, groups_chosen=2, scaling=2.0)
    experts, weights = route_sigmoid(best(), torch.zeros(1, 9), 4, routing)
    assert experts.tolist() == [[0, 1, 2, 3]] and weights.tolist() == [[1.0] * 4]


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_row_by_row_the_same_bits(threads: int) -> None:
    logits, correction = 2 * _noise(37, 24, seed=4), 0.3 * _noise(24, seed=5)
    routing = Routing("sigmoid", renormalise=True, groups=6, groups_chosen=3, scaling=2.5)
    rows = [route_sigmoid(best(), row[None].clone(), 5, routing, correction) for row in logits]
    experts, weights = (torch.cat(parts) for parts in zip(*rows, strict=True))
    torch.set_num_threads(threads)
    for first, last in itertools.pairwise((0, 8, 9, 20, 37)):
        got = route_sigmoid(best(), logits[first:last], 5, routing, correction)
        assert torch.equal(got[0], experts[first:last])
        assert torch.equal(got[1], weights[first:last])
