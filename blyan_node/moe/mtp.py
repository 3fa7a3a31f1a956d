"""Layers that predict further tokens at once: kept as they are found, never computed.

DeepSeek-V3 is released with one such layer (arXiv 2412.19437, 2.2) behind `num_hidden_layers`,
which its `config.json` counts as `num_nextn_predict_layers`. `transformers` leaves it out. Here all
of its tensors, whatever they are, become one subject, `layer61.mtp`: stored, fetched with the whole
model and exported byte for byte. No node holds it, and no answer depends on it.
"""

import re
from collections.abc import Mapping

from blyan_node.moe.config import ModelConfig
from blyan_node.moe.layout import SubjectLayout, TensorLayout, layer_prefix
from blyan_node.moe.strict_json import refuse
from protocols import limits
from protocols.dag.header import Kind
from protocols.ids import DIGEST_BYTES, Subject
from protocols.tensors.manifest import DTYPE_BYTES, Dtype

_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.")
_CHUNK_BYTES = DIGEST_BYTES + 2  # what a manifest takes for a chunk
_TENSOR_BYTES = 64  # and for a tensor beside its name

Shapes = Mapping[str, tuple[int, ...]]


def mtp_subjects(config: ModelConfig) -> list[tuple[int, Subject]]:
    """The layers that a model may have behind its last, with their subjects."""
    first = len(config.layers)
    layers = range(first, first + config.mtp_layers)
    return [(layer, Subject(f"layer{layer}.mtp")) for layer in layers]


def mtp_part(layer: int, shapes: Shapes) -> SubjectLayout:
    """The subject of a layer that has tensors of these local names, in their order."""
    prefix = layer_prefix(layer)
    return SubjectLayout(
        Subject(f"layer{layer}.mtp"),
        Kind.TRUNK,
        tuple(
            TensorLayout(name, shapes[name], prefix + name, dtypes=tuple(Dtype), idle=True)
            for name in sorted(shapes)
        ),
    )


def mtp_parts(config: ModelConfig, tensors: Shapes) -> list[SubjectLayout]:
    """The parts that a directory with `tensors`, by their names on disk, has of such layers.

    Raises `Refused` (BAD_MODEL) for a tensor that has the layer's prefix for its whole name.
    """
    by_layer: dict[int, dict[str, tuple[int, ...]]] = {n: {} for n, _ in mtp_subjects(config)}
    for source, shape in tensors.items():
        match = _LAYER.match(source)
        if match is not None and int(match[1]) in by_layer:
            if match.end() == len(source):  # no manifest could list it
                refuse(f"the tensor {source} has no name of its own in its layer", tensor=source)
            by_layer[int(match[1])][source[match.end() :]] = shape
    return [mtp_part(layer, shapes) for layer, shapes in by_layer.items() if shapes]


def check_mtp_size(part: SubjectLayout, dtypes: Mapping[str, Dtype]) -> None:
    """Raises `Refused` (BAD_MODEL) for a layer that one manifest cannot list."""
    listed = 0
    for tensor in part.tensors:
        size = DTYPE_BYTES[dtypes[tensor.source]]
        for length in tensor.shape:
            size *= length
        listed += -(-size // limits.chunk_bytes) * _CHUNK_BYTES
        listed += len(tensor.name.encode()) + _TENSOR_BYTES
    if listed > limits.manifest_bytes_max:
        refuse(
            f"{part.subject}, which is kept and never computed, is too large for one block: its"
            f" manifest would take {listed} bytes, at most {limits.manifest_bytes_max} are allowed."
            " Take its tensors out of the directory, and num_nextn_predict_layers out of"
            " config.json",
            subject=part.subject,
        )
