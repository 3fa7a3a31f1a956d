"""`prefill`: tokens/s of the pass over a prompt on one thread, beside peers in that precision."""

from collections.abc import Callable, Iterator

from blyan_node.bench.decoding import FLOAT32, SIXTEEN, Case, loaded
from blyan_node.bench.nets import prefill_rate
from blyan_node.bench.rows import Row, alternate, row

RUNS = 5
PROMPT_TOKENS = 256


def measure() -> Iterator[Row]:
    """One row for float32 and one for bfloat16."""
    yield _measure(FLOAT32, "float32")
    yield _measure(SIXTEEN, "bfloat16")


def _measure(case: Case, dtype: str) -> Row:
    with loaded(case, dtype) as (net, beside, _):
        measures: dict[str, Callable[[], float]] = {
            "ours": lambda: prefill_rate(net, PROMPT_TOKENS)
        }
        for name, peer in beside.items():
            if peer is not None:
                measures[name] = lambda peer=peer: peer.run(PROMPT_TOKENS, 1).prefill  # type: ignore[misc]
        medians = alternate(RUNS, **measures)
    first = f"transformers {dtype}"
    return row(
        f"prefill {dtype}",
        "tokens/s",
        medians["ours"],
        beside={name: medians.get(name) for name in (first, *beside)},
        goal=">= 1.0 times the first",
        runs=RUNS,
    )
