"""The tokenizer that a GGUF file carries, rebuilt with the `tokenizers` library.

Two kinds are in use: `gpt2`, byte-level BPE with explicit merges and a named pre-tokenizer, and `llama`, SentencePiece
BPE whose merges follow from the pieces' scores. A pre-tokenizer that is not known is refused: another one would split
text differently and the model would answer from the wrong tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.refusal import Refusal, Refused, bad_file

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerBase

_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6
"""Token types (llama.cpp's llama_token_type); 2 is unknown, 5 unused."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_REST}"
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTED}"
    rf"|\p{{N}}{{1,3}}|{_REST}"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    "gpt-2": (_GPT2,),
    "mpt": (_GPT2,),
    "olmo": (_GPT2,),
    "phi-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "refact": (r"\p{N}", _GPT2),
    "command-r": (r"\p{N}", _GPT2),
    "codeshell": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "smollm3": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "tekken": (_TEKKEN,),
    "gpt-4o": (_GPT4O,),
}
"""Regular expressions that split the text one after another (llama.cpp's llama-vocab)."""

_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "smollm3", "tekken")
"""A word that is a token itself is not merged from pieces."""


def build_tokenizer(metadata: Mapping[str, Any], *, file: Path) -> PreTrainedTokenizerBase:
    """A transformers tokenizer with the file's vocabulary, special tokens and chat template.

    Raises Refused: missing-tensor where the file carries no tokenizer, unknown-variant for a kind or pre-tokenizer that
    is not read, bad-field for lists that do not fit together.
    """
    from transformers import PreTrainedTokenizerFast

    vocabulary = _Vocabulary(metadata, file)
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise vocabulary.variant("tokenizer.ggml.model", kind, "gpt2 or llama")
    tokenizer = _byte_level(vocabulary) if kind == "gpt2" else _sentence_piece(vocabulary)
    special, defined = vocabulary.added()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(defined)
    _add_bos_and_eos(tokenizer, vocabulary, kind)
    names = {f"{role}_token": vocabulary.token(key) for role, key in _ROLES.items()}
    template = metadata.get("tokenizer.chat_template")
    wrapped: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **{role: token for role, token in names.items() if token is not None},
    )
    if isinstance(template, str):
        wrapped.chat_template = template
    return wrapped


_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class _Vocabulary:
    """The tokenizer's lists, checked against each other."""

    def __init__(self, metadata: Mapping[str, Any], file: Path) -> None:
        self.metadata, self.file = metadata, file
        self.tokens: list[str] = self._list("tokens", str)
        if not self.tokens:
            raise bad_file("missing-tensor", "the file carries no tokenizer", file=file, field="tokenizer.ggml.tokens",
                           expected="the vocabulary", fix="Use a file that llama.cpp's converter wrote in one go.")  # fmt: skip
        self.types: list[int] = self._list("token_type", int) or [_NORMAL] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise self.wrong("token_type", len(self.types), f"{len(self.tokens)} types")
        self.ids = {token: i for i, token in enumerate(self.tokens)}

    def _list(self, key: str, kind: type) -> list[Any]:
        values = self.metadata.get(f"tokenizer.ggml.{key}", [])
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise self.wrong(key, type(values).__name__, f"a list of {kind.__name__}")
        return values

    def merges(self) -> list[tuple[str, str]]:
        """Pairs in the order in which they are merged."""
        pairs = []
        for line in self._list("merges", str):
            left, space, right = line.partition(" ")
            if not space or not left or " " in right or left + right not in self.ids:
                raise self.wrong("merges", line, "two pieces of a token, with a space between")
            pairs.append((left, right))
        return pairs

    def scores(self) -> list[float]:
        scores = self._list("scores", float)
        if len(scores) != len(self.tokens):
            raise self.wrong("scores", len(scores), f"{len(self.tokens)} scores")
        return scores

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if type(value) is not bool:
            raise self.wrong(key, value, "true or false")
        return value

    def token(self, key: str) -> str | None:
        """The token of a special id, such as `bos`."""
        value = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise self.wrong(f"{key}_token_id", value, f"an id below {len(self.tokens)}")
        return self.tokens[value]

    def added(self) -> tuple[list[AddedToken], list[AddedToken]]:
        """Control tokens, which text never spells, and user-defined ones, which it does."""
        from tokenizers import AddedToken

        def of(kind: int) -> list[str]:
            return [token for token, type_ in zip(self.tokens, self.types, strict=True) if type_ == kind]

        special = [AddedToken(token, normalized=False, special=True) for token in of(_CONTROL)]
        return special, [AddedToken(token, normalized=False) for token in of(_USER_DEFINED)]

    def wrong(self, key: str, found: object, expected: str) -> Refused:
        return bad_file("bad-field", "the tokenizer's lists do not fit together", file=self.file,
                        field=f"tokenizer.ggml.{key}", found=found, expected=expected)  # fmt: skip

    def variant(self, field: str, found: object, expected: str) -> Refused:
        return Refused(
            Refusal("unknown-variant", "notimpl", str(self.file), "this kind of tokenizer is not read yet",
                    f"found {found!r}, expected {expected}",
                    "Put the model's tokenizer.json beside its safetensors checkpoint and use that.", str(self.file),
                    field=field)
        )  # fmt: skip


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = vocabulary.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise vocabulary.variant("tokenizer.ggml.pre", pre, ", ".join(PRE_TOKENIZERS))
    model = models.BPE(
        vocab=vocabulary.ids, merges=vocabulary.merges(), fuse_unk=False, ignore_merges=pre in _WHOLE_WORDS
    )
    tokenizer = Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in PRE_TOKENIZERS[pre]]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_])
    if pre in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(vocabulary: _Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = vocabulary.token("unknown") or next(
        (t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == 2), None
    )
    model = models.BPE(
        vocab=vocabulary.ids,
        merges=_merges_by_score(vocabulary.tokens, vocabulary.types, vocabulary.scores(), vocabulary.ids),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=_BYTE in vocabulary.types,
    )
    tokenizer = Tokenizer(model)
    prefix = vocabulary.flag("add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_by_score(
    tokens: list[str], types: list[int], scores: list[float], ids: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, the highest score first.

    SentencePiece merges the pair whose result has the highest score; ties go to the pair of the lower ids.
    """
    pairs = []
    for token, kind, score in zip(tokens, types, scores, strict=True):
        if kind not in (_NORMAL, _USER_DEFINED) or len(token) < 2:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                pairs.append((-score, ids[left], ids[right], left, right))
    pairs.sort()
    return [(left, right) for _, _, _, left, right in pairs]


def _add_bos_and_eos(tokenizer: Tokenizer, vocabulary: _Vocabulary, kind: str) -> None:
    """Where the file asks for it (SentencePiece models begin texts with bos unless it says otherwise)."""
    from tokenizers import processors

    bos = vocabulary.token("bos") if vocabulary.flag("add_bos_token", kind == "llama") else None
    eos = vocabulary.token("eos") if vocabulary.flag("add_eos_token", False) else None
    if bos is None and eos is None:
        return
    one = " ".join(filter(None, [bos and "B:0", "$A:0", eos and "E:0"]))
    two = f"{one} {' '.join(filter(None, [bos and 'B:1', '$B:1', eos and 'E:1']))}"
    special = [(name, vocabulary.ids[token]) for name, token in (("B", bos), ("E", eos)) if token is not None]
    tokenizer.post_processor = processors.TemplateProcessing(single=one, pair=two, special_tokens=special)
