"""What the command line shows while a cluster comes up and goes down."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

ENDED = ("ready", "stopped")


class StartProgress:
    """A line for each process, live on a terminal, one line a change elsewhere. ``note`` is the launcher's progress."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._states: dict[str, str] = {}
        self._since = time.monotonic()
        self._spinner = Spinner("dots", style="cyan")
        self._live = Live(self, console=console, refresh_per_second=10, transient=True) if console.is_terminal else None

    def note(self, who: str, what: str) -> None:
        if self._states.get(who) == what:
            return
        self._states[who] = what
        if self._live is None or not self._live.is_started:
            seconds = time.monotonic() - self._since
            self._console.print(f"{seconds:6.1f} s  {who}: {what}", highlight=False, markup=False)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table.grid(padding=(0, 2))
        for who, what in self._states.items():
            mark = Text("✓", style="green") if what in ENDED else self._spinner
            table.add_row(mark, who, Text(what, style="dim" if what in ENDED else ""))
        yield table
        yield Text(f"{time.monotonic() - self._since:.0f} s", style="dim")
