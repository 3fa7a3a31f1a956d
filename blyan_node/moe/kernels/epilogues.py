"""What is done to rows between products: activations, norms, softmax, rotary embedding.

Each function walks rows of float32 whose strides are in bytes. Elements are independent of each
other, so a register's width leaves no trace; what is summed is summed in the order of docs/sums.md.
"""

from collections.abc import Callable, Sequence

from llvmlite import ir

from blyan_node.moe.kernels import emit, order
from blyan_node.moe.kernels.emit import FLOAT, I64, POINTER, constant, vector
from blyan_node.moe.kernels.exponential import at_least, at_most, exp, sigmoid_of_product
from blyan_node.moe.kernels.padding import padded
from blyan_node.moe.kernels.targets import Target

# What happens to `width` elements from `index` on.
Body = Callable[[int, ir.Value], None]


def all_epilogues(module: ir.Module, target: Target) -> list[ir.Function]:
    """The functions of this file."""
    return [
        _add(module, target),
        _combine(module, target),
        _swiglu(module, target),
        _gpt_oss(module, target),
        _sigmoid(module, target),
        _rms_norm(module, target),
        softmax(module, target),
        _rotate(module, target, interleaved=False),
        _rotate(module, target, interleaved=True),
    ]


def elements(b: ir.IRBuilder, count: ir.Value, lanes: int, body: Body) -> None:
    """Runs `body` for whole registers and then for single elements."""
    done = emit.slot(b, I64, emit.word(0))
    for width in (lanes, 1):
        with emit.steps(b, done, count, width) as index:
            body(width, index)


def load(b: ir.IRBuilder, width: int, row: ir.Value, index: ir.Value) -> ir.Value:
    """`width` float32 of a row."""
    return emit.load(b, vector(FLOAT, width), row, b.shl(index, emit.word(2)))


def store(b: ir.IRBuilder, value: ir.Value, row: ir.Value, index: ir.Value) -> None:
    """Writes to a row, with one pattern for all NaNs."""
    emit.store(b, order.one_nan(b, value), row, b.shl(index, emit.word(2)))


def _rows(
    module: ir.Module, name: str, places: Sequence[str], extra: Sequence[tuple[str, ir.Type]]
) -> tuple[ir.IRBuilder, list[ir.Value], list[ir.Value]]:
    """Begins a function over rows: (place, stride) for each place, then rows, count and `extra`."""
    arguments = [pair for p in places for pair in ((p, POINTER), (f"{p}_stride", I64))]
    arguments += [("rows", I64), ("count", I64), *extra]
    b, values = emit.define(module, name, arguments)
    return b, values[: 2 * len(places)], values[2 * len(places) :]


def _row_of(b: ir.IRBuilder, places: Sequence[ir.Value], row: ir.Value) -> list[ir.Value]:
    pairs = zip(places[::2], places[1::2], strict=True)
    return [emit.at(b, place, b.mul(row, stride)) for place, stride in pairs]


def _add(module: ir.Module, target: Target) -> ir.Function:
    """out = x + y."""
    b, places, (rows, count) = _rows(module, "add", ("out", "x", "y"), ())
    with emit.counting(b, rows) as row:
        out, x, y = _row_of(b, places, row)

        def body(width: int, index: ir.Value) -> None:
            store(b, b.fadd(load(b, width, x, index), load(b, width, y, index)), out, index)

        elements(b, count, target.lanes, body)
    b.ret_void()
    return b.function


def _combine(module: ir.Module, target: Target) -> ir.Function:
    """out = residual + (w[0] · experts[0] + w[1] · experts[1] + …), for `ranks` experts of a row.

    The experts' rows of one row lie one after another.
    """
    extra = (("weights", POINTER), ("ranks", I64))
    places_of = ("out", "residual", "experts")
    b, places, (rows, count, weights, ranks) = _rows(module, "combine", places_of, extra)
    with emit.counting(b, rows) as row:
        out, residual, experts = _row_of(b, places, row)
        mine = emit.at(b, weights, b.shl(b.mul(row, ranks), emit.word(2)))

        def body(width: int, index: ir.Value) -> None:
            kind = vector(FLOAT, width)

            def product(rank: ir.Value) -> ir.Value:
                expert = emit.at(b, experts, b.shl(b.mul(rank, count), emit.word(2)))
                weight = emit.load(b, FLOAT, mine, b.shl(rank, emit.word(2)))
                return b.fmul(emit.broadcast(b, weight, width), load(b, width, expert, index))

            total = emit.slot(b, kind, product(emit.word(0)))
            with emit.counting(b, ranks, first=1) as rank:
                b.store(b.fadd(b.load(total, typ=kind), product(rank)), total)
            value = b.load(total, typ=kind)
            store(b, b.fadd(load(b, width, residual, index), value), out, index)

        elements(b, count, target.lanes, body)
    b.ret_void()
    return b.function


