"""SmolLM2's tokenizer and chat template, rebuilt from what a GGUF file says about them."""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


def write_text_files(gguf: GGUFReader, out: Path) -> None:
    """Writes tokenizer.json, its configuration, the special tokens and generation_config.json."""

    def field(name: str) -> Any:
        return gguf.fields[f"tokenizer.{name}"].contents()

    if (field("ggml.model"), field("ggml.pre")) != ("gpt2", "smollm"):
        raise ValueError("the GGUF file has another tokenizer than SmolLM2's")
    tokens = field("ggml.tokens")
    tokenizer = byte_level_bpe(tokens, field("ggml.merges"))
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, field("ggml.token_type"), strict=True)
            if kind == TokenType.CONTROL
        ]
    )
    tokenizer.save(str(out / "tokenizer.json"))

    ids = {
        "bos_token": field("ggml.bos_token_id"),
        "eos_token": field("ggml.eos_token_id"),
        "pad_token": field("ggml.padding_token_id"),
    }
    special = {name: tokens[number] for name, number in ids.items()}
    special["unk_token"] = tokens[field("ggml.unknown_token_id")]
    configuration = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.fields["llama.context_length"].contents(),
        "chat_template": field("chat_template"),
    }
    write = {
        "special_tokens_map.json": special,
        "tokenizer_config.json": configuration | special,
        "generation_config.json": {f"{name}_id": number for name, number in ids.items()},
    }
    for name, document in write.items():
        (out / name).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def byte_level_bpe(tokens: list[str], merges: list[str]) -> Tokenizer:
    """Byte-level BPE; SmolLM2 splits numbers into digits before anything else."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
