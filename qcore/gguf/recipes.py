"""Which type each matrix of a quantized file gets: llama.cpp's mixtures, as rows.

Source: llama.cpp's src/llama-quant.cpp (the rules, for models without experts) and include/llama.h (the numbers of
`general.file_type`). tests/test_gguf_write.py holds them against the files that llama.cpp itself made.
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
    output matrix, and of the embedding where it serves as one. embedding: of the embedding otherwise."""

    name: str
    number: int
    base: str
    rules: tuple[Rule, ...] = ()
    output: str = "q6_k"
    embedding: str | None = None


@dataclass(frozen=True)
class Place:
    """A tensor: its part's name in GGUF ("attn_v", "output"), and what rules ask. columns: of a row. grouped: how many
    query heads share a key. tied: the embedding is the output matrix too. guided: there is an importance matrix."""

    part: str
    layer: int
    layers: int
    columns: int
    grouped: int
    tied: bool
    guided: bool


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
    "grouped": lambda at: at.grouped >= 4,
    "unguided": lambda at: not at.guided,
    "early unguided": lambda at: at.layer < at.layers // 8 and not at.guided,
    "early guided": lambda at: at.layer < at.layers // 8 and at.guided,
}
_V = "attn_v attn_qkv"
_QK = "attn_q attn_k"


def _tiny(output: str, small: str) -> tuple[Rule, ...]:
    """Rules of the types below 3 bits. small: what the sensitive parts get. output: the attention's."""
    rules = ((_V, "q4_k", "grouped"), (_V, small, "everywhere"), ("ffn_down", small, "early"))
    return (*rules, ("attn_output", output, "everywhere"))


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
        (_V, "q4_k", "grouped"), (f"{_V} ffn_down attn_output", "q3_k", "everywhere"))),
    Recipe("q2_k_s", 21, "q2_k", ((_V, "q4_k", "grouped"), ("ffn_down", "q4_k", "early"))),
    Recipe("q3_k_s", 11, "q3_k"),
    Recipe("q3_k_m", 12, "q3_k", (
        (_V, "q5_k", "first 2"), ("ffn_down", "q5_k", "very early"), (f"{_V} ffn_down attn_output", "q4_k", "everywhere"))),
    Recipe("q3_k_l", 13, "q3_k", ((f"{_V} ffn_down attn_output", "q5_k", "everywhere"),)),
    Recipe("q4_k_s", 14, "q4_k", ((_V, "q5_k", "first 4"), ("ffn_down", "q5_k", "early"))),
    Recipe("q4_k_m", 15, "q4_k", ((f"{_V} ffn_down", "q6_k", "ends and thirds"),)),
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
        (_V, "q4_k", "grouped"), (_V, "iq3_s", "unguided"), (_QK, "iq2_s", "everywhere"),
        ("ffn_down", "q4_k", "early unguided"), ("ffn_down", "q3_k", "unguided"), ("attn_output", "iq3_s", "everywhere")),
        "q5_k", "iq3_s"),
    Recipe("iq3_xs", 22, "iq3_s", (
        (_V, "q4_k", "grouped"), (_QK, "iq3_xxs", "everywhere"), ("ffn_gate ffn_up", "iq3_xxs", "middle"))),
    Recipe("iq3_s", 26, "iq3_s", ((_V, "q4_k", "grouped"),)),
    Recipe("iq3_m", 27, "iq3_s", (
        (f"{_V} attn_output", "q4_k", "everywhere"), ("ffn_down", "q4_k", "early"))),
    Recipe("iq4_nl", 25, "iq4_nl", ((_V, "q5_k", "grouped"), ("ffn_down", "q5_k", "early unguided"))),
    Recipe("iq4_xs", 30, "iq4_xs", ((_V, "q5_k", "grouped"), ("ffn_down", "q5_k", "early unguided"))),
    Recipe("tq1_0", 36, "tq1_0", embedding="q4_k"),
    Recipe("tq2_0", 37, "tq2_0", embedding="q4_k"),
    # llama.cpp makes these two of experts only; here they are types like the others.
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
    rules = (kind for parts, kind, where in recipe.rules if at.part in parts.split() and _WHERE[where](at))
    kind = next(rules, recipe.base)
    large = at.layers == 80 and at.grouped > 1 and not recipe.base.startswith(("iq1", "iq2"))
    if large and at.part in _V.split() and kind in ("q3_k", "q4_k"):
        return "q5_k"  # the 70B models share each value head among eight, so that more bits for it cost little
    return kind


def fitting(kind: str, columns: int) -> str:
    """`kind`, or the type that stands in for it where rows are no whole blocks."""
    for wanted in (kind, _NARROWER.get(kind, "f16")):
        if wanted not in BLOCK_TYPES or columns % BLOCK_TYPES[wanted].elements == 0:
            return wanted
    return "f16"
