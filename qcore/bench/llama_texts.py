"""Several texts at once in llama.cpp, through its C interface as llama-cpp-python has it (llama.h): a batch holds tokens of any of them."""

from __future__ import annotations

from typing import Any

_ROOM = 512
"""Tokens of one call."""


class LlamaTexts:
    """`count` texts, for `length` tokens of each. Raises ValueError where llama.cpp does not take the model."""

    def __init__(self, path: str, count: int, length: int, threads: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.api.llama_backend_init()
        self.quiet = self.api.llama_log_callback(lambda *_: None)
        self.api.llama_log_set(self.quiet, None)
        self.model = self.api.llama_model_load_from_file(path.encode(), self.api.llama_model_default_params())
        settings = self.api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = count * length, count
        settings.n_batch = settings.n_ubatch = _ROOM
        settings.n_threads = settings.n_threads_batch = threads
        self.context = self.model and self.api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise ValueError(f"llama.cpp does not take {path}")
        self.batch = self.api.llama_batch_init(_ROOM, 0, 1)
        self.read = [0] * count

    def vocabulary(self) -> int:
        """Tokens that there are."""
        return int(self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model)))

    def prompt(self, texts: list[list[int]]) -> None:
        """From the beginning of each text, and nothing is left of what was."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.read = [0] * len(texts)
        for text, tokens in enumerate(texts):
            for first in range(0, len(tokens), _ROOM):
                part = tokens[first : first + _ROOM]
                self._take([(token, text) for token in part], wanted={len(part) - 1})

    def step(self, tokens: list[int]) -> None:
        """The next token of each text, whose logits all are made."""
        self._take([(token, text) for text, token in enumerate(tokens)], wanted=set(range(len(tokens))))

    def _take(self, rows: list[tuple[int, int]], wanted: set[int]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for row, (token, text) in enumerate(rows):
            batch.token[row], batch.pos[row] = token, self.read[text]
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, text
            batch.logits[row] = row in wanted
            self.read[text] += 1
        if fault := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gave {fault}")
        self.api.llama_synchronize(self.context)
