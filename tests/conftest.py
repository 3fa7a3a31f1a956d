"""What every test finds: a working Ctrl-C, and how Hypothesis looks for what breaks a property.

`make test` tries the same cases every time, so that a red run is the change's own doing;
`make fuzz` looks for new ones. What it finds becomes an example of its test.

Files with slow tests come first, so that in the end no worker is left alone with one.
"""

import signal
from collections import Counter

import pytest
from hypothesis import settings

# A shell has what it starts in the background ignore Ctrl-C, and the children of that as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("fuzz", max_examples=2_000, deadline=None, print_blob=True)
settings.load_profile("steady")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
