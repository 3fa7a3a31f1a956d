"""What a family has to say."""

from collections.abc import Callable
from dataclasses import dataclass

from blyan_node.moe.config import ModelConfig
from blyan_node.moe.layout import Form, SubjectLayout
from blyan_node.moe.strict_json import Fields


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type`.

    `read` takes every field that the family uses and leaves the rest to be refused. `feed` gives
    the subjects of one layer's feed-forward part that the main node computes with (router, shared
    experts, or the dense network), `expert` one of its experts. `forms` are those in which its
    checkpoints occur, the usual one first.
    """

    name: str
    read: Callable[[Fields], ModelConfig]
    feed: Callable[[ModelConfig, int, Form], list[SubjectLayout]]
    expert: Callable[[ModelConfig, int, int, Form], SubjectLayout]
    forms: tuple[Form, ...]
