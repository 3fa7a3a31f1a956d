"""From the description of the kernels to code that this process can call."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from blyan_node.moe.kernels import (
    attention,
    blocks,
    blockwise,
    choosing,
    columns,
    emit,
    epilogues,
    exact,
    reading,
    sequence,
    tile,
    walking,
    whole,
)
from blyan_node.moe.kernels.storages import STORAGES
from blyan_node.moe.kernels.targets import Target

# What is multiplied by whole numbers where a row can be made such.
WHOLE = {"int8": exact.RULE, "mxfp4_whole": blockwise.RULE}

# No flush to zero, no denormals as zero, round to nearest, no exception traps.
_FLOAT_RULES = 0x1F80
_OPTIMISATION = 3


def describe(target: Target) -> ir.Module:
    """All kernels for a target, as LLVM's intermediate code."""
    module = ir.Module("kernels")
    module.triple = llvm.get_process_triple()
    for storage in STORAGES.values():
        rule = WHOLE.get(storage.name)
        if rule is not None:
            apart = tile.product(module, replace(storage, name=f"{storage.name}_apart"), target)
            export(module, whole.product(module, storage, target, rule, apart))
        else:
            many = blocks.product(module, storage, target)
            export(module, tile.product(module, storage, target, many))
        if storage.by_columns:
            export(module, columns.columns(module, storage, target))
    for function in epilogues.all_epilogues(module, target):
        export(module, function)
    export(module, attention.attention(module, target))
    export(module, reading.read(module))
    export(module, sequence.run(module))
    for function in (*choosing.all_choices(module), *walking.all_steps(module, target)):
        export(module, function)
    return module


def compile_object(target: Target) -> bytes:
    """The machine code of all kernels for a target, which need not be this machine."""
    compiler = machine(target)
    return bytes(compiler.emit_object(optimise(str(describe(target)), compiler)))


def optimise(text: str, compiler: Any) -> Any:
    """A module from its text, checked and optimised for `compiler`, a target's machine."""
    module = llvm.parse_assembly(text)
    module.verify()
    passes = llvm.create_new_module_pass_manager()
    # Stack slots to registers, simpler arithmetic and flow, equal loads once. The usual pipeline
    # takes five times as long and its code is no faster: vectors are written out already.
    passes.add_sroa_pass()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    passes.add_new_gvn_pass()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    passes.run(module, llvm.create_pass_builder(compiler, options))
    return module


def machine(target: Target) -> Any:
    """LLVM's code generator for a target."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    native = llvm.Target.from_triple(llvm.get_process_triple())
    return native.create_target_machine(
        cpu=target.cpu, features=target.features, opt=_OPTIMISATION, jit=True
    )


@dataclass(frozen=True, slots=True)
class Kernel:
    """Machine code that can be called, without the GIL."""

    call: Callable[..., None]
    address: int


class Code:
    """Machine code in this process."""

    def __init__(self, target: Target, machine_code: bytes) -> None:
        empty = llvm.parse_assembly(f'target triple = "{llvm.get_process_triple()}"')
        self._engine = llvm.create_mcjit_compiler(empty, machine(target))
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code))
        self._engine.finalize_object()

    def function(self, name: str, arguments: Sequence[Any]) -> Kernel:
        """The kernel of that name; `arguments` are ctypes."""
        address = self._engine.get_function_address(name)
        assert address, name
        return Kernel(ctypes.CFUNCTYPE(None, *arguments)(address), address)


def export(module: ir.Module, inner: ir.Function) -> None:
    """A function `call_NAME` that runs `inner` under one set of floating-point rules.

    The rules of the calling thread come back afterwards: libraries turn on flushing to zero.
    """
    arguments = [(argument.name, argument.type) for argument in inner.args]
    b, values = emit.define(module, f"call_{inner.name}", arguments)
    b.function.linkage = ""
    before, ours = emit.slot(b, emit.I32), emit.slot(b, emit.I32, emit.constant(emit.I32, 0))
    b.store(emit.constant(emit.I32, _FLOAT_RULES), ours)
    emit.intrinsic(b, "llvm.x86.sse.stmxcsr", emit.VOID, [before])
    emit.intrinsic(b, "llvm.x86.sse.ldmxcsr", emit.VOID, [ours])
    b.call(inner, values)
    emit.intrinsic(b, "llvm.x86.sse.ldmxcsr", emit.VOID, [before])
    b.ret_void()
