"""From the logits of one row to its experts and their weights, as `blyan_node.moe.routing` does it.

Values are compared as whole numbers of the same order, in which a NaN is above everything and both
zeros are one, as torch sorts; of equal ones the smaller number wins.
"""

from collections.abc import Callable

from llvmlite import ir

from blyan_node.moe.kernels import emit
from blyan_node.moe.kernels.emit import FLOAT, I32, I64, POINTER, constant

_TAKEN, _NAN = -(1 << 31), (1 << 31) - 1  # below and above every number
_LEAST = 1e-20  # keeps the division of weights that are all 0 defined

# `scores` is room for a float32 of each expert, `keys` for 4 bytes of each expert and group.
_PLACES = (
    ("logits", POINTER), ("count", I64), ("ranks", I64), ("experts", POINTER),
    ("weights", POINTER), ("scores", POINTER), ("keys", POINTER),
)  # fmt: skip


def all_choices(module: ir.Module) -> list[ir.Function]:
    """The functions of this file; those that they call are there already."""
    return [
        _softmax(module, "route_softmax", renormalise=False),
        _softmax(module, "route_softmax_renormalised", renormalise=True),
        _chosen(module),
        _sigmoid(module, "route_sigmoid", renormalise=False),
        _sigmoid(module, "route_sigmoid_renormalised", renormalise=True),
    ]


def _softmax(module: ir.Module, name: str, *, renormalise: bool) -> ir.Function:
    """The best logits; the weights are their shares of all experts, or of the chosen."""
    b, places = emit.define(module, name, _PLACES)
    logits, count, ranks, experts, weights, scores, keys = places
    _keys(b, keys, count, lambda index: _at(b, logits, index))
    _best(b, keys, count, ranks, experts)
    _call_row(b, "softmax", scores, logits, count)
    _gather(b, scores, experts, ranks, weights)
    if renormalise:
        _divide(b, weights, ranks, _total(b, weights, ranks))
    b.ret_void()
    return b.function


def _chosen(module: ir.Module) -> ir.Function:
    """The best logits and the softmax of these."""
    b, places = emit.define(module, "route_softmax_chosen", _PLACES)
    logits, count, ranks, experts, weights, _, keys = places
    _keys(b, keys, count, lambda index: _at(b, logits, index))
    _best(b, keys, count, ranks, experts)
    _gather(b, logits, experts, ranks, weights)
    _call_row(b, "softmax", weights, weights, ranks)
    b.ret_void()
    return b.function


def _sigmoid(module: ir.Module, name: str, *, renormalise: bool) -> ir.Function:
    """The best sigmoids with their `correction` (or 0), in the best groups; times `scaling`."""
    extra = (("correction", POINTER), ("groups", I64), ("groups_chosen", I64), ("scaling", FLOAT))
    b, places = emit.define(module, name, (*_PLACES, *extra))
    logits, count, ranks, experts, weights, scores, keys = places[:7]
    correction, groups, groups_chosen, scaling = places[7:]
    corrected = b.icmp_unsigned("!=", b.ptrtoint(correction, I64), emit.word(0))

    def value(index: ir.Value) -> ir.Value:
        """What an expert is chosen by."""
        score = _at(b, scores, index)
        found = emit.slot(b, FLOAT)
        b.store(score, found)
        with b.if_then(corrected):
            b.store(b.fadd(score, _at(b, correction, index)), found)
        return b.load(found, typ=FLOAT)

    _call_row(b, "sigmoid", scores, logits, count)
    _keys(b, keys, count, value)
    with b.if_then(b.icmp_signed(">", groups, emit.word(1))):
        size = b.sdiv(count, groups)
        group_keys = emit.at(b, keys, b.shl(count, emit.word(2)))
        with emit.counting(b, groups) as group:
            first = b.mul(group, size)
            mine = emit.at(b, keys, b.shl(first, emit.word(2)))
            one, two = (b.add(first, place) for place in _two_greatest(b, mine, size))
            _put(b, _key(b, b.fadd(value(one), value(two))), group_keys, group)
        with emit.counting(b, groups_chosen):
            _take(b, group_keys, groups)
        with emit.counting(b, groups) as group:
            kept = b.icmp_signed("==", _at(b, group_keys, group, I32), constant(I32, _TAKEN))
            with b.if_then(b.not_(kept)):
                first = b.mul(group, size)
                nothing = _key(b, constant(FLOAT, float("-inf")))
                with emit.counting(b, b.add(first, size), 1, first) as index:
                    _put(b, nothing, keys, index)
    _best(b, keys, count, ranks, experts)
    _gather(b, scores, experts, ranks, weights)
    if renormalise:
        total = b.fadd(_total(b, weights, ranks), constant(FLOAT, _LEAST))
        _divide(b, weights, ranks, total)
    with emit.counting(b, ranks) as rank:
        _put(b, b.fmul(_at(b, weights, rank), scaling), weights, rank)
    b.ret_void()
    return b.function


