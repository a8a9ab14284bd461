"""The support matrix, computed: for every row and platform, which kernels take its schemes and what proves it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from qcore.discovery import Registry, registry
from qcore.kernel import Kernel
from qcore.platform import COLUMNS
from qcore.refusal import Kind, Refusal, Refused
from qcore.scheme import Scheme
from qcore.support.digest import source_digest
from qcore.support.evidence import GRADES, Record, read_evidence
from qcore.support.rows import BASELINE, ROWS, Row

LADDER = (*GRADES, "declared", "none")
"""Grades of evidence and what is less than evidence: a kernel that nothing proves, and no kernel."""


@dataclass(frozen=True)
class SchemeSupport:
    """One scheme of a cell: the kernel that stands for it (the best proved one, then the cheapest), and its grade."""

    scheme: Scheme
    kernel: Kernel | None
    plugin: str | None
    evidence: str
    record: Record | None
    stale: bool = False


@dataclass(frozen=True)
class Cell:
    """One cell; it is supported exactly when there is no refusal. baseline: the seed table ticks it."""

    row: Row
    platform: str
    baseline: bool
    schemes: tuple[SchemeSupport, ...]
    refusal: Refusal | None

    @property
    def supported(self) -> bool:
        return self.refusal is None

    @property
    def evidence(self) -> str:
        """The weakest of its schemes' grades; none where nothing reads the format."""
        if self.refusal is not None and self.refusal.code == "unknown-method":
            return "none"
        return max((support.evidence for support in self.schemes), key=LADDER.index, default="none")

    @property
    def kernels(self) -> list[str]:
        return list(dict.fromkeys(support.kernel.name for support in self.schemes if support.kernel))

    @property
    def records(self) -> list[Record]:
        found = (support.record for support in self.schemes if support.record)
        return list({record.place: record for record in found}.values())

    def to_dict(self) -> dict[str, Any]:
        """The cell as plain JSON values."""
        return {
            "row": self.row.id,
            "platform": self.platform,
            "baseline": self.baseline,
            "supported": self.supported,
            "kernels": self.kernels,
            "evidence": self.evidence,
            "schemes": [_scheme_dict(support) for support in self.schemes],
            "records": [_record_dict(record) for record in self.records],
            "refusal": self.refusal.to_dict() if self.refusal else None,
        }


@dataclass(frozen=True)
class Matrix:
    """Cells row by row, in the order of `rows` and `platforms`."""

    rows: tuple[Row, ...]
    platforms: tuple[str, ...]
    titles: Mapping[str, str]
    cells: tuple[Cell, ...]

    @cached_property
    def _places(self) -> dict[tuple[str, str], Cell]:
        return {(cell.row.id, cell.platform): cell for cell in self.cells}

    def cell(self, row: str, platform: str) -> Cell:
        """Raises KeyError."""
        return self._places[row, platform]

    def part(self, row: str | None = None, platform: str | None = None) -> Matrix:
        """The matrix of one row, of one platform, or of both."""
        rows = tuple(r for r in self.rows if row in (None, r.id))
        platforms = tuple(p for p in self.platforms if platform in (None, p))
        cells = tuple(c for c in self.cells if row in (None, c.row.id) and platform in (None, c.platform))
        return Matrix(rows, platforms, self.titles, cells)

    def to_dict(self) -> dict[str, Any]:
        """The matrix as plain JSON values."""
        seed_rows, seed_platforms = (list(dict.fromkeys(names)) for names in zip(*BASELINE, strict=True))
        return {
            "rows": [row.id for row in self.rows],
            "platforms": list(self.platforms),
            "row_titles": {row.id: row.title for row in self.rows},
            "row_kinds": {row.id: row.kind for row in self.rows},
            "platform_titles": {platform: self.titles[platform] for platform in self.platforms},
            "baseline_rows": [row.id for row in self.rows if row.id in seed_rows],
            "baseline_platforms": [platform for platform in self.platforms if platform in seed_platforms],
            "cells": [cell.to_dict() for cell in self.cells],
        }


