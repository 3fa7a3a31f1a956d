"""Models from a hub on loopback: whole, cut off, resumed, by revision, and refused."""

import logging
import os
import shutil
import signal
import sys
from collections import namedtuple
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from blyan_node.hub import child
from blyan_node.services.hub import Downloaded, Hub
from blyan_node.services.publish import Publish, Published
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.daemons import alive
from blyan_node.testing.hub_server import Fault, HubServer, Repository, files_of
from blyan_node.testing.publishing import publishing, rows
from blyan_node.testing.trio_tests import trio_test
from protocols import limits
from protocols.errors import ErrorCode, Refused
from storage.store import Store, open_store

pytestmark = pytest.mark.slow  # a process for each download

NAME = "hf:acme/tiny"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint("mixtral", tmp_path_factory.mktemp("tiny") / "a", sharded=True)
    (path / "LICENSE").write_text("do as you like")
    return path


@pytest.fixture
def files(tiny: Path) -> dict[str, bytes]:
    """What the repository has besides a model: all that is never to be downloaded."""
    beside = {
        "pytorch_model.bin": b"\x80\x04N.", "training_args.pt": b"\x80\x04", "a.py": b"import os",
        ".gitattributes": b"*", "consolidated.safetensors": bytes(5_000), "original/w.pth": b"\x80",
    }  # fmt: skip
    return files_of(tiny) | beside


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the environment leads elsewhere, and nothing waits long."""
    for name in os.environ:
        if name.startswith("HF_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", "/nonexistent")
    monkeypatch.setattr(limits, "hub_pause_s", 0)


@pytest.fixture
def server(files: dict[str, bytes]) -> Iterator[HubServer]:
    with HubServer(page=4) as hub:
        hub.repositories["acme/tiny"] = Repository()
        hub.repositories["acme/tiny"].commit(files, "main", "v1.0")
        yield hub


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "home" / "data") as store:
        yield store


class Node:
    """Publishing from the hub, as the RPC does it."""

    def __init__(self, store: Store, server: HubServer, home: Path) -> None:
        self.store = store
        self.folder = home / "downloads"
        self.hub = Hub(self.folder, server.url)
        self.publish: Publish = publishing(store)
        self.told: list[tuple[int, int | None, str]] = []

    async def __call__(self, text: str = NAME, name: str = "tiny") -> tuple[Downloaded, Published]:
        inspect = partial(self.needs, name=name)
        async with self.hub.downloaded(text, inspect, lambda *a: self.told.append(a)) as found:
            return found, await self.publish.publish(found.path, name, origin=found.origin)

    async def needs(self, path: Path, name: str = "tiny") -> int:
        found = await self.publish.inspect(path, name)
        return found.bytes if found.model is None else 0

    @property
    def partials(self) -> dict[str, int]:
        """Sizes of what was begun, by file name."""
        found = (self.folder / "acme--tiny").glob("*.partial")
        return {p.name.rsplit(".", 2)[0]: p.stat().st_size for p in found}


@pytest.fixture
def alice(store: Store, server: HubServer, tmp_path: Path) -> Node:
    return Node(store, server, tmp_path / "home")


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process ids of hub processes that were started."""
    started: list[int] = []
    real = trio.lowlevel.open_process

    async def opened(*args: Any, **options: Any) -> trio.Process:
        process = await real(*args, **options)
        started.append(process.pid)
        return process

    monkeypatch.setattr(child.trio.lowlevel, "open_process", opened)
    return started


@trio_test
async def test_the_same_model_as_from_a_directory(alice, server, tiny, files, processes) -> None:
    found, done = await alice()
    commit = server.repositories["acme/tiny"].revisions["main"]
    assert found.source == found.origin == f"{NAME}@{commit}"
    assert done.reused_bytes == 0 and done.experts == 18
    again = await alice.publish.publish(tiny, "tiny")
    assert (again.blocks, again.model, again.root) == (0, done.model, done.root)
    (release,) = alice.store.releases(done.model)
    assert alice.store.block(release).header.meta == {"source": found.source}
    # Only what is needed, each byte once.
    needed = {p.name for p in tiny.iterdir()}
    assert server.served == {name: len(files[name]) for name in needed}
    assert not (alice.folder / "acme--tiny").exists()
    assert [pid for pid in processes if alive(pid)] == []
    total = sum(map(len, (files[name] for name in needed)))
    assert alice.told[-1] == (total, total, "downloading acme/tiny")
    assert all(done <= total for done, _, _ in alice.told)


