"""Which tensors a model consists of, subject by subject, and where a checkpoint keeps them.

A subject is one replaceable part of a model. Its tensors have local names: the checkpoint's names
without the prefix that says which part they belong to (`w1.weight`, `self_attn.q_proj.weight`).
gpt_oss keeps the experts of a layer in one tensor; there a local tensor is one slice of it along
the first axis, which is a contiguous piece of the file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from blyan_node.moe.config import ModelConfig
from protocols.dag.header import Kind
from protocols.ids import Subject, expert_subject


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """One tensor of a subject. `index` is its slice of `source`, None if it is the whole."""

    name: str
    shape: tuple[int, ...]
    source: str
    index: int | None = None


@dataclass(frozen=True, slots=True)
class SubjectLayout:
    """One subject with its tensors in their fixed order."""

    subject: Subject
    kind: Kind
    tensors: tuple[TensorLayout, ...]

    def tensor(self, name: str) -> TensorLayout:
        """The tensor with this local name; raises `KeyError`."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(name)


def layout(config: ModelConfig) -> list[SubjectLayout]:
    """Every subject of a model, in the order in which a forward pass meets them."""
    c = config
    parts = [_part("embed", Kind.TRUNK, "model.", {"embed_tokens.weight": (c.vocab, c.hidden)})]
    for layer in range(c.layers):
        prefix = f"model.layers.{layer}."
        parts.append(_part(f"layer{layer}.attention", Kind.TRUNK, prefix, _attention(c)))
        parts.append(_router(c, layer, prefix))
        parts.extend(_expert(c, layer, expert, prefix) for expert in range(c.experts))
    parts.append(_part("final", Kind.TRUNK, "model.", {"norm.weight": (c.hidden,)}))
    if not c.tied:
        parts.append(_part("head", Kind.TRUNK, "", {"lm_head.weight": (c.vocab, c.hidden)}))
    return parts


def expert_layout(config: ModelConfig) -> SubjectLayout:
    """The tensors that any one expert of the model has, by the example of the first."""
    return _expert(config, 0, 0, "")


def sources(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint by name, with their whole shapes."""
    whole: dict[str, tuple[int, ...]] = {}
    for tensor in _tensors(config):
        shape = tensor.shape if tensor.index is None else (config.experts, *tensor.shape)
        whole[tensor.source] = shape
    return whole


def _tensors(config: ModelConfig) -> Iterator[TensorLayout]:
    for part in layout(config):
        yield from part.tensors


def _part(
    subject: str, kind: Kind, prefix: str, shapes: Mapping[str, tuple[int, ...]]
) -> SubjectLayout:
    tensors = (TensorLayout(name, shape, prefix + name) for name, shape in shapes.items())
    return SubjectLayout(Subject(subject), kind, tuple(tensors))


def _attention(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The attention of one layer, with both norms of the layer."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (c.hidden,)}
    for name, out, into in (
        ("q", q, c.hidden), ("k", kv, c.hidden), ("v", kv, c.hidden), ("o", c.hidden, q),
    ):  # fmt: skip
        shapes[f"self_attn.{name}_proj.weight"] = (out, into)
        if c.attention_bias:
            shapes[f"self_attn.{name}_proj.bias"] = (out,)
    if c.family == "gpt_oss":
        shapes["self_attn.sinks"] = (c.heads,)
    shapes["post_attention_layernorm.weight"] = (c.hidden,)
    return shapes


def _router(c: ModelConfig, layer: int, prefix: str) -> SubjectLayout:
    shapes: dict[str, tuple[int, ...]]
    if c.family == "gpt_oss":
        prefix += "mlp."
        shapes = {"router.weight": (c.experts, c.hidden), "router.bias": (c.experts,)}
    else:
        prefix += "block_sparse_moe."
        shapes = {"gate.weight": (c.experts, c.hidden)}
    return _part(f"layer{layer}.router", Kind.ROUTER, prefix, shapes)


def _expert(c: ModelConfig, layer: int, expert: int, prefix: str) -> SubjectLayout:
    subject = expert_subject(layer, expert)
    if c.family == "mixtral":
        shapes = {
            "w1.weight": (c.intermediate, c.hidden),
            "w3.weight": (c.intermediate, c.hidden),
            "w2.weight": (c.hidden, c.intermediate),
        }
        return _part(subject, Kind.EXPERT, f"{prefix}block_sparse_moe.experts.{expert}.", shapes)
    fused: dict[str, tuple[int, ...]] = {
        "gate_up_proj": (c.hidden, 2 * c.intermediate),
        "gate_up_proj_bias": (2 * c.intermediate,),
        "down_proj": (c.intermediate, c.hidden),
        "down_proj_bias": (c.hidden,),
    }
    tensors = (
        TensorLayout(name, shape, f"{prefix}mlp.experts.{name}", expert)
        for name, shape in fused.items()
    )
    return SubjectLayout(subject, Kind.EXPERT, tuple(tensors))
