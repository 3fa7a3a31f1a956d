"""The advert: a node's signed statement of the experts that it holds.

Participants: any node that holds experts, and any node that wants to find them.

Goals: nobody can advertise for another peer (the key is inside and signs); nobody can serve an old
version as the new (block ids are inside); an old advert never replaces a newer one (`seq`); a dead
node's advert goes away by itself (`lifetime_s`, counted by the receiver's clock, never by the
sender's). Not a goal: proof that the sender really holds what it says.

An advert states everything that the node holds and replaces its earlier ones whole. Per layer it
has a bitmap of experts (bit `e % 8` of byte `e // 8`) and one block id for each set bit, in
ascending order. A node that holds two versions of an expert has two entries for the layer. An
advert with `lifetime_s` 0 and no models is a withdrawal: its sender has stopped.

`seq` only ever grows for a key, also over restarts (a node starts it from its clock).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Self

import msgspec

from protocols import limits, wire
from protocols.errors import RemoteProtocolError
from protocols.ids import BlockId, NetworkId, PeerId, PublicKey, is_cid, peer_id_of
from protocols.signing import ADVERT_TAG, SIGNATURE_BYTES, Identity, verify

ADVERT_VERSION = 1
Role = Literal["main", "gpu"]


@dataclass(frozen=True, slots=True, order=True)
class HeldExpert:
    """One expert of one model, held at one version."""

    model: BlockId
    layer: int
    expert: int
    block: BlockId


class LayerAdvert(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Held experts of one layer: a bitmap, and the block ids of its set bits in order."""

    layer: int
    experts: bytes
    blocks: tuple[BlockId, ...]

    def indexes(self) -> Iterator[int]:
        """The experts whose bits are set, ascending."""
        for position, byte in enumerate(self.experts):
            for bit in range(8):
                if byte >> bit & 1:
                    yield position * 8 + bit


