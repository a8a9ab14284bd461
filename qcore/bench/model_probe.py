"""The process that `qcore bench model` starts for each turn of a contender: loads one model, feeds it tokens, prints what it took as JSON.

python -m qcore.bench.model_probe NAME TASK, the task in JSON
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcore.cli.output import memory_mib, peak_rss_mib, print_json
from qcore.refusal import Refused

REPEATS = 3
"""Times that prompt and steps are taken, besides one that warms up; medians count."""


@dataclass(frozen=True)
class Task:
    path: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    dtype: str
    activations: str
    texts: int = 1

    def tokens(self, vocabulary: int) -> list[list[int]]:
        """Of each text the same for every contender, and none twice in a row: what they say does not matter."""
        places = range(self.prompt_tokens + self.new_tokens)
        return [[(7919 * i + 613 * text + 11) % vocabulary for i in places] for text in range(self.texts)]


@dataclass(frozen=True)
class Loaded:
    """prompt: takes tokens from the beginning of each text. step: takes one more of each. by: what takes them."""

    vocabulary: int
    prompt: Callable[[list[list[int]]], object]
    step: Callable[[list[int]], object]
    by: Callable[[], str]


def qcore_(task: Task) -> Callable[[], Loaded]:
    import torch

    from qcore.checkpoint.architecture import model_class
    from qcore.checkpoint.open import open_checkpoint
    from qcore.model.decode import Stepper
    from qcore.model.devices import find_device, wanted_dtype
    from qcore.model.load import load_model

    torch.set_num_threads(task.threads)
    torch.set_grad_enabled(False)

    checkpoint = open_checkpoint(task.path)
    model_class(checkpoint)  # imports its module

    def load() -> Loaded:
        device = find_device("auto")
        model = load_model(
            checkpoint, device, wanted_dtype(task.dtype, device, checkpoint), activations=task.activations
        )
        if task.texts > 1:
            texts = _Texts(model)
            return Loaded(model.config.vocab_size, texts.prompt, texts.step, texts.by)
        steps = list[Stepper]()

        def prompt(given: list[list[int]]) -> None:
            steps[:] = [Stepper(model)]
            steps[0].prompt(given[0])

        return Loaded(
            model.config.vocab_size,
            prompt,
            lambda tokens: steps[0].step(tokens[0]),
            lambda: steps[0].decoder or "the model",
        )

    return load


def llama_cpp_(task: Task) -> Callable[[], Loaded]:
    from llama_cpp import Llama

    def load() -> Loaded:
        room = task.prompt_tokens + task.new_tokens + 8
        if task.texts > 1:
            from qcore.bench.llama_texts import LlamaTexts

            texts = LlamaTexts(task.path, task.texts, room, task.threads)
            return Loaded(texts.vocabulary(), texts.prompt, texts.step, lambda: "llama.cpp")
        model = Llama(
            task.path, n_ctx=room, n_batch=512, n_threads=task.threads, n_threads_batch=task.threads, verbose=False
        )

        def prompt(given: list[list[int]]) -> None:
            model.reset()
            model.eval(given[0])

        return Loaded(model.n_vocab(), prompt, model.eval, lambda: "llama.cpp")

    return load


def transformers_(task: Task) -> Callable[[], Loaded]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(task.threads)
    torch.set_grad_enabled(False)

    def load() -> Loaded:
        path = Path(task.path)
        folder, file = (path.parent, path.name) if path.is_file() else (path, None)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
        texts = _Texts(model)
        return Loaded(model.config.vocab_size, texts.prompt, texts.step, lambda: "transformers, dense bfloat16")

    return load


class _Texts:
    """Texts that a model's own forward reads."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: Any = None

    def prompt(self, texts: list[list[int]]) -> None:
        self.cache = None
        self._take(texts)

    def step(self, tokens: list[int]) -> None:
        self._take([[token] for token in tokens])

    def by(self) -> str:
        from qcore.model.text_cache import TextCache
        from qcore.model.trial import trial_of

        decoded = isinstance(self.cache, TextCache)
        return trial_of(self.model).name if decoded else "the model"

    def _take(self, tokens: list[list[int]]) -> None:
        import torch

        from qcore.model.cache_name import CACHE

        out = self.model(input_ids=torch.tensor(tokens), use_cache=True, logits_to_keep=1, **{CACHE: self.cache})
        self.cache = getattr(out, CACHE)


CONTENDERS = {"qcore": qcore_, "llama.cpp": llama_cpp_, "transformers": transformers_}


def measure(name: str, task: Task) -> dict[str, Any]:
    """load_s: without importing libraries. peak_rss_mib: VmHWM of this process; baseline_rss_mib: with all libraries imported.
    Tokens are those of all texts together."""
    load = CONTENDERS[name](task)
    baseline, began = memory_mib("VmRSS"), time.perf_counter()
    loaded = load()
    seconds = time.perf_counter() - began
    texts = task.tokens(loaded.vocabulary)
    prompt = [tokens[: task.prompt_tokens] for tokens in texts]
    rest = [list(step) for step in zip(*(tokens[task.prompt_tokens :] for tokens in texts), strict=True)]
    taken: list[tuple[float, float]] = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        loaded.prompt(prompt)
        ended = time.perf_counter()
        loaded.step(rest[0])  # what is prepared at the first step is no part of the others
        middle = time.perf_counter()
        for tokens in rest[1:]:
            loaded.step(tokens)
        taken.append((ended - began, time.perf_counter() - middle))
    prefill, decode = (sorted(column)[REPEATS // 2] for column in zip(*taken[1:], strict=True))
    return {
        "name": name, "by": loaded.by(), "load_s": round(seconds, 3), "baseline_rss_mib": baseline, "peak_rss_mib": peak_rss_mib(),
        "prefill_tokens_per_s": round(task.texts * task.prompt_tokens / prefill, 2),
        "decode_tokens_per_s": round(task.texts * (len(rest) - 1) / decode, 2),
    }  # fmt: skip


if __name__ == "__main__":
    try:
        print_json(measure(sys.argv[1], Task(**json.loads(sys.argv[2]))))
    except Refused as error:
        print_json({"refusal": error.refusal.to_dict()})
