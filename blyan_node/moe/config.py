"""What a `config.json` says, read strictly.

Every field of a configuration is one of four things: understood and used, known to change nothing
at inference (`strict_json.INERT`), required to have the one value that this code computes, or
refused by name. A field that nobody here has heard of is refused: it may change the mathematics.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from blyan_node.moe.strict_json import Fields, parse_json, refuse, show, token_ids
from protocols import limits

Family = Literal["mixtral", "gpt_oss"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding. With `factor` None it is plain, else YaRN (arXiv 2309.00071)."""

    theta: float
    factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_positions: int = 0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model's sizes and the variants of its parts; the same for every family."""

    family: Family
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    norm_eps: float
    positions_max: int
    rope: Rope
    windows: tuple[int | None, ...]  # by layer: how many positions a token sees, itself included
    tied: bool  # the head is the embedding
    attention_bias: bool
    swiglu_alpha: float
    swiglu_limit: float
    eos: tuple[int, ...]


def parse_config(data: bytes) -> ModelConfig:
    """Reads the bytes of a `config.json`; raises `Refused` (BAD_MODEL) that names the field."""
    if len(data) > limits.config_bytes_max:
        refuse(f"config.json has {len(data)} bytes, at most {limits.config_bytes_max} are allowed")
    fields = Fields(parse_json(data, "config.json"))
    family = fields.take("model_type", None)
    if not isinstance(family, str) or family not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        refuse(f"config.json: model_type {str(family)[:40]!r}, this version reads {known}")
    if fields.take("quantization_config", None) is not None:
        refuse("config.json: quantization_config: MXFP4 and other quantised weights are not read"
               " by this version")  # fmt: skip
    config = _FAMILIES[family](fields)
    fields.check_rest()
    return config


def _mixtral(fields: Fields) -> ModelConfig:
    window = fields.take("sliding_window", None)
    return _common(
        fields, "mixtral", windows=lambda layers: (_window(fields, window),) * layers, theta=1e6
    )


def _gpt_oss(fields: Fields) -> ModelConfig:
    window = fields.take("sliding_window", 128)
    types = fields.take("layer_types", None)
    if not fields.has("rope_parameters") and not fields.has("rope_scaling"):
        fields.refuse("rope_parameters", "is missing")

    def windows(layers: int) -> tuple[int | None, ...]:
        kinds = types
        if kinds is None:
            kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
        if not isinstance(kinds, list) or len(kinds) != layers:
            fields.refuse("layer_types", f"does not list {layers} layers")
        for kind in kinds:
            if kind not in ("sliding_attention", "full_attention"):
                fields.refuse("layer_types", f"has {show(kind)}")
        size = _window(fields, window)
        if size is None and "sliding_attention" in kinds:
            fields.refuse("sliding_window", "is missing, but layer_types asks for it")
        return tuple(size if kind == "sliding_attention" else None for kind in kinds)

    config = _common(fields, "gpt_oss", windows=windows, theta=150_000.0)
    if fields.take("experts_per_token", config.top_k) != config.top_k:
        fields.refuse("experts_per_token", "differs from num_experts_per_tok")
    original = config.rope.original_positions
    if fields.take("initial_context_length", original) != original:
        fields.refuse("initial_context_length", "differs from original_max_position_embeddings")
    return config


def _common(
    fields: Fields,
    family: Family,
    *,
    windows: Callable[[int], tuple[int | None, ...]],
    theta: float,
) -> ModelConfig:
    fields.only("hidden_act", "silu", "silu")
    gpt_oss = family == "gpt_oss"
    layers = fields.integer("num_hidden_layers", 1, limits.layers_max)
    hidden = fields.integer("hidden_size", 1, limits.hidden_max)
    heads = fields.integer("num_attention_heads", 1, 4096)
    kv_heads = fields.integer("num_key_value_heads", 1, 4096, default=heads)
    if heads % kv_heads:
        fields.refuse("num_key_value_heads", f"is {kv_heads}, which does not divide {heads} heads")
    head_dim = fields.take("head_dim", None)
    if head_dim is None and hidden % heads:
        fields.refuse("head_dim", f"is missing and {heads} heads do not divide {hidden}")
    head_dim = hidden // heads if head_dim is None else head_dim
    if type(head_dim) is not int or not 2 <= head_dim <= 4096 or head_dim % 2:
        fields.refuse("head_dim", f"is {show(head_dim)}, expected an even number from 2 to 4096")
    experts = fields.integer("num_local_experts", 1, limits.experts_per_layer_max)
    positions = fields.integer("max_position_embeddings", 1, 1 << 30)
    return ModelConfig(
        family=family,
        vocab=fields.integer("vocab_size", 1, limits.vocab_max),
        hidden=hidden,
        intermediate=fields.integer("intermediate_size", 1, limits.hidden_max * 8),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        experts=experts,
        top_k=fields.integer("num_experts_per_tok", 1, min(experts, limits.top_k_max)),
        norm_eps=fields.number("rms_norm_eps", 1e-12, 1.0, 1e-5),
        positions_max=positions,
        rope=_rope(fields, theta, positions),
        windows=windows(layers),
        tied=fields.flag("tie_word_embeddings", False),
        attention_bias=fields.flag("attention_bias", True) if gpt_oss else False,
        swiglu_alpha=fields.number("swiglu_alpha", 0.0, 100.0, 1.702) if gpt_oss else 1.0,
        swiglu_limit=fields.number("swiglu_limit", 1e-3, 1e6, 7.0) if gpt_oss else 0.0,
        eos=token_ids(fields.take("eos_token_id", None), "config.json: eos_token_id"),
    )


def _window(fields: Fields, value: object) -> int | None:
    if value is not None and (type(value) is not int or not 1 <= value <= 1 << 30):
        fields.refuse("sliding_window", f"is {show(value)}, expected a positive whole number")
    return value


def _rope(fields: Fields, theta: float, positions: int) -> Rope:
    """Reads `rope_parameters`, or the older `rope_theta` with `rope_scaling`."""
    outer = fields.number("rope_theta", 2.0, 1e12, theta)
    named, scaling = fields.nested("rope_parameters"), fields.nested("rope_scaling")
    if named is not None and scaling is not None:
        fields.refuse("rope_scaling", "is there beside rope_parameters")
    rope = named or scaling
    if rope is None:
        return Rope(outer)
    kind = rope.take("rope_type", rope.take("type", "default"))
    rope.take("type", None)
    theta = rope.number("rope_theta", 2.0, 1e12, outer)
    rope.only("partial_rotary_factor", 1.0, 1.0)
    if kind == "default":
        rope.check_rest()
        return Rope(theta)
    if kind != "yarn":
        rope.refuse("rope_type", f"is {show(kind)}, this version computes 'default' and 'yarn'")
    factor = rope.number("factor", 1.0, 1e6)
    attention = rope.take("attention_factor", None)
    if attention is not None and (type(attention) not in (int, float) or not 0 < attention < 1e3):
        rope.refuse("attention_factor", f"is {show(attention)}")
    read = Rope(
        theta=theta,
        factor=factor,
        beta_fast=rope.number("beta_fast", 1e-3, 1e6, 32.0),
        beta_slow=rope.number("beta_slow", 1e-3, 1e6, 1.0),
        original_positions=rope.integer(
            "original_max_position_embeddings", 1, 1 << 30, default=positions
        ),
        truncate=rope.flag("truncate", True),
        attention_factor=0.1 * math.log(factor) + 1.0 if attention is None else float(attention),
    )
    rope.check_rest()
    return read


_FAMILIES: dict[str, Callable[[Fields], ModelConfig]] = {
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
}
