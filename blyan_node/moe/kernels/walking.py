"""The steps of one token: what differs from token to token they read from memory.

A token's steps are recorded once for a whole model (`program.Program`). Its position, its angles,
the session's cache and the experts that are at hand are in a structure that the steps are told the
address of, so that a token is one call of `walk`.
"""

from llvmlite import ir

from blyan_node.moe.kernels import emit, sequence
from blyan_node.moe.kernels.attention import FIELDS as TASK
from blyan_node.moe.kernels.emit import FLOAT, I64, POINTER
from blyan_node.moe.kernels.epilogues import elements
from blyan_node.moe.kernels.exponential import at_least, at_most
from blyan_node.moe.kernels.targets import Target

# The fields of that structure, each of 8 bytes. `cos` and `sin` are addresses of the angles of
# `position`; `cache` of the slots, `scores` of room for a score of each query head and position and
# one more, `held` of the places of the experts. A step that cannot be made sets `stopped`;
# `reached` is its number then.
NOW = ("position", "cos", "sin", "cache", "scores", "held", "stopped", "reached")
_ADDRESSES = {"cos", "sin", "cache", "scores", "held"}

# A slot is one buffer of a layer's cache: the address of its first position and the bytes from a
# head to the next. A place belongs to an expert: the address of its recording or 0, and how many
# rows it has computed.
PAIR_BYTES = 16

# The fields of an expert's recording: where its row goes and how many float32 it has, where the
# result will be, its steps and their number.
RECORDED = ("operand", "width", "result", "steps", "count")


def field(b: ir.IRBuilder, now: ir.Value, name: str) -> ir.Value:
    """One field: an address or a number."""
    return emit.load(b, POINTER if name in _ADDRESSES else I64, now, 8 * NOW.index(name))


def all_steps(module: ir.Module, target: Target) -> list[ir.Function]:
    """The functions of this file; those that they call are there already."""
    return [
        walk(module),
        _turn(module, "halves"),
        _turn(module, "pairs"),
        _keep(module, target),
        _look(module),
        _experts(module, target),
        _copy(module, target),
        _clip(module, target),
    ]


def walk(module: ir.Module) -> ir.Function:
    """Makes the steps from `first` to `last`, up to one that cannot be made."""
    places = (("now", POINTER), ("steps", POINTER), ("first", I64), ("last", I64))
    b, (now, steps, first, last) = emit.define(module, "walk", places)
    with emit.counting(b, last, 1, first) as number:
        sequence.make(b, steps, number)
        stopped = b.icmp_unsigned("!=", field(b, now, "stopped"), emit.word(0))
        with b.if_then(stopped, likely=False):
            emit.store(b, number, now, 8 * NOW.index("reached"))
            b.ret_void()
    b.ret_void()
    return b.function


def _turn(module: ir.Module, pairs: str) -> ir.Function:
    """Rotary embedding of the heads of one row by the position's angles (`rotate_PAIRS`)."""
    places = (
        ("now", POINTER), ("out", POINTER), ("x", POINTER), ("count", I64),
        ("heads", I64), ("out_head_stride", I64), ("x_head_stride", I64),
    )  # fmt: skip
    b, (now, out, x, count, *heads) = emit.define(module, f"turn_{pairs}", places)
    zero = emit.word(0)
    cos, sin = field(b, now, "cos"), field(b, now, "sin")
    rows = [out, zero, x, zero, emit.word(1), count]
    b.call(module.globals[f"rotate_{pairs}"], [*rows, cos, sin, zero, *heads])
    b.ret_void()
    return b.function


def _keep(module: ir.Module, target: Target) -> ir.Function:
    """Copies a row's heads, `width` values each, to its position in a slot of the cache.

    A position has `position_stride` bytes, of which the first `offset` are left as they are.
    """
    places = (
        ("now", POINTER), ("slot", I64), ("position_stride", I64), ("offset", I64),
        ("x", POINTER), ("x_head_stride", I64), ("width", I64), ("heads", I64),
    )  # fmt: skip
    b, (now, slot, stride, offset, x, x_stride, width, heads) = emit.define(module, "keep", places)
    first, head_stride = _slot(b, now, slot)
    position = b.mul(field(b, now, "position"), stride)
    place = emit.at(b, first, b.add(position, offset))
    with emit.counting(b, heads) as head:
        from_, to = (
            emit.at(b, x, b.mul(head, x_stride)),
            emit.at(b, place, b.mul(head, head_stride)),
        )
        copy(b, from_, to, width, target.lanes)
    b.ret_void()
    return b.function


