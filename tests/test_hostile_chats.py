"""Tokenizers, chat templates and configs that ask for more than numbers: bounded before other libraries see them, and no
code from a checkpoint or from elsewhere is ever run."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qcore
from makers import dense_llama, write
from qcore.checkpoint.tokenizer import is_fault, tokenizer_from_folder
from qcore.model.chat import chat_prompt
from qcore.refusal import Refusal

GOLDEN = Path(__file__).parent / "golden" / "gguf-q4_0"
pytestmark = pytest.mark.alone
EVIL = "raise SystemExit('code from the checkpoint was run')\n"


def refusal_of(call: Callable[[], object], seconds: float = 10) -> Refusal:
    began = time.process_time()
    with pytest.raises(qcore.Refused) as caught:
        call()
    assert time.process_time() - began < seconds
    return caught.value.refusal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(GOLDEN / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert tokenizer_from_folder(tmp_path)("the").input_ids
    return tmp_path


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
@pytest.mark.parametrize(
    ("text", "code"), [('{"a":' * 100_000, "bad-json"), ("[" * 1_000_000, "bad-json"), ('{"a": "\x01"}', "bad-json")]
)
def test_texts_that_nest(folder: Path, name: str, text: str, code: str) -> None:
    (folder / name).write_text(text)
    refusal = refusal_of(lambda: tokenizer_from_folder(folder))
    assert refusal.code == code and refusal.file == str(folder / name)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "merges.txt", "vocab.txt", "chat_template.jinja"]
)
def test_files_that_are_huge(folder: Path, name: str) -> None:
    (folder / name).touch()
    os.truncate(folder / name, 1 << 40)  # takes no place on the disk
    refusal = refusal_of(lambda: tokenizer_from_folder(folder))
    assert refusal.code == "limit-exceeded" and refusal.file == str(folder / name) and refusal.field == "size"


@pytest.mark.parametrize(
    ("place", "value"),
    [("model", 3), ("model", {"type": "BPE", "vocab": {"a": 1 << 40}, "merges": []}), ("model", {"type": "abacus"}),
     ("added_tokens", [{"id": -1}]), ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
     ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False})],
)  # fmt: skip
def test_parts_that_are_none(folder: Path, place: str, value: Any) -> None:
    found = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**found, place: value}))
    assert refusal_of(lambda: tokenizer_from_folder(folder)).code == "bad-field"


def test_a_panic_is_a_fault_of_the_file_and_an_interrupt_is_none() -> None:
    assert is_fault(type("PanicException", (BaseException,), {})()) and is_fault(ValueError())
    assert not is_fault(KeyboardInterrupt()) and not is_fault(SystemExit())


def test_code_beside_a_checkpoint_is_never_run(folder: Path) -> None:
    for name in ("modeling_evil", "tokenization_evil", "configuration_evil"):
        (folder / f"{name}.py").write_text(EVIL)
    auto = {"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_evil.Slow", "tokenization_evil.Fast"]},
                    "tokenizer_class": "Slow", "trust_remote_code": True})
    )  # fmt: skip
    write(folder, dense_llama(), auto_map=auto, trust_remote_code=True)
    assert qcore.load_model(folder) is not None and tokenizer_from_folder(folder)("the").input_ids
    write(folder, dense_llama(), auto_map=auto, trust_remote_code=True, model_type="evil")
    assert refusal_of(lambda: qcore.load_model(folder)).code == "remote-code"


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "experts_implementation", "_attn_implementation_internal"]
)
@pytest.mark.parametrize(
    "value", ["evil/kernel", "kernels-community/flash-attn2:f", {"": "evil/kernel@v1"}, {"a": ["paged|x/y"]}]
)
def test_implementations_are_not_fetched(tmp_path: Path, key: str, value: object) -> None:
    path = write(tmp_path, dense_llama(), **{key: value})
    refusal = refusal_of(lambda: qcore.load_model(path))
    assert refusal.code == "remote-code" and refusal.field == key and refusal.file == str(tmp_path / "config.json")
    path = write(tmp_path, dense_llama(), text_config={key: value})
    assert refusal_of(lambda: qcore.load_model(path)).code == "remote-code"


@pytest.mark.parametrize(
    "text", ['{"a":' * 100_000, "[]", "", '{"temperature": "x"}', '{"eos_token_id": {}}', "\0" * 100]
)
def test_generation_configs_that_are_none(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    """They only have defaults for generating, so that the model runs without them, and it is said."""
    path = write(tmp_path, dense_llama())
    (path / "generation_config.json").write_text(text)
    with caplog.at_level(logging.WARNING, "qcore"):
        assert qcore.load_model(path).generation_config is not None


LOOPS = "{% for a in range(90000) %}{% for b in range(90000) %}{{ b }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "code"),
    [
        (LOOPS, "limit-exceeded"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "bad-field"),
        ("{{ 9 ** 9 ** 9 }}", "limit-exceeded"),
        ("{{ (9)**(9**9) }}", "limit-exceeded"),
        ("{% for a in range(10 ** 12) %}{% endfor %}", "limit-exceeded"),
        ("{% for a in range(1000000000000) %}{% endfor %}", "bad-field"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "bad-field"),
        ("{{ messages.__init__.__globals__ }}", "bad-field"),
        ("{{ raise_exception('no') }}", "bad-field"),
        ("{{ messages[3].a.b }}", "bad-field"),
        ("{% if %}", "bad-field"),
        ("{% include '/etc/passwd' %}", "bad-field"),
        ("{{ 'a' * 10000000000 }}", "limit-exceeded"),
        ("{{ 'a'|center(4000000000) }}", "limit-exceeded"),
        ("{{ '%3000000000d'|format(1) }}", "limit-exceeded"),
        ("{{ '{:3000000000}'.format(1) }}", "limit-exceeded"),
        (
            "{% set n = namespace(x='ab') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
            "limit-exceeded",
        ),
        (
            "{% set n = namespace(x=99) %}{% for a in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
            "limit-exceeded",
        ),
        (
            "{% set n = namespace(x=[1]) %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "limit-exceeded",
        ),
        ("x" * (1 << 21), "limit-exceeded"),
    ],
)
def test_templates_are_stopped(folder: Path, template: str, code: str) -> None:
    tokenizer = tokenizer_from_folder(folder)
    tokenizer.chat_template = template
    refusal = refusal_of(lambda: chat_prompt(tokenizer, "hello"), 20)
    assert refusal.code == code and refusal.field == "chat_template", refusal


def test_templates_are_rendered(folder: Path) -> None:
    tokenizer = tokenizer_from_folder(folder)
    tokenizer.chat_template = (
        "{% macro say(a, b) %}{{ a }}: {{ b }}{% endmacro %}{% for m in messages %}{{ say(**{'a': m.role, 'b': m.content}) }}{% endfor %}"
        "{% if add_generation_prompt %}|assistant: {% endif %}"
    )
    assert chat_prompt(tokenizer, "2 ** 3?") == "user: 2 ** 3?|assistant: "
