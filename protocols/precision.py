"""In which precision a node holds matrices for computing.

`as-published` is what the author stored. The others are wishes that only ever make a matrix
narrower: one that is stored in as few bits or fewer stays as it was published. So nothing is ever
widened, and `float32` asks for the same as `as-published`: products have the bits of the weights'
float32 values (docs/sums.md) either way.
"""

from typing import Literal, get_args

Precision = Literal["as-published", "float32", "bfloat16", "float16", "fp8", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PUBLISHED: Precision = "as-published"


def effective(precision: Precision) -> Precision:
    """The name of what a precision comes to: two that compute the same bits have the same."""
    return PUBLISHED if precision == "float32" else precision
