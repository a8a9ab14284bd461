"""What tools/fuzz.py runs: for each reader, what is done with one input of the fuzzer's, and the inputs to begin with."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TypeVar

TESTS = Path(__file__).parent.parent / "tests"
LONGEST = 4096
"""Bytes of an input, but for those that are whole files."""

T = TypeVar("T")
Run = Callable[[bytes], None]
Target = Callable[[Path], "tuple[Run, list[bytes]]"]
"""Makes what one input runs, and the inputs to begin with; the folder is the target's to write to."""


class Chance:
    """What tests/mutations.py asks of random.Random, answered by the fuzzer's bytes."""

    def __init__(self, data: bytes) -> None:
        self._given = import_module("atheris").FuzzedDataProvider(data)

    def random(self) -> float:
        return float(self._given.ConsumeProbability())

    def randrange(self, start: int, stop: int | None = None) -> int:
        first, last = (0, start) if stop is None else (start, stop)
        return int(self._given.ConsumeIntInRange(first, last - 1))

    def choice(self, options: Sequence[T]) -> T:
        return options[self.randrange(len(options))]

    def text(self, letters: str, most: int) -> str:
        return "".join(self.choice(letters) for _ in range(self.randrange(most + 1)))


def random_inputs(count: int = 64) -> list[bytes]:
    """To begin with where bytes stand for choices."""
    import random

    chance = random.Random(0)
    return [chance.randbytes(chance.randrange(8, 200)) for _ in range(count)]


# --- Readers of bytes -----------------------------------------------------------------------------------------------


def safetensors(folder: Path) -> tuple[Run, list[bytes]]:
    """model.safetensors beside a plain model's config."""
    made, cases = import_module("variants"), import_module("hostile").safetensors_cases()
    whole = (made.made("dense", folder) / "model.safetensors").read_bytes()
    return _file(folder, "model.safetensors", lambda: made.read_all(folder)), [
        whole[:LONGEST], *(data for _, data, _ in cases if len(data) < LONGEST)
    ]  # fmt: skip


def gguf(folder: Path) -> tuple[Run, list[bytes]]:
    """A whole GGUF file: header, config, tokenizer and tensors."""
    import qcore

    made, cases = import_module("variants"), import_module("hostile_gguf").gguf_cases()
    golden = TESTS / "golden" / "gguf-q4_0" / "tiny-q4_0.gguf"
    wholes = [(made.made(f"gguf-{kind}", folder) / "model.gguf").read_bytes() for kind in ("Q4_0", "MXFP4")]

    def read() -> None:
        made.read_all(folder / "model.gguf")
        qcore.open_checkpoint(folder / "model.gguf").load_tokenizer()

    seeds = [*wholes, golden.read_bytes(), *(data for _, data, _ in cases if len(data) < LONGEST)]
    return _file(folder, "model.gguf", read), seeds


def json_text(folder: Path) -> tuple[Run, list[bytes]]:
    """A JSON file, as all of them are read."""
    from qcore.checkpoint.json_file import read_json

    seeds = [b"{}", b'{"a": [1, 2.5, null, true, "x\\u00e9\\n"], "b": {"c": NaN}}', b'{"a": "\\ud800"}', b'{"' * 70]
    return _file(folder, "some.json", lambda: read_json(folder / "some.json")), seeds


def index(folder: Path) -> tuple[Run, list[bytes]]:
    """The index of two shards."""
    made, hostile = import_module("variants"), import_module("hostile")
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    (folder / "config.json").write_bytes(hostile.CONFIG)
    (folder / names[0]).write_bytes(hostile.SHARD)
    (folder / names[1]).write_bytes(hostile.OTHER)
    seeds = [
        hostile.index({"a": names[0], "b": names[1]}),
        hostile.index({"a": "../x"}),
        hostile.index({"b": names[0]}),
    ]
    return _file(folder, "model.safetensors.index.json", lambda: made.read_all(folder)), seeds


def imatrix(folder: Path) -> tuple[Run, list[bytes]]:
    """llama.cpp's importance matrices, in both forms."""
    from qcore.checkpoint.imatrix import read_imatrix

    test = import_module("test_imatrix")
    test.test_the_gguf_form_is_read(folder)
    seeds = [test.binary(test.entry(), test.entry(test.UP, 0, (1.0,))), (folder / "imatrix.gguf").read_bytes()]
    return _file(folder, "imatrix.dat", lambda: read_imatrix(folder / "imatrix.dat")), seeds


def measurements(folder: Path) -> tuple[Run, list[bytes]]:
    """INC's measurement file of a plain model."""
    made, test = import_module("variants"), import_module("test_inc")
    path = test.measured(folder / "model")
    file = next(path.glob("*_hooks_maxabs*.json"))
    return _file(path, file.name, lambda: made.read_all(path)), [file.read_bytes(), b'{"Nodes": {}}']


