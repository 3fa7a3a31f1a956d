"""The processors that kernels are compiled for, and which of them this machine is.

Targets differ in the width of their registers and in the shape of a tile. Neither enters a result:
an output's bits are those of docs/sums.md on each of them.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import llvmlite.binding as llvm


class Unsupported(Exception):
    """This processor cannot run the kernels; the message says why."""


@dataclass(frozen=True)
class Tiles:
    """How many rows and columns a tile has: for some numbers of rows, and for all others."""

    few: Mapping[int, tuple[int, int]]
    many: tuple[int, int]


@dataclass(frozen=True)
class Many:
    """Rows are many from this number on, if they have at least so many values together."""

    rows: int
    values: int = 0


@dataclass(frozen=True)
class Target:
    """A family of processors.

    `lanes` is the number of float32 in a register. `tiles` and `many` have an entry for each effort
    that a storage can take (`storages.Storage`); `block` are the rows and columns of a tile where
    rows are many, which has one register for a pair.
    """

    name: str
    cpu: str
    features: str
    needs: tuple[str, ...]
    lanes: int
    tiles: Sequence[Tiles] = field(hash=False)
    block: tuple[int, int]
    many: Sequence["Many"] = field(hash=False)


_FMA = ("avx", "fma", "f16c")
_AVX2 = (*_FMA, "avx2", "bmi", "bmi2", "lzcnt", "movbe")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

# Chosen by measurement on AVX2, whose 16 registers hold 8 lanes each.
_NARROW = (
    Tiles({1: (1, 4), 2: (2, 4), 4: (2, 4)}, (3, 2)),
    Tiles({1: (1, 4), 2: (2, 3), 4: (2, 3)}, (3, 2)),
    Tiles({1: (1, 2), 2: (2, 2)}, (6, 1)),
)
# And on AVX-512, with 32 registers of 16 lanes.
_WIDE = (
    Tiles({1: (1, 4), 2: (2, 8)}, (4, 4)),
    Tiles({1: (1, 4), 2: (2, 8)}, (4, 4)),
    Tiles({1: (1, 4), 2: (2, 4)}, (6, 2)),
)

# Float32 is not worth copying while the rows fit the second-level cache.
_MANY = (Many(16, values=40_000), Many(24), Many(8))

# The best first.
TARGETS = (
    Target("avx512", "x86-64-v4", "", _AVX512, 16, _WIDE, (4, 4), _MANY),
    Target("avx2", "x86-64-v3", "", _AVX2, 8, _NARROW, (3, 4), _MANY),
    Target("fma", "x86-64-v2", "+avx,+fma,+f16c", _FMA, 8, _NARROW, (3, 4), _MANY),
)


def runnable(features: Mapping[str, bool] | None = None) -> list[Target]:
    """The targets that a processor with these features can run, the best first; default: this one.

    Raises `Unsupported` if there is none.
    """
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        raise Unsupported(f"the kernels are for x86-64, and this is {machine}")
    if features is None:
        features = llvm.get_host_cpu_features()
    found = [t for t in TARGETS if all(features.get(name, False) for name in t.needs)]
    if not found:
        missing = ", ".join(name for name in _FMA if not features.get(name, False))
        raise Unsupported(f"this processor has no {missing}")
    return found
