"""How byte-level BPE tokenizers cut text into words before they merge: the values of `tokenizer.ggml.pre`, as rows.

Sources: llama.cpp's llama-vocab (which name means which expressions) and the tokenizer.json files of the models
themselves (the expressions, which are in Oniguruma's syntax, that of `tokenizers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACE}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACE}"

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAMEL = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CAMEL[0]}|{_CAMEL[1]}|\p{{N}}|{_SIGNS}|{_SPACE}"
_GPT4O = rf"{_CAMEL[0]}{_CONTRACTION}?|{_CAMEL[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACE}"


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting. names: the values of `tokenizer.ggml.pre` that mean it. splits: expressions whose matches
    become words of their own, applied one after another. whole_words: a word that is a token is not merged from its
    letters. adds_bos: texts begin with bos unless the file says otherwise. composes: text is brought to NFC first."""

    names: tuple[str, ...]
    splits: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False
    composes: bool = False


_ROWS = (
    PreTokenizer(("default",), (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9]{3}")),
    PreTokenizer(("gpt-2", "phi-2", "mpt", "olmo"), (_GPT2,)),
    PreTokenizer(("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"), (r"\p{N}", _GPT2)),
    PreTokenizer(("llama-bpe", "llama3", "llama-v3", "falcon3"), (_LLAMA3,), whole_words=True, adds_bos=True),
    PreTokenizer(("dbrx", "smaug-bpe"), (_LLAMA3,)),
    PreTokenizer(("qwen2", "deepseek-r1-qwen", "megrez"), (_QWEN2,), composes=True),
    PreTokenizer(("tekken",), (_TEKKEN,), whole_words=True, adds_bos=True),
    PreTokenizer(("gpt-4o",), (_GPT4O,)),
    PreTokenizer(("deepseek-coder",), (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType({name: row for row in _ROWS for name in row.names})
