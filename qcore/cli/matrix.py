"""qcore matrix: which formats and kernel families run on which hardware, and what proves it."""

from __future__ import annotations

import pathlib
import shutil
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcore.cli import options
from qcore.cli.output import note, print_json, styled, writing
from qcore.platform import known_platform
from qcore.support.rows import known_row

if TYPE_CHECKING:
    from qcore.support.matrix import Cell, Matrix

_MARKS = {"measured": "M", "compiled": "C", "simulated": "S", "declared": "d", "none": "-"}
_STYLES = {"measured": "green", "compiled": "blue", "simulated": "magenta", "declared": "yellow", "none": "dim"}
LEGEND = """M  measured on that hardware           d  declared: a kernel takes it, nothing proves it
C  compiled for it and run elsewhere   -  no kernel, or nothing reads the format
S  simulated                           *  ticked by the seed table; M, C and S are supported"""
MARKDOWN_LEGEND = (
    "**M** measured on that hardware, **C** compiled for it and run elsewhere, **S** simulated; bold where the widely "
    "published table ticks the cell too, a dot where it does and nothing proves it here yet."
)


def matrix_command(
    row: Annotated[
        str | None, typer.Option(help="Only this row, such as gptq; with --platform also the reasons.")
    ] = None,
    platform: Annotated[str | None, typer.Option(help="Only this column, such as hopper.")] = None,
    json: options.Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    html: Annotated[pathlib.Path | None, typer.Option(help="Write one self-contained HTML page to this file.")] = None,
) -> None:
    """Show which formats and kernels run on which hardware, and what proves it. Needs neither hardware nor its SDK.

    Example: qcore matrix --row gptq --platform hopper
    """
    from qcore.support.matrix import matrix

    whole = matrix()
    if row is not None:
        known_row(row)
    if platform is not None:
        known_platform(platform, whole.platforms)
    found = whole.part(row, platform)
    if html is not None:
        _write_page(html, found.to_dict())
    if json:
        print_json(found.to_dict())
    elif markdown:
        print(markdown_table(found), end="")
    elif html is None:
        _print(found)


def markdown_table(found: Matrix) -> str:
    """The matrix as a Markdown table: evidence of supported cells, a dot where the seed table ticks one that is not."""
    lines = [f"| | {' | '.join(found.titles[p] for p in found.platforms)} |", "|---|" + ":-:|" * len(found.platforms)]
    for row in found.rows:
        cells = (found.cell(row.id, platform) for platform in found.platforms)
        lines.append(f"| {row.title} | {' | '.join(map(_markdown_mark, cells))} |")
    return "\n".join(lines) + "\n"


def _markdown_mark(cell: Cell) -> str:
    if cell.supported:
        return f"**{_MARKS[cell.evidence]}**" if cell.baseline else _MARKS[cell.evidence]
    return "." if cell.baseline else ""


def mark(cell: Cell) -> str:
    """The cell in one or two characters; LEGEND explains them. Lower case and dashes are not supported."""
    return _MARKS[cell.evidence] + ("*" if cell.baseline else "")


def table(found: Matrix, width: int, *, colour: bool = False) -> list[str]:
    """The matrix in lines of at most `width` columns: headings in one line or, where they do not fit, down a stair."""
    side = max(len(row.title) for row in found.rows) + 2
    titles = [found.titles[platform] for platform in found.platforms]
    widths = [max(len(title), 2) + 2 for title in titles]
    if side + sum(widths) <= width:
        lines = [" " * side + "".join(title.ljust(w) for title, w in zip(titles, widths, strict=True)).rstrip()]
    else:
        widths = [3] * len(titles)
        lines = [" " * side + "|  " * i + title for i, title in enumerate(titles)]
    for row in found.rows:
        line = row.title.ljust(side)
        for platform, w in zip(found.platforms, widths, strict=True):
            cell = found.cell(row.id, platform)
            line += styled(mark(cell), _STYLES[cell.evidence], colour) + " " * (w - len(mark(cell)))
        lines.append(line.rstrip())
    return lines


def _print(found: Matrix) -> None:
    from qcore.support.matrix import summary

    terminal = sys.stdout.isatty()
    print("\n".join(table(found, shutil.get_terminal_size((1000, 50)).columns if terminal else 1000, colour=terminal)))
    counts = summary(found)
    print(f"\n{LEGEND}")
    print(
        f"supported: {counts['baseline_supported']} of {counts['baseline_ticks']} ticks of the seed table, "
        f"and {counts['beyond_baseline']} cells beyond it; name a cell with --row and --platform for its reasons"
    )
    if len(found.cells) > 2 * max(len(found.rows), len(found.platforms)):
        return
    for cell in found.cells:
        _print_cell(cell)


def _print_cell(cell: Cell) -> None:
    print(
        f"\n{cell.row.title} on {cell.platform}: {'supported, ' + cell.evidence if cell.supported else 'not supported'}"
    )
    for support in cell.schemes:
        kernel = f"{support.kernel.name} ({support.plugin}), {support.evidence}" if support.kernel else "no kernel"
        print(f"  {support.scheme}: {kernel}")
    for record in cell.records:
        print(f"  {record.kernel}: {record.grade} {record.date} on {record.device}")
        print(f"    worst error {record.worst['error']:g} of {record.worst['bound']:g} allowed, {record.cases} cases")
        print(f"    {record.command}")
    if cell.refusal:
        print("  " + str(cell.refusal).replace("\n", "\n  "))


def _write_page(path: pathlib.Path, document: dict[str, Any]) -> None:
    from qcore.support.page import render

    beside = path.with_name(path.name + ".partial")
    with writing(path):
        beside.write_text(render(document), encoding="utf-8")
        beside.replace(path)
    note(f"wrote {path}")
