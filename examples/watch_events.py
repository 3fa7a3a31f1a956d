"""Prints what happens on a node, as it happens.  usage: python watch_events.py SOCKET"""

import json
import socket
import sys
import time

with socket.socket(socket.AF_UNIX) as node:
    node.connect(sys.argv[1])
    request = {"jsonrpc": "2.0", "id": 1, "method": "events.subscribe", "params": {}}
    node.sendall(json.dumps(request).encode() + b"\n")
    for reply in map(json.loads, node.makefile("rb")):
        if reply.get("method") == "event":
            event = reply["params"]
            clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
            print(clock, event["event"], json.dumps(event["data"]), flush=True)
        else:  # the node stops
            break
