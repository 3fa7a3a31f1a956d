"""What every test finds: a working Ctrl-C, and how Hypothesis looks for what breaks a property.

`make test` tries the same cases every time, so that a red run is the change's own doing;
`make fuzz` looks for new ones. What it finds becomes an example of its test.
"""

import signal

from hypothesis import settings

# A shell has what it starts in the background ignore Ctrl-C, and the children of that as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("fuzz", max_examples=2_000, deadline=None, print_blob=True)
settings.load_profile("steady")
