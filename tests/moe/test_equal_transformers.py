"""The engine against `transformers`; `test_mistakes` proves that the comparison sees mistakes."""

import random
from pathlib import Path

import torch
from torch import Tensor

from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.reference import Reference
from blyan_node.testing.arithmetic import best
from blyan_node.testing.engine import Engine
from blyan_node.testing.reference import open_reference
from blyan_node.testing.truth import greedy

TOLERANCE = 1e-4  # a tenth of what is promised; the named mistakes are above 5e-3


def test_logits_at_every_position(
    directory: Path, truths: dict[Path, Tensor], prompt: list[int]
) -> None:
    model, truth = open_reference(directory), truths[directory]
    windows = [layer.attention.window or 0 for layer in model.config.layers]
    assert len(prompt) > 3 * max(windows)
    logits, _ = model.forward(prompt)
    assert (logits - truth).abs().max() < TOLERANCE * truth.abs().max()


def test_greedy_tokens(directory: Path, prompt: list[int]) -> None:
    tokens = open_reference(directory).generate(prompt, 16)
    assert tokens == greedy(directory, prompt, 16)
    assert len(set(tokens)) > 4


def test_token_by_token_equals_the_full_pass(directory: Path, prompt: list[int]) -> None:
    checkpoint = Checkpoint.open(directory)
    engine, composed = Engine(checkpoint.config, checkpoint.load), random.Random(3)
    (whole,) = engine.forward([(engine.trunk.new_cache(), prompt)], composed)
    cache = engine.trunk.new_cache()
    single = [engine.forward([(cache, [token])], composed)[0] for token in prompt]
    assert torch.equal(torch.cat(single), whole)
    logits, _ = Reference(checkpoint.config, checkpoint.load, best()).forward(prompt)
    assert torch.equal(whole, logits)
