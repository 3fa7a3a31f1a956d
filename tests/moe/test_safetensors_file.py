"""safetensors: read as the specification says, written so that the library reads it."""

import json
import os
import random
import struct
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blyan_node.moe.arrays import write_tensors
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.safetensors_file import parse_header, read_header, read_pieces
from protocols import limits
from protocols.errors import ErrorCode, Refused

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "empty": {"dtype": "F32", "shape": [0, 7], "data_offsets": [32, 32]},
}
GOOD_BYTES = 32


def _parse(fields: object, size: int = GOOD_BYTES) -> Any:
    return parse_header(json.dumps(fields).encode(), size, "x.safetensors")


def test_the_library_reads_what_we_write_and_the_reverse(tmp_path: Path) -> None:
    tensors = {
        "logits": torch.randn(5, 7), "layer0.experts": torch.arange(10).view(5, 2),
        "b": torch.randn(3).bfloat16(), "strided": torch.randn(4, 6)[:, ::2],
        "é": torch.empty(0, 2),
    }  # fmt: skip
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    assert write_tensors(ours, tensors) == ours.stat().st_size
    save_file({name: t.contiguous() for name, t in tensors.items()}, theirs)
    for path in (ours, theirs):
        loaded, header = load_file(path), read_header(path)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
            stored = header[name]
            data = b"".join(read_pieces(path, stored.begin, stored.size))
            assert data == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert not list(tmp_path.glob("*.partial"))


def test_a_good_header() -> None:
    found = _parse(GOOD)
    assert found["b"].size == 8 and found["empty"].shape == (0, 7)


@pytest.mark.parametrize(
    ("name", "entry", "why"),
    [
        ("b", {"dtype": "F8_E5M2", "shape": [8], "data_offsets": [24, 32]}, "F8_E5M2"),
        ("b", {"dtype": "BF16", "shape": [4], "data_offsets": [20, 28]}, "begins at"),
        ("b", {"dtype": "BF16", "shape": [4], "data_offsets": [26, 34]}, "begins at"),
        ("b", {"dtype": "BF16", "shape": [5], "data_offsets": [24, 32]}, "do not fit 10"),
        ("b", {"dtype": "BF16", "shape": [-4], "data_offsets": [24, 32]}, "shape"),
        ("b", {"dtype": "BF16", "shape": [4], "data_offsets": [24]}, "data_offsets"),
        ("b", {"dtype": "BF16", "shape": [4], "data_offsets": [32, 24]}, "do not fit"),
        ("b", {"dtype": "BF16", "shape": [4]}, "expected dtype"),
        ("b", {"dtype": ["BF16"], "shape": [4], "data_offsets": [24, 32]}, "dtype"),
        ("b", [], "expected dtype"),
        ("c", {"dtype": "U8", "shape": [1], "data_offsets": [32, 33]}, "32 bytes of tensors"),
        ("x" * 600, {"dtype": "U8", "shape": [0], "data_offsets": [32, 32]}, "too long"),
        ("\ud800", {"dtype": "U8", "shape": [0], "data_offsets": [32, 32]}, "is no text"),
        ("__metadata__", {"format": 1}, "__metadata__"),
        ("d", {"dtype": "U8", "shape": [1] * 9, "data_offsets": [32, 33]}, "shape"),
        ("d", {"dtype": "U8", "shape": [1 << 61, 8], "data_offsets": [32, 1 << 61]}, "fit"),
    ],
)
def test_refused_by_name(name: str, entry: object, why: str) -> None:
    with pytest.raises(Refused, match=why) as refusal:
        _parse({**GOOD, name: entry})
    assert refusal.value.code is ErrorCode.BAD_MODEL


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0" * 7, struct.pack("<Q", 1 << 60), struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", limits.safetensors_header_bytes_max + 1) + b"{}", b"\x80\x02}q\0." * 9,
    ],
)  # fmt: skip
def test_what_is_no_safetensors_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(Refused, match=r"model\.safetensors"):
        read_header(path)


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"12345")
    with pytest.raises(Refused, match="shorter"):
        list(read_pieces(path, 2, 9))


def test_ten_thousand_broken_headers() -> None:
    rng, read = random.Random(4), 0
    values: list[Any] = [
        None, -1, 0, 1, 24, 32, 1 << 70, 2.0, "F32", "BF16", "F99", [], [0, 24], [24, 32], [2, 3],
        [4], {}, "\ud800", [[]],
    ]  # fmt: skip
    for _ in range(10_000):
        fields = json.loads(json.dumps(GOOD))
        for _ in range(rng.randint(1, 3)):
            name = rng.choice([*fields, "c", "\ud800"])
            entry = fields.get(name)
            if isinstance(entry, dict) and rng.random() < 0.8:
                entry[rng.choice([*entry, "more"])] = deepcopy(rng.choice(values))
            elif rng.random() < 0.5:
                fields[name] = deepcopy(rng.choice(values))
            else:
                fields.pop(name, None)
        data = bytearray(json.dumps(fields).encode())
        if rng.random() < 0.3:
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            parse_header(bytes(data), GOOD_BYTES, "x")
        except Refused as refusal:
            assert refusal.code is ErrorCode.BAD_MODEL
            str(refusal).encode()
        else:
            read += 1
    assert 20 < read < 9_000


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.safetensors")
    with pytest.raises(Refused, match="no regular file"):
        read_header(tmp_path / "w.safetensors")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(Refused, match="no regular file"):
        Checkpoint.open(tmp_path)
