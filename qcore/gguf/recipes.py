"""Which type each matrix of a quantized file gets: llama.cpp's mixtures, as rows.

Source: llama.cpp's src/llama-quant.cpp (the rules) and include/llama.h (the numbers of `general.file_type`).
tests/test_gguf_write.py holds them against the files that llama.cpp itself made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qcore.blocks.types import BLOCK_TYPES

Rule = tuple[str, str, str]
"""(parts of a block, the type that they get, where: a key of `_WHERE`). The first that fits is taken."""


@dataclass(frozen=True)
class Recipe:
    """A whole file's mixture. number: its `general.file_type`. base: the type of all that no rule names. output: of the
    output matrix, and of the embedding where it serves as one. embedding: of the embedding otherwise. experts: of stacked
    experts, where they alone get another type than `base`."""

    name: str
    number: int
    base: str
    rules: tuple[Rule, ...] = ()
    output: str = "q6_k"
    embedding: str | None = None
    experts: str | None = None


@dataclass(frozen=True)
class Place:
    """A tensor: its part's name in GGUF ("attn_v", "output"; of experts that of the part, "ffn_down"), and what rules ask.

    columns: of a row. grouped: how many query heads share a key. tied: the embedding is the output matrix too. guided:
    there is an importance matrix. experts: how many the model has. large: it is one of 70B. stacked: the tensor holds all
    experts. down: how many tensors of ffn_down come before this one, which in a model with shared experts has two a layer.
    """

    part: str
    layer: int
    layers: int
    columns: int
    grouped: int
    tied: bool
    guided: bool
    experts: int = 0
    large: bool = False
    stacked: bool = False
    down: int = 0


_WHERE: Mapping[str, Callable[[Place], bool]] = {
    "everywhere": lambda at: True,
    "first 2": lambda at: at.layer < 2,
    "first 4": lambda at: at.layer < 4,
    "early": lambda at: at.layer < at.layers // 8,
    "very early": lambda at: at.layer < at.layers // 16,
    "middle": lambda at: at.layers // 8 <= at.layer < 7 * at.layers // 8,
    "ends and thirds": lambda at: (
        not at.layers // 8 <= at.layer < 7 * at.layers // 8 or (at.layer - at.layers // 8) % 3 == 2
    ),
    "first downs": lambda at: at.down < at.layers // 8,
    "of 8, ends and thirds": lambda at: at.experts == 8 and _WHERE["ends and thirds"](at),
    "of 8": lambda at: at.experts == 8,
    "grouped or mixed": lambda at: at.grouped >= 4 or at.experts >= 4,
    "grouped": lambda at: at.grouped >= 4,
    "unguided": lambda at: not at.guided,
    "early unguided": lambda at: at.layer < at.layers // 8 and not at.guided,
    "early guided": lambda at: at.layer < at.layers // 8 and at.guided,
}
_V = "attn_v attn_qkv"
_QK = "attn_q attn_k"
_OF_8: tuple[Rule, ...] = ((f"{_V} attn_k", "q8_0", "of 8"),)
"""Before the rules of all types but the tiny ones: beside eight experts these parts are small."""
_OUT_8: Rule = ("attn_output", "q5_k", "of 8")


def _tiny(output: str, small: str) -> tuple[Rule, ...]:
    """Rules of the types below 3 bits. small: what the sensitive parts get. output: the attention's."""
    rules = ((_V, "q4_k", "grouped or mixed"), (_V, small, "everywhere"), ("ffn_down", small, "first downs"))
    return (*rules, ("attn_k", "q4_k", "of 8"), _OUT_8, ("attn_output", output, "everywhere"))


