"""A prompt as a chat's turn, by the checkpoint's template: a program in Jinja's sandbox, which is stopped where it goes on and on."""

from __future__ import annotations

import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

from qcore.refusal import Refused, bad_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST = 1 << 20
"""Characters of a template; the longest have some 30 000."""
_STEPS = 1_000_000
"""Lines that rendering may take; templates take a few hundred a message."""


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
    left, before = _STEPS, sys.gettrace()

    def step(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _no(
                tokenizer, "limit-exceeded", "the chat template goes on and on", f"more than {_STEPS} steps", "fewer"
            )
        return step

    sys.settrace(step)
    try:
        return str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
        )
    except Refused:
        raise
    except Exception as error:  # whatever the template raises
        raise _no(tokenizer, "bad-field", "the chat template cannot be rendered", f"{type(error).__name__}: {error}", "a chat") from error  # fmt: skip
    finally:
        sys.settrace(before)


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
