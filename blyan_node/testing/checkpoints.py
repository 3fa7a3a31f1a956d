"""Tiny checkpoints that show mistakes: made by `transformers` itself, with hot weights.

With the usual small random weights most mistakes of an engine do not show. Here norms are 1 with
noise, sinks have a standard deviation of 1, experts of 0.35, everything else of 0.25: a dropped
detail moves the logits by 20 % and more, while correct implementations agree to 1e-4.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 12,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": 1,
}
FAMILY_SIZES: dict[str, dict[str, Any]] = {  # `...`: the family has no such field
    "deepseek_v3": {
        "num_key_value_heads": 6, "head_dim": ..., "moe_intermediate_size": 44,
        "num_local_experts": ..., "n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4,
        "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 28,
        "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 20,
        "sliding_window": ...,
    },
    "olmoe": {"hidden_size": 96, "sliding_window": ...},
    "qwen3_moe": {"moe_intermediate_size": 44},
}  # fmt: skip
SHARD_BYTES = 40_000
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_checkpoint(
    family: str,
    path: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    sharded: bool = False,
    fused: bool = False,
    tokenizer: bool = False,
    **overrides: Any,
) -> Path:
    """Writes a Hugging Face directory of `family`, a `model_type`, to `path` and returns it.

    `dtype` is float32 or bfloat16; `sharded` cuts it into files of 40 kB; `fused` keeps the experts
    of a layer in one tensor where `transformers` can; `tokenizer` adds a byte-level tokenizer with
    a chat template (and a vocabulary of 300, if none is given). `overrides` are fields of the
    configuration.
    """
    transformers: Any = importlib.import_module("transformers")  # untyped, and for tests alone
    transformers.utils.logging.disable_progress_bar()
    sizes = SIZES | FAMILY_SIZES.get(family, {}) | ({"vocab_size": 300} if tokenizer else {})
    sizes = {name: value for name, value in (sizes | overrides).items() if value is not ...}
    config = transformers.AutoConfig.for_model(family, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    _heat(model, seed)
    model.to(getattr(torch, dtype))
    for bias in _corrections(model):
        bias.data = bias.data.float()  # as released, beside bfloat16 weights
    model.save_pretrained(
        path,
        max_shard_size=SHARD_BYTES if sharded else "5GB",
        save_original_format=not fused,
    )
    if tokenizer:
        _write_tokenizer(path)
    return path


@torch.no_grad()
def _heat(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            weight.copy_(1 + 0.1 * noise)
        elif "sinks" in name:
            weight.copy_(noise)
        else:
            weight.copy_((0.35 if "experts" in name else 0.25) * noise)
    for bias in _corrections(model):
        bias.copy_(0.2 * torch.randn(bias.shape, generator=generator))


def _corrections(model: torch.nn.Module) -> list[torch.Tensor]:
    """The routers' correction biases, which are no parameters."""
    buffers = sorted(model.named_buffers())
    return [buffer for name, buffer in buffers if "e_score_correction" in name]


def _write_tokenizer(path: Path) -> None:
    """A byte-level BPE: 3 special tokens, the 256 bytes, and two merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<eos>", "<pad>", *alphabet, "th", "the"]
    bpe = models.BPE(
        vocab={word: number for number, word in enumerate(words)},
        merges=[("t", "h"), ("th", "e")],
    )
    built = Tokenizer(bpe)
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["<unk>", "<eos>", "<pad>"])
    built.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