def matrix(plugins: Registry | None = None) -> Matrix:
    """The whole matrix, from the facts that the loaded plugins declare; no device is looked for and no torch imported."""
    return _Computation(plugins or registry()).run()


def current_records(plugins: Registry) -> tuple[list[Record], dict[str, Refusal]]:
    """Every plugin's records of its own platforms, and by platform the refusal of an evidence file that cannot be read."""
    records: list[Record] = []
    broken: dict[str, Refusal] = {}
    for plugin in plugins.plugins:
        own = {platform.id for platform in plugin.platforms}
        try:
            found = read_evidence(plugin.evidence) if plugin.evidence else []
        except Refused as error:
            broken |= dict.fromkeys(own, error.refusal)
            continue
        records += [record for record in found if record.platform in own]
    return records, broken


def proofs(plugins: Registry) -> dict[tuple[str, str, str], str]:
    """The best grade of current evidence by (platform, kernel, scheme)."""
    digests = _digests(plugins)
    found: dict[tuple[str, str, str], str] = {}
    for record in sorted(current_records(plugins)[0], key=lambda record: GRADES.index(record.grade)):
        if digests.get(record.kernel) == record.source:
            for scheme in record.schemes:
                found.setdefault((record.platform, record.kernel, scheme), record.grade)
    return found


def _digests(plugins: Registry) -> dict[str, str]:
    """What every kernel's evidence is tied to, by its name."""
    return {kernel.name: source_digest(kernel) for kernel, _ in plugins.kernels}


class _Computation:
    """The way from the plugins' facts to the matrix."""

    def __init__(self, plugins: Registry) -> None:
        self.plugins, self.platforms = plugins, plugins.platforms
        self.titles = {column.id: column.title for column in COLUMNS}
        self.titles |= {name: platform.title for name, platform in self.platforms.items()}
        by_cost = sorted(plugins.kernels, key=lambda pair: pair[0].cost)
        self.kernels = {name: [pair for pair in by_cost if name in pair[0].platforms] for name in self.titles}
        self.readable = {name for method in plugins.methods for name in method.readable}
        records, self.broken = current_records(plugins)
        self.records = {record.place: record for record in records}
        self.digests = _digests(plugins)
        self.taken: dict[tuple[str, str], bool] = {}

    def run(self) -> Matrix:
        first = [self._cell(row, platform) for row in ROWS for platform in self.titles]
        return Matrix(ROWS, tuple(self.titles), self.titles, tuple(_with_alternatives(first)))

    def _cell(self, row: Row, platform: str) -> Cell:
        schemes = tuple(self._scheme(row, platform, scheme) for scheme in row.parsed)
        refusal = self._refusal(row, platform, schemes)
        return Cell(row, platform, BASELINE.get((row.id, platform), False), schemes, refusal)

    def _scheme(self, row: Row, platform: str, scheme: Scheme) -> SchemeSupport:
        best, name = SchemeSupport(scheme, None, None, "none", None), str(scheme)
        for kernel, plugin in self.kernels[platform]:
            if best.evidence == LADDER[0]:
                break
            if kernel.op != row.op or row.family not in ("", kernel.family):
                continue
            if (taken := self.taken.get((name, kernel.name))) is None:
                taken = self.taken[name, kernel.name] = kernel.accepts.refuse(scheme) is None
            if not taken:
                continue
            support = self._proved(row, platform, scheme, name, kernel, plugin)
            if LADDER.index(support.evidence) < LADDER.index(best.evidence):
                best = support
        return best

    def _proved(self, row: Row, platform: str, scheme: Scheme, name: str, kernel: Kernel, plugin: str) -> SchemeSupport:
        stale = False
        for grade in GRADES:
            record = self.records.get((row.id, platform, kernel.name, grade))
            if record and name in record.schemes:
                if record.source == self.digests[kernel.name]:
                    return SchemeSupport(scheme, kernel, plugin, grade, record)
                stale = True
        return SchemeSupport(scheme, kernel, plugin, "declared", None, stale)

    def _refusal(self, row: Row, platform: str, schemes: Iterable[SchemeSupport]) -> Refusal | None:
        """Why the cell is not supported. Alternatives are added to the fix when all cells are known."""
        subject = f"{row.title} on {self.titles[platform]}"

        def no(code: str, kind: Kind, reason: str, fact: str, fix: str = "") -> Refusal:
            return Refusal(code, kind, subject, reason, fact, fix)

        if absent := self.plugins.absent(platform):
            return replace(absent, subject=subject)
        if row.platforms and platform not in row.platforms:
            return no(
                "wrong-platform", "never", row.because, f"found {platform}, expected {' or '.join(row.platforms)}"
            )
        if row.methods and not self.readable & set(row.methods):
            return no("unknown-method", "notimpl", "no installed plugin reads checkpoints of this format",
                      f"found readers of {', '.join(sorted(method.name for method in self.plugins.methods))}")  # fmt: skip
        if lacking := [str(support.scheme) for support in schemes if support.kernel is None]:
            kernels = f"kernel of the family {row.family}" if row.family else "kernel"
            return no("no-kernel", "notimpl", f"no registered {kernels} takes {_some(lacking)}",
                      f"{len(lacking)} of the row's {len(row.schemes)} schemes have none")  # fmt: skip
        if unproved := [support for support in schemes if support.evidence == "declared"]:
            names = _some(sorted({support.kernel.name for support in unproved if support.kernel}))
            if platform in self.broken:
                return replace(self.broken[platform], subject=subject)
            fix = f"On a machine with such a device: qcore verify --plugin {self._owner(platform)} --record"
            if any(support.stale for support in unproved):
                return no(
                    "stale-evidence", "notimpl", "a kernel's source has changed since it was verified", names, fix
                )
            return no("unproved", "notimpl", "a kernel takes it, but nothing proves yet that it is right there",
                      f"{names}, declared for {_some([str(s.scheme) for s in unproved])}", fix)  # fmt: skip
        return None

    def _owner(self, platform: str) -> str:
        return next(plugin.name for plugin in self.plugins.plugins if platform in {p.id for p in plugin.platforms})


