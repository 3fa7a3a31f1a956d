"""The worked example of docs/families.md does what the page says, as it is written there."""

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest

from blyan_node.moe.families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs/families.md"


def _program(name: str) -> ModuleType:
    """The page's program whose first line is `# name`, run."""
    programs = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (text,) = (text for text in programs if text.startswith(f"# {name}\n"))
    module = ModuleType(Path(name).stem)
    exec(compile(ast.parse(text, name), name, "exec"), module.__dict__)
    return module


def test_the_example_is_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = _program("blyan_node/moe/families/dots1.py").FAMILY
    assert family.name not in FAMILIES, "the example is no example any more"
    monkeypatch.setitem(FAMILIES, family.name, family)
    _program("tests/moe/test_dots1.py").test_dots1(tmp_path)