@trio_test
async def test_a_single_file_of_weights(alice, server, tmp_path) -> None:
    path = make_checkpoint("olmoe", tmp_path / "one")
    server.repositories["acme/tiny"].commit(files_of(path), "main")
    _, done = await alice()
    assert (await alice.publish.publish(path, "tiny")).root == done.root


SHARD = "model-00002-of-00014.safetensors"


@pytest.mark.parametrize(("name", "cut"), [("LICENSE", 1), (SHARD, 2_500), (SHARD, 30_000)])
@trio_test
async def test_an_answer_that_is_cut_off_is_gone_on_with(
    alice, server, files, monkeypatch, name, cut
) -> None:
    """Every answer ends after so many bytes, and no byte is sent twice."""
    monkeypatch.setattr(limits, "hub_outline_bytes", 100)
    server.faults[name] = Fault(cut=cut)
    await alice()
    assert server.served[name] == len(files[name])
    if name == SHARD:
        begins = [begin for begin, _ in server.ranges(SHARD)]
        assert begins == sorted(set(begins)) and len(begins) > len(files[name]) // cut


@trio_test
async def test_a_hub_that_brings_nothing_any_more(alice, server, files, tmp_path) -> None:
    """Given up after so many tries; the next download goes on where this one was."""
    server.faults[SHARD] = Fault(status=503)
    before = rows(alice.store)
    with pytest.raises(Refused, match="status 503") as refused:
        await alice()
    assert refused.value.code is ErrorCode.HUB_FAILED and refused.value.data["file"] == SHARD
    assert len(server.ranges(SHARD)) == limits.hub_tries_max + 1
    assert rows(alice.store) == before
    server.forget()
    server.faults.clear()
    await alice()
    assert server.served[SHARD] == len(files[SHARD]) and server.served["config.json"] == 0


@trio_test
async def test_a_cancelled_download_is_resumed(alice, server, files, processes) -> None:
    """The second one is served only what the first has not written."""
    server.faults[SHARD] = Fault(cut=40_000, hang=True)
    before = rows(alice.store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice)
        await trio.to_thread.run_sync(server.hanging.wait)
        while alice.partials.get(SHARD) != 40_000:
            await trio.sleep(0)
        nursery.cancel_scope.cancel()
    assert [pid for pid in processes if alive(pid)] == []
    assert rows(alice.store) == before
    here = alice.partials
    assert here[SHARD] == 40_000 < len(files[SHARD])
    server.faults.clear()
    server.forget()
    _, done = await alice()
    assert done.blocks > 18
    for name, size in here.items():
        assert server.served[name] == len(files[name]) - size, name
    assert server.ranges(SHARD) == [(40_000, len(files[SHARD]))]


@trio_test
async def test_a_hub_that_sends_no_ranges(alice, server, files, monkeypatch) -> None:
    """Then the file begins anew, and is right all the same."""
    monkeypatch.setattr(limits, "hub_outline_bytes", 4_000)
    server.faults[SHARD] = Fault(no_ranges=True)
    await alice()
    assert len(server.ranges(SHARD)) > 1 and server.served[SHARD] >= len(files[SHARD])


@trio_test
async def test_what_lies_there_is_checked(alice, server, files) -> None:
    """A partial file that was damaged is fetched anew, once."""
    server.faults["generation_config.json"] = Fault(status=503)
    with pytest.raises(Refused):
        await alice()
    server.faults.clear()
    folder = alice.folder / "acme--tiny"
    (config,) = folder.glob("config.json.*.partial")
    config.write_bytes(b"x" * len(files["config.json"]))
    server.forget()
    await alice()
    assert server.served["config.json"] == len(files["config.json"])


