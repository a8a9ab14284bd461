"""Text generation, one token at a time, streamed and timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qcore.model.chat import chat_prompt
from qcore.model.decode import Stepper
from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
"""Tokens that end an answer in chat formats, besides the model's own end token."""


@dataclass
class Timing:
    """Filled while generating; rates are tokens per second of wall time. decoder: the row that read the text; empty where the
    model itself did."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decoder: str = ""

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """The first token comes with the prompt, so that decoding counts from the second."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s else 0.0


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool) -> list[int]:
    """The prompt's tokens; as a user's turn where `chat` is wanted and the tokenizer has a chat template."""
    if chat and tokenizer.chat_template:
        return list(tokenizer(chat_prompt(tokenizer, prompt), add_special_tokens=False)["input_ids"])
    return list(tokenizer(prompt)["input_ids"])


@torch.no_grad()  # torch-xla refuses the tensors of inference mode
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    timing: Timing | None = None,
) -> Iterator[str]:
    """Pieces of text as they become certain. temperature 0 takes the likeliest token; otherwise `seed` decides.

    Raises Refused (bad-argument) where the prompt does not fit into the model's context.
    """
    timing = Timing() if timing is None else timing
    timing.prompt_tokens = len(prompt)
    room = int(getattr(model.config, "max_position_embeddings", 1 << 30)) - len(prompt)
    if room < 1:
        raise Refused(
            Refusal("bad-argument", "usage", "prompt", "the prompt is longer than the model's context",
                    f"found {len(prompt)} tokens, expected fewer than {room + len(prompt)}", "Shorten the prompt.")
        )  # fmt: skip
    ends = end_tokens(model, tokenizer)
    random = torch.Generator().manual_seed(seed)
    text = _Text(tokenizer)
    steps = Stepper(model)
    token = 0
    for number in range(min(max_new_tokens, room)):
        began = time.perf_counter()
        if number == 0:
            logits = steps.prompt(prompt)
            timing.prefill_s = time.perf_counter() - began
        else:
            logits = steps.step(token)
            timing.decode_s += time.perf_counter() - began
        token = _pick(logits, temperature, random)
        timing.decoder = steps.decoder
        timing.new_tokens += 1
        if token in ends:
            break
        if piece := text.add(token):
            yield piece
    if rest := text.rest():
        yield rest


class _Text:
    """Tokens into text, a piece at a time. A token's text depends on the few before it (spaces, characters cut in two), so
    that each piece is the difference of two short windows; decoding all of them anew would take longer with each token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.window = self.shown = 0
        """Tokens from `window` to `shown` are out already and give those that follow their context."""

    def add(self, token: int) -> str:
        """What is certain with this token; empty in the middle of a character."""
        self.tokens.append(token)
        piece = self._piece()
        if piece.endswith("\ufffd") or not piece:
            return ""
        self.window, self.shown = self.shown, len(self.tokens)
        return piece

    def rest(self) -> str:
        """What never became certain."""
        return self._piece()

    def _piece(self) -> str:
        before = str(self.tokenizer.decode(self.tokens[self.window : self.shown], skip_special_tokens=True))
        return str(self.tokenizer.decode(self.tokens[self.window :], skip_special_tokens=True))[len(before) :]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends an answer: the generation config's, the tokenizer's, and the chat formats' turn ends."""
    ends: set[int] = set()
    for ids in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        ends |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    known = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    return ends | {int(tokenizer.convert_tokens_to_ids(token)) for token in _TURN_ENDS if token in known}


def _pick(logits: torch.Tensor, temperature: float, random: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    chances = torch.softmax(logits / temperature, -1)
    return int(torch.multinomial(chances, 1, generator=random))
