"""The folder beside the output in which a calibrated run keeps what it has done, so that a killed one can go on.

state.json              what was asked for, and how many blocks are done
mixture.json           the scheme of each layer, where they are chosen
block-00003.safetensors the quantized layers of a block in the canonical layout, NAME.codes, NAME.scales.0, ..., and parameters that have changed, by their names; its metadata has the
                        layers' schemes, shapes and errors, and which parameters these are; ATTENTION.k_scale and v_scale of the kv cache, whose names are there too
states-00004.safetensors    what the next block is given
wanted-00004.safetensors    what a block gave before it was quantized, where its roundings are learned
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qcore.checkpoint.json_file import read_json
from qcore.checkpoint.writer import flush, writing
from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    from qcore.calibration.block import Made

_STATE = "state.json"


class Work:
    """A refusal before the first block is done leaves no folder behind. asked: what decides the result, in JSON's types. done: blocks.

    Raises Refused: output-exists where there is such a folder and resume is not asked for, or another run is at it; bad-argument where it is of another request;
    cannot-write.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any], *, resume: bool) -> None:
        self.folder, self.asked, self.done = folder, dict(asked), 0
        with writing(folder):
            there = folder.is_dir() and any(folder.iterdir())
            if there and not resume:
                raise Refused(Refusal("output-exists", "usage", str(folder), "an earlier run was stopped before its end",
                                      fix="Go on with it by --resume, or remove the folder."))  # fmt: skip
            folder.mkdir(exist_ok=True)
            self._lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise Refused(Refusal("output-exists", "usage", str(folder), "another run is at it",
                                  fix="Wait for it, or stop it first."))  from error  # fmt: skip
        if (folder / _STATE).is_file():
            self._go_on()
        else:
            self._say(0)

    def __enter__(self) -> Work:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.done == 0 and isinstance(error, Refused):  # nothing is lost by it
            self.remove()
        os.close(self._lock)

    def states(self, number: int) -> Path:
        """The file of what a block is given."""
        return self.folder / f"states-{number:05}.safetensors"

    def wanted(self, number: int) -> Path:
        """The file of what a block gave before it was quantized."""
        return self.folder / f"wanted-{number:05}.safetensors"

    def block(self, number: int) -> Path:
        return self.folder / f"block-{number:05}.safetensors"

    def keep(self, number: int, made: Made) -> None:
        """What has become of a block; with the states of the next one on the disk, it is done."""
        import torch
        from safetensors.torch import save_file

        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in made.changed.items()}
        for attention, scales in made.kv_scales.items():
            tensors |= {f"{attention}.k_scale": scales.k.scale, f"{attention}.v_scale": scales.v.scale}
        facts: dict[str, dict[str, Any]] = {}
        for name, layer in made.layers.items():
            weight = layer.weight
            parts = {
                "codes": weight.codes,
                "zeros": weight.zeros,
                "index": weight.index,
                "table": weight.table,
                "input_scale": layer.input_scale,
            }
            parts |= {f"scales.{level}": scale for level, scale in enumerate(weight.scales)}
            tensors |= {
                f"{name}.{part}": tensor.clone(memory_format=torch.contiguous_format)
                for part, tensor in parts.items()
                if tensor is not None
            }
            facts[name] = {"scheme": str(weight.scheme), "shape": list(weight.shape), "error": made.errors.get(name)}
        partial = self.block(number).with_suffix(".partial")
        with writing(partial):
            try:
                save_file(tensors, partial, {
                    "layers": json.dumps(facts), "changed": json.dumps(sorted(made.changed)), "kv_scales": json.dumps([*made.kv_scales]),
                })  # fmt: skip
            except Exception as error:  # safetensors has its own for what the system says
                if isinstance(error, OSError):
                    raise
                raise OSError(None, str(error)) from error
            flush(partial)
            partial.rename(self.block(number))
        self._say(number + 1)
        with writing(self.folder):
            for path in (self.states(number), self.wanted(number)):
                path.unlink(missing_ok=True)

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, in JSON's types; made when it is first asked for, and kept."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            self._write(path, make())
        return read_json(path)

    def remove(self) -> None:
        """All of it, once the result is there."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _go_on(self) -> None:
        found = read_json(self.folder / _STATE)
        if found.get("asked") != self.asked:
            before = found.get("asked") if isinstance(found.get("asked"), dict) else {}
            apart = [key for key in self.asked if before.get(key) != self.asked[key]]  # type: ignore[union-attr]
            os.close(self._lock)
            raise Refused(Refusal("bad-argument", "usage", "--resume", "the run that was stopped was asked for something else",
                                  f"found another {', '.join(apart) or 'request'} in {self.folder}", "Ask for the same, or remove the folder to begin anew."))  # fmt: skip
        self.done = int(found.get("blocks", 0))

    def _say(self, done: int) -> None:
        self.done = done
        self._write(self.folder / _STATE, {"asked": self.asked, "blocks": done})

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        partial = path.with_suffix(".partial")
        with writing(partial):
            partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
            flush(partial)
            partial.rename(path)