@trio_test
async def test_revisions(alice, server, files) -> None:
    repository = server.repositories["acme/tiny"]
    first = repository.revisions["v1.0"]
    second = repository.commit(files | {"README.md": b"# two"}, "main", "pr/2")
    found, _ = await alice(f"{NAME}@v1.0")
    assert found.source == f"{NAME}@{first}"
    found, done = await alice(f"{NAME}@{first}", "again")
    assert found.source == f"{NAME}@{first}" and done.reused_bytes == done.bytes
    found, _ = await alice(f"{NAME}@pr/2", "third")
    assert found.source == f"{NAME}@{second}"
    with pytest.raises(Refused, match=r"with other README\.md") as refused:
        await alice(NAME, "tiny")
    assert refused.value.code is ErrorCode.CONFLICT


@trio_test
async def test_another_commit_reuses_what_is_the_same(alice, server, files) -> None:
    """Files are known by their content, whatever commit they came with."""
    last = max(name for name in files if name.startswith("model-"))
    server.faults[last] = Fault(status=503)
    with pytest.raises(Refused):
        await alice()
    server.faults.clear()
    server.forget()
    changed = bytearray(files[SHARD])
    changed[-1] ^= 1
    server.repositories["acme/tiny"].commit(
        {n: d for n, d in files.items() if n != "LICENSE"} | {SHARD: bytes(changed)}, "main"
    )
    _, done = await alice()
    assert {n: c for n, c in server.served.items() if c} == {
        SHARD: len(changed), last: len(files[last]),
    }  # fmt: skip
    _, manifest = alice.store.body(done.model)
    assert "LICENSE" not in {entry.name for entry in manifest.tensors}


Case = namedtuple("Case", "text fault code why")


def _tree(name: str, oid: str) -> bytes:
    return f'[{{"type":"file","path":"{name}","size":7,"oid":"{oid}"}}]'.encode()


MISSING = [
    Case("hf:acme/none", {}, ErrorCode.NOT_FOUND, "knows no such model.*HF_TOKEN"),
    Case(f"{NAME}@v9", {}, ErrorCode.NOT_FOUND, "no such revision"),
    Case("hf:tiny", {}, ErrorCode.BAD_INPUT, "the form is hf:ORG/NAME"),
    Case(f"{NAME}@../../x", {}, ErrorCode.BAD_INPUT, "the form is"),
    Case("hf:acme/../../etc", {}, ErrorCode.BAD_INPUT, "the form is"),
    Case(NAME, {"info": Fault(body=b"<html>")}, ErrorCode.HUB_FAILED, "cannot be used"),
    Case(NAME, {"info": Fault(body=b"[1]")}, ErrorCode.HUB_FAILED, "cannot be used"),
    Case(NAME, {"tree": Fault(body=b"{}")}, ErrorCode.BAD_MODEL, r"has no config\.json"),
    Case(NAME, {"tree": Fault(body=b'[{"type":"file","path":"config.json"}]')},
         ErrorCode.HUB_FAILED, "cannot be used"),
    Case(NAME, {"tree": Fault(body=b'[{"type":"file","path":"config.json","size":"x","oid":"1"}]')},
         ErrorCode.HUB_FAILED, "no size or hash"),
    *(
        Case(NAME, {"tree": Fault(body=_tree(name, oid))}, ErrorCode.HUB_FAILED, why)
        for name, oid, why in (
            ("../../secret", "0" * 40, "no name of a file"),
            ("..", "0" * 40, "no name of a file"),
            ("a\\\\b", "0" * 40, "no name of a file"),
            ("LICENSE", "../" * 13 + "x", "no size or hash"),
            ("LICENSE", "A" * 40, "no size or hash"),
        )
    ),
    Case(NAME, {"tree": Fault(body=b"[]")}, ErrorCode.BAD_MODEL, "has no config.json"),
    Case(NAME, {"info": Fault(status=418)}, ErrorCode.HUB_FAILED, "status 418"),
    Case(NAME, {SHARD: Fault(size=60_000)}, ErrorCode.HUB_FAILED, SHARD),
    Case(NAME, {SHARD: Fault(size=10)}, ErrorCode.BAD_MODEL, "a header of"),
    Case(NAME, {"LICENSE": Fault(size=10)}, ErrorCode.HUB_FAILED, "does not have the hash"),
    Case(NAME, {"LICENSE": Fault(size=20)}, ErrorCode.HUB_FAILED, "status 416|ended after"),
    Case(NAME, {"LICENSE": Fault(body=b"do as WE liked")}, ErrorCode.HUB_FAILED, "have the hash"),
    Case(NAME, {"LICENSE": Fault(body=b"do as you like, no more", no_ranges=True)},
         ErrorCode.HUB_FAILED, "is longer than the 14 bytes"),
    Case(NAME, {SHARD: Fault(body=b"\x00" * 60_000)}, ErrorCode.BAD_MODEL, f"{SHARD}: Expecting"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(MISSING)))
