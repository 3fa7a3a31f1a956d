"""Writing a model back as a Hugging Face directory, byte for byte.

The tensors have the names, types and bytes that they had when they were published; experts that
were fused by layer are fused again. Tensors are cut into files at their boundaries. Every file is
there whole or not at all, and `config.json` comes last: a directory without it is an export that
was cut off.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from blyan_node.moe.checkpoint import INDEX_FILE, SINGLE_FILE
from blyan_node.moe.config import ModelConfig
from blyan_node.moe.families import form_of_names, layout, sources
from blyan_node.moe.layout import TensorLayout
from blyan_node.moe.mtp import mtp_part, mtp_subjects
from blyan_node.moe.safetensors_file import header_bytes, write_whole
from blyan_node.moe.strict_json import refuse
from protocols.dag.header import Kind
from protocols.ids import Subject
from protocols.tensors.manifest import DTYPE_BYTES, Dtype

SHARD_BYTES = 5_000_000_000

Description = Mapping[str, tuple[Dtype, tuple[int, ...]]]
Describe = Callable[[Subject], Description]
Read = Callable[[Subject, str], Iterator[bytes | memoryview]]


@dataclass(frozen=True, slots=True)
class Written:
    """What an export consists of."""

    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class _Whole:
    """A tensor of the directory and the subjects' tensors that it consists of, in order."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    pieces: tuple[tuple[Subject, str], ...]

    @property
    def size(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def write_checkpoint(
    out: Path,
    config: ModelConfig,
    files: Mapping[str, bytes],
    describe: Describe,
    read: Read,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Writes a model to the directory `out`, which is made if it is not there.

    `describe(subject)` gives types and shapes by local name, `read(subject, name)` the bytes of one
    tensor. Raises `Refused` (BAD_MODEL) if what they give does not fit the configuration, and
    `OSError` if the disk does not take it.
    """
    shards = _shards(_whole_tensors(config, describe), shard_bytes)
    out.mkdir(parents=True, exist_ok=True)
    count, size, index = 0, 0, dict[str, str]()
    for number, shard in enumerate(shards, 1):
        name = SINGLE_FILE
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            index.update({tensor.name: name for tensor in shard})
        size += write_whole(out / name, _shard_pieces(shard, read))
        count += 1
    small = {name: data for name, data in files.items() if name != "config.json"}
    if index:
        total = sum(tensor.size for shard in shards for tensor in shard)
        small[INDEX_FILE] = _index(index, total)
    for name, data in (*small.items(), ("config.json", files["config.json"])):
        size += write_whole(out / name, (data,))
        count += 1
    return Written(count, size)


def _whole_tensors(config: ModelConfig, describe: Describe) -> list[_Whole]:
    first = next(part for part in layout(config) if part.kind is Kind.EXPERT)
    form = form_of_names(config, describe(first.subject))
    kept = [(layer, describe(subject)) for layer, subject in mtp_subjects(config)]
    behind = [mtp_part(n, {k: v[1] for k, v in names.items()}) for n, names in kept if names]
    shapes = sources(config, form)
    shapes |= {tensor.source: tensor.shape for part in behind for tensor in part.tensors}
    parts: dict[str, list[tuple[Subject, str]]] = {}
    dtypes: dict[str, Dtype] = {}
    for part in (*layout(config, form), *behind):
        described = describe(part.subject)
        for tensor in part.tensors:
            if tensor.idle and tensor.name not in described:
                continue
            dtype = _dtype(part.subject, tensor, described)
            if dtypes.setdefault(tensor.source, dtype) != dtype:
                refuse(f"{part.subject} is {dtype}, others in {tensor.source} are not")
            parts.setdefault(tensor.source, []).append((part.subject, tensor.name))
    return [_Whole(name, dtypes[name], shapes[name], tuple(parts[name])) for name in parts]


def _dtype(subject: Subject, tensor: TensorLayout, described: Description) -> Dtype:
    if tensor.name not in described:
        refuse(f"{subject} has no tensor {tensor.name}", subject=subject)
    dtype, shape = described[tensor.name]
    if tuple(shape) != tensor.shape:
        refuse(f"{subject}: {tensor.name} has the shape {list(shape)}", subject=subject)
    return dtype


def _shards(tensors: list[_Whole], shard_bytes: int) -> list[list[_Whole]]:
    shards: list[list[_Whole]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.size
    return shards


def _shard_pieces(shard: list[_Whole], read: Read) -> Iterator[bytes | memoryview]:
    yield header_bytes({tensor.name: (tensor.dtype, tensor.shape) for tensor in shard})
    for tensor in shard:
        written = 0
        for subject, name in tensor.pieces:
            for piece in read(subject, name):
                written += len(piece)
                yield piece
        if written != tensor.size:
            refuse(f"{tensor.name}: {written} bytes, expected {tensor.size}")


def _index(files: Mapping[str, str], total: int) -> bytes:
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    return json.dumps(document, indent=2).encode() + b"\n"
