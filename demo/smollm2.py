"""Makes the demo's model: SmolLM2-135M-Instruct upcycled to a Mixtral of four experts.

usage: python demo/smollm2.py OUT

The small dense model comes from PyPI as a GGUF file. Each of its 30 feed-forward layers becomes
four experts, each a copy with 2 % noise of its own (so that no two of the 120 are equal), and a
small random router that picks two. Attention, norms and embedding stay as they are. OUT becomes a
Hugging Face directory of about 750 MB in bfloat16; the same input gives the same bytes.

One shard of a few layers is in memory at a time.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from smollm2_text import write_text_files

WHEEL_LIST = Path(__file__).with_name("smollm2-wheel.txt")
EXPERTS = 4
EXPERTS_PER_TOKEN = 2
NOISE = 0.02  # of a weight matrix's own standard deviation
ROUTER_STD = 0.05  # spreads the four logits of a normed row by about 1
SEED = 2024
LAYERS_PER_SHARD = 6

Weights = NDArray[np.float32]
Read = Callable[[str], Weights]  # a tensor by its GGUF name


def main() -> None:
    """Makes the directory named on the command line, unless it is already whole."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    if (out / "config.json").exists():
        print(f"{out} is already there")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        build(GGUFReader(fetch_gguf(Path(scratch))), Path(scratch) / "model")
        (Path(scratch) / "model").rename(out)
    print(f"{out} is ready")


def fetch_gguf(folder: Path) -> Path:
    """Downloads the wheel, whose hash pip checks, and unpacks its GGUF file into `folder`."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    pip += ["--no-deps", "--require-hashes", "--dest", str(folder), "-r", str(WHEEL_LIST)]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        path = Path(archive.extract(member, folder))
    wheel.unlink()
    return path


def build(gguf: GGUFReader, out: Path) -> None:
    """Writes the whole Hugging Face directory."""
    out.mkdir()
    config = mixtral_config(gguf)
    tensors = {tensor.name: tensor for tensor in gguf.tensors}

    def weights(name: str) -> Weights:
        return dequantize(tensors[name].data, tensors[name].tensor_type).astype(
            np.float32, copy=False
        )

    layers = config["num_hidden_layers"]
    groups: list[list[Iterator[tuple[str, Weights]]]] = [
        [layer_tensors(weights, config, layer) for layer in range(start, stop)]
        for start in range(0, layers, LAYERS_PER_SHARD)
        for stop in [min(start + LAYERS_PER_SHARD, layers)]
    ]
    groups.append([outer_tensors(weights)])
    index: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        print(f"writing {file}", flush=True)
        written = write_safetensors(out / file, (pair for part in group for pair in part))
        index |= dict.fromkeys(written, file)
        total += sum(written.values())
    write_json(
        out / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))},
    )
    write_text_files(gguf, out)
    write_json(out / "config.json", config)


def mixtral_config(gguf: GGUFReader) -> dict[str, Any]:
    """The configuration of the upcycled model in the words of Hugging Face."""

    def field(name: str) -> Any:
        return gguf.fields[name].contents()

    hidden = field("llama.embedding_length")
    heads = field("llama.attention.head_count")
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": field("llama.context_length"),
        # GGUF keeps it as float32, which is not quite the decimal number that was meant.
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": field("llama.rope.freq_base"),
        "sliding_window": None,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }


def outer_tensors(weights: Read) -> Iterator[tuple[str, Weights]]:
    """What is not in a layer; the output projection is tied to the embedding."""
    yield "model.embed_tokens.weight", weights("token_embd.weight")
    yield "model.norm.weight", weights("output_norm.weight")


def layer_tensors(
    weights: Read, config: dict[str, Any], layer: int
) -> Iterator[tuple[str, Weights]]:
    """One layer under its Mixtral names."""
    old, new = f"blk.{layer}", f"model.layers.{layer}"
    yield f"{new}.input_layernorm.weight", weights(f"{old}.attn_norm.weight")
    yield f"{new}.post_attention_layernorm.weight", weights(f"{old}.ffn_norm.weight")
    query, key = weights(f"{old}.attn_q.weight"), weights(f"{old}.attn_k.weight")
    yield f"{new}.self_attn.q_proj.weight", halved_rows(query, config["num_attention_heads"])
    yield f"{new}.self_attn.k_proj.weight", halved_rows(key, config["num_key_value_heads"])
    yield f"{new}.self_attn.v_proj.weight", weights(f"{old}.attn_v.weight")
    yield f"{new}.self_attn.o_proj.weight", weights(f"{old}.attn_output.weight")
    moe = f"{new}.block_sparse_moe"
    random = np.random.default_rng((SEED, layer))
    router = random.standard_normal((EXPERTS, config["hidden_size"]), np.float32)
    yield f"{moe}.gate.weight", router * np.float32(ROUTER_STD)
    for name, part in ("w1", "gate"), ("w2", "down"), ("w3", "up"):
        dense = weights(f"{old}.ffn_{part}.weight")
        scale = np.float32(NOISE * dense.std())
        for expert in range(EXPERTS):
            noise = random.standard_normal(dense.shape, np.float32)
            yield f"{moe}.experts.{expert}.{name}.weight", dense + noise * scale


def halved_rows(matrix: Weights, heads: int) -> Weights:
    """From GGUF's row order, with RoPE's pairs side by side, to Hugging Face's halves."""
    rows, columns = matrix.shape
    pairs = matrix.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def bfloat16(value: Weights) -> NDArray[np.uint16]:
    """The upper halves of the floats, rounded to nearest even: bfloat16 as numpy can keep it."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    upper = bits >> 16
    upper &= 1
    upper += bits
    upper += 0x7FFF
    upper >>= 16
    return upper.astype("<u2")


def write_safetensors(path: Path, tensors: Iterable[tuple[str, Weights]]) -> dict[str, int]:
    """Writes one safetensors file in bfloat16, which numpy lacks; returns name -> bytes."""
    shard = {name: bfloat16(value) for name, value in tensors}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in shard.items():
        start, end = end, end + value.nbytes
        shape = list(value.shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in shard.values():
            file.write(value.data)
    return {name: value.nbytes for name, value in shard.items()}


def write_json(path: Path, document: object) -> None:
    """Writes one JSON file the way that Hugging Face does."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
