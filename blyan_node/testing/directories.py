"""What a Hugging Face directory holds, for comparing two of them."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file

Digest = tuple[str, tuple[int, ...], str]


def tensor_digests(path: Path) -> dict[str, Digest]:
    """Type, shape and digest of every tensor by name, whichever file it is in."""
    return {
        name: (
            str(tensor.dtype),
            tuple(tensor.shape),
            hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
        )
        for file in sorted(path.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
