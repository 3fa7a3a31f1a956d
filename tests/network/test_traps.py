"""Each trap of the library that `docs/protocols/libp2p.md` names has the tests that it names."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tests_of_the_traps_exist() -> None:
    page = (ROOT / "docs/protocols/libp2p.md").read_text()
    here = "".join(path.read_text() for path in (ROOT / "tests/network").glob("test_*.py"))
    named = re.findall(r"`(?:(tests/[\w/]+\.py)(?:::)?)?(test_\w+)?`", page)
    named = [(path, name) for path, name in named if path or name]
    assert len(named) > 35
    for path, name in named:
        text = (ROOT / path).read_text() if path else here
        assert not name or f"def {name}(" in text, name
