"""The lists of a GGUF file's tokenizer, checked against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

from qcore.refusal import Refusal, Refused, bad_file


class TokenType(IntEnum):
    """llama.cpp's llama_token_type. Text never spells a control token, and always spells a user-defined one whole."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Vocabulary:
    """tokens: by id. types: a `TokenType` for each. ids: the inverse of tokens.

    Raises Refused: bad-field, duplicate.
    """

    def __init__(self, metadata: Mapping[str, Any], file: Path) -> None:
        self.metadata, self.file = metadata, file
        tokens = self._list("tokens", str)
        if not tokens:
            raise bad_file("bad-field", "the file carries no tokenizer", file=file, field="tokenizer.ggml.tokens",
                           found="no tokens", expected="the vocabulary",
                           fix="Use the tokenizer of the original model.")  # fmt: skip
        self.tokens: list[str] = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        self.types: list[int] = self._list("token_type", int) or [TokenType.NORMAL] * len(tokens)
        if len(self.types) != len(tokens):
            raise self.wrong("token_type", f"{len(self.types)} types", f"{len(tokens)}")
        if self.text("model") == "llama":
            self._spell_as_sentencepiece()
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for i, token in enumerate(self.tokens) if self.ids[token] != i)
            raise bad_file("duplicate", "two ids have the same token", file=file, field="tokenizer.ggml.tokens",
                           found=repr(twice))  # fmt: skip

    def merges(self) -> list[tuple[str, str]]:
        """Pairs in the order in which they are merged."""
        pairs = []
        for line in self._list("merges", str):
            left, _, right = line.partition(" ")
            if not (left in self.ids and right in self.ids and left + right in self.ids):
                raise self.wrong("merges", repr(line), "two tokens that make a third, with a space between")
            pairs.append((left, right))
        return pairs

    def scores(self) -> list[float]:
        """One for each token."""
        scores = self._list("scores", float)
        if len(scores) != len(self.tokens) or not all(map(math.isfinite, scores)):
            raise self.wrong("scores", f"{len(scores)} scores", f"{len(self.tokens)} finite numbers")
        return scores

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if type(value) is not bool:
            raise self.wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str = "") -> str:
        """A string."""
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if type(value) is not str:
            raise self.wrong(key, value, "a string")
        return value

    def token(self, role: str, default: int | None = None) -> str | None:
        """The token of a special id: `bos`, `eos`, `unknown`, `padding`."""
        value = self.metadata.get(f"tokenizer.ggml.{role}_token_id", default)
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise self.wrong(f"{role}_token_id", value, f"an id below {len(self.tokens)}")
        return self.tokens[value]

    def of_type(self, *kinds: TokenType) -> list[str]:
        """The tokens of some types, by id."""
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in kinds]

    def wrong(self, key: str, found: object, expected: str) -> Refused:
        """The refusal of a value that no tokenizer has."""
        return bad_file("bad-field", "the tokenizer's fields do not fit together", file=self.file,
                        field=f"tokenizer.ggml.{key}", found=found, expected=expected)  # fmt: skip

    def not_read(self, key: str, found: str, expected: str) -> Refused:
        """The refusal of a variant that is not implemented."""
        return Refused(
            Refusal("unknown-variant", "notimpl", str(self.file), "this kind of tokenizer is not read from GGUF yet",
                    f"found {found!r:.200}, expected {expected}", "Use the tokenizer of the original model.",
                    str(self.file), field=f"tokenizer.ggml.{key}")
        )  # fmt: skip

    def _list(self, key: str, kind: type) -> list[Any]:
        values = self.metadata.get(f"tokenizer.ggml.{key}", [])
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise self.wrong(key, f"{type(values).__name__} {values!r:.80}", f"a list of {kind.__name__}")
        return values

    def _spell_as_sentencepiece(self) -> None:
        """Undo what the converter did to whitespace: runs of spaces are written as they are in text, and a tab as a
        byte, although longer pieces are made of tabs."""
        self.tokens = ["▁" * len(token) if token.strip(" ") == "" else token for token in self.tokens]
        if "\t" not in self.tokens and "<0x09>" in self.tokens:
            self.tokens[self.tokens.index("<0x09>")] = "\t"
