"""A vocabulary for writing vector code with llvmlite: what its builder does not have in one word.

Every function takes the builder first. Pointers are opaque and offsets are in bytes; loads and
stores assume no alignment. Counters and sums live in stack slots, which LLVM turns into registers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir

DOUBLE, FLOAT, HALF = ir.DoubleType(), ir.FloatType(), ir.HalfType()
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
POINTER = ir.PointerType()
VOID = ir.VoidType()


def vector(element: ir.Type, size: int) -> ir.VectorType:
    """The type of `size` elements."""
    return ir.VectorType(element, size)


def constant(kind: ir.Type, value: float) -> ir.Constant:
    """A constant of a scalar type, or of a vector type with the value in every lane."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)
    return ir.Constant(kind, value)


def word(value: int) -> ir.Constant:
    """A constant of 64 bits: a count, an index, or an offset in bytes."""
    return ir.Constant(I64, value)


def at(b: ir.IRBuilder, pointer: ir.Value, offset: ir.Value | int) -> ir.Value:
    """The address `offset` bytes after `pointer`."""
    if isinstance(offset, int):
        offset = word(offset)
    return b.gep(pointer, [offset], source_etype=I8)


def load(b: ir.IRBuilder, kind: ir.Type, pointer: ir.Value, offset: ir.Value | int = 0) -> ir.Value:
    """What is `offset` bytes after `pointer`."""
    return b.load(at(b, pointer, offset), typ=kind, align=1)


def store(b: ir.IRBuilder, value: ir.Value, pointer: ir.Value, offset: ir.Value | int = 0) -> None:
    """Writes `value` at `offset` bytes after `pointer`."""
    b.store(value, at(b, pointer, offset), align=1)


def slot(
    b: ir.IRBuilder, kind: ir.Type, value: ir.Value | None = None, align: int | None = None
) -> ir.Value:
    """A place on the stack of the function, holding `value` from here on."""
    with b.goto_entry_block():
        b.position_at_start(b.block)
        place = b.alloca(kind)
        place.align = align
        place.type = POINTER
    if value is not None:
        b.store(value, place)
    return place


def broadcast(b: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """A vector with `value` in every lane."""
    kind = vector(value.type, lanes)
    first = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return pick(b, first, first, [0] * lanes)


def pick(b: ir.IRBuilder, first: ir.Value, second: ir.Value, lanes: Sequence[int]) -> ir.Value:
    """The numbered lanes of `first` followed by `second`."""
    mask = ir.Constant(vector(I32, len(lanes)), list(lanes))
    return b.shuffle_vector(first, second, mask)


def intrinsic(
    b: ir.IRBuilder, name: str, result: ir.Type, arguments: Sequence[ir.Value]
) -> ir.Value:
    """Calls a function that LLVM knows by its full name."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    return b.call(function, arguments)


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, addend: ir.Value) -> ir.Value:
    """x · y + addend, rounded once, in each lane."""
    kind = x.type
    name = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
    return intrinsic(b, f"llvm.fma.{name}", kind, [x, y, addend])


def keep_order(b: ir.IRBuilder) -> None:
    """No load or store moves across this point when code is scheduled; costs no instruction."""
    b.fence("seq_cst", "singlethread")


def prefetch(b: ir.IRBuilder, address: ir.Value, level: int = 2) -> None:
    """Asks for the cache line there, for reading, in that level; any address will do."""
    flags = [ir.Constant(I32, value) for value in (0, 4 - level, 1)]
    intrinsic(b, "llvm.prefetch.p0", VOID, [address, *flags])


@contextmanager
def steps(
    b: ir.IRBuilder, cell: ir.Value, last: ir.Value, step: ir.Value | int
) -> Iterator[ir.Value]:
    """Repeats what is inside for the index in `cell` while a whole step fits before `last`.

    Yields the index; afterwards `cell` has the first index that was not done.
    """
    step = word(step) if isinstance(step, int) else step
    head, body, done = (b.append_basic_block(name) for name in ("head", "body", "done"))
    b.branch(head)
    b.position_at_end(head)
    index = b.load(cell, typ=I64)
    following = b.add(index, step)
    b.cbranch(b.icmp_signed("<=", following, last), body, done)
    b.position_at_end(body)
    yield index
    b.store(following, cell)
    b.branch(head)
    b.position_at_end(done)


@contextmanager
def counting(
    b: ir.IRBuilder, last: ir.Value, step: ir.Value | int = 1, first: ir.Value | int = 0
) -> Iterator[ir.Value]:
    """Repeats what is inside for each whole step from `first` to `last`; yields the index."""
    first = word(first) if isinstance(first, int) else first
    with steps(b, slot(b, I64, first), last, step) as index:
        yield index


@contextmanager
def approaching(b: ir.IRBuilder, length: ir.Value, step: int) -> Iterator[ir.Value]:
    """Repeats what is inside for -length, -length + step … -step, one at least; yields the index.

    With addresses of ends it takes two instructions a turn where `counting` takes four.
    """
    cell = slot(b, I64, b.neg(length))
    body, done = (b.append_basic_block(name) for name in ("body", "done"))
    b.branch(body)
    b.position_at_end(body)
    index = b.load(cell, typ=I64)
    yield index
    following = b.add(index, word(step))
    b.store(following, cell)
    b.cbranch(b.icmp_signed("!=", following, word(0)), body, done)
    b.position_at_end(done)


@contextmanager
def spans(
    b: ir.IRBuilder, first: ir.Value, last: ir.Value, most: ir.Value | int
) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Repeats what is inside for spans of at most `most` from `first` to `last`: start, length."""
    most = word(most) if isinstance(most, int) else most
    with counting(b, b.sub(b.add(last, most), word(1)), most, first) as start:
        left = b.sub(last, start)
        yield start, b.select(b.icmp_signed("<", left, most), left, most)


def define(
    module: ir.Module, name: str, arguments: Sequence[tuple[str, ir.Type]], *, inline: bool = False
) -> tuple[ir.IRBuilder, list[ir.Value]]:
    """Begins a function of this module alone that returns nothing."""
    kind = ir.FunctionType(VOID, [kind for _, kind in arguments])
    function = ir.Function(module, kind, name)
    function.linkage = "internal"
    for attribute in ("nounwind", "alwaysinline" if inline else "noinline"):
        function.attributes.add(attribute)
    for argument, (argument_name, _) in zip(function.args, arguments, strict=True):
        argument.name = argument_name
    return ir.IRBuilder(function.append_basic_block("entry")), list(function.args)
