"""The tokenizer that a GGUF file carries, rebuilt with the `tokenizers` library.

Two kinds are in use: `gpt2`, byte-level BPE with explicit merges and a named pre-tokenizer, and `llama`, SentencePiece
BPE whose merges follow from the pieces' scores. A pre-tokenizer that is not known is refused: another one would split
text differently, and the model would answer to the wrong tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.checkpoint.tokenizer import is_fault
from qcore.gguf.pretokenizers import PRE_TOKENIZERS
from qcore.gguf.vocabulary import TokenType, Vocabulary
from qcore.refusal import Refused, bad_file

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerBase

_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""transformers' names of special tokens -> GGUF's."""
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
"""SentencePiece's own, where the file names none."""
_KEEPS_SPACE = ("<unk>", "<s>", "<|endoftext|>")
"""Phi 3's special tokens take the spaces after them along, but for these."""
_LONGEST_PIECE = 256
"""Characters; every way to cut every piece is looked at. Real pieces have at most a few dozen."""
_PLACEHOLDERS = ("unused", "reserved", "placeholder")
"""Special tokens without a meaning. Gemma has 6 000, and transformers 4 takes quadratic time to list special tokens."""


def build_tokenizer(metadata: Mapping[str, Any], *, file: Path) -> PreTrainedTokenizerBase:
    """A transformers tokenizer with the file's vocabulary, special tokens and chat template.

    Raises Refused: unknown-variant for a kind or pre-tokenizer that is not read; bad-field or duplicate for fields that
    do not fit together, or a file without a tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    vocabulary = Vocabulary(metadata, file)
    kind = vocabulary.text("model")
    if kind not in ("gpt2", "llama"):
        raise vocabulary.not_read("model", kind, "gpt2 or llama")
    sentencepiece = kind == "llama"
    defaults = _SENTENCEPIECE_IDS if sentencepiece else {}
    roles = {name: vocabulary.token(role, defaults.get(role)) for name, role in _ROLES.items()}
    try:
        tokenizer = _sentencepiece(vocabulary, roles["unk_token"]) if sentencepiece else _byte_level(vocabulary)
    except BaseException as error:  # tokenizers raises bare Exception, or panics, for a vocabulary that it cannot use
        if not is_fault(error) or isinstance(error, Refused):
            raise
        raise vocabulary.wrong("tokens", str(error), "a vocabulary for BPE") from error
    special, defined = _added_tokens(
        vocabulary, rstrip=sentencepiece and metadata.get("general.architecture") == "phi3"
    )
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(defined)
    adds_bos = sentencepiece or PRE_TOKENIZERS[vocabulary.text("pre", "default")].adds_bos
    _frame(
        tokenizer,
        roles["bos_token"] if vocabulary.flag("add_bos_token", adds_bos) else None,
        roles["eos_token"] if vocabulary.flag("add_eos_token", False) else None,
    )
    named = {name: token for name, token in roles.items() if token is not None}
    wrapped: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=[
            token
            for token in special
            if token.content not in named.values() and not any(word in token.content for word in _PLACEHOLDERS)
        ],
        **named,
    )
    wrapped.chat_template = _chat_templates(metadata, file)
    return wrapped


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = vocabulary.text("pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise vocabulary.not_read("pre", pre, f"one of {', '.join(PRE_TOKENIZERS)}")
    row, merges = PRE_TOKENIZERS[pre], vocabulary.merges()
    if not merges:
        raise vocabulary.wrong("merges", "none", "the pairs that byte-level BPE merges")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=row.whole_words))
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in row.splits]
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, in_bytes])
    if row.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary, unknown: str | None) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    model = models.BPE(
        vocab=vocabulary.ids,
        merges=merges_by_score(vocabulary),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = vocabulary.flag("add_space_prefix", True)
    prepend = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, in the order in which SentencePiece would: the best result first.

    User-defined pieces come before all others, and of equal results the one with the longer left part comes first,
    as in the merges that transformers makes from the same model. Files converted from a tokenizer.json give all pieces
    one score; their ids are in the order of the merges.
    """
    normal, defined = {}, {}
    for token, score, kind in zip(vocabulary.tokens, vocabulary.scores(), vocabulary.types, strict=True):
        if kind == TokenType.NORMAL:
            normal[token] = score
        elif kind == TokenType.USER_DEFINED:
            defined[token] = 0.0
    if len(set(normal.values())) == 1:
        normal = {token: -float(vocabulary.ids[token]) for token in normal}
    pieces = normal | defined
    if (longest := max(pieces, key=len, default="")) and len(longest) > _LONGEST_PIECE:
        raise vocabulary.wrong("tokens", f"a piece of {len(longest)} characters", f"at most {_LONGEST_PIECE}")
    ranked = [
        (-score, -cut, token[:cut], token[cut:])
        for token, score in pieces.items()
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    ranked.sort(key=lambda entry: entry[:2])
    return [(left, right) for _, _, left, right in ranked]


def _added_tokens(vocabulary: Vocabulary, *, rstrip: bool) -> tuple[list[AddedToken], list[AddedToken]]:
    """Special tokens, which decoding may leave out, and user-defined ones; both are found whole in the text."""
    from tokenizers import AddedToken

    special, defined = (
        [
            AddedToken(token, normalized=False, special=is_special, rstrip=rstrip and token not in _KEEPS_SPACE)
            for token in vocabulary.of_type(*kinds)
        ]
        for is_special, kinds in ((True, (TokenType.UNKNOWN, TokenType.CONTROL)), (False, (TokenType.USER_DEFINED,)))
    )
    return special, defined


def _frame(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Every text begins with bos and ends with eos, where they are given."""
    from tokenizers import processors

    def around(text: str, part: int) -> list[str]:
        return [f"{piece}:{part}" for piece in (bos and "bos", text, eos and "eos") if piece]

    special = [
        {"id": name, "ids": [tokenizer.token_to_id(token)], "tokens": [token]}
        for name, token in (("bos", bos), ("eos", eos))
        if token is not None
    ]
    single = around("$A", 0)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=single + around("$B", 1), special_tokens=special
    )


def _chat_templates(metadata: Mapping[str, Any], file: Path) -> str | dict[str, str] | None:
    """The file's template, or its named ones. They are run in transformers' sandbox, when a chat is rendered."""
    first = "tokenizer.chat_template"
    named = {key[len(first) + 1 :]: value for key, value in metadata.items() if key.startswith(f"{first}.")}
    templates = {"default": metadata[first], **named} if first in metadata else named
    for name, template in templates.items():
        if type(template) is not str:
            raise bad_file("bad-field", "a chat template is a text", file=file,
                           field=first if name == "default" else f"{first}.{name}", found=template)  # fmt: skip
    return templates if named else metadata.get(first)
