"""`docs/rpc.md`, made from the table.

To bring the page up to date:

    python -c "from protocols.rpc.reference import page; print(page(), end='')" > docs/rpc.md
"""

from typing import Any

from protocols import limits
from protocols.errors import ErrorCode
from protocols.rpc import openrpc
from protocols.rpc.table import METHODS, Method

_HEAD = """\
# The RPC

<!-- Made from protocols/rpc/table.py; a test checks that it is current. -->

JSON-RPC 2.0 as newline-delimited JSON over a unix socket (`HOME/rpc.sock`, mode 0600 in a folder
of 0700), for processes of the node's own user. Parameters are named, batches are answered as one
array, ids are integers or strings. `blyan-node rpc METHOD '{{"name": value}}'` calls any method,
and `blyan-node rpc rpc.discover` returns this page's content as an OpenRPC document.

A method that *sends* something does so while it runs, as notifications whose `params` carry the
request's `id`. `rpc.cancel` with that id ends a request early: `generate.run` then answers with
what it has (`"finish": "cancelled"`), other methods with the error `CANCELLED`.

A client that lets too much wait unread is cut off; one that leaves ends its requests. One line
holds at most {line} MiB, a batch {batch} requests, and a connection {in_flight} unanswered
requests.

An error is `{{"code", "message", "data"}}`: the message says what happened and why, `data` has
`why`, `next` (what to do) and names what it is about (`model`, `block`, `subject`, `head`, `path`).
"""


def page() -> str:
    """The whole page."""
    head = _HEAD.format(
        line=limits.rpc_line_bytes_max // limits.MIB,
        batch=limits.rpc_batch_max,
        in_flight=limits.rpc_in_flight_max,
    )
    document = openrpc.document("")
    schemas = document["components"]["schemas"]
    parts = [head, "## Methods\n", *_contents()]
    for described in document["methods"]:
        parts.append(_method(METHODS[described["name"]], described, schemas))
    parts += ["## Notifications\n", *(_notification(n, schemas) for n in _notifications(document))]
    parts += ["## Objects\n", *(_object(name, schemas) for name in _shared_objects(document))]
    parts += ["## Errors\n", _errors()]
    return "\n".join(parts)


def _contents() -> list[str]:
    rows = [f"| [`{m.name}`](#{_anchor(m.name)}) | {m.summary} |" for m in METHODS.values()]
    return ["\n".join(["| method | does |", "| --- | --- |", *rows]) + "\n"]


def _anchor(name: str) -> str:
    return name.replace(".", "").lower()


def _method(method: Method, described: dict[str, Any], schemas: dict[str, Any]) -> str:
    lines = [f"### {method.name}\n", f"{method.summary}.\n"]
    note = _text(schemas[method.request.__name__])
    if note != "No parameters.":
        lines.append(f"{note}\n")
    if described["params"]:
        lines += ["| parameter | type | |", "| --- | --- | --- |"]
        lines += [_parameter(param) for param in described["params"]]
        lines.append("")
    result = described["result"]["schema"]
    if "$ref" in result:
        name = _name(result)
        lines.append(f"Answers `{name}`: {_text(schemas[name])}\n")
        lines += _fields(schemas[name])
    else:
        lines.append("Answers an OpenRPC document.\n")
    if method.streams:
        lines.append(f"Sends {', '.join(f'`{stream.name}`' for stream in method.streams)}.\n")
    if method.errors:
        lines.append(f"Errors: {', '.join(code.name for code in method.errors)}.\n")
    return "\n".join(lines)


def _parameter(param: dict[str, Any]) -> str:
    schema = param["schema"]
    about = [_text(schema)] if _text(schema) else []
    default = schema.get("default")
    if not param["required"] and default not in (None, ()):
        about.append(f"default `{str(default).lower() if isinstance(default, bool) else default}`")
    need = "" if param["required"] else ", optional"
    return f"| `{param['name']}` | {_type(schema)}{need} | {'; '.join(about)} |"


def _fields(schema: dict[str, Any]) -> list[str]:
    lines = ["| field | type |", "| --- | --- |"]
    lines += [f"| `{name}` | {_type(field)} |" for name, field in schema["properties"].items()]
    return [*lines, ""]


def _notifications(document: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = document["x-notifications"]
    return found


def _notification(described: dict[str, Any], schemas: dict[str, Any]) -> str:
    schema = schemas[_name(described["params"])]
    lines = [f"### {described['name']}\n", f"{_text(schema)} Its `params` have the `id` too.\n"]
    return "\n".join([*lines, *_fields(schema)])


def _shared_objects(document: dict[str, Any]) -> list[str]:
    """The objects inside results, in order of their names."""
    known = {method.request.__name__ for method in METHODS.values()}
    known |= {_name(m["result"]["schema"]) for m in document["methods"]}
    known |= {_name(n["params"]) for n in document["x-notifications"]}
    return sorted(set(document["components"]["schemas"]) - known)


def _object(name: str, schemas: dict[str, Any]) -> str:
    return "\n".join([f"### {name}\n", f"{_text(schemas[name])}\n", *_fields(schemas[name])])


def _errors() -> str:
    rows = [f"| {int(code)} | {code.name} |" for code in ErrorCode]
    return "\n".join(["| code | name |", "| --- | --- |", *rows]) + "\n"


def _name(schema: dict[str, Any]) -> str:
    return str(schema.get("$ref", "")).rsplit("/", 1)[-1]


def _text(schema: dict[str, Any]) -> str:
    if "description" in schema:
        return " ".join(str(schema["description"]).split())
    return next((text for part in schema.get("anyOf", ()) if (text := _text(part))), "")


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return f"[{_name(schema)}](#{_name(schema).lower()})"
    if "enum" in schema:
        return " or ".join(f'"{value}"' for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if schema.get("type") == "array":
        return f"array of {_type(schema['items'])}"
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        return f"object of {_type(inner)}" if inner else "object"
    return str(schema.get("type", "any"))