def _swiglu(module: ir.Module, target: Target) -> ir.Function:
    """out = SiLU(gate) · up."""
    b, places, (rows, count) = _rows(module, "swiglu", ("out", "gate", "up"), ())
    with emit.counting(b, rows) as row:
        out, gate, up = _row_of(b, places, row)

        def body(width: int, index: ir.Value) -> None:
            g, u = load(b, width, gate, index), load(b, width, up, index)
            store(b, b.fmul(sigmoid_of_product(b, g, g), u), out, index)

        elements(b, count, target.lanes, body)
    b.ret_void()
    return b.function


def _gpt_oss(module: ir.Module, target: Target) -> ir.Function:
    """out = (up + 1) · gate · sigmoid(alpha · gate), clamped; gate and up take turns in `both`."""
    extra = (("limit", FLOAT), ("alpha", FLOAT))
    b, places, (rows, count, limit, alpha) = _rows(module, "gpt_oss", ("out", "both"), extra)
    with emit.counting(b, rows) as row:
        out, both = _row_of(b, places, row)

        def body(width: int, index: ir.Value) -> None:
            pairs = load(b, 2 * width, both, b.shl(index, emit.word(1)))
            bound, slope = (emit.broadcast(b, value, width) for value in (limit, alpha))
            gate = at_most(b, emit.pick(b, pairs, pairs, range(0, 2 * width, 2)), bound)
            up = at_most(b, emit.pick(b, pairs, pairs, range(1, 2 * width, 2)), bound)
            up = b.fadd(at_least(b, up, b.fneg(bound)), constant(up.type, 1.0))
            active = sigmoid_of_product(b, gate, b.fmul(gate, slope))
            store(b, b.fmul(up, active), out, index)

        elements(b, count, target.lanes, body)
    b.ret_void()
    return b.function


def _sigmoid(module: ir.Module, target: Target) -> ir.Function:
    """out = 1 / (1 + e^-x)."""
    b, places, (rows, count) = _rows(module, "sigmoid", ("out", "x"), ())
    with emit.counting(b, rows) as row:
        out, x = _row_of(b, places, row)

        def body(width: int, index: ir.Value) -> None:
            value = load(b, width, x, index)
            store(b, sigmoid_of_product(b, constant(value.type, 1.0), value), out, index)

        elements(b, count, target.lanes, body)
    b.ret_void()
    return b.function


def _rms_norm(module: ir.Module, target: Target) -> ir.Function:
    """out = x · (1 / √(mean of squares + eps)) · weight."""
    extra = (("weight", POINTER), ("eps", FLOAT))
    b, places, (rows, count, weight, eps) = _rows(module, "rms_norm", ("out", "x"), extra)
    with emit.counting(b, rows) as row:
        out, x = _row_of(b, places, row)
        mean = b.fdiv(_sum(b, x, count, target.lanes, squares=True), b.sitofp(count, FLOAT))
        root = emit.intrinsic(b, "llvm.sqrt.f32", FLOAT, [b.fadd(mean, eps)])
        factor = b.fdiv(constant(FLOAT, 1.0), root)

        def body(width: int, index: ir.Value) -> None:
            scaled = b.fmul(load(b, width, x, index), emit.broadcast(b, factor, width))
            store(b, b.fmul(scaled, load(b, width, weight, index)), out, index)

        elements(b, count, target.lanes, body)
    b.ret_void()
    return b.function


def softmax(module: ir.Module, target: Target) -> ir.Function:
    """out = e^(x - max x) / their sum, row by row; out may be x."""
    found = module.globals.get("softmax")
    if found is not None:
        return found
    b, places, (rows, count) = _rows(module, "softmax", ("out", "x"), ())
    with emit.counting(b, rows) as row:
        out, x = _row_of(b, places, row)
        largest = _largest(b, x, count, target.lanes)

        def exponent(width: int, index: ir.Value) -> None:
            value = b.fsub(load(b, width, x, index), emit.broadcast(b, largest, width))
            store(b, exp(b, value), out, index)

        def share(width: int, index: ir.Value) -> None:
            value = b.fdiv(load(b, width, out, index), emit.broadcast(b, total, width))
            store(b, value, out, index)

        elements(b, count, target.lanes, exponent)
        total = _sum(b, out, count, target.lanes, squares=False)
        elements(b, count, target.lanes, share)
    b.ret_void()
    return b.function


