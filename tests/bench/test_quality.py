"""`bench quality`: what its numbers are."""

import math
from pathlib import Path

import numpy as np
import pytest

from blyan_node.bench import quality
from blyan_node.bench.passage import PASSAGE
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.sampling import Sampler
from blyan_node.testing.arithmetic import best
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.reference import open_reference
from protocols.errors import RemoteProtocolError

IDS = [3, 17, 42, 5, 9, 23, 31, 8, 64, 12, 90, 33] * 4  # more than one piece of a prompt


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral") / "m")


def test_the_model_that_is_measured_is_the_one_that_nodes_compute(mixtral: Path) -> None:
    for precision in ("as-published", "int8"):
        said = quality.Model(Checkpoint.open(mixtral), best(), precision).say(IDS, 8, Sampler())
        truth = open_reference(mixtral, precision=precision)
        assert np.array_equal(said.logits, truth.forward(IDS)[0].numpy())
        assert said.goes_on == truth.generate(IDS, 8)


def test_perplexity_is_that_of_the_tokens_that_came() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1.0, 1.0, 1.0]], np.float32))
    assert quality.perplexity(logits, [7, 0, 1]) == pytest.approx(math.sqrt(2 * 10))
    assert quality.beginning([1, 2, 3], [1, 2, 4]) == 2
    assert quality.beginning([1, 2], [1, 2]) == 2


def test_rows_name_the_precision_and_what_was_published_is_beside(mixtral: Path) -> None:
    rows = list(
        quality.compared("tiny", Checkpoint.open(mixtral), IDS, best(), ["float32", "int8"])
    )
    names = [row.name.rsplit(" ", 1) for row in rows]
    assert [name for name, _ in names] == ["quality tiny float32"] * 3 + ["quality tiny int8"] * 3
    assert all(list(row.beside) == ["as-published"] for row in rows)
    assert [row.ratio for row in rows[:3]] == [1, 1, 1]  # float32 is what was published
    assert rows[3].ratio != 1 and 0 < rows[4].value < 1


def test_the_passage_is_long_enough_to_tell_precisions_apart() -> None:
    assert len(PASSAGE.split()) > 400


def test_without_any_model_it_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RemoteProtocolError, match="make demo"):
        list(quality.measure())
