"""The stages that need the chain, by script."""

from collections.abc import Iterable

import pytest

from blyan_node.testing.blocks import Author, Made
from protocols.dag.admission import Accepted, Admission, Duplicate, Parked, Staged, admit
from protocols.dag.header import Kind
from protocols.dag.heads import heads_of
from protocols.dag.release import encode_release
from protocols.dag.view import MemoryView
from protocols.errors import RemoteProtocolError
from protocols.ids import BlockId, Subject, model_root


def feed(view: MemoryView, made: Made, *, body: bool = True) -> Admission:
    """What a node does with a block that came with its manifest (and its body, if a release)."""
    view.manifests[made.manifest_id] = made.manifest
    if body and made.subjects is not None:
        view.bodies[made.id] = made.subjects
    admission = admit(made.block, view)
    if isinstance(admission, Staged):
        view.stage(made.block)
    if isinstance(admission, Accepted):
        view.accept(admission.blocks, {admission.model: admission.heads})
    return admission


def feed_all(view: MemoryView, made: Iterable[Made]) -> list[Admission]:
    return [feed(view, m) for m in made]


@pytest.fixture
def alice() -> Author:
    return Author("alice")


def test_a_publish_takes_effect_with_its_release(alice: Author) -> None:
    view = MemoryView()
    published = alice.publish()
    *staged, last = feed_all(view, published)
    assert all(isinstance(a, Staged) for a in staged)
    assert isinstance(last, Accepted)
    assert {b.id for b in last.blocks} == {m.id for m in published}
    assert last.blocks[0].id == published[0].id and last.blocks[-1].id == published[-1].id
    assert last.heads == published[-1].subjects
    assert last.root == model_root(published[0].id, last.heads)
    assert view.models() == [published[0].id]


def test_what_is_here_is_a_duplicate(alice: Author) -> None:
    view = MemoryView()
    published = alice.publish()
    feed_all(view, published[:-1])
    assert isinstance(feed(view, published[0]), Duplicate)
    assert isinstance(feed(view, published[1]), Duplicate)
    feed(view, published[-1])
    assert all(isinstance(a, Duplicate) for a in feed_all(view, published))


def test_a_release_waits_for_manifest_then_body_then_parts(alice: Author) -> None:
    view = MemoryView()
    model, *parts, release = alice.publish()
    feed(view, model)
    admission = admit(release.block, view)
    assert isinstance(admission, Parked) and admission.manifests == {release.manifest_id}
    admission = feed(view, release, body=False)
    assert isinstance(admission, Parked) and admission.bodies == {release.id}
    feed(view, parts[0])
    admission = feed(view, release)
    assert isinstance(admission, Parked)
    assert admission.blocks == {p.id for p in parts[1:]}
    feed_all(view, parts[1:])
    assert isinstance(feed(view, release), Accepted)


def test_an_update_waits_for_its_base_to_be_accepted(alice: Author) -> None:
    view = MemoryView()
    model, embed, expert, release = alice.publish()
    update = alice.update(expert, b"new")
    admission = feed(view, update)
    assert isinstance(admission, Parked) and admission.blocks == {model.id, expert.id}
    feed_all(view, (model, embed, expert))
    admission = feed(view, update)
    assert isinstance(admission, Parked) and not admission.blocks
    assert admission.unaccepted == {model.id, expert.id}
    feed(view, release)
    admission = feed(view, update)
    assert isinstance(admission, Accepted)
    assert admission.heads == {"embed": embed.id, "layer0.expert0": update.id}


def test_a_second_release_makes_staged_updates_effective(alice: Author) -> None:
    view = MemoryView()
    model, embed, expert, release = alice.publish()
    feed_all(view, (model, embed, expert, release))
    newer = alice.part(model.id, "layer0.expert0", b"v2", base=expert.id)
    second = alice.release(model.id, (embed, newer), base=release.id)
    assert isinstance(feed(view, newer), Staged)
    admission = feed(view, second)
    assert isinstance(admission, Accepted)
    assert [b.id for b in admission.blocks] == [newer.id, second.id]
    assert admission.heads["layer0.expert0"] == newer.id


