"""Two answers beside each other, as wide as the terminal, while they grow."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dspref.terminal import printable, shown


class Sides:
    def __init__(self, names: Sequence[str], console: Console | None = None) -> None:
        self._names = [printable(name) for name in names]
        self._texts = [""] * len(names)
        self._live = Live(console=console or Console(highlight=False), refresh_per_second=8, auto_refresh=False)

    def __enter__(self) -> Sides:
        self._live.__enter__()
        self._draw()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._draw()
        self._live.__exit__(kind, error, trace)

    def add(self, side: int, text: str) -> None:
        self._texts[side] += text
        self._draw()

    def _draw(self) -> None:
        grid = Table(box=None, expand=True, padding=(0, 2, 0, 0), show_edge=False)
        for name in self._names:
            grid.add_column(Text(name), ratio=1, overflow="fold")
        grid.add_row(*(Text(shown(text).expandtabs(4)) for text in self._texts))
        self._live.update(grid, refresh=True)