def _largest(b: ir.IRBuilder, x: ir.Value, count: ir.Value, lanes: int) -> ir.Value:
    """The largest of a row; NaNs are passed over."""
    lowest = constant(vector(FLOAT, lanes), float("-inf"))
    best = emit.slot(b, vector(FLOAT, lanes), lowest)

    def body(width: int, index: ir.Value) -> None:
        value = load(b, width, x, index)
        if width == 1:
            value = emit.broadcast(b, b.extract_element(value, constant(emit.I32, 0)), lanes)
        b.store(at_least(b, b.load(best, typ=lowest.type), _no_nan(b, value)), best)

    elements(b, count, lanes, body)
    value = b.load(best, typ=lowest.type)
    for width in (8, 4, 2, 1):
        if width < lanes:
            low, high = (emit.pick(b, value, value, range(i, i + width)) for i in (0, width))
            value = at_least(b, low, high)
    return b.extract_element(value, constant(emit.I32, 0))


def _no_nan(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    odd = b.fcmp_unordered("uno", value, value)
    return b.select(odd, constant(value.type, float("-inf")), value)


def _sum(b: ir.IRBuilder, x: ir.Value, count: ir.Value, lanes: int, *, squares: bool) -> ir.Value:
    """The sum of a row or of its squares: its dot product with ones or with itself."""
    kind = vector(FLOAT, lanes)
    registers = order.PARTIAL_SUMS // lanes
    slots = [emit.slot(b, kind, constant(kind, 0.0)) for _ in range(registers)]

    def add_block(block: ir.Value) -> None:
        for part in range(order.BLOCK // lanes):
            value, place = emit.load(b, kind, block, 4 * lanes * part), slots[part % registers]
            other = value if squares else constant(kind, 1.0)
            b.store(emit.fma(b, value, other, b.load(place, typ=kind)), place)

    done = emit.slot(b, I64, emit.word(0))
    with emit.steps(b, done, count, order.BLOCK) as index:
        add_block(emit.at(b, x, b.shl(index, emit.word(2))))
    index = b.load(done, typ=I64)
    with b.if_then(b.icmp_signed("<", index, count)):
        add_block(padded(b, emit.at(b, x, b.shl(index, emit.word(2))), b.sub(count, index), 4))
    total = order.total(b, [order.halve(b, [b.load(place, typ=kind) for place in slots])])
    return b.extract_element(total, constant(emit.I32, 0))


def _rotate(module: ir.Module, target: Target, *, interleaved: bool) -> ir.Function:
    """Turns the pairs of each row by an angle: out = (a·cos - b·sin, b·cos + a·sin), in halves.

    A row has `heads` heads that are turned alike; strides are from row to row and, `_head_stride`,
    from head to head. `count` is the number of pairs. A pair is (i, i + count), or (2i, 2i + 1) if
    interleaved.
    """
    name = "rotate_pairs" if interleaved else "rotate_halves"
    extra = (
        ("cos", POINTER), ("sin", POINTER), ("angles_stride", I64),
        ("heads", I64), ("out_head_stride", I64), ("x_head_stride", I64),
    )  # fmt: skip
    b, places, values = _rows(module, name, ("out", "x"), extra)
    rows, count, first_cos, first_sin, angles_stride, heads, *head_strides = values
    with emit.counting(b, rows) as row, emit.counting(b, heads) as head:
        cos, sin = (emit.at(b, p, b.mul(row, angles_stride)) for p in (first_cos, first_sin))
        out, x = (
            emit.at(b, place, b.mul(head, stride))
            for place, stride in zip(_row_of(b, places, row), head_strides, strict=True)
        )

        def body(width: int, index: ir.Value) -> None:
            if interleaved:
                both = load(b, 2 * width, x, b.shl(index, emit.word(1)))
                left, right = (emit.pick(b, both, both, range(i, 2 * width, 2)) for i in (0, 1))
            else:
                left, right = load(b, width, x, index), load(b, width, x, b.add(index, count))
            c, s = load(b, width, cos, index), load(b, width, sin, index)
            store(b, b.fsub(b.fmul(left, c), b.fmul(right, s)), out, index)
            turned = b.fadd(b.fmul(right, c), b.fmul(left, s))
            store(b, turned, out, b.add(index, count))

        elements(b, count, target.lanes, body)
    b.ret_void()
    return b.function
