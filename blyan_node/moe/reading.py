"""What the `config.json` of every family has in common, read strictly.

Every field of a configuration is one of four things: understood and used, known to change nothing
at inference (`strict_json.INERT`), required to have the one value that this code computes, or
refused by name. A field that nobody here has heard of is refused: it may change the mathematics.
"""

import re
from collections.abc import Sequence
from typing import NoReturn

from blyan_node.moe.config import GroupedAttention, LayerConfig, ModelConfig, Rope
from blyan_node.moe.rope import natural_log
from blyan_node.moe.stored import FP8_BLOCK
from blyan_node.moe.strict_json import Fields, show, token_ids
from protocols import limits


def read_model(
    fields: Fields,
    family: str,
    hidden: int,
    layers: Sequence[LayerConfig],
    *,
    theta: float,
    norm_eps: float,
    mscale: bool = False,
) -> ModelConfig:
    """The fields around the layers. `theta` and `norm_eps` are the family's defaults.

    With `mscale` the fields of that name and `mscale_all_dim` are read, else they are unknown.
    """
    positions = fields.integer("max_position_embeddings", 1, 1 << 30)
    return ModelConfig(
        family=family,
        vocab=fields.integer("vocab_size", 1, limits.vocab_max),
        hidden=hidden,
        layers=tuple(layers),
        norm_eps=fields.number("rms_norm_eps", 1e-12, 1.0, norm_eps),
        positions_max=positions,
        rope=_rope(fields, theta, positions, mscale),
        tied=fields.flag("tie_word_embeddings", False),
        eos=token_ids(fields.take("eos_token_id", None), "config.json: eos_token_id"),
    )


def read_layers(fields: Fields) -> int:
    """The number of layers."""
    return fields.integer("num_hidden_layers", 1, limits.layers_max)


def read_hidden(fields: Fields) -> int:
    """The width of the rows between the layers."""
    return fields.integer("hidden_size", 1, limits.hidden_max)


def read_intermediate(fields: Fields, name: str = "intermediate_size") -> int:
    """The inner width of a feed-forward network."""
    return fields.integer(name, 1, limits.hidden_max * 8)


def read_experts(fields: Fields, *names: str) -> tuple[int, int]:
    """Experts of a layer, under any of `names` that are there, and how many a token passes."""
    present = [name for name in names if fields.has(name)] or [names[0]]
    counts = [fields.integer(name, 1, limits.experts_per_layer_max) for name in present]
    if len(set(counts)) > 1:
        fields.refuse(present[1], f"differs from {present[0]}")
    top_k = fields.integer("num_experts_per_tok", 1, min(counts[0], limits.top_k_max))
    return counts[0], top_k


def read_attention(fields: Fields, hidden: int) -> GroupedAttention:
    """Heads and their width; the family adds what else its attention does."""
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
    return GroupedAttention(heads, kv_heads, head_dim)


def read_window(fields: Fields, default: int | None) -> int | None:
    """`sliding_window`, None if there is none."""
    value = fields.take("sliding_window", default)
    if value is not None and (type(value) is not int or not 1 <= value <= 1 << 30):
        fields.refuse("sliding_window", f"is {show(value)}, expected a positive whole number")
    return value


def read_mxfp4(fields: Fields, *widths: int) -> bool:
    """Whether the experts are stored as MXFP4; `widths` are those of their matrices' rows."""
    quantised = fields.nested("quantization_config")
    if quantised is None:
        return False
    quantised.only("quant_method", "mxfp4", None)
    quantised.flag("dequantize", False)  # what `transformers` did when it loaded them
    kept = quantised.take("modules_to_not_convert", None) or []
    if not isinstance(kept, list) or any(type(one) is not str or "expert" in one for one in kept):
        quantised.refuse("modules_to_not_convert", f"is {show(kept)}: experts are to be MXFP4")
    quantised.check_rest()
    for width in widths:
        if width % 32:
            fields.refuse("quantization_config", f"is mxfp4, and 32 does not divide {width}")
    return True


def refuse_quantised(fields: Fields) -> None:
    """Refuses, by its name, a quantisation that the family has not taken."""
    quantised = fields.nested("quantization_config")
    if quantised is not None:
        _refuse_method(fields, quantised.take("quant_method", None))


def _refuse_method(fields: Fields, method: object) -> NoReturn:
    fields.refuse(
        "quantization_config", f"asks for {show(method)}, which is not read in this family"
    )


# Modules that releases list as kept, and that are no matrices or never FP8 here.
_KEPT = re.compile(r"(.*\.)?(lm_head|embed_tokens|gate|eh_proj|head|shared_head|\w*norm)")


def read_fp8(fields: Fields) -> bool:
    """Whether matrices are stored as FP8 with a scale for each 128 by 128 weights.

    What was done to activations when a model was quantised is left out, as `transformers` leaves it
    out when it widens the weights.
    """
    quantised = fields.nested("quantization_config")
    if quantised is None:
        return False
    method = quantised.take("quant_method", None)
    if method != "fp8":
        _refuse_method(fields, method)
    quantised.only("fmt", "e4m3", "e4m3")
    quantised.only("weight_block_size", [FP8_BLOCK, FP8_BLOCK], [FP8_BLOCK, FP8_BLOCK])
    quantised.only("activation_scheme", "dynamic", "dynamic")
    if quantised.take("scale_fmt", "float") not in ("float", "ue8m0"):
        quantised.refuse("scale_fmt", "is neither 'float' nor 'ue8m0'")
    quantised.flag("dequantize", False)  # what `transformers` did when it loaded them
    kept = quantised.take("modules_to_not_convert", None) or []
    if not isinstance(kept, list):
        quantised.refuse("modules_to_not_convert", f"is {show(kept)}, expected a list")
    for one in kept:
        if type(one) is not str or not _KEPT.fullmatch(one):
            quantised.refuse("modules_to_not_convert", f"has {show(one)}, which is to be FP8")
    quantised.check_rest()
    return True


def _rope(fields: Fields, theta: float, positions: int, mscale: bool) -> Rope:
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
    read = _yarn(rope, theta, positions, mscale)
    rope.check_rest()
    return read


def _yarn(rope: Fields, theta: float, positions: int, mscale: bool) -> Rope:
    factor = rope.number("factor", 1.0, 1e6)
    attention = rope.take("attention_factor", None)
    if attention is not None and (type(attention) not in (int, float) or not 0 < attention < 1e3):
        rope.refuse("attention_factor", f"is {show(attention)}")
    part = rope.number("mscale", 0.0, 100.0, 0.0) if mscale else 0.0
    whole = rope.number("mscale_all_dim", 0.0, 100.0, 0.0) if mscale else 0.0
    grown = 0.1 * natural_log(factor)
    if attention is None:
        attention = (grown * part + 1) / (grown * whole + 1) if part and whole else grown + 1
    return Rope(
        theta=theta,
        factor=factor,
        beta_fast=rope.number("beta_fast", 1e-3, 1e6, 32.0),
        beta_slow=rope.number("beta_slow", 1e-3, 1e6, 1.0),
        original_positions=rope.integer(
            "original_max_position_embeddings", 1, 1 << 30, default=positions
        ),
        truncate=rope.flag("truncate", True),
        attention_factor=float(attention),
        score_factor=(grown * whole + 1) * (grown * whole + 1),
    )
