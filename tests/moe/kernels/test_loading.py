"""How kernels come into a process: targets, kept machine code, several processes, threads."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from blyan_node.moe.kernels import compiler, objects, targets
from blyan_node.moe.kernels.library import Kernels, load
from blyan_node.moe.kernels.matrix import Matrix
from blyan_node.moe.kernels.storages import STORAGES
from blyan_node.moe.kernels.targets import TARGETS, Target, Unsupported, runnable

FMA = {"avx": True, "fma": True, "f16c": True}
BEST = TARGETS[1]


def _compiled(target: Target) -> bytes:
    return target.name.encode() * 100


def _refused(target: Target) -> bytes:
    raise AssertionError("compiled again")


def test_a_processor_gets_the_best_that_it_can_run() -> None:
    assert [t.name for t in runnable(dict.fromkeys(TARGETS[0].needs, True))] == [
        "avx512", "avx2", "fma"
    ]  # fmt: skip
    assert [t.name for t in runnable(FMA)] == ["fma"]


@pytest.mark.parametrize("missing", FMA)
def test_without_a_fused_multiply_add_it_is_refused(missing: str) -> None:
    with pytest.raises(Unsupported, match=f"this processor has no {missing}$"):
        runnable(FMA | {missing: False})


def test_another_kind_of_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.platform, "machine", lambda: "arm64")
    with pytest.raises(Unsupported, match="x86-64, and this is arm64"):
        runnable(FMA)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_target_is_compiled_for_what_it_says(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AVX-512 code is compiled and looked at on machines that cannot run it, too."""
    if target.name != "avx512":
        monkeypatch.setattr(compiler, "STORAGES", {n: STORAGES[n] for n in ("float32", "mxfp4")})
    machine = compiler.machine(target)
    text = machine.emit_assembly(compiler.optimise(str(compiler.describe(target)), machine))
    assert "vfmadd" in text
    assert ("zmm" in text) == (target.name == "avx512")
    called = set(re.findall(r"^\tcallq?\t\*?(\S+)", text, re.MULTILINE))
    ours = set(re.findall(r"^(\w+):", text, re.MULTILINE))
    # Nothing from a library, such as fmaf: only our own, some by an address that is computed.
    assert {name for name in called if "%" not in name} <= ours


def test_machine_code_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    assert objects.machine_code(BEST, folder, _compiled) == _compiled(BEST)
    assert objects.machine_code(BEST, folder, _refused) == _compiled(BEST)
    (file,) = folder.iterdir()
    assert file.name == f"{BEST.name}-{objects.key(BEST)}.o"


def test_targets_have_their_own_code() -> None:
    assert len({objects.key(target) for target in TARGETS}) == len(TARGETS)


def test_another_compiler_has_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = objects.key(BEST)
    objects.key.cache_clear()
    monkeypatch.setattr(objects.llvmlite, "__version__", "0.0.1")
    assert objects.key(BEST) != before
    objects.key.cache_clear()


@pytest.mark.parametrize("damage", [b"", b"x", b"x" * 40, "flip", "cut"])
def test_a_damaged_file_is_replaced(tmp_path: Path, damage: bytes | str) -> None:
    objects.machine_code(BEST, tmp_path, _compiled)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    broken = {"flip": whole[:50] + bytes([whole[50] ^ 1]) + whole[51:], "cut": whole[:-1]}
    file.write_bytes(damage if isinstance(damage, bytes) else broken[damage])
    assert objects.machine_code(BEST, tmp_path, _compiled) == _compiled(BEST)
    assert file.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    assert objects.machine_code(BEST, in_the_way / "folder", _compiled) == _compiled(BEST)
    assert objects.machine_code(BEST, Path("/proc/1/kernels"), _compiled) == _compiled(BEST)


def test_a_crash_while_writing_leaves_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        objects.machine_code(BEST, tmp_path, _compiled)
    assert list(tmp_path.iterdir()) == []


def test_code_that_others_could_have_written_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.machine_code(BEST, tmp_path, _compiled)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(AssertionError, match="compiled again"):
        objects.machine_code(BEST, tmp_path, _refused)


def _writable(file: Path) -> None:
    file.chmod(0o620)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


def _link(file: Path) -> None:
    file.rename(file.with_suffix(".elsewhere"))
    file.symlink_to(file.with_suffix(".elsewhere"))


@pytest.mark.parametrize("make", [_writable, _pipe, _link])
def test_what_is_no_file_of_ours_alone_is_not_run(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    objects.machine_code(BEST, tmp_path, _compiled)
    (file,) = tmp_path.iterdir()
    make(file)
    with pytest.raises(AssertionError, match="compiled again"):
        objects.machine_code(BEST, tmp_path, _refused)


_START = """
import sys
from pathlib import Path
import torch
from blyan_node.moe.kernels.library import load
from blyan_node.moe.kernels.matrix import Matrix
from blyan_node.moe.kernels.storages import STORAGES
for name in list(STORAGES)[1:]:  # one is enough, and compiled sooner
    del STORAGES[name]
x = torch.arange(33.0)[None] / 7
print(load(Path(sys.argv[1])).linear(x, Matrix("float32", (1, 33), x.clone())).item())
"""


def test_processes_that_start_at_once_share_a_folder(
    every_kernels: list[Kernels], tmp_path: Path
) -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}\n{_START}"
    started = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    printed = {process.communicate()[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    x = torch.arange(33.0)[None] / 7
    expected = every_kernels[0].linear(x, Matrix("float32", (1, 33), x.clone())).item()
    assert printed == {f"{expected}\n".encode()}
    assert [path.suffix for path in tmp_path.iterdir()] == [".o"]


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_change_no_bit(
    every_kernels: list[Kernels],
    objects_folder: Path,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("blyan_node.moe.kernels.workers._PRODUCTS_MIN", 1)
    alone, shared = every_kernels[0], load(objects_folder, threads=threads)
    for outs in (1, 2, 11, 12, 13, 30, 101):
        x, w = torch.randn(3, 70), torch.randn(outs, 70)
        matrix = Matrix("float32", (outs, 70), w)
        assert torch.equal(shared.linear(x, matrix), alone.linear(x, matrix))
    for kv_heads in (1, 6):
        query, (keys, values) = torch.randn(2, 12, 8), torch.randn(2, kv_heads, 40, 8)
        found = shared.attend(query, keys, values, 0.3)
        assert torch.equal(found, alone.attend(query, keys, values, 0.3))
    shared.close()
    assert torch.equal(shared.linear(x, matrix), alone.linear(x, matrix))


def test_threads_that_call_at_once_do_not_meet(every_kernels: list[Kernels]) -> None:
    kernels = every_kernels[0]
    x, w = torch.randn(64, 96), torch.randn(64, 96)
    matrix = Matrix("float32", (64, 96), w)
    expected, wrong = kernels.linear(x, matrix), []

    def caller(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(200):
            rows = torch.from_numpy(random.integers(0, 64, random.integers(1, 9)))
            if not torch.equal(kernels.linear(x[rows], matrix), expected[rows]):
                wrong.append(seed)

    with ThreadPoolExecutor(8) as callers:
        list(callers.map(caller, range(8)))
    assert wrong == []


def test_a_matrix_that_does_not_fit_its_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="23 bytes, not 24"):
        Matrix("float32", (2, 3), bytes(23))
    with pytest.raises(ValueError, match="block_scales"):
        Matrix("mxfp4", (2, 32), bytes(32))
    with pytest.raises(ValueError, match="33 is not a multiple of 32"):
        Matrix("mxfp4", (2, 33), bytes(33), block_scales=bytes(2))
