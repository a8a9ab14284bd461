"""Tokenizers from GGUF metadata, against the tokenizer.json of the same model and tokenizers built by other means."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from qcore.checkpoint.gguf import GgufSource
from qcore.gguf.tokenizer import build_tokenizer
from qcore.refusal import Refused

GOLDEN = Path(__file__).parent / "golden" / "gguf-q4_0"
FILE = Path("model.gguf")
TEXTS = [
    "", " ", "Hello, world!", "  leading and trailing   ", "one\ntwo\n\nthree\n\n\n four\r\n\tfive\t\tsix", "x" * 70,
    "def f(x, *, y=None):\n    return x ** 2  # squared\n\n\nclass A:\n\tpass\n", "1 12 123 1234567 3.14159 2024-01-31",
    "I'm sure you'RE right, they'll say it's fine, isn't it?", "naïve café e\u0301 ﬁ ÅÅ İ ǅ", "日本語 中文字符 한국어 ไทย",
    "🙂 👩‍👩‍👧 🏳️‍🌈 👍🏽", "مرحبا بالعالم हिन्दी", "\u00a0\u2003\u200b\ufeff", "a" + " " * 40 + "b" + "\n" * 20, "<s>not bos</s>",
    "https://example.com/a?b=c&d=%20#e", "\x00\x01\x7f", "CamelCase snake_case kebab-case JSON2XML", "$100 + 50% = €75 ≠ ∞",
]  # fmt: skip
CORPUS = [*TEXTS, "the quick brown fox jumps over the lazy dog 12345 times; it isn't tired, and they aren't either"] * 3


def refusal_of(metadata: dict[str, Any]) -> tuple[str, str | None]:
    with pytest.raises(Refused) as refused:
        build_tokenizer(metadata, file=FILE)
    assert refused.value.refusal.file == str(FILE)
    return refused.value.refusal.code, refused.value.refusal.field


# --- the real file


def test_golden_file_gives_the_models_own_tokenizer(tmp_path: Path) -> None:
    source = GgufSource.open(GOLDEN / "tiny-q4_0.gguf")
    tokenizer = build_tokenizer(source.metadata, file=source.path)
    original = Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
    for text in TEXTS:
        ids = original.encode(text).ids
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)
    assert (tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)) == ("<s>", "</s>", 1024)
    tokenizer.save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]


# --- byte-level BPE

CONTROL = ["<|begin|>", "<|end|>", "<|pad|>"]
DEFINED = ["<tool>"]
QWEN2 = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
LLAMA3 = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
UNSPLIT = {"add_prefix_space": False, "use_regex": False}


def split_by(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(expression), "isolated"), pre_tokenizers.ByteLevel(**UNSPLIT)]
    )


# The pre-tokenizers of the models' own tokenizer.json files.
PRE_TOKENIZERS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "qwen2": split_by(QWEN2),
    "llama-bpe": split_by(LLAMA3),
    "dbrx": split_by(LLAMA3),
}


def train_byte_level(pre: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(DEFINED)
    return tokenizer


def byte_level_metadata(tokenizer: Tokenizer, pre: str, **changes: Any) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    size = tokenizer.get_vocab_size()
    tokens = [tokenizer.id_to_token(i) for i in range(size)]
    types = [3 if token in CONTROL else 4 if token in DEFINED else 1 for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.padding_token_id": 2,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }  # fmt: skip


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_tokenizers_are_rebuilt(pre: str) -> None:
    original = train_byte_level(pre)
    tokenizer = build_tokenizer(byte_level_metadata(original, pre, add_bos_token=False), file=FILE)
    for text in [*TEXTS, "<tool>x</tool><|end|> y<|begin|>"]:
        assert tokenizer(text).input_ids == original.encode(text).ids, text
    plain = [text for text in TEXTS if pre != "qwen2" or "e\u0301" not in text]  # which qwen2 composes
    for text in plain:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        # a stream of growing decodes shows the same text: no spaces are lost on the way
        shown = ""
        for end in range(1, len(ids) + 1):
            part = tokenizer.decode(ids[:end])
            if not part.endswith("\ufffd"):
                assert part.startswith(shown)
                shown = part
        assert shown == text


def test_words_that_are_tokens_are_not_merged_where_the_kind_says_so() -> None:
    metadata = byte_level_metadata(train_byte_level("dbrx"), "dbrx", add_bos_token=False)
    tokens = [*metadata["tokenizer.ggml.tokens"], "zqj"]  # no merge makes this one
    metadata |= {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*metadata["tokenizer.ggml.token_type"], 1],
    }
    assert len(build_tokenizer(metadata, file=FILE)("zqj").input_ids) > 1
    metadata["tokenizer.ggml.pre"] = "llama-bpe"
    assert build_tokenizer(metadata, file=FILE)("zqj").input_ids == [len(tokens) - 1]


def test_default_cuts_as_llama_cpp_does() -> None:
    """Runs of punctuation and of digits stand alone; digits go in threes."""
    metadata = byte_level_metadata(train_byte_level("gpt-2"), "default")
    backend = build_tokenizer(metadata, file=FILE).backend_tokenizer
    cut = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str("ab, cd!? 1234567")]
    assert cut == ["ab", ",", "Ġcd", "!?", "Ġ", "123", "456", "7"]
    del metadata["tokenizer.ggml.pre"]  # as in files that are older than the field
    assert [w for w, _ in build_tokenizer(metadata, file=FILE).backend_tokenizer.pre_tokenizer.pre_tokenize_str("a!1")] == [
        "a", "!", "1"]  # fmt: skip


def test_special_tokens_and_flags() -> None:
    original = train_byte_level("gpt-2")
    plain = build_tokenizer(byte_level_metadata(original, "gpt-2"), file=FILE)
    assert (plain.bos_token, plain.eos_token, plain.pad_token, plain.unk_token) == (*CONTROL, None)
    assert plain("hi").input_ids == original.encode("hi").ids
    both = build_tokenizer(byte_level_metadata(original, "gpt-2", add_bos_token=True, add_eos_token=True), file=FILE)
    assert both("hi").input_ids == [0, *original.encode("hi").ids, 1]
    assert both.convert_ids_to_tokens(both("hi").input_ids)[:: len(both("hi").input_ids) - 1] == CONTROL[:2]
    assert both("hi", add_special_tokens=False).input_ids == original.encode("hi").ids
    assert both("hi", "ho").input_ids == [*both("hi").input_ids, *both("ho").input_ids]
    ids = both("<tool>hi").input_ids
    assert both.decode(ids, skip_special_tokens=True) == "<tool>hi"  # user-defined tokens are text
    assert both.decode(ids) == "<|begin|><tool>hi<|end|>"
    llama3 = build_tokenizer(byte_level_metadata(original, "llama-bpe"), file=FILE)
    assert llama3("hi").input_ids[0] == 0  # where the file does not say


def test_chat_templates() -> None:
    metadata = byte_level_metadata(train_byte_level("gpt-2"), "gpt-2")
    template = "{% for m in messages %}<|begin|>{{ m.role }}: {{ m.content }}{% endfor %}"
    chat = [{"role": "user", "content": "hi"}]
    one = build_tokenizer({**metadata, "tokenizer.chat_template": template}, file=FILE)
    assert one.apply_chat_template(chat, tokenize=False) == "<|begin|>user: hi"
    named = {
        "tokenizer.chat_template": template,
        "tokenizer.chat_template.rag": "rag",
        "tokenizer.chat_templates": ["rag"],
    }
    several = build_tokenizer({**metadata, **named}, file=FILE)
    assert several.apply_chat_template(chat, tokenize=False) == "<|begin|>user: hi"
    assert several.apply_chat_template(chat, tokenize=False, chat_template="rag") == "rag"
    assert build_tokenizer(metadata, file=FILE).chat_template is None
    assert refusal_of({**metadata, "tokenizer.chat_template": 3}) == ("bad-field", "tokenizer.chat_template")


# --- SentencePiece BPE

BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """Pieces learned from a corpus, each scored by the rank at which it was learned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    lines = [line for text in CORPUS for line in text.splitlines() if line.isascii() and line.isprintable()]
    lines = [line for line in lines if "<" not in line]
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merged = [piece for piece, _ in learned if len(piece) > 1]
    letters = [piece for piece, _ in learned if len(piece) == 1 and piece > " "]
    tokens = [*SPECIAL, *BYTES, *merged, *letters]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(merged) + len(letters))
    scores = [0.0] * 259 + [-float(i) for i in range(len(merged) + len(letters))]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores, "tokenizer.ggml.token_type": types,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }  # fmt: skip


