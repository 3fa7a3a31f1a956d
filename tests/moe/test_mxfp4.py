"""gpt_oss with MXFP4 experts: read, stored, held and exported as they are, computed exactly."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blyan_node.moe import stored
from blyan_node.moe.arithmetic import Arithmetic
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.config import MoeFeed
from blyan_node.moe.experts import Expert
from blyan_node.moe.export import write_checkpoint
from blyan_node.moe.families import parse_config, sources
from blyan_node.moe.kernels.order import CONTRACT
from blyan_node.moe.numerics import Plain
from blyan_node.moe.reference import Reference
from blyan_node.testing.arithmetic import best
from blyan_node.testing.engine import Engine
from blyan_node.testing.exact_arithmetic import Exact
from blyan_node.testing.mxfp4 import dequantised, make_mxfp4_checkpoint, quantise
from blyan_node.testing.truth import greedy, logits_of
from protocols.errors import Refused
from protocols.ids import Subject
from protocols.tensors.manifest import Dtype

PROMPT = [(31 * i * i + 17 * i + 5) % 89 + 2 for i in range(48)]
EXPERT = Subject("layer1.expert2")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mxfp4_checkpoint(tmp_path_factory.mktemp("mxfp4") / "packed", sharded=True)


@pytest.fixture(scope="module")
def dense(packed: Path) -> Path:
    """The same weights in bfloat16, as `transformers` unpacks them."""
    return dequantised(packed, packed.parent / "dense")


@pytest.fixture(scope="module")
def truth(dense: Path) -> Tensor:
    return logits_of(dense, PROMPT)


def _error(path: Path, truth: Tensor) -> float:
    checkpoint = Checkpoint.open(path)
    logits, _ = Reference(checkpoint.config, checkpoint.load, best()).forward(PROMPT)
    return float((logits - truth).abs().max() / truth.abs().max())


def test_logits_and_tokens_are_those_of_the_unpacked_weights(
    packed: Path, dense: Path, truth: Tensor
) -> None:
    assert _error(packed, truth) < 1e-4
    checkpoint = Checkpoint.open(packed)
    tokens = Reference(checkpoint.config, checkpoint.load, best()).generate(PROMPT, 16)
    assert tokens == greedy(dense, PROMPT, 16) and len(set(tokens)) > 4


def test_what_a_swarm_computes_equals_the_reference(packed: Path) -> None:
    checkpoint = Checkpoint.open(packed)
    expected, _ = Reference(checkpoint.config, checkpoint.load, best()).forward(PROMPT)
    engine = Engine(checkpoint.config, checkpoint.load)
    cache, composed = engine.trunk.new_cache(), random.Random(3)
    logits = [engine.forward([(cache, ids)], composed)[0] for ids in (PROMPT[:31], PROMPT[31:])]
    assert torch.equal(torch.cat(logits), expected)


@pytest.mark.parametrize("arithmetic", [best(), Plain()], ids=str)
def test_under_int8_the_same_bytes_are_multiplied_by_whole_rows(
    packed: Path, truth: Tensor, arithmetic: Arithmetic
) -> None:
    checkpoint = Checkpoint.open(packed)
    rules = Exact() if arithmetic.name == CONTRACT else arithmetic
    expected, _ = Reference(checkpoint.config, checkpoint.load, rules, "int8").forward(PROMPT[:12])
    engine = Engine(checkpoint.config, checkpoint.load, arithmetic, "int8")
    cache, composed = engine.trunk.new_cache(), random.Random(4)
    logits = [engine.forward([(cache, ids)], composed)[0] for ids in (PROMPT[:1], PROMPT[1:12])]
    assert torch.equal(torch.cat(logits), expected)
    assert float((expected[0] - truth[0]).abs().max() / truth[0].abs().max()) < 0.3  # a hot model


def test_whole_rows_cost_a_ten_thousandth_of_a_result() -> None:
    kernels, random_ = best(), torch.Generator().manual_seed(9)
    if kernels.name != CONTRACT:
        pytest.skip("torch has no such products")
    blocks, scales = quantise(torch.randn(1, 96, 2880, generator=random_))
    x = torch.randn(8, 2880, generator=random_)
    x[:, ::777] *= 100  # as activations are
    pair = [
        kernels.product(stored.Mxfp4(blocks[0], scales[0], whole_rows=whole))(x)
        for whole in (False, True)
    ]
    error = (pair[0] - pair[1]).abs().max() / pair[0].abs().max()
    assert 0 < error < 1e-4


def test_an_expert_is_held_as_it_is_stored(packed: Path) -> None:
    checkpoint = Checkpoint.open(packed)
    given = checkpoint.load(EXPERT)
    expert = Expert(checkpoint.config, EXPERT, given, best())
    assert expert.bytes == sum(len(data) for _, _, data in given.values()) and expert.copied == 0
    values = 2 * 96 * 64 + 64 * 96
    assert expert.bytes == values * 17 // 32 + 2 * (2 * 96 + 64)  # 4.25 bits a value, and biases


@pytest.mark.parametrize("mistake", ["nibbles", "scale", "sign"])
def test_a_wrong_unpacking_shows(
    packed: Path, truth: Tensor, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    right = stored.Mxfp4.widen

    def swapped(self: stored.Mxfp4, first: int, last: int, out: Tensor) -> None:
        right(self, first, last, out)
        out.copy_(out.unflatten(1, (-1, 2)).flip(-1).flatten(1))

    def one_exponent(self: stored.Mxfp4, first: int, last: int, out: Tensor) -> None:
        right(self, first, last, out)
        out.view(-1, 32)[::3] *= 2

    def unsigned(self: stored.Mxfp4, first: int, last: int, out: Tensor) -> None:
        right(self, first, last, out)
        out.abs_()

    wrong = {"nibbles": swapped, "scale": one_exponent, "sign": unsigned}[mistake]
    monkeypatch.setattr(stored.Mxfp4, "widen", wrong)
    assert _error(packed, truth) > 5e-3


def test_export_is_byte_equal_and_loads_in_transformers(
    packed: Path, truth: Tensor, tmp_path: Path
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, Mxfp4Config

    checkpoint = Checkpoint.open(packed)
    out = tmp_path / "out"
    write_checkpoint(
        out, checkpoint.config, checkpoint.files, checkpoint.describe, checkpoint.read_tensor
    )
    before = {n: t for file in packed.glob("*.safetensors") for n, t in load_file(file).items()}
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert all(
        torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
        for name in before
    )
    assert (out / "config.json").read_bytes() == (packed / "config.json").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(
        out, quantization_config=Mxfp4Config(dequantize=True), attn_implementation="eager"
    )
    with torch.inference_mode():
        got = model.float().eval()(torch.tensor([PROMPT])).logits[0]
    assert float((got - truth).abs().max() / truth.abs().max()) < 1e-3


GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2880, "initial_context_length": 4096, "initializer_range": 0.02,
    "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
    "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
    "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
        "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True,
    "vocab_size": 201088,
}  # fmt: skip


def test_the_released_configuration_and_its_tensors() -> None:
    config = parse_config(json.dumps(GPT_OSS_20B).encode())
    feed = config.layers[0].feed
    assert isinstance(feed, MoeFeed) and feed.mxfp4 and feed.experts == 32
    assert abs(config.rope.attention_factor - 1.3466) < 1e-4
    expected = sources(config)
    prefix = "model.layers.23.mlp.experts."
    assert expected[prefix + "gate_up_proj_blocks"] == (32, 5760, 90, 16)
    assert expected[prefix + "gate_up_proj_scales"] == (32, 5760, 90)
    assert expected[prefix + "gate_up_proj_bias"] == (32, 5760)
    assert expected[prefix + "down_proj_blocks"] == (32, 2880, 90, 16)
    assert expected[prefix + "down_proj_scales"] == (32, 2880, 90)
    assert expected[prefix + "down_proj_bias"] == (32, 2880)
    assert len(expected) == 24 * (9 + 2 + 2 + 6) + 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quant_method": "fp8"}, "quant_method is 'fp8'"),
        ({"quant_method": None}, "quant_method is missing"),
        ({"modules_to_not_convert": ["model.layers.*.mlp.experts"]}, "modules_to_not_convert"),
        ({"bits": 4}, "'bits' is unknown"),
    ],
)
def test_another_quantisation_is_refused_by_name(change: dict[str, object], named: str) -> None:
    quantised = GPT_OSS_20B["quantization_config"] | change  # type: ignore[operator]
    with pytest.raises(Refused, match=named):
        parse_config(json.dumps(GPT_OSS_20B | {"quantization_config": quantised}).encode())


def test_widths_that_blocks_do_not_divide_are_refused() -> None:
    with pytest.raises(Refused, match="32 does not divide 2896"):
        parse_config(json.dumps(GPT_OSS_20B | {"intermediate_size": 2896}).encode())


def test_packed_tensors_must_be_bytes_and_floats_floats(packed: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(packed)
    given = checkpoint.load(EXPERT)
    _, shape, data = given["down_proj_blocks"]
    wrong = {**given, "down_proj_blocks": (Dtype.BF16, shape, data)}
    with pytest.raises(Refused, match=r"down_proj_blocks is BF16 .* expected U8"):
        Expert(checkpoint.config, EXPERT, wrong, best())


def test_quantising_finds_the_nearest_values() -> None:
    matrix = torch.tensor([[0.5, -6.0, 3.0, 0.0] * 8]) * 2.0**-9
    blocks, scales = quantise(matrix)
    assert torch.equal(stored.widened(stored.Mxfp4(blocks, scales)), matrix)
