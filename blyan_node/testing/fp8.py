"""Checkpoints with FP8 matrices as DeepSeek-V3 and Qwen3 are released, and what they stand for.

Beside each matrix `NAME` lies `NAME_scale_inv`, a scale for each 128 by 128 weights. Blocks differ
in size here by more than trained ones do, so that a scale in the wrong place shows.
"""

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

QUANTIZATION: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
SIZES: dict[str, dict[str, Any]] = {  # 128 divides none of them
    "deepseek_v3": {
        "hidden_size": 192, "moe_intermediate_size": 160, "intermediate_size": 136,
        "q_lora_rank": 132, "kv_lora_rank": 140, "qk_nope_head_dim": 20, "v_head_dim": 24,
    },
    "qwen3_moe": {
        "hidden_size": 144, "moe_intermediate_size": 136, "intermediate_size": 150,
        "num_attention_heads": 9, "num_key_value_heads": 3, "mlp_only_layers": [1],
    },
}  # fmt: skip
_PLAIN = ("norm.weight", "gate.weight", "embed_tokens.weight", "lm_head.weight", "head.weight",
          "eh_proj.weight")  # fmt: skip
_SIDE, _LARGEST = 128, 448.0


def make_fp8_checkpoint(
    family: str,
    path: Path,
    *,
    scales: torch.dtype = torch.float32,
    mtp: bool = False,
    sharded: bool = False,
    **overrides: Any,
) -> Path:
    """Writes a hot directory of `family` to `path`, its matrices FP8 and the rest bfloat16.

    With `mtp` there is a layer behind the last that predicts the token after the next one.
    """
    made = SIZES[family] | overrides
    make_checkpoint(family, path, dtype="bfloat16", sharded=sharded, **made)
    random = torch.Generator().manual_seed(4)
    if mtp:
        _add_layer(path, made["hidden_size"])
    for file, tensors in tensors_by_file(path):
        packed: dict[str, Tensor] = {}
        for name, tensor in sorted(tensors.items()):
            if tensor.dim() == 2 and not name.endswith(_PLAIN):
                packed[name], scale = quantise(_uneven(tensor.float(), random))
                packed[f"{name}_scale_inv"] = scale.to(scales)
            else:
                packed[name] = tensor
        write_tensors(file, packed)
    rewrite_config(path, quantization_config=QUANTIZATION)
    return path


def dequantised(path: Path, out: Path) -> Path:
    """The same model in float32, without a layer behind the last, for `transformers` to load."""
    out.mkdir()
    count = _layers(path)
    tensors, dense = all_tensors(path), dict[str, Tensor]()
    for name, tensor in tensors.items():
        if name.startswith(f"model.layers.{count}.") or name.endswith("_scale_inv"):
            continue
        scale = tensors.get(f"{name}_scale_inv")
        dense[name] = tensor.float() if scale is None else tensor.float() * spread(tensor, scale)
    write_tensors(out / "model.safetensors", dense)
    (out / "config.json").write_bytes((path / "config.json").read_bytes())
    rewrite_config(out, quantization_config=None, dtype="float32")
    return out


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and float32 scales of a float32 [out, in]; the last blocks may be partial."""
    shape = tuple(-(-size // _SIDE) for size in matrix.shape)
    scales = torch.empty(shape)
    for down in range(shape[0]):
        for along in range(shape[1]):
            block = matrix[_SIDE * down :, _SIDE * along :][:_SIDE, :_SIDE]
            scales[down, along] = block.abs().max().clamp(min=1e-9) / _LARGEST
    return (matrix / spread(matrix, scales)).to(torch.float8_e4m3fn), scales


def spread(matrix: Tensor, scales: Tensor) -> Tensor:
    """The scale of each weight of `matrix`: float32 [out, in]."""
    whole = scales.float().repeat_interleave(_SIDE, 0).repeat_interleave(_SIDE, 1)
    return whole[: matrix.shape[0], : matrix.shape[1]]


def as_transformers_widens(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 of a matrix that blocks divide, by the code with which `transformers` loads."""
    integration: Any = importlib.import_module("transformers.integrations.finegrained_fp8")
    widen = integration.Fp8Dequantize(None)._dequantize_one
    return widen(codes, scales, output_dtype=torch.float32)  # type: ignore[no-any-return]


def _uneven(matrix: Tensor, random: torch.Generator) -> Tensor:
    shape = tuple(-(-size // _SIDE) for size in matrix.shape)
    factors = torch.exp2(2.5 * torch.rand(shape, generator=random) - 1.5)
    return matrix * spread(matrix, factors)


def _layers(path: Path) -> int:
    numbers = (name.split(".") for name in all_tensors(path) if name.startswith("model.layers."))
    extra = any(name.endswith("eh_proj.weight") for name in all_tensors(path))
    return max(int(name[2]) for name in numbers) + (0 if extra else 1)


def _add_layer(path: Path, hidden: int) -> None:
    """A layer like the last one behind it, with what only such a layer has, in the last file."""
    tensors, behind = all_tensors(path), _layers(path)
    prefix, here = f"model.layers.{behind - 1}.", f"model.layers.{behind}."
    random = torch.Generator().manual_seed(9)
    file, last = tensors_by_file(path)[-1]
    extra = {
        here + name.removeprefix(prefix): torch.randn(one.shape, generator=random).to(one.dtype)
        for name, one in tensors.items()
        if name.startswith(prefix)
    }
    for name, shape in (
        ("eh_proj.weight", (hidden, 2 * hidden)), ("enorm.weight", (hidden,)),
        ("hnorm.weight", (hidden,)), ("shared_head.norm.weight", (hidden,)),
    ):  # fmt: skip
        extra[here + name] = torch.randn(shape, generator=random).bfloat16()
    extra[here + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    extra[here + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_tensors(file, last | extra)
    rewrite_config(path, num_nextn_predict_layers=1)
