"""Which tensors a model consists of, subject by subject, and where a checkpoint keeps them.

A subject is one replaceable part of a model. Its tensors have local names: the checkpoint's names
without the prefix that says which part they belong to (`w1.weight`, `self_attn.q_proj.weight`),
and roles, by which whatever computes finds them. Here are the parts that families share; which of
them a family consists of, and under which names, is said in `blyan_node.moe.families`.

A checkpoint keeps its experts in one of two forms: `separate`, each with tensors of its own, or
`fused`, those of a layer in one tensor, of which an expert's local tensor is one slice along the
first axis: a contiguous piece of the file. Only experts (and where the router lies) differ by form.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from blyan_node.moe.config import (
    Attention,
    DenseFeed,
    GroupedAttention,
    LatentAttention,
    ModelConfig,
    MoeFeed,
)
from blyan_node.moe.stored import FP8_BLOCK
from protocols.dag.header import Kind
from protocols.ids import Subject, expert_subject
from protocols.tensors.manifest import Dtype

FLOATS = (Dtype.F32, Dtype.BF16, Dtype.F16)
PACKED = (Dtype.U8,)
FP8 = (Dtype.F8_E4M3,)

SCALE_SUFFIX = "_scale_inv"  # behind the name of a matrix of FP8 blocks: that of its scales

Form = Literal["separate", "fused"]


@dataclass(frozen=True, slots=True)
class Local:
    """A tensor of a part: its role, its local name and shape.

    `transposed`: the file has [in, out], while the role is a matrix [out, in]. `dtypes` are those
    in which it may be stored. `idle`: nothing computes with it; a directory may be without it, and
    what it has is kept.
    """

    role: str
    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    dtypes: tuple[Dtype, ...] = FLOATS
    idle: bool = False


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """One tensor of a subject. `index` is its slice of `source`, None if it is the whole."""

    name: str
    shape: tuple[int, ...]
    source: str
    index: int | None = None
    role: str = ""
    transposed: bool = False
    dtypes: tuple[Dtype, ...] = FLOATS
    idle: bool = False


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


def part(
    subject: str, kind: Kind, prefix: str, tensors: Iterable[Local], index: int | None = None
) -> SubjectLayout:
    """A subject whose tensors a checkpoint keeps under `prefix`, or as slices `index` of them."""
    return SubjectLayout(
        Subject(subject),
        kind,
        tuple(
            TensorLayout(
                one.name,
                one.shape,
                prefix + one.name,
                index,
                one.role,
                one.transposed,
                one.dtypes,
                one.idle,
            )
            for one in tensors
        ),
    )


def first_parts(config: ModelConfig) -> list[SubjectLayout]:
    """What is before the layers."""
    table = Local("weight", "embed_tokens.weight", (config.vocab, config.hidden))
    return [part("embed", Kind.TRUNK, "model.", [table])]


def last_parts(config: ModelConfig) -> list[SubjectLayout]:
    """What is after the layers."""
    norm = Local("weight", "norm.weight", (config.hidden,))
    head = Local("weight", "lm_head.weight", (config.vocab, config.hidden))
    parts = [part("final", Kind.TRUNK, "model.", [norm])]
    return parts if config.tied else [*parts, part("head", Kind.TRUNK, "", [head])]


def attention_part(config: ModelConfig, layer: int) -> SubjectLayout:
    """The attention of one layer, with both norms of the layer."""
    tensors = (
        Local("input_norm", "input_layernorm.weight", (config.hidden,)),
        *_attention(config.layers[layer].attention, config.hidden),
        Local("output_norm", "post_attention_layernorm.weight", (config.hidden,)),
    )
    return part(f"layer{layer}.attention", Kind.TRUNK, layer_prefix(layer), tensors)


def _attention(attention: Attention, hidden: int) -> list[Local]:
    if isinstance(attention, LatentAttention):
        return _latent(attention, hidden)
    return _grouped(attention, hidden)


def _grouped(a: GroupedAttention, hidden: int) -> list[Local]:
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    tensors: list[Local] = []
    for name, out, into in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden),
                            ("o", hidden, q)):  # fmt: skip
        tensors.extend(_projection(name, f"{name}_proj", out, into, a.bias))
    if a.qk_norm is not None:
        q, kv = (q, kv) if a.qk_norm == "whole" else (a.head_dim, a.head_dim)
        tensors.append(Local("q_norm", "self_attn.q_norm.weight", (q,)))
        tensors.append(Local("k_norm", "self_attn.k_norm.weight", (kv,)))
    if a.sinks:
        tensors.append(Local("sinks", "self_attn.sinks", (a.heads,)))
    return tensors


def _latent(a: LatentAttention, hidden: int) -> list[Local]:
    q, kv = a.heads * a.head_dim, a.heads * (a.plain_dim + a.value_dim)
    if a.query_rank is None:
        queries = _projection("q", "q_proj", q, hidden, False)
    else:
        queries = [
            *_projection("q_a", "q_a_proj", a.query_rank, hidden, a.bias),
            Local("q_a_norm", "self_attn.q_a_layernorm.weight", (a.query_rank,)),
            *_projection("q_b", "q_b_proj", q, a.query_rank, False),
        ]
    return [
        *queries,
        *_projection("kv_a", "kv_a_proj_with_mqa", a.kv_rank + a.rope_dim, hidden, a.bias),
        Local("kv_a_norm", "self_attn.kv_a_layernorm.weight", (a.kv_rank,)),
        Local("kv_b", "self_attn.kv_b_proj.weight", (kv, a.kv_rank)),
        *_projection("o", "o_proj", hidden, a.heads * a.value_dim, a.bias),
        Local("", "self_attn.rotary_emb.inv_freq", (a.rope_dim // 2,), idle=True),
    ]


def _projection(role: str, name: str, out: int, into: int, bias: bool) -> list[Local]:
    weight = Local(role, f"self_attn.{name}.weight", (out, into))
    return [weight, Local(f"{role}_bias", f"self_attn.{name}.bias", (out,))] if bias else [weight]


def layer_prefix(layer: int) -> str:
    """Where a checkpoint keeps a layer."""
    return f"model.layers.{layer}."


def router_part(config: ModelConfig, layer: int, prefix: str, name: str = "gate") -> SubjectLayout:
    """The router of one layer under `prefix`, for example `mlp.`."""
    feed = config.layers[layer].feed
    assert isinstance(feed, MoeFeed)
    tensors = [Local("weight", f"{name}.weight", (feed.experts, config.hidden))]
    if feed.routing.bias:
        tensors.append(Local("bias", f"{name}.bias", (feed.experts,)))
    if feed.routing.correction:
        tensors.append(Local("correction", f"{name}.e_score_correction_bias", (feed.experts,)))
    return part(f"layer{layer}.router", Kind.ROUTER, layer_prefix(layer) + prefix, tensors)


def separate_expert(
    config: ModelConfig, layer: int, expert: int, prefix: str, names: tuple[str, str, str]
) -> SubjectLayout:
    """An expert with three matrices of its own: `names` are those of gate, up and down."""
    feed = config.layers[layer].feed
    assert isinstance(feed, MoeFeed)
    return part(
        expert_subject(layer, expert),
        Kind.EXPERT,
        f"{layer_prefix(layer)}{prefix}experts.{expert}.",
        gated(config.hidden, feed.intermediate, names),
    )


def fused_expert(layer: int, expert: int, prefix: str, tensors: Iterable[Local]) -> SubjectLayout:
    """An expert whose tensors are slices of those of its layer."""
    prefix = f"{layer_prefix(layer)}{prefix}experts."
    return part(expert_subject(layer, expert), Kind.EXPERT, prefix, tensors, expert)


GATED = ("gate_proj", "up_proj", "down_proj")


def gated(hidden: int, inner: int, names: tuple[str, str, str] = GATED) -> list[Local]:
    """The matrices of a gated feed-forward network, in the order of `names`."""
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return [
        Local(role, f"{name}.weight", shape)
        for role, name, shape in zip(("gate", "up", "down"), names, shapes, strict=True)
    ]


def gated_fused(hidden: int, inner: int) -> list[Local]:
    """The same with gate above up in one matrix, as `transformers` 5 keeps it in memory."""
    return [
        Local("gate_up", "gate_up_proj", (2 * inner, hidden)),
        Local("down", "down_proj", (hidden, inner)),
    ]


def mlp_parts(config: ModelConfig, layer: int, form: Form) -> list[SubjectLayout]:
    """A layer's router with shared experts, or its dense network, under the names most use."""
    feed, here = config.layers[layer].feed, layer_prefix(layer) + "mlp."
    if isinstance(feed, DenseFeed):
        dense = gated(config.hidden, feed.intermediate)
        return [part(f"layer{layer}.mlp", Kind.TRUNK, here, dense)]
    parts = [router_part(config, layer, "mlp.")]
    if feed.shared_intermediate:
        shared = gated(config.hidden, feed.shared_intermediate)
        parts.append(part(f"layer{layer}.shared", Kind.TRUNK, here + "shared_experts.", shared))
    return parts


