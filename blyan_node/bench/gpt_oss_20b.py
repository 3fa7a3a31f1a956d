"""gpt-oss-20b with random weights: the release's shapes, types and configuration, fewer layers.

24 layers would be 12.8 GB of experts and trunk; each layer is 477 MB, embedding and head are 2.3 GB
whatever the layers. Written in a stream: no tensor is ever whole in memory.
"""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from blyan_node.moe.export import Description, write_checkpoint
from blyan_node.moe.families import layout, parse_config
from protocols.ids import Subject
from protocols.tensors.manifest import DTYPE_BYTES, Dtype

CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}
SHARD_BYTES = 2_000_000_000
PIECE_BYTES = 4 << 20

# Random bits are weights already. Of a bfloat16 all but the upper seven bits of the exponent are
# random: ±2^-7 to 2^-5. MXFP4 blocks are random; scales of 2^-9 to 2^-7 make weights of that size.
_RANDOM_BITS = np.uint16(0x80FF)
_EXPONENT = np.uint16(120 << 7)
_SCALES = (118, 121)


def write_gpt_oss(out: Path, layers: int, **changes: object) -> Path:
    """Writes `layers` layers of it to the directory `out`, the same each time."""
    kinds = ["full_attention" if n % 2 else "sliding_attention" for n in range(layers)]
    fields = CONFIG | {"num_hidden_layers": layers, "layer_types": kinds} | changes
    text = json.dumps(fields, indent=2).encode()
    config = parse_config(text)
    subjects = {part.subject: part for part in layout(config)}

    def describe(subject: Subject) -> Description:
        return {
            tensor.name: (Dtype.U8 if Dtype.U8 in tensor.dtypes else Dtype.BF16, tensor.shape)
            for tensor in subjects[subject].tensors
        }

    def read(subject: Subject, name: str) -> Iterator[bytes]:
        dtype, shape = describe(subject)[name]
        return _pieces(subject, name, prod(shape) * DTYPE_BYTES[dtype])

    write_checkpoint(out, config, {"config.json": text}, describe, read, shard_bytes=SHARD_BYTES)
    return out


def _pieces(subject: Subject, name: str, size: int) -> Iterator[bytes]:
    """The bytes of one tensor, a few MiB at a time."""
    random = np.random.default_rng(list(f"{subject} {name}".encode()))
    for at in range(0, size, PIECE_BYTES):
        yield _bytes(random, name, min(PIECE_BYTES, size - at))


def _bytes(random: np.random.Generator, name: str, count: int) -> bytes:
    if name.endswith("_blocks"):
        return random.bytes(count)
    if name.endswith("_scales"):
        return random.integers(*_SCALES, count, np.uint8).tobytes()
    if name.endswith(("norm.weight", "sinks")):
        values = random.standard_normal(count // 2, np.float32)
        if not name.endswith("sinks"):
            values = np.float32(1) + values / np.float32(10)
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    words = np.frombuffer(random.bytes(count), "<u2") & _RANDOM_BITS
    return (words | _EXPONENT).tobytes()
