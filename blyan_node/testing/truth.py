"""What `transformers` says of a checkpoint: the outside truth that our engine is held against."""

from collections.abc import Sequence
from pathlib import Path

import torch


def _model(path: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()  # type: ignore[no-any-return,no-untyped-call]


@torch.inference_mode()
def logits_of(path: Path, ids: Sequence[int]) -> torch.Tensor:
    """Logits [tokens, vocab] in float32 of one pass over `ids`."""
    return _model(path)(torch.tensor([list(ids)])).logits[0].float()  # type: ignore[no-any-return]


@torch.inference_mode()
def greedy(path: Path, ids: Sequence[int], count: int) -> list[int]:
    """The `count` tokens of greedy decoding after `ids`, by full passes without a cache."""
    model, known = _model(path), list(ids)
    for _ in range(count):
        known.append(int(model(torch.tensor([known])).logits[0, -1].argmax()))
    return known[len(ids) :]