def sentencepiece_encode(text: str, metadata: dict[str, Any]) -> list[int]:
    """SentencePiece's own way: join the adjacent pair that makes the best-scored piece, until no pair makes one."""
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    symbols = list(text)
    while True:
        pairs = [a + b for a, b in pairwise(symbols)]
        found = [(-scores[ids[pair]], i) for i, pair in enumerate(pairs) if pair in ids]
        if not found:
            break
        at = min(found)[1]
        symbols[at : at + 2] = [pairs[at]]
    encoded = []
    for symbol in symbols:
        encoded += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return encoded


def test_sentencepiece_merges_follow_from_the_scores() -> None:
    metadata = sentencepiece_metadata()
    tokenizer = build_tokenizer(metadata, file=FILE)
    for text in [text for text in TEXTS if "<s>" not in text and text]:
        expected = sentencepiece_encode("▁" + text.replace(" ", "▁"), metadata)
        assert tokenizer(text).input_ids == [1, *expected], text
        assert tokenizer.decode(expected) == text
    assert tokenizer("").input_ids == [1]
    assert (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token) == tuple(SPECIAL)
    # a text after a special token begins a word again, as in llama.cpp
    assert tokenizer("a</s>a").input_ids[1:] == [*tokenizer("a").input_ids[1:], 2, *tokenizer("a").input_ids[1:]]


