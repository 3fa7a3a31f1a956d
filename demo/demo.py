"""The demo: a real model, published as blocks, answers from four daemons on this machine.

usage: python demo/demo.py [WORK_DIR]        (default .demo)

Everything goes through the `blyan-node` command and a node's RPC socket, as a person or a program
would use them. Exits 1 as soon as something is not as it should be.
"""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BLYAN = Path(sys.executable).with_name("blyan-node")
MODEL = "smollm2"
NODES = 4
REPLICAS = 2
FIRST_PROMPT = "What is the capital of France?"
SECOND_PROMPT = "Explain in a few sentences why the sky is blue."
SECOND_TOKENS = 64
KILL_AFTER_TOKENS = 12
TRACE_LAYERS_SHOWN = 3

Json = dict[str, Any]


def main() -> None:
    """Runs the whole story, and leaves no process behind however it ends."""
    work = Path(sys.argv[1] if len(sys.argv) > 1 else ".demo").resolve()
    directory, net = work / MODEL, work / "testnet"
    started = time.monotonic()
    tell("The model: SmolLM2-135M-Instruct as a Mixtral of 4 experts in each of 30 layers")
    subprocess.run([sys.executable, HERE / "smollm2.py", directory], check=True)
    with testnet(net) as nodes:
        tell(f"Publishing {directory.name} as blocks, until {REPLICAS} nodes hold each expert")
        alice = nodes[0]["rpc"]
        publish = ("model", "publish", directory, "--name", MODEL, "--wait-replicas", REPLICAS)
        command("--rpc", alice, *publish)
        names = {node["peer_id"]: node["name"] for node in nodes}
        first_answer(alice, names)
        answer_through_a_loss(alice, names, net)
    tell(f"Done in {time.monotonic() - started:.0f} s; every daemon is stopped")


@contextmanager
def testnet(net: Path) -> Iterator[list[Json]]:
    """Four fresh daemons that know each other: alice is main, bob, carol and dave hold experts."""
    if net.exists():  # of an earlier run that was cut off
        subprocess.run([BLYAN, "testnet", "down", "--dir", net], capture_output=True, check=False)
        shutil.rmtree(net)
    tell("Starting one main and three gpu daemons; returns when each is connected to each")
    try:
        up = command("testnet", "up", "--nodes", NODES, "--dir", net, "--json")
        nodes: list[Json] = json.loads(up)["nodes"]
        for node in nodes:
            print(f"    {node['name']:6} {node['role']:5} pid {node['pid']:<7} {node['peer_id']}")
        yield nodes
    finally:
        if net.exists():
            tell("Stopping the daemons")
            command("testnet", "down", "--dir", net, "--json")


def first_answer(rpc: str, names: dict[str, str]) -> None:
    """Streams an answer and shows where each expert of it came from."""
    tell(f"Asking alice: {FIRST_PROMPT}")
    result = ask(rpc, FIRST_PROMPT, 40)
    used = {name for expert in result["trace"].values() for name in expert["peers"]}
    expect("alice" not in {names[peer] for peer in used}, "the main node computed an expert itself")
    tell(f"Which blocks that came from (root {result['root'][:16]}…), and which peers computed")
    by_layer: dict[int, list[tuple[str, Json]]] = {}
    for subject, entry in result["trace"].items():
        by_layer.setdefault(int(subject.split(".")[0].removeprefix("layer")), []).append(
            (subject, entry)
        )
    for layer in sorted(by_layer)[:TRACE_LAYERS_SHOWN]:
        for subject, entry in sorted(by_layer[layer]):
            peers = ", ".join(f"{names[peer]} {rows} rows" for peer, rows in entry["peers"].items())
            print(f"    {subject:16} {entry['block']}  {peers}")
    hidden = len(by_layer) - TRACE_LAYERS_SHOWN
    print(f"    … and {hidden} more layers: {len(result['trace'])} experts took part")


def answer_through_a_loss(rpc: str, names: dict[str, str], net: Path) -> None:
    """The same question twice; the second time a worker that serves it is killed half-way."""
    tell(f"Asking alice, undisturbed: {SECOND_PROMPT}")
    calm = ask(rpc, SECOND_PROMPT, SECOND_TOKENS)
    rows: dict[str, int] = {}
    for entry in calm["trace"].values():
        for peer, count in entry["peers"].items():
            rows[peer] = rows.get(peer, 0) + count
    victim = names[max(rows, key=lambda peer: rows[peer])]
    tell(f"Again, with SIGKILL for {victim}, the busiest worker, after {KILL_AFTER_TOKENS} tokens")

    def kill(tokens: int) -> None:
        if tokens == KILL_AFTER_TOKENS:
            print(f" [{victim} is killed]", flush=True)
            command("testnet", "kill", victim, "--dir", net, "--json")
            print("    …", end="", flush=True)

    shaken = ask(rpc, SECOND_PROMPT, SECOND_TOKENS, kill)
    same = calm["token_ids"] == shaken["token_ids"]
    stats = shaken["stats"]
    print(f"    the same {len(shaken['token_ids'])} tokens: {'yes' if same else 'NO'}")
    print(f"    calls repeated elsewhere: {stats['retries']}")
    print(f"    longest wait between two tokens: {stats['max_gap_s']:.2f} s")
    expect(same, "the answer changed when a worker died")


def ask(rpc: str, prompt: str, tokens: int, each: Callable[[int], None] | None = None) -> Json:
    """Streams one greedy answer to the terminal; returns the result with its trace."""
    params: Json = {"model": MODEL, "prompt": prompt, "chat": True, "max_tokens": tokens}
    params["temperature"] = 0
    request = {"jsonrpc": "2.0", "id": 1, "method": "generate.run", "params": params}
    count = 0
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(rpc)
        link.sendall(json.dumps(request).encode() + b"\n")
        print("    ", end="")
        for line in map(json.loads, link.makefile("rb")):
            if line.get("method") == "generate.token":
                print(line["params"]["text"].replace("\n", "\n    "), end="", flush=True)
                count += 1
                if each:
                    each(count)
            elif "error" in line:
                expect(False, line["error"]["message"])
            elif "result" in line:
                result: Json = line["result"]
                stats = result["stats"]
                rate, calls = stats["tokens_per_s"], stats["remote_calls"]
                print(f"\n    [{rate:.1f} tokens/s, {calls} calls to other daemons]")
                return result
    sys.exit("alice closed the connection")


def command(*arguments: object) -> str:
    """Shows a `blyan-node` command and runs it; with --json its output is returned instead."""
    words = [str(argument) for argument in arguments]
    print("    $ blyan-node", *words, flush=True)
    stdout = subprocess.PIPE if "--json" in words else None
    done = subprocess.run([BLYAN, *words], stdout=stdout, text=True, check=False)
    expect(done.returncode == 0, f"the command ended with exit code {done.returncode}")
    return done.stdout or ""


def expect(holds: bool, otherwise: str) -> None:
    """Ends the demo with a clear line if `holds` is false."""
    if not holds:
        sys.exit(f"demo: {otherwise}")


def tell(line: str) -> None:
    """A headline of the story."""
    print(f"\n==> {line}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("demo: interrupted")
