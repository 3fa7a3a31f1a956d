"""One order for everybody: parents first, and among those that are ready the smallest id first.

Each store numbers blocks in its own order of acceptance. What people are shown is this order: it
depends on the set of blocks alone, so two nodes with the same blocks show the same.
"""

import heapq
from collections.abc import Iterable, Mapping

from protocols.dag.header import Block, Kind
from protocols.ids import BlockId, Subject, cid_text

_COLOURS = {
    Kind.MODEL: "gold",
    Kind.RELEASE: "lightskyblue",
    Kind.TRUNK: "gray90",
    Kind.ROUTER: "palegreen",
    Kind.EXPERT: "white",
}


def topological(blocks: Iterable[Block]) -> list[BlockId]:
    """The ids of `blocks`, parents first (Kahn), the smallest id first among the ready ones.

    Parents that are not in `blocks` do not count. A cycle cannot be: an id covers its parents.
    """
    known = {block.id: block for block in blocks}
    waiting = {id: 0 for id in known}
    children: dict[BlockId, list[BlockId]] = {}
    for id, block in known.items():
        for parent in block.header.depends_on:
            if parent in known:
                waiting[id] += 1
                children.setdefault(parent, []).append(id)
    ready = [id for id, count in waiting.items() if not count]
    heapq.heapify(ready)
    order: list[BlockId] = []
    while ready:
        id = heapq.heappop(ready)
        order.append(id)
        for child in children.get(id, ()):
            waiting[child] -= 1
            if not waiting[child]:
                heapq.heappush(ready, child)
    assert len(order) == len(known), "a cycle among content-addressed blocks"
    return order


def graphviz(
    blocks: Iterable[Block], heads: Mapping[BlockId, Mapping[Subject, BlockId]] | None = None
) -> str:
    """The DAG as a Graphviz document; current heads have a thick border, bases dashed edges."""
    known = {block.id: block for block in blocks}
    current = {id for subjects in (heads or {}).values() for id in subjects.values()}
    lines = ["digraph blyan {", "  rankdir=RL;", "  node [shape=box, style=filled];"]
    for id in topological(known.values()):
        header = known[id].header
        width = 3 if id in current else 1
        label = _quote(f"{_title(known[id])}\\n{_short(id)}")
        lines.append(
            f"  {_name(id)} [label={label}, fillcolor={_COLOURS[header.kind]}, penwidth={width}];"
        )
        for parent in header.depends_on:
            style = " [style=dashed]" if parent == header.base else ""
            lines.append(f"  {_name(id)} -> {_name(parent)}{style};")
    return "\n".join([*lines, "}"]) + "\n"


def _title(block: Block) -> str:
    header = block.header
    if header.kind is Kind.MODEL:
        return str(header.meta.get("name", "model"))
    return header.subject or str(header.kind)


def _short(id: BlockId) -> str:
    return "…" + cid_text(id)[-10:]


def _name(id: BlockId) -> str:
    return f'"{cid_text(id)}"'


def _quote(text: str) -> str:
    return '"' + text.replace('"', "'") + '"'