class ModelAdvert(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Held experts of one model; layers ascending, a layer again for a second version."""

    model: BlockId
    layers: tuple[LayerAdvert, ...]


class Advert(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fields that the signature covers.

    `queue` is the number of requests waiting at the worker, `memory_free` the bytes that it could
    still hold, `auto` whether it takes experts by itself.
    """

    v: int = ADVERT_VERSION
    net: NetworkId
    key: PublicKey
    seq: int
    lifetime_s: int
    role: Role
    profile: str
    auto: bool = False
    queue: int = 0
    memory_free: int = 0
    models: tuple[ModelAdvert, ...] = ()

    @property
    def peer(self) -> PeerId:
        """The peer id of the advertising key."""
        return peer_id_of(self.key)

    @property
    def withdrawn(self) -> bool:
        """Whether this advert says that its sender has stopped."""
        return self.lifetime_s == 0

    @property
    def experts(self) -> int:
        """How many experts are held, each version counted."""
        return sum(len(layer.blocks) for model in self.models for layer in model.layers)

    def held(self) -> Iterator[HeldExpert]:
        """Everything that the advert says is held."""
        for model in self.models:
            for layer in model.layers:
                for expert, block in zip(layer.indexes(), layer.blocks, strict=True):
                    yield HeldExpert(model.model, layer.layer, expert, block)


def pack_held(held: Iterable[HeldExpert]) -> tuple[ModelAdvert, ...]:
    """Held experts in the form of an advert; the inverse of `Advert.held`, whatever the order."""
    models: dict[BlockId, dict[int, list[dict[int, BlockId]]]] = {}
    for item in sorted(set(held)):
        planes = models.setdefault(item.model, {}).setdefault(item.layer, [])
        plane = next((plane for plane in planes if item.expert not in plane), None)
        if plane is None:
            planes.append(plane := {})
        plane[item.expert] = item.block
    return tuple(
        ModelAdvert(model, tuple(_layer(n, plane) for n in sorted(layers) for plane in layers[n]))
        for model, layers in sorted(models.items())
    )


def _layer(layer: int, plane: dict[int, BlockId]) -> LayerAdvert:
    bitmap = bytearray(max(plane) // 8 + 1)
    for expert in plane:
        bitmap[expert // 8] |= 1 << expert % 8
    return LayerAdvert(layer, bytes(bitmap), tuple(plane[expert] for expert in sorted(plane)))


class _Signed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    advert: bytes
    sig: bytes


@dataclass(frozen=True, slots=True)
class SignedAdvert:
    """An advert with its canonical bytes and its verified signature."""

    advert: Advert
    raw: bytes
    sig: bytes

    @classmethod
    def create(cls, advert: Advert, identity: Identity) -> Self:
        """Encodes and signs `advert`, whose key must be the identity's."""
        assert advert.key == identity.public
        _check(advert)
        raw = wire.encode(advert)
        return cls(advert, raw, identity.sign(ADVERT_TAG, raw))

    @classmethod
    def decode(cls, data: bytes | memoryview, *, net: NetworkId) -> Self:
        """Reads, checks and verifies an advert of network `net`; raises `RemoteProtocolError`."""
        signed = wire.decode_signed(
            bytes(data), _Signed, where="advert", bytes_max=limits.advert_bytes_max
        )
        advert = wire.decode_signed(
            signed.advert, Advert, where="advert", bytes_max=limits.advert_bytes_max
        )
        if advert.net != net:
            raise RemoteProtocolError("advert", "is of another network")
        _check(advert)
        if len(signed.sig) != SIGNATURE_BYTES or not verify(
            advert.key, ADVERT_TAG, signed.advert, signed.sig
        ):
            raise RemoteProtocolError("advert", "signature does not hold")
        return cls(advert, signed.advert, signed.sig)

    @property
    def size(self) -> int:
        """Bytes of the wire form; more than `limits.advert_bytes_max` would be refused."""
        return len(self.encode())

    def encode(self) -> bytes:
        """The wire form: canonical msgpack of [advert bytes, signature]."""
        return wire.encode(_Signed(self.raw, self.sig))


def _check(advert: Advert) -> None:
    if advert.v != ADVERT_VERSION:
        raise RemoteProtocolError("advert", f"version {advert.v} is not known")
    if len(advert.key) != 32 or not 0 < advert.seq < 1 << 63:
        raise RemoteProtocolError("advert", "key or sequence number out of range")
    if not 0 <= advert.lifetime_s <= limits.advert_lifetime_s:
        raise RemoteProtocolError("advert", f"lifetime of {advert.lifetime_s} s")
    if advert.withdrawn and advert.models:
        raise RemoteProtocolError("advert", "a withdrawal that holds experts")
    if len(advert.profile.encode()) > limits.profile_bytes_max:
        raise RemoteProtocolError("advert", "the numeric profile's name is too long")
    if not 0 <= advert.queue < 1 << 31 or not 0 <= advert.memory_free < 1 << 63:
        raise RemoteProtocolError("advert", "queue or free memory out of range")
    models = [model.model for model in advert.models]
    if models != sorted(set(models)) or not all(map(is_cid, models)):
        raise RemoteProtocolError("advert", "models are not sorted block ids")
    for model in advert.models:
        _check_layers(model.layers)


def _check_layers(layers: tuple[LayerAdvert, ...]) -> None:
    numbers = [layer.layer for layer in layers]
    if not numbers or numbers != sorted(numbers):
        raise RemoteProtocolError("advert", "layers are missing or not sorted")
    if numbers[0] < 0 or numbers[-1] >= limits.layers_max:
        raise RemoteProtocolError("advert", "layer number out of range")
    seen: set[tuple[int, int, BlockId]] = set()
    for layer in layers:
        bitmap = layer.experts
        if not 0 < len(bitmap) <= limits.experts_per_layer_max // 8 or not bitmap[-1]:
            raise RemoteProtocolError("advert", f"bitmap of layer {layer.layer} has a bad length")
        if bitmap and int.from_bytes(bitmap).bit_count() != len(layer.blocks):
            raise RemoteProtocolError("advert", f"block ids of layer {layer.layer} do not fit")
        if not all(map(is_cid, layer.blocks)):
            raise RemoteProtocolError("advert", f"layer {layer.layer}: not a block id")
        held = set(
            zip([layer.layer] * len(layer.blocks), layer.indexes(), layer.blocks, strict=True)
        )
        if seen & held:
            raise RemoteProtocolError("advert", f"layer {layer.layer} names an expert twice")
        seen |= held
