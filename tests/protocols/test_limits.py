"""Each limit is said once: a second value under one name would silently win."""

import ast
import inspect
from collections import Counter

from protocols import limits


def test_no_limit_is_defined_twice() -> None:
    tree = ast.parse(inspect.getsource(limits))
    names = Counter(
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    )
    assert len(names) > 50
    assert [name for name, count in names.items() if count > 1] == []
