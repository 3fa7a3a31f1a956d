"""Progress of long requests on stderr: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any, Self

import click

from cli.terminal import console, decorated

PLAIN_EVERY_S = 2.0


class Progress:
    """Draws what `progress` notifications tell; draws nothing if there are none."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._plain: tuple[str, float] = ("", 0.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the bar as it is and gives the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def show(self, params: dict[str, Any]) -> None:
        """Takes in one notification: `what`, `done`, `total` (None if unknown), `unit`."""
        if decorated(sys.stderr):
            self._draw(params)
        else:
            self._print(params)

    def _draw(self, params: dict[str, Any]) -> None:
        if self._bar is None:
            self._bar = _bar()
            self._bar.start()
        what, total = str(params["what"]), params["total"]
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=params["done"], total=total)

    def _print(self, params: dict[str, Any]) -> None:
        what, done, total = str(params["what"]), params["done"], params["total"]
        now = time.monotonic()
        if done != total and what == self._plain[0] and now < self._plain[1] + PLAIN_EVERY_S:
            return
        self._plain = (what, now)
        share = f" ({100 * done // total} %)" if total else ""
        of = f" of {total:,}" if total is not None else ""
        click.echo(f"{what}: {done:,}{of} {params['unit']}{share}", err=True)


def _bar() -> Any:
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=console(sys.stderr),
        transient=False,
    )
