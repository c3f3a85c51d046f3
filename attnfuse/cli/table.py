"""A table: rich on a terminal, aligned columns everywhere else (a pipe, a log, rich not installed)."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def is_rich() -> bool:
    """Whether rich can draw on standard output."""
    if not sys.stdout.isatty():
        return False
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] | None = None) -> None:
    """Print `rows` under `columns`; `styles` colours each row on a terminal."""
    if not is_rich():
        widths = [max(len(cell) for cell in cells) for cells in zip(columns, *rows)]
        for row in (columns, *rows):
            print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for n, column in enumerate(columns):
        table.add_column(column, no_wrap=n + 1 < len(columns), overflow="fold")
    for n, row in enumerate(rows):
        table.add_row(*(Text(cell) for cell in row), style=styles[n] if styles else None)
    Console().print(table)
