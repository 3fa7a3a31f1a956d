"""Replaces one part of a model by the tensors of a safetensors file, if nobody else has meanwhile.

usage: python publish_update.py SOCKET MODEL SUBJECT FILE.safetensors
"""

import json
import os
import socket
import sys
from typing import Any

path, model, subject, weights = sys.argv[1:]
with socket.socket(socket.AF_UNIX) as node, node.makefile("rb") as replies:
    node.connect(path)

    def call(method: str, **params: object) -> Any:
        """One request and its result."""
        request = {"jsonrpc": "2.0", "id": method, "method": method, "params": params}
        node.sendall(json.dumps(request).encode() + b"\n")
        reply = next(r for r in map(json.loads, replies) if r.get("id") == method)
        return reply["result"] if "result" in reply else sys.exit(reply["error"]["message"])

    base = call("model.show", model=model)["subjects"][subject]["block"]
    file = os.path.abspath(weights)
    done = call("model.update", model=model, subject=subject, weights=file, base=base)
    print(f"{subject}: {base} -> {done['block']}")
    print("root", done["root"])
