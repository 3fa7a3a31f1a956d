"""Prints what happens on a node, as it happens.  usage: python watch_events.py SOCKET [COUNT]"""

import json
import socket
import sys
import time

path, *rest = sys.argv[1:]
left = int(rest[0]) if rest else -1
with socket.socket(socket.AF_UNIX) as node:
    node.connect(path)
    request = {"jsonrpc": "2.0", "id": 1, "method": "events.subscribe", "params": {}}
    node.sendall(json.dumps(request).encode() + b"\n")
    for reply in map(json.loads, node.makefile("rb")):
        if reply.get("method") == "event":
            event = reply["params"]
            clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
            print(clock, event["event"], json.dumps(event["data"]), flush=True)
            left -= 1
        if left == 0 or "result" in reply or "error" in reply:
            break