def _slot(b: ir.IRBuilder, now: ir.Value, slot: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The address of a slot's first position, and the bytes from a head to the next."""
    place = emit.at(b, field(b, now, "cache"), b.mul(slot, emit.word(PAIR_BYTES)))
    return emit.load(b, POINTER, place), emit.load(b, I64, place, 8)


def _look(module: ir.Module) -> ir.Function:
    """Attention of one row: `attend` for a task, of which it fills in what has changed."""
    places = (("now", POINTER), ("task", POINTER), ("keys", I64), ("values", I64), ("parts", I64))
    b, (now, task, keys, values, parts) = emit.define(module, "look", places)
    fields = {"scores": field(b, now, "scores")}
    fields["seen"] = b.add(field(b, now, "position"), emit.word(1))
    for name, slot in (("keys", keys), ("values", values)):
        fields[name], fields[f"{name}_head_stride"] = _slot(b, now, slot)
    for name, value in fields.items():
        emit.store(b, value, task, 8 * TASK.index(name))
    b.call(module.globals["attend"], [task, emit.word(0), parts])
    b.ret_void()
    return b.function


def _experts(module: ir.Module, target: Target) -> ir.Function:
    """The results of the chosen experts for a row, one after another in `out`.

    `first` is the number of the place of the layer's expert 0. If one of them is not at hand
    nothing is computed and `stopped` is set.
    """
    places = (
        ("now", POINTER), ("first", I64), ("chosen", POINTER), ("ranks", I64),
        ("x", POINTER), ("out", POINTER),
    )  # fmt: skip
    b, (now, first, chosen, ranks, x, out) = emit.define(module, "experts", places)
    held = field(b, now, "held")

    def place_of(rank: ir.Value) -> ir.Value:
        number = b.add(first, emit.load(b, I64, chosen, b.shl(rank, emit.word(3))))
        return emit.at(b, held, b.mul(number, emit.word(PAIR_BYTES)))

    with emit.counting(b, ranks) as rank:
        missing = b.icmp_unsigned("==", emit.load(b, I64, place_of(rank)), emit.word(0))
        with b.if_then(missing, likely=False):
            emit.store(b, emit.word(1), now, 8 * NOW.index("stopped"))
            b.ret_void()
    with emit.counting(b, ranks) as rank:
        place = place_of(rank)
        recorded = emit.load(b, POINTER, place)
        operand, width, result, steps, count = (
            emit.load(b, I64 if name in ("width", "count") else POINTER, recorded, 8 * number)
            for number, name in enumerate(RECORDED)
        )
        copy(b, x, operand, width, target.lanes)
        b.call(module.globals["run"], [steps, count])
        here = emit.at(b, out, b.shl(b.mul(rank, width), emit.word(2)))
        copy(b, result, here, width, target.lanes)
        used = emit.load(b, I64, place, 8)
        emit.store(b, b.add(used, emit.word(1)), place, 8)
    b.ret_void()
    return b.function


def copy(b: ir.IRBuilder, from_: ir.Value, to: ir.Value, count: ir.Value, lanes: int) -> None:
    """Copies `count` float32 bit for bit."""

    def body(size: int, index: ir.Value) -> None:
        offset = b.shl(index, emit.word(2))
        emit.store(b, emit.load(b, emit.vector(FLOAT, size), from_, offset), to, offset)

    elements(b, count, lanes, body)


def _copy(module: ir.Module, target: Target) -> ir.Function:
    """out = x, `count` values."""
    places = (("out", POINTER), ("x", POINTER), ("count", I64))
    b, (out, x, count) = emit.define(module, "copy", places)
    copy(b, x, out, count, target.lanes)
    b.ret_void()
    return b.function


def _clip(module: ir.Module, target: Target) -> ir.Function:
    """x = x within ± bound, `count` values; NaN stays."""
    places = (("x", POINTER), ("count", I64), ("bound", FLOAT))
    b, (x, count, bound) = emit.define(module, "clip", places)

    def body(size: int, index: ir.Value) -> None:
        offset, limit = b.shl(index, emit.word(2)), emit.broadcast(b, bound, size)
        value = emit.load(b, emit.vector(FLOAT, size), x, offset)
        emit.store(b, at_most(b, at_least(b, value, b.fneg(limit)), limit), x, offset)

    elements(b, count, target.lanes, body)
    b.ret_void()
    return b.function
