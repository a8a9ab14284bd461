"""A prompt as a chat's turn, by the checkpoint's template: a program in Jinja's sandbox, which is stopped where it goes on and on."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from qcore.refusal import Refused, bad_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST = 1 << 20
"""Characters of a template; the longest have some 30 000."""
_STEPS = 1_000_000
"""Lines that rendering may take; templates take a few hundred a message."""
_SECONDS = 5.0
"""Of the processor, which lines may take together; templates take a millisecond."""
_MEMORY = 64 << 20
"""Bytes that rendering may add to the process, where the system can hold it to that (Linux)."""


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as a user's turn that the model is to answer. Raises Refused (bad-field, limit-exceeded) where the template
    fails, or takes too long."""
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if len(str(template)) > _LONGEST:
            raise _no(tokenizer, "limit-exceeded", "the chat template is longer than any real one", len(str(template)), f"at most {_LONGEST} characters")  # fmt: skip
        if _takes_powers(str(template)):
            raise _no(
                tokenizer, "limit-exceeded", "the chat template takes powers, which may take for ever", "**", "none"
            )
    left, began, before = _STEPS, time.thread_time(), sys.gettrace()

    def step(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or time.thread_time() - began > _SECONDS:
            found = f"more than {_STEPS} steps" if left < 0 else f"more than {_SECONDS} seconds"
            raise _no(tokenizer, "limit-exceeded", "the chat template goes on and on", found, "fewer")
        return step

    turns = [{"role": "user", "content": prompt}]
    sys.settrace(step)
    try:
        with _bounded_memory():
            return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    except Refused:
        raise
    except MemoryError as error:
        raise _no(tokenizer, "limit-exceeded", "the chat template makes a text beyond bounds", f"more than {_MEMORY} bytes", "less") from error  # fmt: skip
    except Exception as error:  # whatever the template raises
        raise _no(tokenizer, "bad-field", "the chat template cannot be rendered", f"{type(error).__name__}: {error}", "a chat") from error  # fmt: skip
    finally:
        sys.settrace(before)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Lets the process grow by no more than _MEMORY: whatever asks for more gets a MemoryError."""
    if sys.platform != "linux":
        yield
        return
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = used + _MEMORY
    if soft == resource.RLIM_INFINITY or soft > most:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _takes_powers(template: str) -> bool:
    """Whether a number is raised to a power, which can take for ever in one step; `f(**words)` is another thing."""
    from jinja2 import Environment, TemplateSyntaxError

    before = ""
    try:
        for _, kind, text in Environment().lex(template):
            if text == "**" and kind == "operator" and before not in ("(", ","):
                return True
            before = before if kind == "whitespace" else text
    except TemplateSyntaxError:
        return False  # it will not be rendered either
    return False


def _no(tokenizer: PreTrainedTokenizerBase, code: str, reason: str, found: object, expected: str) -> Refused:
    return bad_file(code, reason, file=tokenizer.name_or_path or "tokenizer", field="chat_template", found=found,
                    expected=expected, fix="Correct the template, or run without it: qcore run --raw.")  # fmt: skip
