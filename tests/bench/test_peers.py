"""The engines beside ours: the same weights, asked in the same way, and missing when they are."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blyan_node.bench import decoding, peers
from blyan_node.bench.gguf_file import write_gguf
from blyan_node.bench.models import write_model
from blyan_node.moe.checkpoint import Checkpoint
from protocols.ids import Subject
from protocols.tensors.manifest import Dtype

pytestmark = pytest.mark.slow  # torch, transformers and llama.cpp in processes of their own

SMALL: dict[str, object] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("peers") / "model", Dtype.F32, **SMALL)


def _read(path: Path) -> dict[str, Any]:
    import gguf

    return {
        t.name: np.array(gguf.dequantize(t.data, t.tensor_type))
        for t in gguf.GGUFReader(path).tensors
    }


def _weights(model: Path, subject: str, name: str) -> Any:
    _, shape, data = Checkpoint.open(model).load(Subject(subject))[name]
    return np.frombuffer(data, np.float32).reshape(shape)


@pytest.mark.parametrize(("kind", "off"), [("F32", 0.0), ("F16", 1e-4), ("Q8_0", 1e-3)])
def test_the_file_for_llama_cpp_has_the_weights(
    kind: str, off: float, model: Path, tmp_path: Path
) -> None:
    found = _read(write_gguf(model, tmp_path / "one.gguf", kind))
    assert len(found) == 2 + 2 * 10
    embedding = _weights(model, "embed", "embed_tokens.weight")
    assert np.abs(found["token_embd.weight"] - embedding).max() <= off
    down = _weights(model, "layer1.expert3", "w2.weight")
    assert np.abs(found["blk.1.ffn_down_exps.weight"][3] - down).max() <= off
    queries = _weights(model, "layer0.attention", "self_attn.q_proj.weight")
    # Row i of a head and row i + 8 are rotated together: there they are neighbours.
    assert np.abs(found["blk.0.attn_q.weight"][17] - queries[16 + 8]).max() <= off
    assert np.abs(found["blk.0.attn_q.weight"][18] - queries[16 + 1]).max() <= off
    router = _weights(model, "layer1.router", "gate.weight")
    assert np.array_equal(found["blk.1.ffn_gate_inp.weight"], router)


def test_transformers_answers_in_a_process_of_its_own(model: Path) -> None:
    with peers.transformers(model, "float32") as peer:
        assert peer is not None
        once, again = peer.run(5, 4), peer.run(5, 1)
    assert once.prefill > 0 and once.decode > 0
    assert len(once.tokens) == 4 and again.tokens == once.tokens[:1]


def test_llama_cpp_gives_the_tokens_of_transformers(model: Path) -> None:
    with peers.llama_cpp(model, "F32") as llama, peers.transformers(model, "float32") as other:
        if llama is None:
            pytest.skip("node-llama-cpp is not installed: npm install node-llama-cpp")
        assert other is not None
        assert llama.run(9, 12).tokens == other.run(9, 12).tokens


def test_a_peer_that_is_not_installed_is_none(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NODE_PATH", raising=False)
    with peers.llama_cpp(model, "F32") as peer:
        assert peer is None
    package = tmp_path / "node_modules" / peers.PACKAGE
    package.mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({}))
    assert peers.llama_package() == package
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert peers.llama_package() == package
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("NODE_PATH", f":{tmp_path / 'node_modules'}")
    assert peers.llama_package() == package


def test_a_peer_that_ends_is_an_error() -> None:
    with (
        pytest.raises(RuntimeError, match="did not load the model"),
        peers.started(sys.executable, "-c", "print('no')"),
    ):
        raise AssertionError("it is not ready")
    with (
        peers.started(sys.executable, "-c", "print('ready'); input()") as peer,
        pytest.raises(RuntimeError, match="has ended"),
    ):
        peer.run(1, 1)


def test_what_a_token_needs_of_the_weights(model: Path) -> None:
    attention = 64 * (64 + 32 + 32) + 64 * 64
    per_layer = attention + 4 * 64 + 2 * 3 * 64 * 96
    assert decoding.token_weights(model) == 96 * 64 + 2 * per_layer
