"""The arithmetic that tests compute with."""

from functools import cache

from blyan_node.moe.arithmetic import Arithmetic, choose
from blyan_node.moe.kernels.objects import user_folder


@cache
def best() -> Arithmetic:
    """The best that this machine has, one for the process, on one thread."""
    return choose(folder=user_folder())
