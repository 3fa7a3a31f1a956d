"""A loop that reads memory and does nothing else: how fast weights could come at best."""

from llvmlite import ir

from blyan_node.moe.kernels import emit
from blyan_node.moe.kernels.emit import I64, POINTER, vector

_STEP_BYTES = 256
_AHEAD_BYTES = 2048
_WORDS = 4  # of 8 bytes in a vector


def read(module: ir.Module) -> ir.Function:
    """`read`: every bit of `length` bytes takes part in the 64 bits at `found`."""
    arguments = (("start", POINTER), ("length", I64), ("found", POINTER))
    b, (start, length, found) = emit.define(module, "read", arguments)
    kind = vector(I64, _WORDS)
    size = 8 * _WORDS
    slots = [emit.slot(b, kind, emit.constant(kind, 0)) for _ in range(_STEP_BYTES // size)]
    with emit.counting(b, length, _STEP_BYTES) as offset:
        here = emit.at(b, start, offset)
        for number, place in enumerate(slots):
            if number % 2 == 0:
                emit.prefetch(b, emit.at(b, here, _AHEAD_BYTES + size * number))
            value = emit.load(b, kind, here, size * number)
            b.store(b.xor(b.load(place, typ=kind), value), place)
    words = [
        b.extract_element(b.load(place, typ=kind), emit.constant(emit.I32, lane))
        for place in slots
        for lane in range(_WORDS)
    ]
    total = words[0]
    for value in words[1:]:
        total = b.xor(total, value)
    emit.store(b, total, found)
    b.ret_void()
    return b.function
