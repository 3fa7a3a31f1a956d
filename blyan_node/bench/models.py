"""Models to measure with: directories of random weights in the form that people publish."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from blyan_node.moe.export import Description, write_checkpoint
from blyan_node.moe.families import layout, parse_config
from protocols.ids import Subject
from protocols.tensors.manifest import Dtype

# The shape of SmolLM2-135M upcycled to four experts: 373 M parameters, 214 M of them per token.
SMOLLM2_UPCYCLED = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WEIGHT_STD = 0.03


def write_model(out: Path, dtype: Dtype, **changes: object) -> Path:
    """A Mixtral of random weights at `out`, SmolLM2's shape with `changes`; the same each time."""
    names = {Dtype.F32: "float32", Dtype.BF16: "bfloat16"}
    text = json.dumps(SMOLLM2_UPCYCLED | {"dtype": names[dtype]} | changes).encode()
    config = parse_config(text)
    subjects = {part.subject: part for part in layout(config)}

    def describe(subject: Subject) -> Description:
        return {tensor.name: (dtype, tensor.shape) for tensor in subjects[subject].tensors}

    def read(subject: Subject, name: str) -> Iterator[bytes]:
        shape = subjects[subject].tensor(name).shape
        random = np.random.default_rng(list(f"{subject} {name}".encode()))
        values = random.standard_normal(shape, np.float32)
        values *= np.float32(WEIGHT_STD)
        if len(shape) == 1:  # a norm
            values += np.float32(1)
        if dtype is Dtype.F32:
            yield values.tobytes()
        else:
            yield (values.view(np.uint32) >> 16).astype("<u2").tobytes()

    write_checkpoint(out, config, {"config.json": text}, describe, read)
    return out