@trio_test
async def test_what_the_hub_cannot_or_should_not_say(alice, server, processes, case) -> None:
    """Refused by name; nothing is stored, and no process is left."""
    text, faults, code, why = MISSING[case]
    server.faults |= faults
    secret = alice.folder.parent / "secret"
    secret.write_text("decoy\n\n")
    before = rows(alice.store)
    with pytest.raises(Refused, match=why) as refused:
        await alice(text)
    assert refused.value.code is code and refused.value.data, refused.value
    assert rows(alice.store) == before
    assert [pid for pid in processes if alive(pid)] == []
    assert not list(alice.folder.glob("*/*.safetensors"))
    assert secret.read_text() == "decoy\n\n"


@trio_test
async def test_a_gated_model(alice, server) -> None:
    server.repositories["acme/tiny"].gated = True
    with pytest.raises(Refused, match="HF_TOKEN") as refused:
        await alice()
    assert refused.value.code is ErrorCode.NOT_ALLOWED


@trio_test
async def test_a_private_model_is_published_without_its_origin(alice, server) -> None:
    server.repositories["acme/tiny"].private = True
    found, done = await alice()
    assert found.origin is None and found.source.startswith(NAME)
    (release,) = alice.store.releases(done.model)
    assert alice.store.block(release).header.meta == {}


@trio_test
async def test_a_token_goes_to_the_hub_alone(alice, server, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    await alice()
    assert {a.authorization for a in server.asked if not a.network} == {"Bearer hf_secret"}
    assert {a.authorization for a in server.asked if a.network} == {None}


@pytest.mark.parametrize(
    ("token", "faults"),
    [
        ("hf_secret", {"info": Fault(status=500)}),
        ("hf_secret", {"tree": Fault(status=401)}),
        ("hf_secret", {"tree": Fault(body=b"<html>hf_secret</html>")}),
        ("hf_secret", {SHARD: Fault(status=403)}),
        ("hf_secret", {"LICENSE": Fault(body=b"do as WE liked")}),
        ("hf_se\ncret", {}),
        ("hf_secr\u00e9t", {}),
    ],
)
@trio_test
async def test_a_token_is_never_told(
    alice, server, monkeypatch, caplog, capfd, token, faults
) -> None:
    """Not even where a hub says in its errors what it was sent."""
    monkeypatch.setenv("HF_TOKEN", token)
    server.faults |= faults
    with caplog.at_level(logging.DEBUG), pytest.raises(Refused) as refused:
        await alice()
    said = (str(refused.value), str(refused.value.data), caplog.text, *capfd.readouterr())
    assert "HF_TOKEN" in said[0] or server.asked
    for part in token.split():
        assert not [text for text in said if part in text or ascii(part)[1:-1] in text]


@trio_test
async def test_a_token_from_a_file_with_a_line_end(alice, server, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret\r\n")
    await alice()
    assert "Bearer hf_secret" in {a.authorization for a in server.asked}


@trio_test
async def test_names_that_are_never_read_are_never_files(alice, server, files, tmp_path) -> None:
    """Too long a name for the disk, and names that we use ourselves."""
    beside = ("x" * 300, "outline", ".library", f"{SHARD}.{'0' * 16}.partial", "acme--tiny")
    server.repositories["acme/tiny"].commit(files | dict.fromkeys(beside, b"not ours"), "main")
    _, done = await alice()
    assert done.experts == 18 and not any(server.served[name] for name in beside)


@trio_test
async def test_a_disk_that_fills_during_the_download(alice, server, files, monkeypatch) -> None:
    """A bound on file sizes is what it looks like: refused, kept, and gone on with."""
    most = len(files[SHARD]) - 10_000
    bounded = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, resource.RLIM_INFINITY))
