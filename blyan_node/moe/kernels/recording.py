"""Recordings: what was called for one row is called again for the next, without Python between.

While a recording is made, results are written to an arena that all recordings share: what is in it
is valid until the next one is made or played. Threads take turns by the recorder's `lock`.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

from blyan_node.moe.kernels.sequence import FLOATS, STEP_BYTES, WORDS
from blyan_node.moe.kernels.walking import RECORDED

_BLOCK_FLOATS = 1 << 16
_ALIGNED_FLOATS = 16


class Arena:
    """Memory for results, in blocks that never move."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def block(self, number: int, floats: int) -> Tensor:
        """Block `number`, the first time with room for `floats` or more."""
        if number == len(self._blocks):
            with torch.inference_mode(False):
                self._blocks.append(torch.empty(max(_BLOCK_FLOATS, floats)))
        return self._blocks[number]


class _Step(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_int64),
        ("words", ctypes.c_int64 * WORDS),
        ("floats", ctypes.c_float * FLOATS),
    ]


assert ctypes.sizeof(_Step) == STEP_BYTES


class _Recorded(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in RECORDED]


# Makes a step on several threads; makes steps on one; computes rows from rows.
Share = Callable[[], None]
Run = Callable[[int, int], None]
Rows = Callable[..., tuple[Tensor, ...]]


class Recording:
    """Calls of kernels, and the places of their operands and results.

    While a `dry` one is made, its kernels are not called.
    """

    def __init__(self, arena: Arena, *, dry: bool = False) -> None:
        self._arena, self.dry = arena, dry
        self._block = self._used = 0
        self._calls: list[_Step] = []
        self._shares: list[Share] = []
        self._kept: list[object] = []
        self._inputs: list[tuple[int, int]] = []
        self.outputs: Sequence[Tensor] = ()

    def empty(self, *shape: int) -> Tensor:
        """Uninitialised float32 in the arena."""
        floats = prod(shape)
        while True:
            block = self._arena.block(self._block, floats)
            if self._used + floats <= block.numel():
                break
            self._block, self._used = self._block + 1, 0
        place = block[self._used : self._used + floats]
        self._used += -(-floats // _ALIGNED_FLOATS) * _ALIGNED_FLOATS
        return place.view(shape)

    def again(self) -> None:
        """What is made from here on may take the memory of what was made so far."""
        self._block = self._used = 0

    @property
    def count(self) -> int:
        """How many calls there are so far."""
        return len(self._calls)

    def take(self, row: Tensor) -> Tensor:
        """A place for an operand [1, width], with this one in it."""
        place = self.empty(*row.shape)
        self._inputs.append((place.data_ptr(), 4 * place.numel()))
        ctypes.memmove(place.data_ptr(), row.data_ptr(), 4 * place.numel())
        return place

    def add(
        self, kernel: int, arguments: Sequence[int | float], share: Share, weights: object
    ) -> None:
        """Adds a call of the kernel at that address; `weights` are kept alive for it."""
        self._kept.append(weights)
        words = [one for one in arguments if isinstance(one, int)]
        floats = [one for one in arguments if isinstance(one, float)]
        step = _Step(kernel)
        step.words[: len(words)] = words
        step.floats[: len(floats)] = floats
        self._calls.append(step)
        self._shares.append(share)

    def finish(self, outputs: Sequence[Tensor], run: Run | None) -> None:
        """Ends it. `run` makes steps; without it each is made by its `share`."""
        self.outputs = outputs
        self._run = run
        self._steps = (_Step * len(self._calls))(*self._calls)
        self.place, self._count = ctypes.addressof(self._steps), len(self._calls)

    def described(self) -> int:
        """The address of a description (`walking.RECORDED`) of one that has one operand and result.

        It is there for as long as the recording.
        """
        (operand, size), result = self._inputs[0], self.outputs[0]
        fields = (operand, size // 4, result.data_ptr(), self.place, self._count)
        assert result.is_contiguous() and 4 * result.numel() == size
        self._description = _Recorded(*fields)
        return ctypes.addressof(self._description)

    def play(self, rows: Sequence[Tensor]) -> None:
        """Makes all calls again for these operands."""
        for (place, size), row in zip(self._inputs, rows, strict=True):
            ctypes.memmove(place, row.data_ptr(), size)
        if self._run is not None:
            self._run(self.place, self._count)
            return
        for share in self._shares:
            share()


class _Making(threading.local):
    """The recording that a thread makes."""

    recording: Recording | None = None


class Recorder:
    """Makes recordings and plays them. `run` makes steps on one thread; None: there are more."""

    def __init__(self, run: Run | None) -> None:
        self.lock = threading.Lock()
        self._run = run
        self._arena, self._making = Arena(), _Making()
        self._rows = Arena()  # of programs: what they call has the other one

    @property
    def alone(self) -> bool:
        """Whether one thread makes all steps."""
        return self._run is not None

    @property
    def active(self) -> Recording | None:
        """The recording that the calling thread makes."""
        return self._making.recording

    def played(
        self, made: Recording | None, function: Rows, rows: Sequence[Tensor]
    ) -> tuple[Recording | None, tuple[Tensor, ...]]:
        """The results of `function` for operands [1, width], and its recording.

        Played from `made` if there is one; else it is called and recorded, unless another thread
        has the arena. `function` calls kernels on its operands and does nothing else. The results
        are the caller's.
        """
        if self._making.recording is not None or not self.lock.acquire(blocking=False):
            return made, function(*rows)
        try:
            if made is None:
                made = self._record(function, rows)
            else:
                made.play(rows)
            return made, tuple(out.clone() for out in made.outputs)
        finally:
            self.lock.release()

    def dry(self, function: Rows, rows: Sequence[Tensor]) -> Recording:
        """A recording of the function for rows like these; no kernel is called. Within `lock`."""
        return self._record(function, rows, dry=True)

    @contextmanager
    def program(self) -> Iterator[Recording]:
        """A dry recording with memory of its own, for what is called within. Within `lock`."""
        recording = Recording(self._rows, dry=True)
        with self._made(recording):
            yield recording
        recording.finish((), self._run)

    def _record(self, function: Rows, rows: Sequence[Tensor], *, dry: bool = False) -> Recording:
        recording = Recording(self._arena, dry=dry)
        with self._made(recording):
            outputs = function(*(recording.take(row) for row in rows))
        recording.finish(outputs, self._run)
        return recording

    @contextmanager
    def _made(self, recording: Recording) -> Iterator[None]:
        self._making.recording = recording
        try:
            yield
        finally:
            self._making.recording = None
