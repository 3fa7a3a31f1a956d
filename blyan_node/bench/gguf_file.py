"""A Mixtral checkpoint as the GGUF file of llama.cpp: the same weights, for a peer of measurements.

Needs the `gguf` package (`pip install 'blyan-node[demo]'`). The vocabulary is a stub: measurements
give token ids, and no text is ever made of them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.config import GroupedAttention, MoeFeed
from blyan_node.moe.families import layout
from blyan_node.moe.weights import by_role, load_part
from protocols.ids import Subject, expert_subject

# What a GGUF calls the tensors of a layer, by their role.
_ATTENTION = {
    "input_norm": "attn_norm", "output_norm": "ffn_norm",
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
}  # fmt: skip
_EXPERTS = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}
_ROTATED = ("attn_q", "attn_k")


def write_gguf(model: Path, out: Path, kind: str) -> Path:
    """Writes the Mixtral in the directory `model` as `out`, its matrices as `kind`.

    `kind` is a name of GGML's: F32, F16, BF16 or Q8_0. Norms and routers are float32, as in the
    files that llama.cpp's own converter makes.
    """
    import gguf

    checkpoint = Checkpoint.open(model)
    writer = gguf.GGUFWriter(out, "llama")
    _describe(writer, checkpoint)
    for name, tensor in _tensors(checkpoint):
        plain = tensor.dim() == 1 or "gate_inp" in name
        stored = gguf.GGMLQuantizationType["F32" if plain else kind]
        values = gguf.quantize(np.ascontiguousarray(tensor.float().numpy()), stored)
        writer.add_tensor(f"{name}.weight", values, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _describe(writer: Any, checkpoint: Checkpoint) -> None:
    """The hyperparameters, and a vocabulary of as many tokens as the model has."""
    config = checkpoint.config
    layer = config.layers[0]
    attention, feed = layer.attention, layer.feed
    assert isinstance(attention, GroupedAttention) and isinstance(feed, MoeFeed)
    writer.add_context_length(4096)
    writer.add_block_count(len(config.layers))
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(feed.intermediate)
    writer.add_head_count(attention.heads)
    writer.add_head_count_kv(attention.kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_rope_dimension_count(attention.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_expert_count(feed.experts)
    writer.add_expert_used_count(feed.top_k)
    writer.add_vocab_size(config.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{number}" for number in range(config.vocab)])
    writer.add_token_types([1] * config.vocab)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its name in a GGUF, less the ending; experts of a layer in one."""
    config = checkpoint.config
    parts = {part.subject: part for part in layout(config)}

    def read(subject: str) -> dict[str, Tensor]:
        part = parts[Subject(subject)]
        return by_role(part, load_part(part, checkpoint.load(part.subject)))

    yield "token_embd", read("embed")["weight"]
    yield "output_norm", read("final")["weight"]
    if not config.tied:
        yield "output", read("head")["weight"]
    for number, layer in enumerate(config.layers):
        attention, feed = layer.attention, layer.feed
        assert isinstance(attention, GroupedAttention) and isinstance(feed, MoeFeed)
        for role, tensor in read(f"layer{number}.attention").items():
            name = _ATTENTION[role]
            rotated = name in _ROTATED
            yield f"blk.{number}.{name}", _pairs(tensor, attention) if rotated else tensor
        yield f"blk.{number}.ffn_gate_inp", read(f"layer{number}.router")["weight"]
        experts = [read(expert_subject(number, one)) for one in range(feed.experts)]
        for role, name in _EXPERTS.items():
            yield f"blk.{number}.{name}", torch.stack([expert[role] for expert in experts])


def _pairs(weight: Tensor, attention: GroupedAttention) -> Tensor:
    """Rows in the order in which llama.cpp rotates them: (i, i + dim / 2) become neighbours."""
    heads = weight.view(-1, 2, attention.head_dim // 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)
