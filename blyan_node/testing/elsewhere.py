"""A device that has a memory of its own, for machines that have none.

Within `Elsewhere` torch's device `meta` computes: its tensors are `Far` ones, whose numbers lie
hidden in ordinary memory. As on a GPU, an operation takes operands of one device only, nothing but
a copy goes from one to the other, and numpy reads none of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

FAR = torch.device("meta")
_COPIES = ("_to_copy", "copy_")


class Far(Tensor):
    """A tensor on the device; `near` has its numbers."""

    near: Tensor

    @staticmethod
    def of(near: Tensor) -> "Far":
        """The device's tensor of these numbers."""
        with torch.inference_mode(False):  # else torch would look for a version of its memory
            far: Far = Tensor._make_wrapper_subclass(
                Far, near.shape, strides=near.stride(), storage_offset=near.storage_offset(),
                dtype=near.dtype, device=FAR,
            )  # fmt: skip
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Outside of `Elsewhere` nothing can be done with one."""
        raise AssertionError(f"{function} on the device, outside of it")


class Elsewhere(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A `with` block in which there is the device; the bytes that went `to` it and came `back`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.to = self.back = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Does one operation of torch."""
        kwargs = dict(kwargs or {})
        given = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        far = any(isinstance(one, Far) for one in given)
        name = function.overloadpacket.__name__
        if name not in _COPIES:
            near = [one for one in given if not isinstance(one, Far) and one.dim()]
            assert not (far and near), f"{name} of tensors on different devices"
        goes_to = _taken(kwargs)
        result = function(*tree_map(_near, args), **tree_map(_near, kwargs))
        if name == "copy_":
            self._count(args[1], isinstance(args[0], Far))
        if name.endswith("_") or "out" in kwargs:
            return kwargs.get("out", args[0])
        there = far if goes_to is None else goes_to == FAR
        if name == "_to_copy":
            self._count(args[0], there)
        return tree_map(_far, result) if there else result

    def _count(self, source: Tensor, there: bool) -> None:
        size = source.numel() * source.element_size()
        if there != isinstance(source, Far):
            self.to, self.back = self.to + size * there, self.back + size * (not there)


def _taken(kwargs: dict[str, Any]) -> torch.device | None:
    """The device that an operation names, which is done in ordinary memory instead."""
    device: torch.device | None = kwargs.pop("device", None)
    if device is not None:
        kwargs["device"] = torch.device("cpu")
    return device


def _near(value: Any) -> Any:
    return value.near if isinstance(value, Far) else value


def _far(value: Any) -> Any:
    return Far.of(value) if isinstance(value, Tensor) else value
