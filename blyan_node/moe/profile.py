"""The numeric profile: what must agree for two nodes to compute the same bits."""

import torch

from protocols import limits


def profile() -> str:
    """For example `cpu-torch2.13-avx2-f32-mv`: device, library, instruction set, sums, products.

    Weights are kept in their stored precision and computed with in float32 (`f32`), row by row
    with matrix-vector products (`mv`).
    """
    version = ".".join(torch.__version__.split(".")[:2])
    capability = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "")
    text = f"cpu-torch{version}-{capability}-f32-mv"
    assert len(text) <= limits.profile_bytes_max
    return text
