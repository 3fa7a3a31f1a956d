"""The peer that answers are measured beside: `transformers` in a process of its own.

usage: python -m blyan_node.bench.transformers_peer MODEL THREADS DTYPE

Prints "ready", then for each line of input "PROMPT_TOKENS NEW_TOKENS" one line of JSON
(`blyan_node.bench.peers.Rates`).
"""

import sys
import time

import msgspec
import torch
from transformers import AutoModelForCausalLM

from blyan_node.bench.peers import Rates


def main() -> None:
    """Loads the model in the dtype and serves until the input ends."""
    path, threads, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(threads)
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    model.train(False)
    print("ready", flush=True)
    for line in sys.stdin:
        prompt, new = map(int, line.split())
        print(msgspec.json.encode(run(model, prompt, new)).decode(), flush=True)


@torch.inference_mode()
def run(model: torch.nn.Module, prompt: int, new: int) -> Rates:
    """One greedy answer with a KV cache; logits are made of the last position alone."""
    began = time.perf_counter()
    out = model(torch.arange(3, 3 + prompt)[None], use_cache=True, logits_to_keep=1)
    tokens = [int(out.logits[0, -1].argmax())]
    first = time.perf_counter()
    while len(tokens) < new:
        ids = torch.tensor([tokens[-1:]])
        out = model(ids, past_key_values=out.past_key_values, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
    decoding = time.perf_counter() - first
    return Rates(prompt / (first - began), (new - 1) / decoding, tokens)


if __name__ == "__main__":
    main()
