"""Makes quantized GGUF files: every matrix in the type that a recipe gives it, the rest in float32."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.blocks.types import BLOCK_TYPES
from qcore.checkpoint.imatrix import read_imatrix
from qcore.checkpoint.open import Checkpoint, open_checkpoint
from qcore.checkpoint.writer import atomic_file
from qcore.gguf.architectures import ROUTERS
from qcore.gguf.contents import Contents, contents_of, is_stack
from qcore.gguf.fields import Fields
from qcore.gguf.recipes import ALIASES, RECIPES, Place, Recipe, choose, fitting
from qcore.gguf.write import Progress, write_tensors
from qcore.refusal import Refusal, Refused, bad_file

if TYPE_CHECKING:
    import torch

log = logging.getLogger("qcore")

_FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_UNGUIDED_IN_NEED = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")
"""Types that llama.cpp does not make without an importance matrix."""
_DOWN = re.compile(r"blk\.\d+\.ffn_down\w*\.weight")
_SUFFIX = re.compile("_(exps|shexp)$")
"""What experts' parts are called beside the same parts of other models."""


@dataclass(frozen=True)
class Mixture:
    """A file that is to be made. types: of each tensor of `contents`, a key of BLOCK_TYPES, or f32, f16 or bf16."""

    contents: Contents
    recipe: Recipe
    types: Mapping[str, str]

    @classmethod
    def of(cls, source: Checkpoint, type: str, overrides: Mapping[str, str], *, guided: bool) -> Mixture:
        """Reads headers, configs and the tokenizer only. type, overrides: as in `save_gguf`. guided: it is known how important columns are. Raises Refused as `save_gguf` does."""
        recipe, patterns = recipe_of(type), _patterns(overrides)
        contents = contents_of(source)
        return cls(contents, recipe, types_of(contents, recipe, patterns, guided=guided))

    def encoded(self, tensor: str, importance: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """What is stored of a tensor; of stacks one expert after the other. importance: that of columns, [experts * columns]."""
        each = None if importance is None else importance.view(-1, self.contents.shapes[tensor][-1])
        for number, rows in enumerate(self.contents.rows(tensor)):
            yield _quantized(self.contents, tensor, rows, self.types[tensor], None if each is None else each[number])

    def write(
        self, out: Path, read: Callable[[str], Iterator[torch.Tensor]], metadata: Mapping[str, object], progress: Progress | None
    ) -> Path:  # fmt: skip
        """The file, of what `read` gives of each tensor. metadata: more fields. Raises Refused: output-exists, cannot-write."""
        own: dict[str, object] = {"general.file_type": self.recipe.number}
        if any(kind in BLOCK_TYPES for kind in self.types.values()):
            own["general.quantization_version"] = 2

        def write(path: Path) -> None:
            write_tensors(path, self.contents, self.types, read, own | dict(metadata), progress)
            open_checkpoint(path)  # all that it says of itself fits together

        atomic_file(Path(out), write)
        return Path(out).absolute()


def save_gguf(
    source: Checkpoint,
    out: Path,
    type: str = "q4_k_m",
    *,
    importance: Path | None = None,
    overrides: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Quantizes the checkpoint's weights into the GGUF file `out`, which is returned.

    type: a key of RECIPES, in either case. importance: an imatrix file of llama.cpp's. overrides: types by regular
    expression, which is looked for in GGUF's names; the first that is found wins over the recipe. Raises Refused:
    bad-argument, not-representable, bad-content, output-exists, cannot-write, and all that reading gives.
    """
    mixture = Mixture.of(source, type, overrides or {}, guided=importance is not None)
    weights = read_imatrix(importance) if importance is not None else {}
    _check_importance(mixture.contents, mixture.types, weights, importance)
    metadata: dict[str, object] = {}
    if importance is not None:
        metadata = {"quantize.imatrix.file": importance.name, "quantize.imatrix.entries_count": len(weights)}
    return mixture.write(out, lambda tensor: mixture.encoded(tensor, weights.get(tensor)), metadata, progress)


def recipe_of(name: str) -> Recipe:
    """The recipe of this name. Raises Refused (bad-argument)."""
    key = name.lower().removeprefix("gguf:")
    key = ALIASES.get(key, key)
    if key not in RECIPES:
        raise Refused(Refusal("bad-argument", "usage", name, "there is no GGUF mixture or type of this name",
                              fix=f"Name one of: {', '.join(row.upper() for row in RECIPES)}."))  # fmt: skip
    return RECIPES[key]


def _patterns(overrides: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    patterns = []
    for expression, kind in overrides.items():
        if kind.lower() not in BLOCK_TYPES and kind.lower() not in _FLOATS:
            raise Refused(Refusal("bad-argument", "usage", kind, "there is no GGUF type of this name",
                                  fix=f"Name one of: {', '.join([*_FLOATS, *BLOCK_TYPES])}."))  # fmt: skip
        try:
            patterns.append((re.compile(expression), kind.lower()))
        except re.error as error:
            raise Refused(Refusal("bad-argument", "usage", expression, "this is not a regular expression", str(error),
                                  "Write a pattern such as ffn_down\\.weight$.")) from error  # fmt: skip
    return patterns


def types_of(
    contents: Contents, recipe: Recipe, patterns: list[tuple[re.Pattern[str], str]], *, guided: bool
) -> dict[str, str]:
    """Each tensor's type; matrices whose rows are no whole blocks of the wanted one get another, which is logged."""
    place = _place(contents, guided=guided)
    downs = sorted(filter(_DOWN.fullmatch, contents.shapes), key=lambda tensor: (_layer(tensor), tensor))
    types, unguided = {}, set()
    for tensor, shape in contents.shapes.items():
        part = tensor.split(".")[-2]
        if len(shape) != (3 if is_stack(tensor) else 2) or not tensor.endswith(".weight") or part in ROUTERS:
            types[tensor] = "f32"
            continue
        own = replace(place, part=_SUFFIX.sub("", part), layer=_layer(tensor), columns=shape[-1], stacked=is_stack(tensor),
                      down=downs.index(tensor) if tensor in downs else 0)  # fmt: skip
        wanted = next((kind for pattern, kind in patterns if pattern.search(tensor)), None) or choose(recipe, own)
        types[tensor] = fitting(wanted, shape[-1])
        if types[tensor] != wanted:
            log.warning("%s is stored as %s: its rows of %d are no whole blocks of %s", tensor, types[tensor].upper(),
                        shape[-1], wanted.upper())  # fmt: skip
        if types[tensor] in _UNGUIDED_IN_NEED and not guided:
            unguided.add(types[tensor])
    if unguided:
        log.warning("%s without an importance matrix: give one, or expect a poor model", ", ".join(sorted(unguided)))
    return types


def _layer(tensor: str) -> int:
    return int(tensor.split(".")[1]) if tensor.startswith("blk.") else 0


def _place(contents: Contents, *, guided: bool) -> Place:
    """What all tensors of the model have in common."""
    from qcore.checkpoint.source import TensorInfo

    infos = {
        name: TensorInfo(name, "F32", shape, contents.source.path, 0, 0) for name, shape in contents.shapes.items()
    }
    fields = Fields(contents.metadata, infos)
    heads, experts = fields.size("attention.head_count"), fields.size("expert_count", 0, least=0)
    grouped, layers = heads // fields.size("attention.head_count_kv", heads), fields.size("block_count")
    # llama.cpp tells a 70B model by its layers, and asks that of no mixture but llama's.
    large = layers == 80 and grouped > 1 and (not experts or fields.architecture.name == "llama")
    return Place("", 0, layers, 0, grouped, "output.weight" not in contents.shapes, guided, experts, large)


def _check_importance(
    contents: Contents, types: Mapping[str, str], weights: Mapping[str, torch.Tensor], file: Path | None
) -> None:
    """Raises Refused (bad-shape) for another model's; says which matrices have none."""
    if file is None:
        return
    quantized = [tensor for tensor, kind in types.items() if kind in BLOCK_TYPES]
    for tensor in quantized:
        *experts, _, columns = contents.shapes[tensor]
        expected = prod(experts) * columns
        if tensor in weights and weights[tensor].numel() != expected:
            raise bad_file("bad-shape", "the importance matrix belongs to another model", file=file, tensor=tensor,
                           field="values", found=list(weights[tensor].shape), expected=[expected],
                           fix="Make it with the model that is quantized.")  # fmt: skip
    inner = [tensor for tensor in quantized if tensor.startswith("blk.") and tensor not in weights]
    if inner:
        log.warning("%s tells nothing of %d matrices, such as %s", file, len(inner), inner[0])


def _quantized(
    contents: Contents, tensor: str, rows: torch.Tensor, kind: str, importance: torch.Tensor | None
) -> torch.Tensor:
    """What is stored of a tensor, or of one expert's rows of it."""
    import torch

    from qcore.blocks.quantize import quantize_blocks

    finite = bool(rows.isfinite().all())
    if kind in _FLOATS:
        stored = rows.to(getattr(torch, _FLOATS[kind]))
        if finite == bool(stored.isfinite().all()):
            return stored
        raise Refused(Refusal("not-representable", "never", tensor, "its values are too large for float16",
                              f"found {rows.abs().max().item():g}, expected at most 65504", "Choose BF16 or F32."))  # fmt: skip
    if not finite:
        raise bad_file("bad-content", "weights are finite numbers", file=contents.source.path,
                       tensor=contents.original(tensor), field="values", found="NaN or infinity")  # fmt: skip
    return quantize_blocks(kind, rows, importance)