def test_sentencepiece_flags() -> None:
    metadata = sentencepiece_metadata(add_space_prefix=False, add_bos_token=False, add_eos_token=True)
    tokenizer = build_tokenizer(metadata, file=FILE)
    for text in ("hello the fox", " the fox"):
        expected = sentencepiece_encode(text.replace(" ", "▁"), metadata)
        assert tokenizer(text).input_ids == [*expected, 2]
        assert tokenizer.decode(expected) == text


def test_equal_scores_leave_the_order_to_the_ids() -> None:
    """As in files made from a tokenizer.json, whose converter gives every piece the same score."""
    metadata = sentencepiece_metadata()
    expected = [build_tokenizer(metadata, file=FILE)(text).input_ids for text in TEXTS]
    metadata["tokenizer.ggml.scores"] = [-1000.0] * len(metadata["tokenizer.ggml.tokens"])
    assert [build_tokenizer(metadata, file=FILE)(text).input_ids for text in TEXTS] == expected


def test_runs_of_spaces_and_tabs_are_pieces() -> None:
    """Gemma's user-defined runs: stored with real spaces, and with the lowest of scores, but taken before all others."""
    metadata = sentencepiece_metadata(add_space_prefix=False, add_bos_token=False)
    runs = ["  ", "   ", "    ", "\t\t", "\n\n"]
    known = [run for run in runs if run.replace(" ", "▁") in metadata["tokenizer.ggml.tokens"]]
    keep = [i for i, token in enumerate(metadata["tokenizer.ggml.tokens"]) if token.replace("▁", " ") not in known]
    for key in ("tokens", "scores", "token_type"):
        metadata[f"tokenizer.ggml.{key}"] = [metadata[f"tokenizer.ggml.{key}"][i] for i in keep]
    first = len(keep)
    metadata["tokenizer.ggml.tokens"] += runs
    metadata["tokenizer.ggml.scores"] += [-1000.0] * len(runs)
    metadata["tokenizer.ggml.token_type"] += [4] * len(runs)
    tokenizer = build_tokenizer(metadata, file=FILE)
    single = metadata["tokenizer.ggml.tokens"].index("▁")
    for length, expected in (
        (1, [single]),
        (2, [first]),
        (3, [first + 1]),
        (4, [first + 2]),
        (7, [first + 2, first + 1]),
    ):
        assert tokenizer(" " * length).input_ids == expected
        assert tokenizer.decode(expected) == " " * length
    assert tokenizer("\t\t\n\n\t").input_ids == [first + 3, first + 4, len(SPECIAL) + 9]


