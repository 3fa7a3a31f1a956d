"""Streams an answer from a node.  usage: python generate.py SOCKET MODEL PROMPT [MAX_TOKENS]"""

import json
import socket
import sys

path, model, prompt, *rest = sys.argv[1:]
params = {"model": model, "max_tokens": int(rest[0]) if rest else 100}
# A model without a tokenizer takes token ids: 1,2,3
ids = prompt.replace(",", "").isdigit()
params |= {"prompt_ids": [int(i) for i in prompt.split(",")]} if ids else {"prompt": prompt}
with socket.socket(socket.AF_UNIX) as node:
    node.connect(path)
    request = {"jsonrpc": "2.0", "id": 1, "method": "generate.run", "params": params}
    node.sendall(json.dumps(request).encode() + b"\n")
    for reply in map(json.loads, node.makefile("rb")):
        if reply.get("method") == "generate.token":
            token = reply["params"]
            print(token["text"] if token["text"] is not None else token["token_id"], end=" " * ids)
            sys.stdout.flush()
        elif "error" in reply:
            sys.exit(reply["error"]["message"])
        elif "result" in reply:
            print("\nroot", reply["result"]["root"])
            break
