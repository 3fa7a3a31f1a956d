"""The table is whole, and what is made from it is current."""

from pathlib import Path

import msgspec
import pytest

from protocols.rpc import openrpc, reference
from protocols.rpc.fields import Request
from protocols.rpc.table import METHODS, Method

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("row", METHODS.values(), ids=METHODS)
def test_a_method_is_area_and_verb_with_a_strict_request(row: Method) -> None:
    area, _, verb = row.name.partition(".")
    assert area.isidentifier() and verb.isidentifier()
    assert issubclass(row.request, Request)
    assert row.request.__struct_config__.forbid_unknown_fields
    assert row.summary and not row.summary.endswith(".")


def test_every_request_and_result_type_has_a_name_of_its_own() -> None:
    kinds = {method.request for method in METHODS.values()}
    assert len({kind.__name__ for kind in kinds}) == len(kinds) == len(METHODS)


def test_the_openrpc_document_describes_every_method() -> None:
    document = openrpc.document("1.2.3")
    assert document["info"]["version"] == "1.2.3"
    assert [method["name"] for method in document["methods"]] == list(METHODS)
    assert {n["name"] for n in document["x-notifications"]} == {
        "progress",
        "generate.token",
        "event",
    }
    msgspec.json.encode(document)


def test_every_reference_in_the_openrpc_document_leads_somewhere() -> None:
    document = openrpc.document("1")

    def look(value: object) -> None:
        if isinstance(value, dict):
            if "$ref" in value:
                found: object = document
                for step in value["$ref"].removeprefix("#/").split("/"):
                    assert isinstance(found, dict)
                    found = found[step]
            for inner in value.values():
                look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)

    look(document)


def test_required_parameters_are_marked() -> None:
    methods = {method["name"]: method for method in openrpc.document("1")["methods"]}
    params = {p["name"]: p["required"] for p in methods["model.update"]["params"]}
    assert params == {"model": True, "subject": True, "weights": True, "base": False}


def test_the_reference_page_is_current() -> None:
    page = (ROOT / "docs" / "rpc.md").read_text()
    assert page == reference.page(), "docs/rpc.md is old; protocols/rpc/reference.py says how"


def test_the_reference_page_names_every_method() -> None:
    page = reference.page()
    for name in METHODS:
        assert f"### {name}\n" in page
