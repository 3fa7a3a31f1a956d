"""What this program is: its version, and the commit that it was made from when it was started."""

from importlib.metadata import distribution
from pathlib import Path

from protocols import build

FOLDER = Path(__file__).parents[1]


def _read(path: str) -> str | None:
    try:
        return (FOLDER / path).read_text()
    except (OSError, ValueError):
        return None


VERSION = distribution(build.PACKAGE).version
COMMIT = build.commit(_read, distribution(build.PACKAGE).read_text("direct_url.json"))
"""None where nothing tells it. Read once: a checkout may go on while the node runs."""
