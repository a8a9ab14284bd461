"""A transformers tokenizer as GGUF metadata: the inverse of `tokenizer`.

Its pre-tokenizer and its flags are found by what they do to a text, for tokenizer.json spells one thing in many ways. The
result is built again and has to give the same tokens; a tokenizer that GGUF cannot name is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.gguf.pretokenizers import PRE_TOKENIZERS
from qcore.gguf.tokenizer import build_tokenizer, merges_by_score
from qcore.gguf.vocabulary import TokenType, Vocabulary
from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = (
    "Hello, world! It's the CAT'S; we'll see: they'RE, I'd, you've 'tis  fine.",
    "  leading and trailing   ", "one\ntwo\n\nthree\n\n\n four\r\n\tfive\t\tsix", "1 12 123 1234 1234567 3.14159 2024-01-31",
    "def f(x, *, y=None):\n    return x ** 2  # squared\n\n\nclass A_b:\n\tpass\n", "naïve café ÅÅ İ ǅ ½ ² Ⅳ",
    "日本語 中文字符 한국어 ไทย 你好世界。", "🙂 👩‍👩‍👧 🏳️‍🌈 👍🏽", "مرحبا بالعالم हिन्दी", "\u00a0\u2003\u200b\ufeff",
    "a" + " " * 40 + "b" + "\n" * 20, "https://example.com/a?b=c&d=%20#e", "\x01\x7f", "CamelCase snake_case JSON2XML",
    "$100 + 50% = €75 ≠ ∞ <= >= != ~^|`", "!?!?...---___///\n)}]\n", "x", " x", "e\u0301 ﬁ",
)  # fmt: skip
"""Texts in which the known pre-tokenizers differ."""
_ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}
_UNSCORED = -1000.0
"""What llama.cpp's converter gives pieces that no merge makes."""


def tokenizer_fields(tokenizer: PreTrainedTokenizerBase, vocabulary: int, file: Path) -> dict[str, Any]:
    """The `tokenizer.` fields of a model whose embedding has this many rows. Raises Refused (not-representable)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else {}
    model = parts.get("model") or {}
    if model.get("type") != "BPE":
        raise _no(file, "GGUF files are written with BPE tokenizers", f"found {model.get('type')!r}, expected 'BPE'")
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    fields = {f"{role}_token_id": value for role, key in _ROLES.items()
              if (value := getattr(tokenizer, key, None)) is not None and value < vocabulary}  # fmt: skip
    fields |= _frame(tokenizer, file)
    if model.get("byte_fallback"):
        fields |= _tokens(parts, vocabulary, spelled=True)
        candidates = _sentencepiece(fields, merges, file)
    else:
        fields |= _tokens(parts, vocabulary, spelled=False)
        candidates = _byte_level(fields, merges)
    template = _templates(tokenizer)
    found = next((made for made in candidates if _encodes_alike(tokenizer, made, file)), None)
    if found is None:
        raise _no(file, "GGUF has no name for the way in which the tokenizer cuts text",
                  f"none of {', '.join(PRE_TOKENIZERS)} and SentencePiece's gives its tokens")  # fmt: skip
    return _named(found) | template


def _byte_level(fields: Mapping[str, Any], merges: Sequence[tuple[str, ...]]) -> Iterable[dict[str, Any]]:
    """One for each way of cutting; `default`, which is only for old files, comes last."""
    lines = [" ".join(pair) for pair in merges]
    rows = {id(row): row for row in PRE_TOKENIZERS.values()}.values()
    for row in sorted(rows, key=lambda row: row.names[0] == "default"):
        yield {"model": "gpt2", "pre": row.names[0], **fields, "merges": lines}


def _sentencepiece(fields: dict[str, Any], merges: Sequence[tuple[str, ...]], file: Path) -> Iterable[dict[str, Any]]:
    """With and without the space before a text. A piece's score is the place of its first merge, negative."""
    first: dict[str, int] = {}
    for i, pair in enumerate(merges):
        first.setdefault("".join(pair), i)
    plain = {TokenType.NORMAL, TokenType.USER_DEFINED}
    spelled = [token.replace(" ", "▁") for token in fields["tokens"]]
    scores = [-float(first[token]) if kind in plain and token in first else _UNSCORED - len(first)
              for token, kind in zip(spelled, fields["token_type"], strict=True)]  # fmt: skip
    for prefix in (True, False):
        made = {"model": "llama", "pre": "default", **fields, "scores": scores, "add_space_prefix": prefix}
        implied = merges_by_score(Vocabulary(_named(made), file))
        missing = set(implied) ^ set(merges)
        if missing:
            raise _no(file, "SentencePiece merges every two pieces that make a third, and the tokenizer does not",
                      f"found {len(missing)} pairs that only one of them merges, such as {sorted(missing)[0]!r}")  # fmt: skip
        yield made


def _tokens(parts: Mapping[str, Any], vocabulary: int, *, spelled: bool) -> dict[str, Any]:
    """The token and the type of each id; ids beyond the embedding are left out, gaps are filled."""
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [int(TokenType.UNUSED)] * vocabulary
    unknown = parts["model"].get("unk_token")
    for token, i in parts["model"]["vocab"].items():
        if i < vocabulary:
            kind = TokenType.BYTE if spelled and len(token) == 6 and token[:3] == "<0x" else TokenType.NORMAL
            tokens[i], types[i] = token, int(kind)
    for added in parts.get("added_tokens", ()):
        if added["id"] < vocabulary:
            kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
            if spelled and added["content"] == unknown:
                kind = TokenType.UNKNOWN
            # llama.cpp looks for user-defined tokens in the text, where spaces are spaces.
            text = added["content"] if added["special"] or not spelled else added["content"].replace("▁", " ")
            tokens[added["id"]], types[added["id"]] = text, int(kind)
    return {"tokens": tokens, "token_type": types}


def _frame(tokenizer: PreTrainedTokenizerBase, file: Path) -> dict[str, bool]:
    """Whether texts begin with bos and end with eos. Raises Refused where something else stands there."""
    bare = tokenizer("x", add_special_tokens=False).input_ids
    framed = tokenizer("x").input_ids
    bos, eos = ([i] if i is not None else [] for i in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    for before in ([], bos):
        for after in ([], eos):
            if framed == before + bare + after:
                return {"add_bos_token": bool(before), "add_eos_token": bool(after)}
    raise _no(file, "the tokenizer puts other tokens around a text than bos and eos", f"found {framed} around {bare}")


def _encodes_alike(tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any], file: Path) -> bool:
    built = build_tokenizer(_named(fields), file=file)
    return all(built(text).input_ids == tokenizer(text).input_ids for text in PROBES)


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The chat template, or the named ones with the list of their names."""
    template, key = getattr(tokenizer, "chat_template", None), "tokenizer.chat_template"
    if not isinstance(template, dict):
        return {key: template} if template else {}
    names = sorted(name for name in template if name != "default")
    fields: dict[str, Any] = {"tokenizer.chat_templates": names} if names else {}
    fields |= {f"{key}.{name}": template[name] for name in names}
    return fields | ({key: template["default"]} if "default" in template else {})


def _named(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def _no(file: Path, reason: str, fact: str) -> Refused:
    return Refused(
        Refusal("not-representable", "notimpl", str(file), reason, fact, "Keep the model in safetensors.", str(file),
                field="tokenizer")
    )  # fmt: skip