def _at(b: ir.IRBuilder, row: ir.Value, index: ir.Value, kind: ir.Type = FLOAT) -> ir.Value:
    return emit.load(b, kind, row, b.shl(index, emit.word(2)))


def _put(b: ir.IRBuilder, value: ir.Value, row: ir.Value, index: ir.Value) -> None:
    emit.store(b, value, row, b.shl(index, emit.word(2)))


def _call_row(b: ir.IRBuilder, name: str, out: ir.Value, x: ir.Value, count: ir.Value) -> None:
    """An epilogue of one row."""
    zero = emit.word(0)
    b.call(b.module.globals[name], [out, zero, x, zero, emit.word(1), count])


def _key(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The whole number that stands for a value where values are compared."""
    bits = b.bitcast(b.fadd(value, constant(FLOAT, 0.0)), I32)  # -0 becomes 0
    flipped = b.and_(b.ashr(bits, constant(I32, 31)), constant(I32, _NAN))
    odd = b.fcmp_unordered("uno", value, value)
    return b.select(odd, constant(I32, _NAN), b.xor(bits, flipped))


def _keys(
    b: ir.IRBuilder, keys: ir.Value, count: ir.Value, value: Callable[[ir.Value], ir.Value]
) -> None:
    with emit.counting(b, count) as index:
        _put(b, _key(b, value(index)), keys, index)


def _take(b: ir.IRBuilder, keys: ir.Value, count: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The first place of the greatest key, and the key; it is not found again."""
    best, place = emit.slot(b, I32, emit.load(b, I32, keys)), emit.slot(b, I64, emit.word(0))
    with emit.counting(b, count, first=1) as index:
        key, known = _at(b, keys, index, I32), b.load(best, typ=I32)
        more = b.icmp_signed(">", key, known)
        b.store(b.select(more, key, known), best)
        b.store(b.select(more, index, b.load(place, typ=I64)), place)
    found = b.load(place, typ=I64)
    _put(b, constant(I32, _TAKEN), keys, found)
    return found, b.load(best, typ=I32)


def _two_greatest(b: ir.IRBuilder, keys: ir.Value, count: ir.Value) -> list[ir.Value]:
    """The places of the two greatest keys, which stay."""
    found = [_take(b, keys, count) for _ in range(2)]
    for place, key in found:
        _put(b, key, keys, place)
    return [place for place, _ in found]


def _best(
    b: ir.IRBuilder, keys: ir.Value, count: ir.Value, ranks: ir.Value, experts: ir.Value
) -> None:
    """Writes the places of the greatest keys, best first."""
    with emit.counting(b, ranks) as rank:
        place, _ = _take(b, keys, count)
        emit.store(b, place, experts, b.shl(rank, emit.word(3)))


def _gather(
    b: ir.IRBuilder, values: ir.Value, experts: ir.Value, ranks: ir.Value, out: ir.Value
) -> None:
    """The values of the chosen experts."""
    with emit.counting(b, ranks) as rank:
        expert = emit.load(b, I64, experts, b.shl(rank, emit.word(3)))
        _put(b, _at(b, values, expert), out, rank)


def _total(b: ir.IRBuilder, weights: ir.Value, ranks: ir.Value) -> ir.Value:
    """The sum of the weights, in ascending rank."""
    total = emit.slot(b, FLOAT, emit.load(b, FLOAT, weights))
    with emit.counting(b, ranks, first=1) as rank:
        b.store(b.fadd(b.load(total, typ=FLOAT), _at(b, weights, rank)), total)
    return b.load(total, typ=FLOAT)


def _divide(b: ir.IRBuilder, weights: ir.Value, ranks: ir.Value, total: ir.Value) -> None:
    with emit.counting(b, ranks) as rank:
        _put(b, b.fdiv(_at(b, weights, rank), total), weights, rank)