def _with_alternatives(cells: list[Cell]) -> Iterable[Cell]:
    """The cells, with what runs instead in every fix."""
    on_platform: dict[str, list[str]] = {}
    of_row: dict[str, list[str]] = {}
    for cell in cells:
        if cell.supported:
            on_platform.setdefault(cell.platform, []).append(cell.row.title)
            of_row.setdefault(cell.row.id, []).append(cell.platform)
    for cell in cells:
        if cell.refusal is None:
            yield cell
            continue
        parts = [cell.refusal.fix]
        if rows := on_platform.get(cell.platform):
            parts.append(f"Supported on {cell.platform}: {', '.join(rows)}.")
        elif platforms := of_row.get(cell.row.id):
            parts.append(f"{cell.row.title} is supported on {', '.join(platforms)}.")
        ended = [part if part.endswith(".") else f"{part};" for part in parts[:-1] if part] + parts[-1:]
        fix = " ".join(ended) or "Use another format: `qcore matrix` shows which are supported where."
        yield replace(cell, refusal=replace(cell.refusal, fix=fix))


def summary(found: Matrix) -> dict[str, Any]:
    """Counts: ticks of the seed table, how many of them are supported, cells supported beyond it, and cells by grade."""
    seed = [cell for cell in found.cells if cell.baseline]
    return {
        "baseline_ticks": len(seed),
        "baseline_supported": sum(cell.supported for cell in seed),
        "beyond_baseline": sum(cell.supported and not cell.baseline for cell in found.cells),
        "by_evidence": dict(Counter(cell.evidence for cell in found.cells)),
    }


def _some(names: list[str]) -> str:
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")


def _scheme_dict(support: SchemeSupport) -> dict[str, Any]:
    return {
        "scheme": str(support.scheme),
        "kernel": support.kernel.name if support.kernel else None,
        "plugin": support.plugin,
        "evidence": support.evidence,
    }


def _record_dict(record: Record) -> dict[str, Any]:
    return {**asdict(record), **record.worst}
