"""Streaming: the pieces together are the text, and no piece ends in the middle of a character."""

from pathlib import Path

import pytest
import torch

import qcore
from qcore.model.generate import Timing, _Text, encode, generate

MODEL = Path(__file__).parent / "golden" / "gguf-q4_0"
TEXTS = [
    "The quick brown fox jumps over the lazy dog, twice.\n\n  Indented, then  two  spaces.",
    "Grüße aus Köln: 42 °C, naïve café, 東京都, здравствуйте, مرحبا",
    "Emoji of several code points: 👩\u200d🚀 🏳️\u200d🌈 and a flag 🇯🇵.",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_text(text: str) -> None:
    tokenizer = qcore.load_tokenizer(MODEL)
    tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    stream = _Text(tokenizer)
    pieces = [stream.add(token) for token in tokens]
    whole = str(tokenizer.decode(tokens, skip_special_tokens=True))
    assert "".join(pieces) + stream.rest() == whole
    assert not any(piece.endswith("\ufffd") for piece in pieces) and len([p for p in pieces if p]) > 3


def test_a_text_that_ends_in_half_a_character_is_still_told_whole() -> None:
    tokenizer = qcore.load_tokenizer(MODEL)
    tokens = list(tokenizer("abc 👩\u200d🚀", add_special_tokens=False)["input_ids"])[:-1]
    stream = _Text(tokenizer)
    assert "".join([*map(stream.add, tokens), stream.rest()]) == str(tokenizer.decode(tokens))


def test_the_same_seed_gives_the_same_text_and_tokens_are_counted() -> None:
    model, tokenizer = qcore.load_model(MODEL, dtype=torch.float32), qcore.load_tokenizer(MODEL)
    prompt = encode(tokenizer, "the quick brown fox", chat=False)

    def answer(seed: int, temperature: float) -> tuple[str, Timing]:
        timing = Timing()
        pieces = generate(
            model, tokenizer, prompt, max_new_tokens=12, temperature=temperature, seed=seed, timing=timing
        )
        return "".join(pieces), timing

    greedy, timing = answer(0, 0.0)
    assert answer(1, 0.0)[0] == greedy and answer(7, 1.5)[0] == answer(7, 1.5)[0]
    assert timing.prompt_tokens == len(prompt) and 1 <= timing.new_tokens <= 12