_ROWS = (
    Recipe("f32", 0, "f32"),
    Recipe("f16", 1, "f16"),
    Recipe("bf16", 32, "bf16"),
    Recipe("q4_0", 2, "q4_0", (("ffn_down", "q4_1", "early guided"),)),
    Recipe("q4_1", 3, "q4_1"),
    Recipe("q5_0", 8, "q5_0", (("ffn_down", "q5_1", "early guided"),)),
    Recipe("q5_1", 9, "q5_1"),
    Recipe("q8_0", 7, "q8_0", output="q8_0"),
    Recipe("q2_k", 10, "q2_k", (
        _OUT_8, (_V, "q4_k", "grouped"), (f"{_V} ffn_down attn_output", "q3_k", "everywhere"))),
    Recipe("q2_k_s", 21, "q2_k", ((_V, "q4_k", "grouped"), ("ffn_down", "q4_k", "early"))),
    Recipe("q3_k_s", 11, "q3_k", (_OUT_8,)),
    Recipe("q3_k_m", 12, "q3_k", (
        _OUT_8, (_V, "q5_k", "first 2"), ("ffn_down", "q5_k", "very early"), (f"{_V} ffn_down attn_output", "q4_k", "everywhere"))),
    Recipe("q3_k_l", 13, "q3_k", (
        ("attn_output", "q3_k", "of 8"), (f"{_V} ffn_down attn_output", "q5_k", "everywhere"),)),
    Recipe("q4_k_s", 14, "q4_k", (_OUT_8, (_V, "q5_k", "first 4"), ("ffn_down", "q5_k", "early"))),
    Recipe("q4_k_m", 15, "q4_k", (_OUT_8, (f"{_V} ffn_down", "q6_k", "ends and thirds"),)),
    Recipe("q5_k_s", 16, "q5_k"),
    Recipe("q5_k_m", 17, "q5_k", ((f"{_V} ffn_down", "q6_k", "ends and thirds"),)),
    Recipe("q6_k", 18, "q6_k"),
    Recipe("iq1_s", 24, "iq1_s", _tiny("iq2_xxs", "q2_k"), "q5_k", "q2_k"),
    Recipe("iq1_m", 31, "iq1_m", _tiny("iq2_xxs", "q2_k"), "q5_k", "q2_k"),
    Recipe("iq2_xxs", 19, "iq2_xxs", _tiny("iq2_xxs", "q2_k"), "q5_k", "q2_k"),
    Recipe("iq2_xs", 20, "iq2_xs", _tiny("iq2_xs", "q2_k"), "q5_k", "q2_k"),
    Recipe("iq2_s", 28, "iq2_xs", _tiny("iq3_s", "iq3_s"), "q5_k", "iq3_s"),
    Recipe("iq2_m", 29, "iq2_s", _tiny("iq3_s", "iq3_s"), "q5_k", "iq3_s"),
    Recipe("iq3_xxs", 23, "iq3_xxs", (
        _OUT_8, (_V, "q4_k", "grouped"), (_V, "iq3_s", "unguided"), (_QK, "iq2_s", "everywhere"),
        ("ffn_down", "q4_k", "early unguided"), ("ffn_down", "q3_k", "unguided"), ("attn_output", "iq3_s", "everywhere")),
        "q5_k", "iq3_s"),
    Recipe("iq3_xs", 22, "iq3_s", (
        _OUT_8, (_V, "q4_k", "grouped"), (_QK, "iq3_xxs", "everywhere"), ("ffn_gate ffn_up", "iq3_xxs", "middle"))),
    Recipe("iq3_s", 26, "iq3_s", (_OUT_8, (_V, "q4_k", "grouped"))),
    Recipe("iq3_m", 27, "iq3_s", (
        _OUT_8, (f"{_V} attn_output", "q4_k", "everywhere"),
        ("ffn_down", "q4_k", "early"), ("ffn_down", "q4_k", "of 8, ends and thirds"))),
    Recipe("iq4_nl", 25, "iq4_nl", (_OUT_8, (_V, "q5_k", "grouped"), ("ffn_down", "q5_k", "early unguided"))),
    Recipe("iq4_xs", 30, "iq4_xs", (_OUT_8, (_V, "q5_k", "grouped"), ("ffn_down", "q5_k", "early unguided"))),
    Recipe("tq1_0", 36, "tq1_0", embedding="q4_k"),
    Recipe("tq2_0", 37, "tq2_0", embedding="q4_k"),
    Recipe("mxfp4_moe", 38, "q8_0", output="q8_0", experts="mxfp4"),
    # llama.cpp has this one under the name before only; here it is a type like the others.
    Recipe("mxfp4", 38, "mxfp4"),
    Recipe("nvfp4", 39, "nvfp4"),
    Recipe("q1_0", 40, "q1_0"),
    Recipe("q2_0", 41, "q2_0", embedding="q4_k"),
)  # fmt: skip

RECIPES: Mapping[str, Recipe] = MappingProxyType({row.name: row for row in _ROWS})
ALIASES: Mapping[str, str] = MappingProxyType({"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"})
"""llama.cpp's names of the middle mixtures."""


def is_recipe(name: str) -> bool:
    """Whether llama.cpp has a mixture of this name, in either case."""
    key = name.lower().removeprefix("gguf:")
    return key in RECIPES or key in ALIASES


_NARROWER = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
    **dict.fromkeys(("q2_0", "q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
    "q1_0": "q4_0", "nvfp4": "mxfp4",  # llama.cpp refuses them
}  # fmt: skip
"""What rows get that are no whole blocks of a type: one with blocks of 32."""


def choose(recipe: Recipe, at: Place) -> str:
    """The type that the recipe gives a matrix, whatever the length of its rows."""
    if recipe.base not in BLOCK_TYPES:
        return recipe.base
    if at.part == "output" or (at.part == "token_embd" and at.tied):
        return recipe.output if at.columns % BLOCK_TYPES[recipe.base].elements == 0 else "q8_0"
    if at.part == "token_embd":
        return recipe.embedding or recipe.base
    if recipe.experts is not None and at.stacked and at.experts > 1:
        return recipe.experts
    tiny = recipe.base.startswith(("iq1", "iq2"))
    rules = recipe.rules if tiny or recipe.experts else _OF_8 + recipe.rules
    kind = next((kind for parts, kind, where in rules if at.part in parts.split() and _WHERE[where](at)), recipe.base)
    if at.large and not tiny and at.part in _V.split() and kind in ("q3_k", "q4_k"):
        return "q5_k"  # the 70B models share each value head among eight, so that more bits for it cost little
    return kind


def fitting(kind: str, columns: int) -> str:
    """`kind`, or the type that stands in for it where rows are no whole blocks."""
    for wanted in (kind, _NARROWER.get(kind, "f16")):
        if wanted not in BLOCK_TYPES or columns % BLOCK_TYPES[wanted].elements == 0:
            return wanted
    return "f16"