def test_phi3s_turns_take_the_space_after_them_along() -> None:
    metadata = sentencepiece_metadata()
    turns = ["<|user|>", "<|endoftext|>"]
    metadata["tokenizer.ggml.tokens"] += turns
    metadata["tokenizer.ggml.scores"] += [-1000.0] * 2
    metadata["tokenizer.ggml.token_type"] += [3, 3]
    user = len(metadata["tokenizer.ggml.tokens"]) - 2
    word = build_tokenizer(metadata, file=FILE)("the").input_ids[1:]
    spaced = build_tokenizer(metadata, file=FILE)(" the").input_ids[1:]
    assert spaced != word
    phi3 = build_tokenizer({**metadata, "general.architecture": "phi3"}, file=FILE)
    assert phi3("<|user|> the").input_ids == [1, user, *word]
    assert phi3("<|endoftext|> the").input_ids == [1, user + 1, *spaced]
    assert build_tokenizer(metadata, file=FILE)("<|user|> the").input_ids == [1, user, *spaced]


# --- what is refused

HOSTILE = [
    ({"model": "bert"}, "unknown-variant", "model"), ({"model": "t5"}, "unknown-variant", "model"),
    ({"model": None}, "bad-field", "model"), ({"pre": "unheard-of"}, "unknown-variant", "pre"),
    ({"pre": 3}, "bad-field", "pre"), ({"tokens": []}, "bad-field", "tokens"), ({"tokens": "abc"}, "bad-field", "tokens"),
    ({"tokens": ["a", 1]}, "bad-field", "tokens"), ({"tokens": ["a", "a"], "token_type": [1, 1]}, "duplicate", "tokens"),
    ({"token_type": [1]}, "bad-field", "token_type"), ({"token_type": ["1"]}, "bad-field", "token_type"),
    ({"merges": []}, "bad-field", "merges"), ({"merges": ["ab"]}, "bad-field", "merges"),
    ({"merges": ["! nothere"]}, "bad-field", "merges"), ({"merges": ["! \" #"]}, "bad-field", "merges"),
    ({"merges": ["! \""]}, "bad-field", "merges"), ({"bos_token_id": 10**9}, "bad-field", "bos_token_id"),
    ({"eos_token_id": -1}, "bad-field", "eos_token_id"), ({"padding_token_id": "2"}, "bad-field", "padding_token_id"),
    ({"add_bos_token": 1}, "bad-field", "add_bos_token"), ({"add_eos_token": "yes"}, "bad-field", "add_eos_token"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "code", "field"), HOSTILE)
def test_bad_fields_are_named(changes: dict[str, Any], code: str, field: str) -> None:
    metadata = byte_level_metadata(train_byte_level("gpt-2"), "gpt-2")
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    assert refusal_of(metadata) == (code, f"tokenizer.ggml.{field}")


@pytest.mark.parametrize("scores", [None, [1.0], [0.0, "x"], [float("nan")] * 2])
def test_bad_scores_are_refused(scores: Any) -> None:
    metadata = sentencepiece_metadata()
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.scores"] = scores if scores is None or len(scores) == 1 else (scores * size)[:size]
    assert refusal_of(metadata) == ("bad-field", "tokenizer.ggml.scores")


def test_endless_pieces_are_refused() -> None:
    metadata = sentencepiece_metadata()
    metadata["tokenizer.ggml.tokens"][-1] = "x" * 100_000
    assert refusal_of(metadata) == ("bad-field", "tokenizer.ggml.tokens")


def test_random_fields_are_refused_or_built() -> None:
    """Whatever the lists hold, the answer is a tokenizer or a refusal."""
    rng = random.Random(0)
    values = [None, True, -1, 0, 2.5, "x", "", [], [1], ["a"], [""], ["a", "b"], {"a": 1}, 1 << 70, float("nan")]
    for base in (byte_level_metadata(train_byte_level("gpt-2"), "gpt-2"), sentencepiece_metadata()):
        for _ in range(150):
            metadata = dict(base)
            for key in rng.sample(sorted(metadata), rng.randint(1, 2)):
                metadata[key] = rng.choice(values)
            try:
                build_tokenizer(metadata, file=FILE)("some text")
            except Refused:
                continue
