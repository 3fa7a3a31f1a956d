"""`hf:ORG/NAME[@REVISION]`: a model on the hub, as a person writes it."""

import re
from dataclasses import dataclass
from typing import Self

from protocols.errors import ErrorCode, Refused
from protocols.rpc.fields import HUB

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_FORM = re.compile(rf"{HUB}({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")
MAIN = "main"


@dataclass(frozen=True)
class Reference:
    """A repository and a branch, a tag or a commit of it."""

    repository: str
    revision: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `hf:ORG/NAME[@REVISION]`; raises `Refused` (BAD_INPUT)."""
        match = _FORM.fullmatch(text)
        if match is None or ".." in text or "--" in match[1]:
            raise Refused(
                ErrorCode.BAD_INPUT,
                f"{text[:120]!a} names no model of the hub",
                "the form is hf:ORG/NAME or hf:ORG/NAME@REVISION",
                "For a directory of that name, write ./ before it.",
                {"path": text[:200]},
            )
        return cls(match[1], match[2] or MAIN)

    @property
    def folder(self) -> str:
        """The name of the folder that its files go into, on any revision."""
        return self.repository.replace("/", "--")

    def at(self, commit: str) -> str:
        """The same with the commit that it was resolved to."""
        return f"{HUB}{self.repository}@{commit}"
