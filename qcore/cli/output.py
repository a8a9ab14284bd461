"""What all commands print with: one JSON document or text on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from qcore.refusal import Refusal, Refused

DONE, FAULT, USAGE, REFUSED, BAD_FILE, INTERRUPTED = 0, 1, 2, 3, 4, 130
"""What commands exit with."""


def exit_status(refusal: Refusal) -> int:
    """Of a command that ends with this refusal."""
    return {"bad-file": BAD_FILE, "usage": USAGE}.get(refusal.kind, REFUSED)


def print_json(document: Any) -> None:
    """One document on stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def note(text: str) -> None:
    """A line for the person, not for the pipe."""
    print(text, file=sys.stderr, flush=True)


def print_refusal(refusal: Refusal, *, as_json: bool) -> None:
    """The refusal on stderr and, where JSON was asked for, as a document on stdout."""
    if as_json:
        print_json({"refusal": refusal.to_dict()})
    note(f"{styled('refused', 'bold red', sys.stderr.isatty())}: {refusal}")


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table in a terminal; lines with two spaces between columns elsewhere."""
    texts = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Column, Table
        from rich.text import Text

        columns = [Column(name, overflow="fold") for name in headings]
        columns[0].min_width = min(60, max(len(row[0]) for row in [list(headings), *texts]))  # names are to be copied
        table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
        for row in texts:
            table.add_row(*(Text(cell) for cell in row))
        Console(no_color="NO_COLOR" in os.environ).print(table)
        return
    widths = [max(len(line[i]) for line in [list(headings), *texts]) for i in range(len(headings))]
    for line in [list(headings), *texts]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def styled(text: str, style: str, terminal: bool) -> str:
    """`text` in a style where a terminal shows it."""
    if not terminal or "NO_COLOR" in os.environ:
        return text
    codes = {"bold red": "1;31", "red": "31", "green": "32", "yellow": "33", "blue": "34", "magenta": "35", "dim": "2"}
    return f"\033[{codes[style]}m{text}\033[0m"


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, int, int], None] | None]:
    """Yields a callback (label, done, total) that draws on stderr; None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, no_color="NO_COLOR" in os.environ)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda label, done, total: progress.update(task, completed=done, total=total)


@contextmanager
def writing(path: object) -> Iterator[None]:
    """Turns what the file system raises while `path` is written into a refusal (bad-argument)."""
    try:
        yield
    except OSError as error:
        raise Refused(Refusal("bad-argument", "usage", str(path), "it cannot be written", str(error),
                              "Name a place that exists, that you may write to, and that has room.")) from error  # fmt: skip


def mebibytes(count: float) -> float:
    """MiB, to one decimal."""
    return round(count / 2**20, 1)


def peak_rss_mib() -> float:
    """The largest resident memory that this process ever had (VmHWM; getrusage where /proc is absent)."""
    return memory_mib("VmHWM")


def memory_mib(field: str) -> float:
    """A field of /proc/self/status in MiB; ru_maxrss, which a child inherits from its parent, is the last resort."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:  # noqa: PTH123
            for line in status:
                if line.startswith(field + ":"):
                    return round(int(line.split()[1]) / 1024, 1)
    except OSError:
        pass
    import resource

    return round(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1
    )
