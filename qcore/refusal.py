"""Why something is refused, as data.

Every "no" in qcore is a `Refusal`: a stable code, the kind of no, what it is about, the reason, the fact it rests on
and what to do instead. A function that cannot go on raises `Refused`, the project's one exception; a function that
compares candidates returns the refusals beside the accepted ones.
"""

from __future__ import annotations

import reprlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["notimpl", "notyet", "never", "missing-dep", "bad-file", "usage"]

KINDS: dict[Kind, str] = {
    "notimpl": "we have not done it",
    "notyet": "the vendor's stack lacks it",
    "never": "the hardware or the format cannot",
    "missing-dep": "something has to be installed",
    "bad-file": "the checkpoint or input file is at fault (exit code 4)",
    "usage": "the request is at fault (exit code 2)",
}
"""What each kind of no means."""

CODES: dict[str, str] = {
    # Files and folders
    "path-not-found": "The path does not exist or cannot be read.",
    "not-a-checkpoint": "Nothing in the folder or file is a checkpoint that qcore knows.",
    "ambiguous-checkpoint": "The folder holds more than one checkpoint and nothing says which is meant.",
    "unsafe-container": "Pickled weights run code when they are read, so they are never opened.",
    "remote-code": "The model needs Python code from the checkpoint, which is never run.",
    "shard-missing": "A shard that the index or the file name promises is not there.",
    "shard-unsafe": "A shard's name leads out of the checkpoint's folder.",
    "index-inconsistent": "The shard index disagrees with the shards.",
    "not-enough-memory": "The quantized weights are larger than the memory that is free.",
    # Headers
    "bad-magic": "The file does not begin as its format demands.",
    "bad-version": "The container's version is not one that qcore reads.",
    "truncated": "A length or an offset points past the end of the file.",
    "limit-exceeded": "A count, length or size is larger than any real checkpoint's.",
    "bad-text": "A name or string is not valid UTF-8, or not valid where it stands.",
    "bad-json": "A JSON document cannot be parsed, nests too deeply, or repeats a key.",
    "bad-field": "A field's value or type is not one that the format allows.",
    "duplicate": "The same key or tensor name stands twice.",
    "overlap": "Two tensors claim the same bytes.",
    "hole": "Bytes between the tensors belong to none of them.",
    "bad-shape": "A tensor's shape disagrees with its size, its scheme or the model.",
    "bad-dtype": "A tensor's data type is unknown, or not the one that its format demands.",
    # Contents
    "missing-tensor": "A tensor that the format or the model needs is not in the checkpoint.",
    "unexpected-tensor": "A tensor belongs to no part of the model.",
    "bad-content": "A tensor's values are outside what its format allows.",
    # Methods, schemes and kernels
    "unknown-method": "No installed method reads this quantization format.",
    "unknown-variant": "The method is known, this variant of it is not.",
    "unknown-architecture": "The model's architecture is not one that can be built.",
    "bad-scheme": "The text does not describe a scheme.",
    "scheme-unsupported": "The kernel does not take this scheme.",
    "shape-unsupported": "The kernel does not take this shape.",
    "contents-unsupported": "The kernel does not take what the layer's tensors hold.",
    "dtype-unsupported": "The kernel does not compute in this data type.",
    "wrong-platform": "The kernel does not run on this platform.",
    "wrong-device": "The device lacks an instruction set or capability that the kernel needs.",
    "inexact": "The kernel would quantize activations, which was not allowed.",
    "not-chosen": "Another kernel was asked for by name.",
    "not-quicker": "The kernel is taken only where it is quicker than others on this device, and it is not.",
    "missing-requirement": "A package that the kernel needs is absent or too old.",
    "no-kernel": "No registered kernel takes this layer on this platform.",
    "no-device": "No such device was found on this host.",
    "kernel-wrong": "The kernel's answer on the checkpoint's own weights is too far from the definition.",
    "kernel-failed": "The kernel's implementation raised an error.",
    "unproved": "A kernel is declared for the cell, and no evidence supports it.",
    "stale-evidence": "The kernel's source has changed since it was verified.",
    "unknown-row": "No row of the matrix has this name.",
    "unknown-platform": "No platform has this name.",
    "unknown-kernel": "No registered kernel has this name.",
    # Writing
    "unknown-format": "No checkpoint format has this name.",
    "format-not-written": "The format is read, but not written.",
    "not-representable": "The format cannot hold a layer without changing its numbers.",
    "output-exists": "There is something under the output's name already.",
    "cannot-write": "The operating system does not let the output be written.",
    # Plugins
    "plugin-missing": "The plugin that owns the platform is not installed.",
    "plugin-broken": "The plugin failed while it was loaded or asked.",
    "plugin-api": "The plugin was made for another version of the plugin interface.",
    "plugin-disabled": "The plugin is switched off by an environment variable.",
    # Requests
    "bad-argument": "An argument has a value that the command does not take.",
    "task-unavailable": "A task for a model, or its data, cannot be had, or must not be run.",
    "engine-failed": "What was to do the parts of a run's work cannot be reached, or gave up.",
    "missing-package": "An optional package that this command needs is not installed.",
}
"""Every code and its meaning, documented in docs/refusals.md from this table."""


