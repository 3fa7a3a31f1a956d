"""The manifest: what a block's body consists of, tensor by tensor, chunk by chunk.

A body is the concatenation of its tensors' raw little-endian bytes. Each tensor is cut into chunks
of `limits.chunk_bytes` (the last one shorter), named by their hashes; equal chunks are stored once
whatever block they belong to. Files that travel with a model (tokenizer, configuration) are entries
of dtype `U8` whose shape is their length.
"""

from collections.abc import Iterator
from enum import StrEnum
from math import prod

import msgspec

from protocols import limits, wire
from protocols.errors import RemoteProtocolError
from protocols.ids import DIGEST_BYTES, ChunkHash, ManifestId, cid


class Dtype(StrEnum):
    """Element types, by their safetensors names."""

    F32 = "F32"
    BF16 = "BF16"
    F16 = "F16"
    U8 = "U8"
    I64 = "I64"
    F8_E4M3 = "F8_E4M3"


DTYPE_BYTES = {Dtype.F32: 4, Dtype.BF16: 2, Dtype.F16: 2, Dtype.U8: 1, Dtype.I64: 8,
               Dtype.F8_E4M3: 1}  # fmt: skip


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of a body: `size` is its length in bytes, `chunks` its pieces in order."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    size: int
    chunks: tuple[ChunkHash, ...]

    def chunk_size(self, index: int) -> int:
        """Bytes of the chunk at `index`."""
        return min(limits.chunk_bytes, self.size - index * limits.chunk_bytes)


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tensors of one body, in order; names are unique."""

    tensors: tuple[TensorEntry, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole body."""
        return sum(tensor.size for tensor in self.tensors)

    def chunks(self) -> Iterator[tuple[ChunkHash, int]]:
        """Every chunk of the body in order, with its length; repeats are not removed."""
        for tensor in self.tensors:
            for index, name in enumerate(tensor.chunks):
                yield name, tensor.chunk_size(index)

    def tensor(self, name: str) -> TensorEntry:
        """The entry called `name`; raises `KeyError`."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(name)

    def encode(self) -> tuple[ManifestId, bytes]:
        """The manifest's id and canonical bytes."""
        data = wire.encode(self)
        return ManifestId(cid(data)), data

    @classmethod
    def decode(cls, data: bytes | memoryview) -> "Manifest":
        """Reads and checks a manifest; raises `RemoteProtocolError`."""
        manifest = wire.decode_signed(
            bytes(data), cls, where="manifest", bytes_max=limits.manifest_bytes_max
        )
        if len(manifest.tensors) > limits.manifest_tensors_max:
            raise RemoteProtocolError("manifest", f"{len(manifest.tensors)} tensors")
        seen: set[str] = set()
        for tensor in manifest.tensors:
            _check(tensor)
            if tensor.name in seen:
                raise RemoteProtocolError("manifest", f"two tensors named {tensor.name!r}")
            seen.add(tensor.name)
        return manifest


def _check(tensor: TensorEntry) -> None:
    name = tensor.name[:80]
    if not 0 < len(tensor.name.encode()) <= limits.tensor_name_bytes_max:
        raise RemoteProtocolError("manifest", f"tensor name {name!r} is empty or too long")
    if len(tensor.shape) > limits.tensor_dims_max or any(n < 0 for n in tensor.shape):
        raise RemoteProtocolError("manifest", f"{name}: shape {tensor.shape}")
    if tensor.size != prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]:
        raise RemoteProtocolError("manifest", f"{name}: {tensor.size} bytes do not fit its shape")
    if tensor.size > limits.tensor_bytes_max:
        raise RemoteProtocolError("manifest", f"{name}: {tensor.size} bytes")
    if len(tensor.chunks) != -(-tensor.size // limits.chunk_bytes):
        raise RemoteProtocolError("manifest", f"{name}: {len(tensor.chunks)} chunks do not fit")
    if any(len(chunk) != DIGEST_BYTES for chunk in tensor.chunks):
        raise RemoteProtocolError("manifest", f"{name}: a chunk hash is not 32 bytes")
