"""Answers: tokens from a prompt, one after the other, or one pass over a prompt.

A request pins a root for as long as it runs, so an update that arrives meanwhile changes nothing
about it. Cancelling frees everything at once: what others still compute for it is dropped there.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import trio

from blyan_node.moe.arrays import tensor_of, write_tensors
from blyan_node.moe.profile import Profiles
from blyan_node.services.account import Account
from blyan_node.services.compute import Rows
from blyan_node.services.decoding import Decoding
from blyan_node.services.layers import Layers
from blyan_node.services.models import Description, Models
from blyan_node.services.prompts import Question, question, room_for
from blyan_node.services.session import Choices, Session
from blyan_node.services.supply import Progress, silent
from blyan_node.services.texts import Texts
from blyan_node.services.trunks import Trunks
from blyan_node.services.work import Work
from blyan_node.services.writer import Emit, Finish, Writer
from protocols import limits
from protocols.dag.header import Block
from protocols.errors import ErrorCode, Refused
from protocols.ids import BlockId, Root, Subject, model_root, parse_root, root_text
from protocols.precision import effective
from protocols.rpc.generate import (
    ForwardRequest,
    ForwardResult,
    GenerateRequest,
    GenerateResult,
)
from storage.store import Store


class Heads(Protocol):
    """What generation needs of the chain; `blyan_node.services.chain.Chain` is it."""

    def find_model(self, text: str, /) -> Block:
        """The model of that name or id; raises `Refused` NOT_FOUND or AMBIGUOUS."""

    def heads(self, model: BlockId, /) -> Mapping[Subject, BlockId]:
        """The current head of each subject."""


@dataclass
class _Answer:
    """A running request."""

    description: Description
    root: Root
    session: Session
    account: Account


class Generation:
    """Runs requests. `compute` is the node's limiter for products, `profiles` its own."""

    def __init__(
        self,
        chain: Heads,
        store: Store,
        models: Models,
        texts: Texts,
        trunks: Trunks,
        layers: Layers,
        compute: trio.CapacityLimiter,
        profiles: Profiles,
    ) -> None:
        self._chain = chain
        self._store = store
        self._models = models
        self._texts = texts
        self._trunks = trunks
        self._layers = layers
        self._compute = compute
        self._profiles = profiles
        self.work = Work()

    @property
    def running(self) -> int:
        """How many requests are being answered."""
        return self.work.running

    async def generate(
        self,
        request: GenerateRequest,
        emit: Emit,
        *,
        progress: Progress = silent,
        cancelled: trio.Event | None = None,
        on_begin: Callable[[], None] = lambda: None,
    ) -> GenerateResult:
        """Answers a prompt; `emit` gets each token as soon as it is there.

        Once `on_begin` has been called the model is loaded, and when `cancelled` is set the answer
        ends with what there is. Raises `Refused`.
        """
        async with (
            self._open(request, progress) as answer,
            self._texts.use(answer.description) as text,
        ):
            asked = await question(request, answer.description, text)
            prompt = asked.prompt
            answer.account.prompt_tokens = len(prompt)
            writer = Writer(asked.speech, answer.account, emit, asked.ends)
            decode = partial(self._decode, asked, answer, writer)
            async with answer.session.room(len(prompt) + asked.ends.most):
                on_begin()
                finish = answer.account.outcome = await _until(cancelled, decode)
            return GenerateResult(
                token_ids=writer.ids,
                text=await writer.end(),
                root=root_text(answer.root),
                reasoning=writer.reasoning,
                finish=finish,
                sampling=asked.used,
                profile=answer.session.profile,
                trace=answer.account.trace(),
                stats=answer.account.stats(trio.current_time()),
            )

    async def forward(
        self, request: ForwardRequest, *, progress: Progress = silent
    ) -> ForwardResult:
        """One pass over a prompt, written to a safetensors file. Raises `Refused`."""
        async with self._open(request, progress) as answer:
            seen: dict[int, list[Choices]] = {}
            answer.session.watch = lambda layer, chosen: seen.setdefault(layer, []).append(chosen)
            answer.account.prompt_tokens = len(request.prompt_ids)
            room_for(len(request.prompt_ids), 0, answer.description)
            async with answer.session.room(len(request.prompt_ids)):
                logits = await answer.session.extend(request.prompt_ids, every=True)
            answer.account.first_at = trio.current_time()
            chosen = {layer: np.concatenate(pieces) for layer, pieces in seen.items()}
            await trio.to_thread.run_sync(_write_forward, Path(request.out), logits, chosen)
            return ForwardResult(
                out=request.out,
                root=root_text(answer.root),
                profile=answer.session.profile,
                trace=answer.account.trace(),
                stats=answer.account.stats(trio.current_time()),
            )

    @asynccontextmanager
    async def _open(
        self, request: GenerateRequest | ForwardRequest, progress: Progress
    ) -> AsyncIterator[_Answer]:
        """A session at the model's current root, or at the one that is named.

        In the node's own precision, or in the one that is demanded.
        """
        if self.running >= limits.generations_max:
            self.work.outcomes["refused"] += 1
            raise Refused(
                ErrorCode.BUSY,
                "this node answers no further request now",
                f"{self.running} requests are running",
                "Try again later, or ask another main node.",
            )
        with self.work.answer() as account:
            model, root, heads = self._at(request.model, request.root)
            precision = effective(request.precision or self._profiles.precision)
            account.fetched_bytes = await self._models.fetch(model, progress)
            description = await self._models.describe(model, progress)
            async with self._trunks.use(description, heads, precision, progress) as (
                trunk,
                fetched,
            ):
                account.fetched_bytes += fetched
                session = Session(
                    model,
                    heads,
                    trunk,
                    self._layers,
                    self._compute,
                    account,
                    precision,
                    self._profiles.of(precision),
                )
                yield _Answer(description, root, session, account)

    def _at(
        self, name: str, root_name: str | None
    ) -> tuple[BlockId, Root, Mapping[Subject, BlockId]]:
        """The model, the root and its heads. Raises `Refused`."""
        model = self._chain.find_model(name).id
        if root_name is None:
            heads = self._chain.heads(model)
            return model, model_root(model, heads), heads
        root = parse_root(root_name)
        found = self._store.heads_at(root)
        if found is None or found.model != model:
            raise Refused(
                ErrorCode.NOT_FOUND,
                f"the model {name} has no root {root_name}",
                "this node knows no release or update that led to it",
                "`blyan-node model show` has the current one.",
                {"root": root_name},
            )
        return model, root, found.heads

    async def _decode(self, asked: Question, answer: _Answer, writer: Writer) -> Finish:
        session, pick = answer.session, asked.sampler.pick
        async with aclosing(Decoding(session, asked.prompt, pick, asked.ends)) as tokens:
            while True:
                finish = await writer.put(await tokens.next())
                if finish is not None:
                    return finish


async def _until(cancelled: trio.Event | None, decode: Callable[[], Awaitable[Finish]]) -> Finish:
    """What `decode` ends with, or "cancelled" if `cancelled` is set before."""
    if cancelled is None:
        return await decode()
    finish: Finish = "cancelled"
    refused: Refused | None = None
    async with trio.open_nursery() as nursery:

        async def watch(event: trio.Event) -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch, cancelled)
        try:
            finish = await decode()
        except Refused as error:  # handed on outside of the nursery, which would wrap it
            refused = error
        nursery.cancel_scope.cancel()
    if refused is not None:
        raise refused
    return finish


def _write_forward(out: Path, logits: Rows, chosen: Mapping[int, Choices]) -> None:
    """Writes `logits` and each layer's `layerL.experts`. Raises `Refused` for a bad path."""
    tensors = {"logits": tensor_of(logits)}
    tensors |= {f"layer{layer}.experts": tensor_of(rows) for layer, rows in sorted(chosen.items())}
    try:
        write_tensors(out, tensors)
    except OSError as error:
        raise Refused(
            ErrorCode.BAD_INPUT,
            f"cannot write {out}",
            error.strerror or str(error),
            "Give a path in a folder that the daemon may write to.",
            {"path": str(out)},
        ) from error
