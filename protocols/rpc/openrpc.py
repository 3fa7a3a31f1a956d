"""The OpenRPC document (https://spec.open-rpc.org) of the table."""

from typing import Any

import msgspec

from protocols.errors import ErrorCode
from protocols.rpc.table import METHODS, Method, Stream

OPENRPC_VERSION = "1.3.2"


def document(version: str) -> dict[str, Any]:
    """Every method with JSON schemas of its parameters, result, errors and notifications."""
    kinds = [method.request for method in METHODS.values()]
    kinds += [method.result for method in METHODS.values()]
    kinds += [stream.params for stream in streams()]
    schemas, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    count = len(METHODS)
    rows = zip(METHODS.values(), schemas[:count], schemas[count : 2 * count], strict=True)
    return {
        "openrpc": OPENRPC_VERSION,
        "info": {"title": "Blyan node", "version": version},
        "methods": [
            _method(method, components[_name(request)], result) for method, request, result in rows
        ],
        "components": {
            "schemas": components,
            "errors": {code.name: {"code": int(code), "message": code.name} for code in ErrorCode},
        },
        "x-notifications": [
            {"name": stream.name, "params": schema}
            for stream, schema in zip(streams(), schemas[2 * count :], strict=True)
        ],
    }


def streams() -> list[Stream]:
    """Every notification that some method sends, in the table's order."""
    return list({s.name: s for method in METHODS.values() for s in method.streams}.values())


def _name(schema: dict[str, Any]) -> str:
    return str(schema["$ref"]).rsplit("/", 1)[-1]


def _method(method: Method, request: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    required = request.get("required", [])
    return {
        "name": method.name,
        "summary": method.summary,
        "paramStructure": "by-name",
        "params": [
            {"name": name, "required": name in required, "schema": field}
            for name, field in request.get("properties", {}).items()
        ],
        "result": {"name": "result", "schema": result},
        "errors": [{"$ref": f"#/components/errors/{code.name}"} for code in method.errors],
        "x-notifications": [stream.name for stream in method.streams],
    }
