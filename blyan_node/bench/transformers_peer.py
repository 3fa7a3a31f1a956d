"""The peer that decoding is measured beside: `transformers` in a process of its own.

usage: python -m blyan_node.bench.transformers_peer MODEL THREADS

Prints "ready", then for each line of input "PROMPT_TOKENS NEW_TOKENS" the tokens/s of decoding.
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Loads the model in float32 and serves until the input ends."""
    path, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.train(False)
    print("ready", flush=True)
    for line in sys.stdin:
        prompt, new = map(int, line.split())
        print(decode(model, prompt, new), flush=True)


@torch.inference_mode()
def decode(model: torch.nn.Module, prompt: int, new: int) -> float:
    """Tokens/s of greedy decoding with a KV cache, the prompt's pass not counted."""
    ids = torch.arange(3, 3 + prompt)[None]
    out = model(ids, use_cache=True)
    started = time.perf_counter()
    for _ in range(new - 1):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    return (new - 1) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
