"""A token's time falls into parts, none of which is missing or counted twice."""

from pathlib import Path

import pytest
import torch

from blyan_node.bench import decoding, parts
from blyan_node.bench.models import write_model
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.here import Here
from blyan_node.moe.kernels.targets import Unsupported, runnable
from blyan_node.testing.engine import Engine
from protocols.tensors.manifest import Dtype

SMALL: dict[str, object] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", Dtype.BF16, **SMALL)


def test_the_parts_have_all_weights_of_a_token(model: Path) -> None:
    weights = parts.weights_of(Checkpoint.open(model).config)
    assert weights["all"] == decoding.token_weights(model)
    assert 2 * weights["all"] == sum(weights.values())


def test_every_part_has_a_row(model: Path) -> None:
    try:
        runnable()
    except Unsupported as error:
        pytest.skip(str(error))
    rows = parts.parts(model, "int8", 1, "int8")
    names = {one.name.partition(", ")[2] for one in rows}
    assert names == {
        "all", "projections", "attention", "output and router", "choosing", "experts",
        "combining", "head", "between them",
    }  # fmt: skip
    assert all(one.value > 0 and one.unit == "ms/token" for one in rows)


def test_a_token_made_part_by_part_is_the_same_token(model: Path) -> None:
    try:
        runnable()
    except Unsupported as error:
        pytest.skip(str(error))
    checkpoint = Checkpoint.open(model)
    engine = Engine(checkpoint.config, checkpoint.load)
    trunk, here = engine.trunk, Here(engine.config, engine.experts_by_place())
    assert trunk.token is not None
    timed = parts.Timed(trunk.token.program)
    found: list[torch.Tensor] = []
    for program in (trunk.token.program, timed):
        trunk.token.program, cache = program, trunk.new_cache()
        for token in range(5):
            logits = trunk.enter([token], cache, here, slice(None))
        assert isinstance(logits, torch.Tensor)
        found.append(logits)
    assert torch.equal(found[0], found[1])
    assert timed.spent.keys() == {name for *_, name in timed.parts()}
