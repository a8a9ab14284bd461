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

    def tokens(self, vocabulary: int) -> list[int]:
        """The same for every contender, and none twice in a row: what they say does not matter."""
        return [(7919 * i + 11) % vocabulary for i in range(self.prompt_tokens + self.new_tokens)]


@dataclass(frozen=True)
class Loaded:
    """prompt: takes tokens from the beginning of a text. step: takes one more. by: what takes them."""

    vocabulary: int
    prompt: Callable[[list[int]], object]
    step: Callable[[int], object]
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
        steps = list[Stepper]()

        def prompt(tokens: list[int]) -> None:
            steps[:] = [Stepper(model)]
            steps[0].prompt(tokens)

        return Loaded(
            model.config.vocab_size, prompt, lambda token: steps[0].step(token), lambda: steps[0].decoder or "the model"
        )

    return load


def llama_cpp_(task: Task) -> Callable[[], Loaded]:
    from llama_cpp import Llama

    def load() -> Loaded:
        room = task.prompt_tokens + task.new_tokens + 8
        model = Llama(
            task.path, n_ctx=room, n_batch=512, n_threads=task.threads, n_threads_batch=task.threads, verbose=False
        )

        def prompt(tokens: list[int]) -> None:
            model.reset()
            model.eval(tokens)

        return Loaded(model.n_vocab(), prompt, lambda token: model.eval([token]), lambda: "llama.cpp")

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
        cache: list[Any] = [None]

        def take(tokens: list[int]) -> None:
            cache[0] = model(
                input_ids=torch.tensor([tokens]), past_key_values=cache[0], use_cache=True, logits_to_keep=1
            ).past_key_values

        def prompt(tokens: list[int]) -> None:
            cache[0] = None
            take(tokens)

        return Loaded(
            model.config.vocab_size, prompt, lambda token: take([token]), lambda: "transformers, dense bfloat16"
        )

    return load


CONTENDERS = {"qcore": qcore_, "llama.cpp": llama_cpp_, "transformers": transformers_}


def measure(name: str, task: Task) -> dict[str, Any]:
    """load_s: without importing libraries. peak_rss_mib: VmHWM of this process; baseline_rss_mib: with all libraries imported."""
    load = CONTENDERS[name](task)
    baseline, began = memory_mib("VmRSS"), time.perf_counter()
    loaded = load()
    seconds = time.perf_counter() - began
    tokens = task.tokens(loaded.vocabulary)
    prompt, rest = tokens[: task.prompt_tokens], tokens[task.prompt_tokens :]
    taken: list[tuple[float, float]] = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        loaded.prompt(prompt)
        ended = time.perf_counter()
        loaded.step(rest[0])  # what is prepared at the first step is no part of the others
        middle = time.perf_counter()
        for token in rest[1:]:
            loaded.step(token)
        taken.append((ended - began, time.perf_counter() - middle))
    prefill, decode = (sorted(column)[REPEATS // 2] for column in zip(*taken[1:], strict=True))
    return {
        "name": name, "by": loaded.by(), "load_s": round(seconds, 3), "baseline_rss_mib": baseline, "peak_rss_mib": peak_rss_mib(),
        "prefill_tokens_per_s": round(len(prompt) / prefill, 2), "decode_tokens_per_s": round((len(rest) - 1) / decode, 2),
    }  # fmt: skip


if __name__ == "__main__":
    try:
        print_json(measure(sys.argv[1], Task(**json.loads(sys.argv[2]))))
    except Refused as error:
        print_json({"refusal": error.refusal.to_dict()})
