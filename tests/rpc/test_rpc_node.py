"""Every method against a real node in this process, over its real socket."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from safetensors.torch import load_file, save_file

from blyan_node.app import run_app
from blyan_node.home import create_home, open_home
from blyan_node.parts import App
from blyan_node.rpc.ask import ask
from blyan_node.rpc.handlers import HANDLERS
from blyan_node.settings import Settings
from blyan_node.testing.checkpoints import make_checkpoint
from protocols.errors import ErrorCode, Refused
from protocols.rpc.table import METHODS

Ask = Callable[..., Any]
MODEL = "tiny"
EXPERT = "layer0.expert1"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("models") / MODEL)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Ask]:
    """Asks a gpu node that is alone in its network and has published one model."""
    home = tmp_path_factory.mktemp("alice")
    create_home(home, role="gpu", network=None)
    options = Settings(listen=["/ip4/127.0.0.1/tcp/0"], memory="1GiB", threads=1, hold="none")
    config = open_home(home, rpc=None, network=None, options=options)
    ready = threading.Event()

    def on_ready(app: App) -> None:
        assert app.readiness()["rpc"] == str(config.rpc)
        ready.set()

    async def run() -> None:
        await run_app(config, on_ready=on_ready)

    thread = threading.Thread(target=trio.run, args=(run,))
    thread.start()
    assert ready.wait(60)

    def asked(method: str, **params: object) -> Any:
        result = ask(config.rpc, method, params, timeout_s=60)
        kind = METHODS[method].result
        if isinstance(kind, type):  # the document is exactly what the table says
            assert msgspec.to_builtins(msgspec.convert(result, kind)) == result
        return result

    published = asked("model.publish", path=str(checkpoint), name=MODEL)
    assert published["blocks"] > 0
    yield asked
    assert asked("node.stop") == {"stopping": True}
    thread.join(30)
    assert not thread.is_alive(), "node.stop did not stop the node"


def _refused(code: ErrorCode, *call: Any, **params: Any) -> Refused:
    ask_node, method = call
    with pytest.raises(Refused) as caught:
        ask_node(method, **params)
    assert caught.value.code is code
    assert code in METHODS[method].errors, "the table does not tell of this error"
    return caught.value


def test_the_table_and_the_handlers_agree() -> None:
    assert HANDLERS.keys() == METHODS.keys()


def test_the_node_says_what_it_is(alone: Ask) -> None:
    status = alone("node.status")
    assert (status["role"], status["peers"], status["models"]) == ("gpu", 0, 1)
    assert status["syncing"] is None
    assert status["peer_id"] == alone("node.id")["peer_id"]
    assert alone("node.peers") == {"peers": []}
    assert alone("network.show")["id"] == status["network"]
    assert status["stored_bytes"] > 0


def test_publishing_again_changes_nothing(alone: Ask, checkpoint: Path) -> None:
    again = alone("model.publish", path=str(checkpoint), name=MODEL)
    assert again["blocks"] == 0
    assert again["reused_bytes"] == again["bytes"]


def test_a_model_is_listed_and_shown_in_the_order_of_its_parts(alone: Ask) -> None:
    (listed,) = alone("model.list")["models"]
    shown = alone("model.show", model=MODEL)
    assert {key: shown[key] for key in listed} == listed
    assert listed["held"] == 0
    names = list(shown["subjects"])
    assert names[0] == "embed"
    assert names[-2:] == ["final", "head"]
    assert sum(".expert" in name for name in names) == listed["experts"]
    assert sorted(shown["subjects"][EXPERT]["tensors"]) == ["w1.weight", "w2.weight", "w3.weight"]
    assert alone("model.show", model=f"{MODEL}@{listed['model']}") == shown
    assert alone("model.show", model=listed["model"]) == shown


def test_an_unknown_model_is_named(alone: Ask) -> None:
    for method, rest in (
        ("model.show", {}),
        ("model.fetch", {}),
        ("model.verify", {}),
        ("model.wait", {"replicas": 1}),
        ("model.export", {"out": "/nowhere/out"}),
        ("model.update", {"subject": EXPERT, "weights": "/nowhere/w"}),
        ("expert.list", {}),
        ("chain.heads", {}),
        ("chain.graph", {}),
        ("generate.run", {"prompt_ids": [1]}),
        ("forward.run", {"prompt_ids": [1], "out": "/nowhere/out"}),
    ):
        refused = _refused(ErrorCode.NOT_FOUND, alone, method, model="nowhere", **rest)
        assert "nowhere" in str(refused)


def test_what_is_stored_needs_no_fetch_and_verifies(alone: Ask) -> None:
    assert alone("model.fetch", model=MODEL) == {"blocks": 0, "bytes": 0, "peers": {}}
    verified = alone("model.verify", model=MODEL)
    assert verified["ok"] and not verified["bad"]
    chain = alone("chain.verify")
    assert chain["ok"] and chain["blocks"] == alone("chain.status")["blocks"]


def test_a_model_is_exported_as_it_came(alone: Ask, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = alone("model.export", model=MODEL, out=str(out))
    assert done["path"] == str(out)
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (checkpoint / "config.json").read_text()
    )
    _refused(ErrorCode.CONFLICT, alone, "model.export", model=MODEL, out=str(out))


def test_an_expert_is_held_used_counted_and_dropped(alone: Ask) -> None:
    before = alone("generate.run", model=MODEL, prompt_ids=[1, 2, 3], max_tokens=4)
    held = alone("expert.hold", subjects=[EXPERT])
    assert (held["subjects"], held["experts"]) == ([EXPERT], 1)
    assert alone("node.status")["held"] == {"experts": 1, "bytes": held["bytes"]}
    told = alone("expert.stats")
    (stats,) = told["experts"]
    assert stats["subject"] == EXPERT
    memory = told["memory"]
    assert memory["experts"] >= stats["bytes"] and memory["copied"] == memory["caches"] == 0
    used = memory["experts"] + memory["trunks"]
    assert memory["free"] == memory["budget"] - used and memory["packs"] >= used
    after = alone("generate.run", model=MODEL, prompt_ids=[1, 2, 3], max_tokens=4)
    assert after["token_ids"] == before["token_ids"]
    _refused(ErrorCode.LAST_COPY, alone, "expert.drop", subjects=[EXPERT])
    assert alone("expert.drop", subjects=[EXPERT], force=True)["experts"] == 0
    _refused(ErrorCode.NOT_FOUND, alone, "expert.drop", subjects=[EXPERT])


def test_experts_are_found_by_name(alone: Ask) -> None:
    every = alone("expert.list")["experts"]
    assert every == alone("expert.list", model=MODEL)["experts"]
    (one,) = alone("expert.where", subject=EXPERT)["experts"]
    assert one in every
    _refused(ErrorCode.NOT_FOUND, alone, "expert.where", subject="layer9.expert0")
    _refused(ErrorCode.BAD_INPUT, alone, "expert.where", subject="layer0.router")
    _refused(ErrorCode.BAD_INPUT, alone, "expert.hold", subjects=["nonsense"])


def test_an_answer_has_its_trace_and_its_stats(alone: Ask) -> None:
    answer = alone("generate.run", model=MODEL, prompt_ids=[1, 2, 3], max_tokens=5)
    assert len(answer["token_ids"]) == answer["stats"]["new_tokens"] == 5
    assert answer["finish"] == "length"
    me = alone("node.id")["peer_id"]
    assert {peer for entry in answer["trace"].values() for peer in entry["peers"]} == {me}


def test_a_pass_is_written_to_a_file(alone: Ask, tmp_path: Path) -> None:
    out = tmp_path / "f.safetensors"
    done = alone("forward.run", model=MODEL, prompt_ids=[1, 2, 3], out=str(out))
    assert done["out"] == str(out)
    assert load_file(out)["logits"].shape[0] == 3
    bad = str(tmp_path / "none" / "f")
    refused = _refused(
        ErrorCode.BAD_INPUT, alone, "forward.run", model=MODEL, prompt_ids=[1], out=bad
    )
    assert bad in refused.what


def test_an_update_needs_the_head_that_it_replaces(
    alone: Ask, tmp_path: Path, checkpoint: Path
) -> None:
    subject = "layer1.expert0"
    shown = alone("model.show", model=MODEL)
    head = shown["subjects"][subject]["block"]
    weights = tmp_path / "w.safetensors"
    every = {k: v for f in checkpoint.glob("*.safetensors") for k, v in load_file(f).items()}
    prefix = "model.layers.1.block_sparse_moe.experts.0."
    save_file(
        {name: every[prefix + name] * 0.5 for name in shown["subjects"][subject]["tensors"]},
        weights,
    )
    update = {"model": MODEL, "subject": subject, "weights": str(weights)}
    done = alone("model.update", **update, base=head)
    assert done["base"] == head
    assert done["root"] != shown["root"]
    assert alone("model.show", model=MODEL)["root"] == done["root"]
    save_file({name: tensor * 3 for name, tensor in load_file(weights).items()}, weights)
    stale = _refused(ErrorCode.STALE_BASE, alone, "model.update", **update, base=head)
    assert stale.data["head"] == done["block"]
    _refused(ErrorCode.NOT_FOUND, alone, "model.update", **(update | {"subject": "layer9.expert0"}))
    _refused(ErrorCode.BAD_INPUT, alone, "model.update", **update, base="bafk")
    old = alone("generate.run", model=MODEL, prompt_ids=[1, 2], max_tokens=3, root=shown["root"])
    assert old["root"] == shown["root"]


def test_the_log_is_read_in_pages(alone: Ask) -> None:
    count = alone("chain.status")["blocks"]
    found, after = [], 0
    while True:
        page = alone("chain.log", after=after, limit=7)
        found += page["entries"]
        if page["next"] is None:
            break
        after = page["next"]
    assert [entry["n"] for entry in found] == list(range(1, count + 1))
    assert found[0]["block"]["kind"] == "model"


def test_a_block_is_shown_with_its_tensors(alone: Ask) -> None:
    id = alone("model.show", model=MODEL)["subjects"][EXPERT]["block"]
    block = alone("block.show", id=id)
    assert (block["subject"], block["accepted"], block["stored"]) == (EXPERT, True, True)
    assert sum(tensor["bytes"] for tensor in block["tensors"]) == block["size"]
    unknown = id[:-4] + ("aaaa" if id[-4:] != "aaaa" else "aaba")
    _refused(ErrorCode.NOT_FOUND, alone, "block.show", id=unknown)
    _refused(ErrorCode.BAD_INPUT, alone, "block.show", id="nonsense")


def test_heads_and_graph_name_every_current_block(alone: Ask) -> None:
    (model,) = alone("chain.heads")["models"]
    shown = alone("model.show", model=MODEL)
    assert model["heads"] == {name: part["block"] for name, part in shown["subjects"].items()}
    assert model["forks"] == []
    dot = alone("chain.graph")["dot"]
    assert dot.startswith("digraph")
    assert all(id in dot for id in model["heads"].values())


def test_the_node_describes_itself(alone: Ask) -> None:
    document = alone("rpc.discover")
    assert [method["name"] for method in document["methods"]] == list(METHODS)


def test_there_is_nothing_to_cancel(alone: Ask) -> None:
    assert alone("rpc.cancel", id="nothing") == {"cancelled": False}