def test_two_successors_of_one_base_are_a_fork_and_the_smaller_id_wins(alice: Author) -> None:
    model, embed, expert, release = alice.publish()
    one, two = sorted((alice.update(expert, b"1"), alice.update(expert, b"2")), key=lambda m: m.id)
    after_two = alice.update(two, b"3")
    for order in ((one, two, after_two), (two, after_two, one)):
        view = MemoryView()
        feed_all(view, (model, embed, expert, release, *order))
        whole = heads_of(model.id, view)
        assert whole is not None and whole.heads["layer0.expert0"] == one.id
        assert dict(view.heads(model.id)) == whole.heads
        (fork,) = whole.forks
        assert (fork.subject, fork.base) == ("layer0.expert0", expert.id)
        assert (fork.chosen, fork.others) == (one.id, (two.id,))


def refused(view: MemoryView, made: Made, stage: str, match: str) -> None:
    with pytest.raises(RemoteProtocolError, match=match) as caught:
        feed(view, made)
    assert caught.value.where == f"block/{stage}"


def test_what_can_never_fit_is_refused_by_its_stage(alice: Author) -> None:
    view = MemoryView()
    model, embed, expert, release = alice.publish()
    feed_all(view, (model, embed, expert, release))
    mallory = Author("mallory")
    refused(view, mallory.update(expert, b"x"), "author", "not the model's")
    refused(view, mallory.part(model.id, "head"), "author", "not the model's")
    refused(view, mallory.release(model.id, [embed]), "author", "not the model's")
    refused(view, alice.part(embed.id, "head"), "parents", "not a model block")
    other = alice.part(model.id, "head", base=expert.id, staged=False)
    refused(view, other, "base", "not of the same model and subject")
    short = alice.make(Kind.RELEASE, {"other": b"x"}, model=model.id)
    refused(view, short, "body", "not `release`")
    fewer = alice.release(model.id, [embed], base=release.id)
    refused(view, fewer, "release", "other subjects than the release before")


def test_a_manifest_that_does_not_fit_the_header_is_refused(alice: Author) -> None:
    view = MemoryView()
    model = alice.model()
    feed(view, model)
    made = alice.part(model.id, "embed", b"12345")
    view.manifests[made.manifest_id] = alice.part(model.id, "embed", b"123").manifest
    with pytest.raises(RemoteProtocolError, match="3 bytes, not 5"):
        admit(made.block, view)


def test_a_release_lists_blocks_of_its_model_under_their_subjects(alice: Author) -> None:
    view = MemoryView()
    model, embed, expert, _ = alice.publish()
    other_model, other, *_ = alice.publish("other")
    feed_all(view, (model, embed, expert, other_model, other))

    def listing(subjects: dict[str, BlockId]) -> Made:
        listed = {Subject(s): id for s, id in subjects.items()}
        body = {"release": encode_release(listed)}
        return alice.make(Kind.RELEASE, body, model=model.id, subjects=listed)

    refused(view, listing({"head": embed.id}), "release", "something else")
    refused(view, listing({"embed": other.id}), "release", "something else")
    refused(view, listing({"embed": model.id}), "release", "something else")
    based = alice.part(model.id, "embed", b"2", base=embed.id)
    feed(view, based)
    refused(view, listing({"embed": based.id}), "release", "has a base")


def test_parents_may_be_in_any_model_and_diamonds_are_fine(alice: Author) -> None:
    view = MemoryView()
    model, embed, expert, release = alice.publish()
    other = alice.publish("other")
    feed_all(view, (model, embed, expert, release))
    left = alice.update(embed, b"l", parents=[other[-1].id])
    right = alice.update(expert, b"r", parents=[other[-1].id, left.id])
    assert isinstance(feed(view, right), Parked)
    admission = feed(view, left)
    assert isinstance(admission, Parked) and admission.blocks == {other[-1].id}
    feed_all(view, other)
    assert isinstance(feed(view, left), Accepted)
    assert isinstance(feed(view, right), Accepted)
