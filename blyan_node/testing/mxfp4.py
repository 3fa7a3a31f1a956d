"""gpt_oss checkpoints with MXFP4 experts, and what `transformers` makes of them."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.rewriting import (
    all_tensors,
    rewrite_config,
    tensors_by_file,
    write_tensors,
)

MODULES_KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                "lm_head"]  # fmt: skip
QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": MODULES_KEPT}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "num_local_experts": 5,
    "num_experts_per_tok": 4,
    "sliding_window": 7,
}
_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def make_mxfp4_checkpoint(path: Path, *, sharded: bool = False, **overrides: Any) -> Path:
    """Writes a hot gpt_oss directory in bfloat16 to `path` with its experts as MXFP4."""
    make_checkpoint("gpt_oss", path, dtype="bfloat16", sharded=sharded, **(SIZES | overrides))
    for file, tensors in tensors_by_file(path):
        packed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name.endswith(("gate_up_proj", "down_proj")):
                blocks, scales = quantise(tensor.float().transpose(1, 2).contiguous())
                packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            else:
                packed[name] = tensor
        write_tensors(file, packed)
    rewrite_config(path, quantization_config=QUANTIZATION)
    return path


def dequantised(path: Path, out: Path) -> Path:
    """The same model in bfloat16, unpacked by `transformers` itself."""
    unpack: Any = importlib.import_module(
        "transformers.integrations.mxfp4"
    ).convert_moe_packed_tensors
    out.mkdir()
    tensors = all_tensors(path)
    dense: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            whole = name.removesuffix("_blocks")
            dense[whole] = unpack(tensor, tensors[f"{whole}_scales"]).contiguous()
        elif not name.endswith("_scales"):
            dense[name] = tensor
    write_tensors(out / "model.safetensors", dense)
    (out / "config.json").write_bytes((path / "config.json").read_bytes())
    rewrite_config(out, quantization_config=None)
    return out


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and scales of float32 [.., out, in]: 32 values of a row share a power of two."""
    blocks = matrix.view(*matrix.shape[:-1], -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-6)
    exponents = torch.log2(largest / 6.0).ceil().int()
    nearest = (blocks.abs() / 2.0**exponents)[..., None].sub(_MAGNITUDES).abs().argmin(-1)
    nibbles = nearest + 8 * (blocks < 0)
    packed = nibbles[..., ::2] + 16 * nibbles[..., 1::2]
    return packed.to(torch.uint8), (exponents[..., 0] + 127).to(torch.uint8)
