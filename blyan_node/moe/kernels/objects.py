"""Machine code kept between runs: one file for each target, compiler and version of the kernels.

Several processes may start at once: each writes a file of its own and renames it, so that a name
has whole content or none, and whoever comes last changes nothing. A file that is damaged, cannot be
read or cannot be written costs a compilation and nothing else.
"""

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm

from blyan_node.moe.kernels.targets import Target

_DIGEST_BYTES = 32
_FILE_BYTES_MAX = 64 << 20
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def user_folder() -> Path:
    """Where this user's machine code is kept by default."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "blyan" / "kernels"


def machine_code(target: Target, folder: Path | None, compile_: Callable[[Target], bytes]) -> bytes:
    """The code for `target` from `folder`, or newly compiled and, where that can be, left there."""
    if folder is None:
        return compile_(target)
    path = folder / f"{target.name}-{key(target)}.o"
    found = _read(path)
    if found is None:
        found = compile_(target)
        _write(path, found)
    return found


@cache
def key(target: Target) -> str:
    """What the code depends on: the kernels' own text, the compiler, and the target."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(hashlib.sha256(source.read_bytes()).digest())
    versions = (llvmlite.__version__, *llvm.llvm_version_info, llvm.get_process_triple())
    digest.update(repr((versions, target.cpu, target.features)).encode())
    return digest.hexdigest()[:32]


def _read(path: Path) -> bytes | None:
    try:
        # A pipe under that name is not waited for, and a link not followed.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
            about = os.fstat(file.fileno())
            if about.st_uid != os.getuid() or about.st_mode & _OTHERS_WRITE:
                return None  # code that somebody else may have written is not run
            if not stat.S_ISREG(about.st_mode):
                return None
            data = file.read(_FILE_BYTES_MAX)
    except OSError:  # not there, not readable
        return None
    digest, code = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(hashlib.sha256(code).digest() + code)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError:  # a read-only or full disk: this process has the code in memory
        return
