"""The families of models that are read: one module each, and here what asks them by name.

A family says how its `config.json` becomes a `ModelConfig`, which subjects a layer's feed-forward
part consists of, and under which names a checkpoint keeps them. docs/families.md adds one by
example.
"""

from collections.abc import Callable, Collection

from blyan_node.moe.config import ModelConfig
from blyan_node.moe.families import deepseek_v3, gpt_oss, mixtral, olmoe, qwen3_moe
from blyan_node.moe.families.family import Family
from blyan_node.moe.layout import (
    Form,
    SubjectLayout,
    attention_part,
    first_parts,
    fp8_blocks,
    last_parts,
)
from blyan_node.moe.reading import refuse_quantised
from blyan_node.moe.strict_json import Fields, parse_json, refuse
from protocols import limits
from protocols.ids import Subject, parse_subject

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        deepseek_v3.FAMILY,
        gpt_oss.FAMILY,
        mixtral.FAMILY,
        olmoe.FAMILY,
        qwen3_moe.FAMILY,
    )
}


def parse_config(data: bytes) -> ModelConfig:
    """Reads the bytes of a `config.json`; raises `Refused` (BAD_MODEL) that names the field."""
    if len(data) > limits.config_bytes_max:
        refuse(f"config.json has {len(data)} bytes, at most {limits.config_bytes_max} are allowed")
    fields = Fields(parse_json(data, "config.json"))
    name = fields.take("model_type", None)
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        refuse(
            f"config.json: model_type {str(name)[:40]!r}, this version reads {known}",
            field="model_type",
        )
    config = FAMILIES[name].read(fields)
    refuse_quantised(fields)
    fields.check_rest()
    if not any(config.experts_of(layer) for layer in range(len(config.layers))):
        refuse("config.json: no layer has experts, and dense models are not read")
    return config


def layout(config: ModelConfig, form: Form | None = None) -> list[SubjectLayout]:
    """Every subject of a model, in the order in which a forward pass meets them.

    Without a `form`, the family's usual one; all but the experts' tensors are the same in each.
    """
    family = FAMILIES[config.family]
    form = form or _forms(config)[0]
    parts = first_parts(config)
    for layer in range(len(config.layers)):
        parts.append(attention_part(config, layer))
        parts.extend(family.feed(config, layer, form))
        parts.extend(
            family.expert(config, layer, expert, form) for expert in range(config.experts_of(layer))
        )
    parts.extend(last_parts(config))
    return fp8_blocks(parts) if config.fp8 else parts


def expert_layout(config: ModelConfig, subject: Subject, names: Collection[str]) -> SubjectLayout:
    """The tensors of an expert, in the form that has the local `names`."""
    name = parse_subject(subject)
    assert name.layer is not None and name.expert is not None
    return _expert(config, name.layer, name.expert, form_of_names(config, names))


def form_of_names(config: ModelConfig, names: Collection[str]) -> Form:
    """The form in which an expert's tensors have these local names; the usual one if none fits."""
    return _form(config, lambda expert: {tensor.name for tensor in expert.tensors} == set(names))


def form_of_sources(config: ModelConfig, sources: Collection[str]) -> Form:
    """The form of a checkpoint with these tensors; the family's usual one if none fits."""
    return _form(config, lambda expert: any(one.source in sources for one in expert.tensors))


def _form(config: ModelConfig, fits: Callable[[SubjectLayout], bool]) -> Form:
    forms = _forms(config)
    layer = next(n for n in range(len(config.layers)) if config.experts_of(n))
    fitting = (form for form in forms if fits(_expert(config, layer, 0, form)))
    return next(fitting, forms[0])


def _forms(config: ModelConfig) -> tuple[Form, ...]:
    """The forms in which experts may occur, the usual one first; FP8 ones are never fused."""
    forms = FAMILIES[config.family].forms
    return tuple(form for form in forms if form == "separate") if config.fp8 else forms


def _expert(config: ModelConfig, layer: int, expert: int, form: Form) -> SubjectLayout:
    part = FAMILIES[config.family].expert(config, layer, expert, form)
    return fp8_blocks([part])[0] if config.fp8 else part


def sources(config: ModelConfig, form: Form | None = None) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint by name, with their whole shapes."""
    whole: dict[str, tuple[int, ...]] = {}
    for part in layout(config, form):
        for tensor in part.tensors:
            count = 0 if tensor.index is None else tensor.index + 1
            whole[tensor.source] = (count, *tensor.shape) if count else tensor.shape
    return whole
