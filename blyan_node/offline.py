"""What is done to a home whose node does not run: `fsck` and `block drop`."""

import dataclasses
import json
from pathlib import Path

from blyan_node.config import DATA_FOLDER
from protocols.errors import ErrorCode, Refused
from protocols.ids import BlockId, cid_text, parse_cid
from storage.errors import Corrupt
from storage.fsck import Fault, Report, check
from storage.gc import drop_body
from storage.repair import repair as mend
from storage.repair import repair_databases
from storage.store import open_store

EXIT_BAD = 1
_ROUNDS_MAX = 3  # mending one thing can show another beneath it


def fsck(home: Path, *, repair: bool, as_json: bool) -> int:
    """Checks a store, mends it if asked to, and prints what it found; 1 if something is wrong.

    With `repair`, `bad` is what is still wrong afterwards and `repaired` what was.
    """
    data = _data_of(home)
    report = _check(data)
    found = report.bad
    for _ in range(_ROUNDS_MAX if repair else 0):
        if not report.ok:
            _mend(data)
            report = _check(data)
    document = {
        "ok": report.ok,
        "blocks": report.blocks,
        "chunks": report.chunks,
        "bad": [dataclasses.asdict(fault) for fault in report.bad],
    }
    if repair:
        document["repaired"] = [dataclasses.asdict(fault) for fault in found]
    if as_json:
        print(json.dumps(document))
    else:
        _show(report, found if repair else [])
    return 0 if report.ok else EXIT_BAD


def block_drop(home: Path, id: str, *, as_json: bool) -> int:
    """Removes the body of a block from a store; its header stays, as the chain goes through it."""
    block = BlockId(parse_cid(id))
    with open_store(_data_of(home)) as store:
        if store.block(block) is None:
            raise Refused(
                ErrorCode.NOT_FOUND,
                "no such block",
                f"{id} is not in this store",
                "`blyan-node model show` lists the blocks of a model.",
                {"block": id},
            )
        freed = drop_body(store, block)
    document = {"block": cid_text(block), "bytes": freed}
    print(json.dumps(document) if as_json else f"dropped {id}: {freed} bytes")
    return 0


def _data_of(home: Path) -> Path:
    data = home / DATA_FOLDER
    if not data.is_dir():
        raise Refused(
            ErrorCode.NOT_FOUND,
            f"{home} has no store",
            "there is no node's home",
            "Name the home of a node with --home.",
            {"path": str(home)},
        )
    return data


def _check(data: Path) -> Report:
    """A report, even where LevelDB itself cannot read on."""
    try:
        with open_store(data) as store:
            return check(store)
    except Corrupt as error:
        return Report(bad=[Fault("database", str(error.data.get("path", data)), error.why)])


def _mend(data: Path) -> None:
    """Repairs the databases where LevelDB cannot read them, else what the check finds."""
    try:
        with open_store(data) as store:
            report = check(store)
            if not report.ok:
                mend(store, report)
    except Corrupt:
        repair_databases(data)


def _show(report: Report, repaired: list[Fault]) -> None:
    for title, faults in (("repaired", repaired), ("bad", report.bad)):
        for fault in faults:
            print(f"{title}: {fault.what} {fault.id}: {fault.why}")
    verdict = "clean" if report.ok else f"{len(report.bad)} things are wrong"
    print(f"{report.blocks} blocks, {report.chunks} chunks: {verdict}")
    if not report.ok:
        print("`blyan-node fsck --repair` drops what is broken; the network brings it back.")
