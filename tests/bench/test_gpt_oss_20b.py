"""The synthetic gpt-oss-20b has the release's shapes, and is a directory that can be published."""

import json
from math import prod
from pathlib import Path

import numpy as np

from blyan_node.bench.gpt_oss_20b import CONFIG, write_gpt_oss
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.families import layout, parse_config
from blyan_node.moe.reference import Reference
from blyan_node.testing.arithmetic import best
from protocols.ids import Subject
from protocols.tensors.manifest import Dtype

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 6,
    "vocab_size": 97,
}


def test_it_has_the_parameters_of_the_release() -> None:
    config = parse_config(json.dumps(CONFIG | {"num_hidden_layers": 24}).encode())
    parts = {part.subject: part for part in layout(config)}
    counts = {
        subject: sum(
            prod(tensor.shape) * (2 if tensor.name.endswith("_blocks") else 1)
            for tensor in part.tensors
            if not tensor.name.endswith("_scales")
        )
        for subject, part in parts.items()
    }
    assert round(sum(counts.values()) / 1e9, 2) == 20.91
    assert round(counts[Subject("layer0.expert0")] / 1e6, 1) == 24.9
    assert config.rope.factor == 32 and not config.rope.truncate
    assert round(config.rope.attention_factor, 4) == 1.3466
    windows = [getattr(layer.attention, "window", None) for layer in config.layers]
    assert windows == [128, None] * 12


def test_it_can_be_published_and_computes(tmp_path: Path) -> None:
    write_gpt_oss(tmp_path / "once", 2, **SMALL)
    write_gpt_oss(tmp_path / "again", 2, **SMALL)
    for file in (tmp_path / "once").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    checkpoint = Checkpoint.open(tmp_path / "once")
    described = checkpoint.describe(Subject("layer1.expert5"))
    assert {dtype for dtype, _ in described.values()} == {Dtype.U8, Dtype.BF16}
    bodies = {
        name: b"".join(checkpoint.read_tensor(Subject(subject), name))
        for subject, name in (
            ("layer0.expert0", "gate_up_proj_blocks"),
            ("layer0.expert1", "gate_up_proj_blocks"),
        )
    }
    assert len(set(bodies.values())) == len(bodies)
    logits, _ = Reference(checkpoint.config, checkpoint.load, best()).forward(list(range(90)))
    values = np.asarray(logits)
    assert np.isfinite(values).all() and 0.05 < values.std() < 20