@dataclass(frozen=True)
class Refusal:
    """One "no".

    code: a key of `CODES`. subject: what is refused (a path, tensor, layer, kernel or plugin). reason: one sentence.
    fact: what the reason rests on, usually "found X, expected Y". fix: what to do, or the nearest alternative.
    file, tensor, field: where, as far as known; only for refusals about files.
    """

    code: str
    kind: Kind
    subject: str
    reason: str
    fact: str = ""
    fix: str = ""
    file: str | None = None
    tensor: str | None = None
    field: str | None = None

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"unknown refusal code {self.code!r}: add it to qcore.refusal.CODES")
        if self.kind not in KINDS:
            raise ValueError(f"unknown refusal kind {self.kind!r}: one of {', '.join(KINDS)}")
        for name in ("subject", "reason", "fact", "tensor", "field"):
            if text := getattr(self, name):
                object.__setattr__(self, name, _printable(text))

    def to_dict(self) -> dict[str, Any]:
        """The refusal as plain JSON values; absent places are left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        lines = [f"{self.subject}: {self.reason} [{self.code}, {self.kind}]"]
        place = ", ".join(f"{k} {v}" for k, v in (("tensor", self.tensor), ("field", self.field)) if v)
        for label, text in (("where", place), ("fact", self.fact), ("fix", self.fix)):
            if text:
                lines.append(f"  {label}: {text}")
        return "\n".join(lines)


class Refused(Exception):
    """Raised where qcore cannot go on; `refusal` says why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


def bad_file(
    code: str,
    reason: str,
    *,
    file: Path | str,
    tensor: str | None = None,
    field: str | None = None,
    found: object = None,
    expected: object = None,
    fix: str = "Download or export the checkpoint again; the file is damaged or was not written by the tool it names.",
) -> Refused:
    """A `Refused` of kind bad-file, with the place and what was found there; long values are cut to 200 characters."""
    parts = [
        f"{word} {_short(value)}" for word, value in (("found", found), ("expected", expected)) if value is not None
    ]
    refusal = Refusal(code, "bad-file", str(file), reason, ", ".join(parts), fix, str(file), _name(tensor), field)
    return Refused(refusal)


def _printable(text: str, most: int = 1000) -> str:
    """What may be shown: files choose a part of the text, which may be endless, or command a terminal."""
    text = text if len(text) <= most else text[: most - 3] + "..."
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else reprlib.repr(value)  # a hostile value may be huge
    return text if len(text) <= 200 else text[:197] + "..."


def _name(tensor: str | None) -> str | None:
    return None if tensor is None else _short(tensor)
