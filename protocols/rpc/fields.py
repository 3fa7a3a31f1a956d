"""The fields that many requests and results share, with their limits and what they mean.

The descriptions are what `rpc.discover`, `docs/rpc.md` and the command's help say.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from protocols import limits


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Named parameters of a method; an unknown name is refused."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a method answers: always an object, so that fields can be added."""


HUB = "hf:"  # what a model on the hub begins with, where a directory may be given

Count = Annotated[int, Meta(ge=0)]
Replicas = Annotated[
    int,
    Meta(ge=1, le=limits.replicas_max, description="Live holders that every expert must have"),
]
ModelName = Annotated[
    str, Meta(min_length=1, max_length=160, description="A model: its name, `name@id` or its id")
]
NewName = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$",
        description="A name for the model: lower case letters, digits, `.`, `_`, `-`",
    ),
]
SubjectText = Annotated[
    str, Meta(min_length=1, max_length=64, description="One part of a model: `layer3.expert5`")
]
BlockText = Annotated[
    str, Meta(min_length=1, max_length=128, description="The id of a block: `bafkrei...`")
]
RootText = Annotated[
    str,
    Meta(min_length=64, max_length=64, description="A root: 64 hex digits; the newest if left out"),
]
PathText = Annotated[
    str, Meta(min_length=1, max_length=4096, description="An absolute path on the node's machine")
]
SourceText = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=4096,
        description="A Hugging Face directory (an absolute path on the node's machine), or "
        "`hf:ORG/NAME[@REVISION]` on the hub",
    ),
]
TokenIds = Annotated[
    list[Annotated[int, Meta(ge=0, lt=2**31)]], Meta(max_length=limits.prompt_tokens_max)
]
