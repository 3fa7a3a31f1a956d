"""The same set of blocks gives the same chain, in whatever order they arrive."""

import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from blyan_node.testing.blocks import Author, Made
from protocols.dag.admission import Accepted, Duplicate, Parked, Staged, admit
from protocols.dag.heads import heads_of
from protocols.dag.order import topological
from protocols.dag.orphans import OrphanPool, PoolLimits
from protocols.dag.view import MemoryView
from protocols.ids import BlockId

SUBJECTS = ("embed", "layer0.router", "layer0.expert0", "layer0.expert1")


class Node:
    """The smallest node: a view, a pool, and nothing that is lost."""

    def __init__(self, bounds: PoolLimits) -> None:
        self.view = MemoryView()
        self.pool = OrphanPool(bounds)

    def receive(self, made: Made) -> None:
        self.view.manifests[made.manifest_id] = made.manifest
        if made.subjects is not None:
            self.view.bodies[made.id] = made.subjects
        queue = [made.block]
        while queue:
            block = queue.pop()
            admission = admit(block, self.view)
            arrived: list[bytes] = []
            match admission:
                case Parked():
                    self.pool.add(admission, "peer")
                case Staged():
                    self.view.stage(block)
                    arrived = [block.id]
                case Accepted():
                    self.view.accept(admission.blocks, {admission.model: admission.heads})
                    arrived = [b.id for b in admission.blocks]
                    whole = heads_of(admission.model, self.view)
                    assert whole is not None
                    assert (dict(admission.heads), admission.root) == (whole.heads, whole.root)
                case Duplicate():
                    pass
            queue.extend(orphan.block for orphan in self.pool.arrived(arrived))


def random_dag(rng: random.Random) -> list[Made]:
    """Models, releases, updates and forks of all of these by two authors."""
    made: list[Made] = []
    for name in ("alice", "bob")[: rng.randint(1, 2)]:
        author = Author(name)
        model = author.model(f"model-{name}")
        parts = [author.part(model.id, s, f"{name}{s}".encode()) for s in SUBJECTS]
        releases = [author.release(model.id, parts)]
        made += [model, *parts, *releases]
        versions = {s: [p] for s, p in zip(SUBJECTS, parts, strict=True)}
        for step in range(rng.randint(0, 12)):
            others = [m.id for m in made if m.block.header.model is None]
            extra = rng.sample(others, rng.randint(0, len(others)))
            subject = rng.choice(SUBJECTS)
            match rng.choice(("update", "update", "update", "release", "first", "unlisted")):
                case "update":
                    before = rng.choice(versions[subject][-3:])
                    new = author.update(before, str(step).encode(), parents=extra)
                    versions[subject].append(new)
                    made.append(new)
                case "release":
                    listed = {s: rng.choice(v) for s, v in versions.items()}
                    before = rng.choice(versions[subject])
                    new = author.part(model.id, subject, b"r%d" % step, base=before.id)
                    listed[subject] = new
                    base = rng.choice(releases)
                    releases.append(author.release(model.id, list(listed.values()), base=base.id))
                    versions[subject].append(new)
                    made += [new, releases[-1]]
                case "first":
                    new = author.part(model.id, subject, b"f%d" % step)
                    listed = dict(zip(SUBJECTS, parts, strict=True)) | {subject: new}
                    releases.append(author.release(model.id, list(listed.values())))
                    versions[subject].append(new)
                    made += [new, releases[-1]]
                case "unlisted":
                    made.append(author.part(model.id, subject, b"u%d" % step))
    return made


def picture(view: MemoryView) -> object:
    accepted: set[BlockId] = set(view.log)
    return (
        accepted,
        set(view.blocks),
        sorted(view.models()),
        {m: heads_of(m, view) for m in view.models()},
        {m: dict(view.heads(m)) for m in view.models()},
        topological(view.blocks[id] for id in accepted),
    )


def fed(order: Sequence[Made], bounds: PoolLimits) -> MemoryView:
    node = Node(bounds)
    for made in order:
        node.receive(made)
    return node.view


ROOMY = PoolLimits(1000, 10**7, 1000, 10**7)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_any_order_of_arrival_gives_the_same_chain(seed: int) -> None:
    rng = random.Random(seed)
    dag = random_dag(rng)
    expected = picture(fed(dag, ROOMY))
    for _ in range(4):
        shuffled = rng.sample(dag, len(dag)) + rng.sample(dag, len(dag) // 2)
        assert picture(fed(shuffled, ROOMY)) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_a_small_pool_only_delays(seed: int) -> None:
    """What a full pool dropped comes again, as sync does it, and the result is the same."""
    rng = random.Random(seed)
    dag = random_dag(rng)
    expected = picture(fed(dag, ROOMY))
    node = Node(PoolLimits(3, 10**6, 2, 10**6))
    for _ in range(len(dag)):
        for made in rng.sample(dag, len(dag)):
            node.receive(made)
            assert len(node.pool) <= 2
    assert picture(node.view) == expected


def test_the_log_has_parents_first() -> None:
    rng = random.Random(7)
    for _ in range(20):
        dag = random_dag(rng)
        view = fed(rng.sample(dag, len(dag)), ROOMY)
        seen: set[BlockId] = set()
        for id in view.log:
            assert set(view.blocks[id].header.depends_on) <= seen
            seen.add(id)


def test_order_is_parents_first_then_smallest() -> None:
    rng = random.Random(11)
    blocks = [m.block for m in random_dag(rng)]
    order = topological(blocks)
    by_id = {b.id: b for b in blocks}
    placed: set[BlockId] = set()
    for id in order:
        ready = [
            b.id
            for b in blocks
            if b.id not in placed and placed.issuperset(set(b.header.depends_on) & set(by_id))
        ]
        assert id == min(ready)
        placed.add(id)
