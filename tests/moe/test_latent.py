"""Latent attention over a compressed cache: as `transformers` does it, bit for bit in any cut."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from blyan_node.moe.cache import KVCache
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.config import LatentAttention, ModelConfig
from blyan_node.moe.families import parse_config
from blyan_node.moe.latent import Latent
from blyan_node.moe.layout import attention_part
from blyan_node.moe.reference import Reference
from blyan_node.moe.rope import RopeTable
from blyan_node.testing.arithmetic import best
from blyan_node.testing.engine import Engine

SIZES: dict[str, Any] = {
    "hidden_size": 48, "num_attention_heads": 5, "num_key_value_heads": 5, "q_lora_rank": 28,
    "kv_lora_rank": 40, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 20,
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 2,
    "topk_group": 1, "num_experts_per_tok": 2, "intermediate_size": 8, "moe_intermediate_size": 8,
    "vocab_size": 16, "max_position_embeddings": 640,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "queries by a latent": {},
    "queries by the rows": {"q_lora_rank": None},
    "biases": {"attention_bias": True},
    "halves": {"rope_interleave": False},
    "YaRN": {"rope_parameters": YARN},
    "YaRN, mscale only": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0}},
    "YaRN, two scales": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}},
    "YaRN, given factor": {"rope_parameters": {**YARN, "attention_factor": 1.3}},
    "odd sizes": {
        "kv_lora_rank": 19, "qk_nope_head_dim": 7, "qk_rope_head_dim": 6, "v_head_dim": 9,
        "q_lora_rank": 11,
    },
}  # fmt: skip
ROWS = 50


class Layer:
    """One attention twice, as `transformers` has it and as we do, with rows to go through it."""

    def __init__(self, changes: dict[str, Any]) -> None:
        theirs = DeepseekV3Config(**(SIZES | changes), attn_implementation="eager")
        self.config = parse_config(json.dumps(theirs.to_diff_dict()).encode())
        self.module, generator = DeepseekV3Attention(theirs, 0), torch.Generator().manual_seed(1)
        for name, weight in sorted(self.module.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            weight.data = 1 + 0.1 * noise if "norm" in name else 0.25 * noise
        self.turns = DeepseekV3RotaryEmbedding(theirs)
        self.x = torch.randn(ROWS, theirs.hidden_size, generator=generator)
        self.ours = self._load(self.config)

    def _load(self, config: ModelConfig) -> Latent:
        attention, state = config.layers[0].attention, self.module.state_dict()
        assert isinstance(attention, LatentAttention)
        tensors = {
            one.role: state.pop(one.name.removeprefix("self_attn."))
            for one in attention_part(config, 0).tensors
            if one.name.startswith("self_attn.") and not one.idle
        }
        assert not state
        return Latent(attention, tensors, RopeTable(config.rope, attention.rope_dim), best())

    @torch.inference_mode()
    def truth(self) -> Tensor:
        mask = torch.full((ROWS, ROWS), -torch.inf).triu(1)[None, None]
        x = self.x[None]
        return self.module(x, self.turns(x, torch.arange(ROWS)[None]), mask)[0][0]

    def apply(self, layer: int, x: Tensor, cache: KVCache) -> Tensor:
        """Rows [n, hidden] through our attention, as the one of a layer."""
        return self.ours.output(self.ours.mix(layer, self.ours.project(x), cache))

    @torch.inference_mode()
    def passed(self, *cuts: int) -> Tensor:
        """All rows, in passes that begin at the cuts."""
        cache = KVCache(self.config)
        ranges = pairwise((0, *cuts, ROWS))
        return torch.cat([self.apply(0, self.x[a:b], cache) for a, b in ranges])


@pytest.fixture(params=sorted(VARIANTS))
def layer(request: pytest.FixtureRequest) -> Layer:
    return Layer(VARIANTS[request.param])


def test_as_transformers(layer: Layer) -> None:
    truth = layer.truth()
    assert (layer.passed() - truth).abs().max() < 1e-5 * truth.abs().max()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_bits_are_those_of_token_by_token(layer: Layer, threads: int) -> None:
    alone = layer.passed(*range(1, ROWS))
    torch.set_num_threads(threads)
    for cuts in ((), (32,), (1, 2, 30, 31), (17, 49)):
        assert torch.equal(layer.passed(*cuts), alone)


def test_a_pass_that_was_cut_off_is_done_again(layer: Layer) -> None:
    cache = KVCache(layer.config)
    with torch.inference_mode():
        first = layer.apply(0, layer.x[:20], cache)
        layer.apply(0, layer.x[30:40], cache)
        cache.truncate(20)
        assert cache.length_of(0) == 20
        again = torch.cat((first, layer.apply(0, layer.x[20:], cache)))
    assert torch.equal(again, layer.passed())


def test_the_cache_has_the_latent_and_the_shared_key_of_a_position_and_no_more() -> None:
    layer = Layer({})
    cache, room = KVCache(layer.config), 256
    with torch.inference_mode():
        for _ in range(2):
            layer.apply(0, layer.x, cache)
        layer.apply(1, layer.x, cache)
    assert cache.bytes == 2 * room * (40 + 8) * 4
    with torch.inference_mode():
        for _ in range(4):
            layer.apply(0, layer.x, cache)
    assert cache.length_of(0) == 300 and cache.bytes == 3 * room * (40 + 8) * 4


def test_the_cache_of_the_released_sizes() -> None:
    """61 layers of 576 floats for a token; keys and values of 128 heads are 71 times that."""
    attention = LatentAttention(128, 1536, 512, 128, 64, 128)
    assert attention.cached == ((1, 576),) and attention.head_dim == 192
    assert 128 * (192 + 128) // 576 == 71


@pytest.mark.parametrize("variant", ["deepseek_v3", "deepseek_v3-odd"])
def test_the_trunk_equals_the_reference(
    directories: dict[str, Path], prompt: list[int], variant: str
) -> None:
    checkpoint = Checkpoint.open(directories[variant])
    expected, _ = Reference(checkpoint.config, checkpoint.load, best()).forward(prompt)
    engine = Engine(checkpoint.config, checkpoint.load)
    for threads, cuts in ((1, (1, 33)), (2, (32,)), (1, range(1, 48))):
        torch.set_num_threads(threads)
        cache, composed = engine.trunk.new_cache(), random.Random(threads)
        logits = [
            engine.forward([(cache, prompt[a:b])], composed)[0] for a, b in pairwise((0, *cuts, 48))
        ]
        assert torch.equal(torch.cat(logits), expected)