from blyan_node.hub.process import main
main()
"""
    monkeypatch.setattr(limits, "hub_outline_bytes", 4_096)
    before = rows(alice.store)
    with monkeypatch.context() as patch:
        patch.setattr(child, "COMMAND", (sys.executable, "-c", bounded))
        with pytest.raises(Refused, match="File too large") as refused:
            await alice()
    assert refused.value.code is ErrorCode.DISK_FULL and "Free some space" in str(refused.value)
    assert refused.value.data["file"] in files and rows(alice.store) == before
    name = str(refused.value.data["file"])
    had, _ = alice.partials[name], server.forget()
    assert 0 < had <= most
    await alice()
    assert server.served[name] == len(files[name]) - had


@pytest.mark.parametrize("where", ["info", "tree", "LICENSE", SHARD])
@trio_test
async def test_a_hub_that_hangs(alice, server, monkeypatch, processes, where) -> None:
    """Its silence ends the request; what came is kept."""
    monkeypatch.setattr(limits, "hub_silence_s_max", 3)
    server.faults[where] = Fault(cut=5, hang=True)
    with pytest.raises(Refused, match="does not answer") as refused:
        await alice()
    assert refused.value.code is ErrorCode.TIMEOUT and refused.value.data
    assert [pid for pid in processes if alive(pid)] == []


@trio_test
async def test_a_request_that_hangs_is_made_again(alice, server, files, monkeypatch) -> None:
    monkeypatch.setattr(limits, "hub_read_s_max", 1)
    server.faults[SHARD] = Fault(cut=40_000, hang=True)
    await alice()
    assert [begin for begin, _ in server.ranges(SHARD)] == [0, 40_000]
    assert server.served[SHARD] == len(files[SHARD])


@trio_test
async def test_no_hub_at_all(alice, server, monkeypatch) -> None:
    alice.hub = Hub(alice.folder, "http://127.0.0.1:1")
    with pytest.raises(Refused, match="cannot be reached") as refused:
        await alice()
    assert refused.value.code is ErrorCode.HUB_FAILED


@trio_test
async def test_a_process_that_dies(alice, server, processes) -> None:
    server.faults["info"] = Fault(hang=True)

    async def kill() -> None:
        await trio.to_thread.run_sync(server.hanging.wait)
        os.kill(processes[0], signal.SIGKILL)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill)
        with pytest.raises(Refused, match="its process has died"):
            await alice()


@trio_test
async def test_without_the_extra(alice, server, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Refused, match=r"pip install 'blyan-node\[hub\]'") as refused:
        await alice()
    assert refused.value.code is ErrorCode.NOT_ALLOWED and not server.asked


@trio_test
async def test_a_configuration_that_is_not_read_costs_no_weights(alice, server, files) -> None:
    config = files["config.json"].replace(b'"silu"', b'"gelu_new"')
    server.repositories["acme/tiny"].commit(files | {"config.json": config}, "main")
    before = rows(alice.store)
    with pytest.raises(Refused, match="hidden_act is 'gelu_new'"):
        await alice()
    assert rows(alice.store) == before and not (alice.folder / "acme--tiny").exists()


@trio_test
async def test_a_shape_that_does_not_fit_costs_the_headers(
    alice, server, files, monkeypatch
) -> None:
    monkeypatch.setattr(limits, "hub_outline_bytes", 64)
    config = files["config.json"].replace(b'"vocab_size": 97', b'"vocab_size": 98')
    server.repositories["acme/tiny"].commit(files | {"config.json": config}, "main")
    with pytest.raises(Refused, match="has the shape"):
        await alice()
    weights = {n: d for n, d in files.items() if n.startswith("model-")}
    served = sum(server.served[name] for name in weights)
    assert 0 < served < sum(map(len, weights.values())) / 10


@trio_test
async def test_a_missing_shard_and_only_pickles(alice, server, files) -> None:
    repository = server.repositories["acme/tiny"]
    repository.commit({n: d for n, d in files.items() if n != SHARD}, "main")
    with pytest.raises(Refused, match=f"the shard {SHARD} is missing"):
        await alice()
    repository.commit({n: d for n, d in files.items() if "safetensors" not in n}, "main")
    with pytest.raises(Refused, match=r"pytorch_model\.bin is a pickle"):
        await alice()
    assert not server.served["pytorch_model.bin"]


@trio_test
async def test_no_room_for_the_download_or_for_the_blocks(
    alice, server, files, monkeypatch
) -> None:
    """Free space is needed twice, beside the reserve; `--disk` bounds the store alone."""
    monkeypatch.setattr(limits, "hub_outline_bytes", 4_096)
    usage = shutil.disk_usage(alice.store._directory)
    total = sum(len(d) for n, d in files.items() if n in {"config.json"} or n.startswith("model-"))
    short = usage._replace(free=limits.disk_reserve_bytes + total + total // 2)
    with monkeypatch.context() as patch:
        patch.setattr("blyan_node.services.hub.shutil.disk_usage", lambda path: short)
        with pytest.raises(Refused, match="to be downloaded") as refused:
            await alice()
    data = refused.value.data
    assert refused.value.code is ErrorCode.DISK_FULL
    assert data["download_bytes"] + data["new_bytes"] > data["room_bytes"] > data["new_bytes"]
    alice.store.chunks.quota_bytes = total // 2
    with pytest.raises(Refused, match="--disk allows"):
        await alice()
    assert server.served[SHARD] < len(files[SHARD])
    alice.store.chunks.quota_bytes = None
    await alice()


@trio_test
async def test_a_dry_run_takes_no_weights_and_leaves_nothing(alice, server, files) -> None:
    before = rows(alice.store)
    async with alice.hub.outlined(NAME, alice.needs) as found:
        weights = sum(len(d) for n, d in files.items() if n.startswith("model-"))
        assert 0 <= found.missing_bytes < weights
        inspected = await alice.publish.inspect(found.path, "tiny")
    assert not (alice.folder / "acme--tiny").exists() and rows(alice.store) == before
    _, done = await alice()
    assert (inspected.blocks, inspected.experts, inspected.bytes) == (
        done.blocks, done.experts, done.bytes,
    )  # fmt: skip


@trio_test
async def test_a_dry_run_keeps_what_an_earlier_download_brought(
    alice, server, files, monkeypatch
) -> None:
    monkeypatch.setattr(limits, "hub_outline_bytes", 64)
    server.faults["config.json"] = Fault(status=503)
    with pytest.raises(Refused):
        await alice()
    server.faults.clear()
    async with alice.hub.outlined(NAME, alice.needs) as found:
        assert found.missing_bytes > 100_000
    assert alice.partials["config.json"] == len(files["config.json"])


@trio_test
async def test_a_dry_run_of_what_is_all_here_reads_it(alice, server, monkeypatch) -> None:
    with pytest.raises(RuntimeError):
        async with alice.hub.downloaded(NAME, alice.needs, lambda *a: None):
            raise RuntimeError  # the publish fails, and the download stays
    server.forget()
    async with alice.hub.outlined(NAME, alice.needs) as found:
        assert found.missing_bytes == 0
        rehearsed = await alice.publish.rehearse(found.path, "tiny")
    assert sum(server.served.values()) == 0
    _, done = await alice()
    assert (rehearsed.blocks, rehearsed.bytes) == (done.blocks, done.bytes)
    assert sum(server.served.values()) == 0