def mlp_expert(config: ModelConfig, layer: int, expert: int, form: Form) -> SubjectLayout:
    """An expert under the names most use."""
    if form == "separate":
        return separate_expert(config, layer, expert, "mlp.", GATED)
    feed = config.layers[layer].feed
    assert isinstance(feed, MoeFeed)
    return fused_expert(layer, expert, "mlp.", gated_fused(config.hidden, feed.intermediate))


def mxfp4(role: str, name: str, out: int, into: int) -> list[Local]:
    """A matrix [out, in] as 4-bit floats (`blyan_node.moe.stored.Mxfp4`): blocks and scales."""
    blocks = (out, into // 32, 16)
    return [
        Local(f"{role}_blocks", f"{name}_blocks", blocks, dtypes=PACKED),
        Local(f"{role}_scales", f"{name}_scales", blocks[:2], dtypes=PACKED),
    ]


def fp8_blocks(parts: Iterable[SubjectLayout]) -> list[SubjectLayout]:
    """The same parts with matrices as FP8 (`blyan_node.moe.stored.Fp8Blocks`), as releases have it.

    Embedding, routers and head stay what they are, and so does what is no matrix.
    """
    return [
        replace(part, tensors=tuple(one for tensor in part.tensors for one in _fp8(tensor)))
        if part.kind is not Kind.ROUTER and part.subject not in ("embed", "head")
        else part
        for part in parts
    ]


def _fp8(tensor: TensorLayout) -> tuple[TensorLayout, ...]:
    if len(tensor.shape) != 2 or tensor.index is not None:
        return (tensor,)
    codes = replace(tensor, role=f"{tensor.role}_codes", dtypes=FP8)
    scales = replace(
        tensor,
        role=f"{tensor.role}_scales",
        name=tensor.name + SCALE_SUFFIX,
        source=tensor.source + SCALE_SUFFIX,
        shape=tuple(-(-size // FP8_BLOCK) for size in tensor.shape),
    )
    return codes, scales
