"""Other engines on the same weights, each on one thread in a process of its own.

A peer that is not installed is None, and its row says so. Nothing is installed by a measurement:
transformers comes with `pip install 'blyan-node[test]'`; llama.cpp with `npm install
--ignore-scripts node-llama-cpp`, in the folder where the measurement runs or in one whose
`node_modules` NODE_PATH names, and `pip install 'blyan-node[demo]'`, which writes its files.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import msgspec

from blyan_node.bench.gguf_file import write_gguf

PACKAGE = "node-llama-cpp"
POSITIONS = 1024  # that a peer has room for


class Rates(msgspec.Struct, frozen=True):
    """Tokens/s of one answer: of the pass over the prompt, and of every token after the first."""

    prefill: float
    decode: float
    tokens: list[int]


class Peer:
    """An engine that has loaded a model and waits."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, prompt: int, tokens: int) -> Rates:
        """A greedy answer of so many tokens to the prompt 3, 4, 5, …; raises `RuntimeError`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{prompt} {tokens}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} has ended")
        return msgspec.json.decode(line, type=Rates)


@contextmanager
def transformers(model: Path, dtype: str) -> Iterator[Peer | None]:
    """The model in transformers, in a dtype of torch's."""
    if importlib.util.find_spec("transformers") is None:
        yield None
        return
    module = "blyan_node.bench.transformers_peer"
    with started(sys.executable, "-m", module, str(model), "1", dtype) as peer:
        yield peer


@contextmanager
def llama_cpp(model: Path, kind: str) -> Iterator[Peer | None]:
    """The model in llama.cpp, its matrices as `kind`; the file is written beside the model."""
    node, package = shutil.which("node"), llama_package()
    if node is None or package is None or importlib.util.find_spec("gguf") is None:
        yield None
        return
    file = write_gguf(model, model.parent / f"{model.name}-{kind}.gguf", kind)
    try:
        with resources.as_file(resources.files(__package__) / "llama_peer.mjs") as script:
            line = (node, str(script), str(package), str(file), str(POSITIONS))
            with started(*line) as peer:
                file.unlink()  # it is mapped
                yield peer
    finally:
        file.unlink(missing_ok=True)


def llama_package() -> Path | None:
    """Where node-llama-cpp is installed."""
    here = Path.cwd()
    folders = [folder / "node_modules" for folder in (here, *here.parents)]
    folders += [Path(entry) for entry in os.environ.get("NODE_PATH", "").split(os.pathsep) if entry]
    found = (folder / PACKAGE for folder in folders)
    return next((path for path in found if (path / "package.json").is_file()), None)


@contextmanager
def started(*line: str) -> Iterator[Peer]:
    """A process that has said that it is ready; it ends afterwards. Raises `RuntimeError`."""
    with subprocess.Popen(
        line,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError(f"{' '.join(line)} did not load the model")
            yield Peer(process)
        finally:
            process.stdin.close()
