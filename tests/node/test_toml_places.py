"""Where keys and values stand in a TOML text."""

import random
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.toml_places import Entry, Place, entries_of, place_of

TEXT = """\
# a comment with = and [ in it
role = "gpu"   # more
  listen = [
    "/ip4/127.0.0.1/tcp/0",  # "not an item"
    '/ip6/::1/tcp/4040',
  ]
"quoted key" = 1
a.b = 2
'x' = \"\"\"two
lines = "3\"\"\"
when = 1979-05-27 07:32:00
nested = [[1, 2], {c = [3]}]
inline = { d = "}" }
[table]
inside = 1
[[tables]]
"""


def test_every_entry_has_its_place() -> None:
    found = {entry.key: entry for entry in entries_of(TEXT)}
    assert list(found) == [
        "role", "listen", "quoted key", "a", "x", "when", "nested", "inline", "table", "tables",
    ]  # fmt: skip
    assert found["role"] == Entry("role", Place(2, 1), Place(2, 8), (), '"gpu"')
    assert found["listen"].at == Place(3, 3)
    assert found["listen"].items == (Place(4, 5), Place(5, 5))
    assert found["quoted key"].value == Place(7, 16)
    assert found["a"].value == Place(8, 7)
    assert found["x"].text == '"""two\nlines = "3"""'
    assert found["when"].text == "1979-05-27 07:32:00"
    assert found["nested"].items == (Place(12, 11), Place(12, 19))
    assert found["table"].at == Place(14, 1)


def test_windows_line_ends_and_wide_characters_count_as_one() -> None:
    first, second = entries_of('a = "äß€"\r\nb = ["€", 2]\r\n')
    assert (first.value, second.at) == (Place(1, 5), Place(2, 1))
    assert second.items == (Place(2, 6), Place(2, 11))


@pytest.mark.parametrize(("offset", "place"), [(0, (1, 1)), (1, (1, 2)), (2, (2, 1)), (4, (2, 3))])
def test_the_place_of_an_offset(offset: int, place: tuple[int, int]) -> None:
    assert place_of("a\nbcd", offset) == place


_VALUES = st.one_of(
    st.integers(-(2**60), 2**60).map(str),
    st.text(st.characters(exclude_categories=["C"], exclude_characters="\"\\'")).map(
        lambda text: f'"{text}"'
    ),
    st.just("'\\'"),
    st.just('"\\""'),
    st.just("'''it's ]\n# [ '''"),
    st.just('"""a "quoted" \\""""'),
    st.booleans().map(lambda value: str(value).lower()),
)
_ARRAYS = st.lists(_VALUES, max_size=4)


@given(st.lists(st.one_of(_VALUES, _ARRAYS), max_size=6), st.sampled_from([" ", "  # ] '\n\t"]))
def test_places_are_where_tomllib_finds_the_values(values: list[str | list[str]], gap: str) -> None:
    lines = []
    for number, value in enumerate(values):
        if isinstance(value, list):
            lines.append(f"k{number} = [{gap}{f',{gap}'.join(value)}{gap}]")
        else:
            lines.append(f"k{number}\t=  {value} # k = 1")
    text = "\n".join(lines) + "\n"
    read = tomllib.loads(text)
    entries = entries_of(text)
    assert [entry.key for entry in entries] == list(read)
    rows = text.split("\n")
    for entry, value in zip(entries, values, strict=True):
        assert tomllib.loads(f"k = {entry.text}")["k"] == read[entry.key]
        items = value if isinstance(value, list) else [value]
        places = entry.items if isinstance(value, list) else [entry.value]
        assert len(places) == len(items)
        for place, item in zip(places, items, strict=True):
            assert rows[place.line - 1][place.column - 1 :].startswith(item.split("\n")[0])


def test_10_000_broken_texts_are_read_without_an_error() -> None:
    rng = random.Random(5)
    signs = ["[", "]", "{", "}", '"', '"""', "'''", "=", ".", "\\", "\n", "#", ",", "a", "é", " "]
    for _ in range(10_000):
        text = "".join(rng.choices([*signs, TEXT[: rng.randrange(60)]], k=rng.randrange(40)))
        lines = text.replace("\r\n", "\n").split("\n")
        for entry in entries_of(text):
            for place in (entry.at, entry.value, *entry.items):
                assert 1 <= place.line <= len(lines)
                assert 1 <= place.column <= len(lines[place.line - 1]) + 1