def patterns(folder: Path) -> tuple[Run, list[bytes]]:
    """Regular expressions and wildcards from configs."""
    from qcore.checkpoint.patterns import matches, wildcard

    words = ("(", ")", "(?:", "(?=", "(?!", "(?<=", "(?P<a>", "(?P=a)", "\\1", "(?(1)", "(?i)", "(?>", "[", "]", "[^", "|", "*", "+",
             "?", "*?", "++", "{2}", "{1,3}", "{,}", "{65536}", "{1,99999}", ".", "a", "b", "-", "_", "^", "$", "\\b", "\\w", "\\W", "\\d",
             "\\Z", "\\", "é", "\0", "!", "layers", "0")  # fmt: skip

    def run(data: bytes) -> None:
        chance = Chance(data)
        name = chance.text("ab_.0\n!", 8) * (1 + chance.randrange(64))
        pattern = "".join(chance.choice(words) for _ in range(chance.randrange(60)))
        for anywhere in (False, True):
            refusable(lambda: matches(pattern, name, file=folder, field="ignore", anywhere=anywhere))  # noqa: B023
        refusable(lambda: wildcard(pattern, name, file=folder, field="ignore"))

    return run, random_inputs()


def schemes(folder: Path) -> tuple[Run, list[bytes]]:
    """The text of a scheme, and of a request to quantize; what parses prints and parses again."""
    from qcore.checkpoint.in_flight import InFlight
    from qcore.scheme import Scheme

    known = ["W4A16-g128-sym", "FP8_DYNAMIC", "W8A8-fp8-block128", "W4A4-nvfp4", "W4A16-nf4-flat64:dynamic8+flat16384",
             "W8A8-int8-channel-sym/int8-token-sym-dyn-outliers6.0", "W4A16-gguf:q4_k", "W8A8-e4m3-tile64x32/fp8-tensor-dyn",
             "rtn:W4A16-g32-asym-order", "bitsandbytes:nf4"]  # fmt: skip

    def run(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        refusable(lambda: InFlight.parse(text))
        scheme = refusable(lambda: Scheme.parse(text))
        if scheme is not None and Scheme.parse(str(scheme)) != scheme:
            raise AssertionError(f"{text!r} is printed as {scheme}, which is another scheme")

    return run, [text.encode() for text in known]


# --- Readers of checkpoints -----------------------------------------------------------------------------------------


def method(name: str) -> Target:
    """Every variant of a method, its config, metadata and tensors changed."""

    def make(folder: Path) -> tuple[Run, list[bytes]]:
        made, mutations = import_module("variants"), import_module("mutations")
        names = [variant for variant in made.VARIANTS if variant == name or variant.startswith(f"{name}-")]
        samples = [mutations.Sample.read(made.made(variant, folder / variant)) for variant in names]
        target = folder / "changed"
        target.mkdir()

        def run(data: bytes) -> None:
            chance = Chance(data)
            _write(target, mutations.mutated(chance.choice(samples), chance))
            refusable(lambda: made.read_all(target))

        return run, random_inputs()

    return make


def side_files(folder: Path) -> tuple[Run, list[bytes]]:
    """A quantization config beside config.json, under each name that a method knows."""
    from qcore.discovery import registry

    made, mutations = import_module("variants"), import_module("mutations")
    names = sorted({file for row in registry().methods for file in row.side_files})
    variants = ("gptq-v1", "awq-gemm", "modelopt-FP8", "auto-round-", "inc-saved", "deepspeedfp")
    samples = [mutations.Sample.read(made.made(variant, folder / variant)) for variant in variants]

    def run(data: bytes) -> None:
        chance = Chance(data)
        sample = chance.choice(samples).copy()
        config = sample.config.pop("quantization_config", {})
        config = {"quantization": config} if chance.random() < 0.3 else config
        if chance.random() < 0.5:
            config.pop("quant_method", None)
        mutations.change_value(config, chance)
        name, text = chance.choice(names), json.dumps(config).encode()
        if chance.random() < 0.2:
            text = mutations.flipped(text, chance, 0, len(text))
        target = Path(tempfile.mkdtemp(dir=folder))
        _write(target, {**sample.files(), name: text})
        try:
            refusable(lambda: made.read_all(target))
        finally:
            for file in target.iterdir():
                file.unlink()
            target.rmdir()

    return run, random_inputs()


def tokenizer(folder: Path) -> tuple[Run, list[bytes]]:
    """The tokenizer's fields of a GGUF file; what is built has to encode a text."""
    from qcore.gguf.tokenizer import build_tokenizer

    test, change = import_module("test_gguf_tokenizer"), import_module("mutations").change_value
    bases = [test.sentencepiece_metadata(), test.byte_level_metadata(test.train_byte_level("gpt-2"), "gpt-2")]
    for base in bases:
        base["tokenizer.chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

    def run(data: bytes) -> None:
        chance = Chance(data)
        metadata = copy.deepcopy(chance.choice(bases))
        for _ in range(1 + chance.randrange(3)):
            key = chance.choice(list(metadata))  # long lists have most places: first a field, then a place in it
            change(metadata if chance.random() < 0.3 else {key: metadata[key]}, chance)
            if isinstance(metadata.get(key), list) and metadata[key]:
                change(metadata[key], chance)
        built = refusable(lambda: build_tokenizer(metadata, file=folder))
        if built is not None:
            built.decode(built("the <s> quick\tbrown").input_ids)

    return run, random_inputs()


def model(folder: Path) -> tuple[Run, list[bytes]]:
    """What transformers is to build from a config.json and a generation_config.json."""
    from qcore.model.load import load_model

    mutations, makers = import_module("mutations"), import_module("makers")
    dense = makers.dense_llama()
    samples = [mutations.Sample.read(makers.write(folder / "a", dense))]
    generation = {
        "eos_token_id": [1, 2],
        "temperature": 0.5,
        "do_sample": True,
        "max_length": 20,
        "transformers_version": "5.0",
    }
    target = folder / "changed"
    target.mkdir()

    def run(data: bytes) -> None:
        chance = Chance(data)
        sample, own = chance.choice(samples).copy(), dict(generation)
        mutations.change_value(sample.config, chance)
        mutations.change_value(own, chance)
        _write(target, {**sample.files(), "generation_config.json": json.dumps(own).encode()})
        refusable(lambda: load_model(target))

    return run, random_inputs()


def chat(folder: Path) -> tuple[Run, list[bytes]]:
    """A chat template, of pieces that templates are made of."""
    from qcore.checkpoint.tokenizer import tokenizer_from_folder
    from qcore.model.chat import chat_prompt

    (folder / "tokenizer.json").write_bytes((TESTS / "golden" / "gguf-q4_0" / "tokenizer.json").read_bytes())
    tokenizer = tokenizer_from_folder(folder)
    words = ("{{ ", " }}", "{% ", " %}", "{%- ", "for m in messages", "for a in range(99999)", "endfor", "if ", "endif", "else", "elif ",
             "set x = ", "macro f(a)", "endmacro", "f(1)", "call f(2)", "endcall", "m", "m.role", "m['content']", "x", "messages", "loop.index",
             "~", "+", "-", "*", "/", "//", "**", "%", " in ", " is defined", "|trim", "|length", "|tojson", "|join", "|list", "|map('x')",
             "|batch(2)", "|format(3)", "(", ")", "[", "]", ":", ",", "'a'", "9", "0", "None", ".__class__", "namespace(a=1)", "raise_exception('a')",
             "strftime_now('%Y')", "{# ", " #}", "a", "\n", "generation", "endgeneration", "break", "continue", "add_generation_prompt", "include 'x'",
             "import 'x' as y", "extends 'x'", "block b", "endblock", "raw", "endraw", "filter upper", "endfilter", "**", "dict(**", "recursive")  # fmt: skip

    def run(data: bytes) -> None:
        chance = Chance(data)
        tokenizer.chat_template = "".join(chance.choice(words) for _ in range(chance.randrange(60)))
        refusable(lambda: chat_prompt(tokenizer, "hello"))

    return run, random_inputs()


METHODS = ("dense", "gptq", "awq", "bitblas", "auto-round", "bitsandbytes", "compressed-tensors", "fp8", "modelopt", "quark",
           "torchao", "deepspeedfp", "inc")  # fmt: skip
TARGETS: dict[str, Target] = {
    "safetensors": safetensors,
    "gguf": gguf,
    "json": json_text,
    "index": index,
    "imatrix": imatrix,
    "measurements": measurements,
    "patterns": patterns,
    "schemes": schemes,
    "side-files": side_files,
    "tokenizer": tokenizer,
    "model": model,
    "chat": chat,
    **{name: method(name) for name in METHODS},
}
"""By the name to call them on the command line."""


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def refusable(call: Callable[[], T]) -> T | None:
    """What the call gives; None where it refuses."""
    from qcore.refusal import Refused

    try:
        return call()
    except Refused as error:
        assert error.refusal.reason and len(str(error)) < 4000, error
        return None


def _file(folder: Path, name: str, read: Callable[[], object]) -> Run:
    """Reads the input as this file."""

    def run(data: bytes) -> None:
        (folder / name).write_bytes(data)
        refusable(read)

    return run
