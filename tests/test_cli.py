"""The command line as a user meets it: each command in a process of its own."""

import json
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from commands import command as qcore
from makers import too_slow
from qcore.discovery import registry
from qcore.explanation import explain
from qcore.platform import COLUMNS, PLATFORM_PLUGINS
from qcore.support.matrix import current_records
from sim import sim_registry

GOLDEN = Path(__file__).parent / "golden"
GGUF, GPTQ, PACKED = (GOLDEN / name for name in ("gguf-q4_0", "gptqmodel-gptq-4bit-sym", "llmcompressor-w4a16-gptq"))
COMMANDS = ("run", "inspect", "explain", "eval", "convert", "quantize", "plugins", "doctor", "bench", "bench load")


def answer(*arguments: object, code: int = 0) -> Any:
    done = qcore(*arguments, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


# --- Help -----------------------------------------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick_and_has_an_example(command: str) -> None:
    done = qcore(*command.split(), "--help")
    assert done.returncode == 0 and "Usage" in done.stdout
    assert command in ("", "bench") or "Example: qcore" in done.stdout
    # 0.3 s on an ordinary machine; on a slow or busy one not much more than what any command takes there
    assert not too_slow([sys.executable, "-m", "qcore", *command.split(), "--help"], 0.3, 1.75)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['qcore', '--help']\ntry:\n    from qcore.cli.main import main; main()\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'transformers', 'numpy', 'pydantic', 'pluggy') if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("command", ["explain", "inspect"])
def test_questions_about_a_checkpoint_import_no_torch(command: str) -> None:
    code = f"import sys; sys.argv = ['qcore', {command!r}, {str(GPTQ)!r}]\ntry:\n    from qcore.cli.main import main; main()\n"
    code += "except SystemExit as stop: print(stop.code, 'torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "0 False"


def test_version() -> None:
    import qcore as package

    assert qcore("--version").stdout.strip() == f"qcore {package.__version__}"


# --- run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [GGUF, GGUF / "tiny-q4_0.gguf", GPTQ, PACKED])
def test_run_answers(path: Path) -> None:
    found = answer("run", path, "-p", "the quick brown", "--max-new-tokens", 6)
    assert found.keys() >= {"text", "prompt_tokens", "new_tokens", "prefill_tokens_per_s", "decode_tokens_per_s", "load_s",
                            "peak_rss_mib", "kernels"}  # fmt: skip
    assert found["text"] and 1 <= found["new_tokens"] <= 6 and found["prompt_tokens"] >= 3
    assert found["peak_rss_mib"] > 50 and sum(found["kernels"].values()) >= 14


def test_run_streams_text_on_stdout_and_figures_on_stderr() -> None:
    done = qcore("run", GGUF, "-p", "-", "--max-new-tokens", 5, "--dtype", "checkpoint", text="the quick brown")
    assert done.returncode == 0
    assert "tokens/s" in done.stderr and "float32 activations" in done.stderr and "tokens/s" not in done.stdout
    assert (
        done.stdout.strip()
        == answer("run", GGUF, "-p", "the quick brown", "--max-new-tokens", 5, "--dtype", "checkpoint")["text"].strip()
    )


def test_run_repeats_itself_for_a_seed() -> None:
    sampled = ["run", GGUF, "-p", "the quick brown", "--max-new-tokens", 12, "--temperature", 2.0]
    texts = [answer(*sampled, "--seed", seed)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_run_takes_the_kernel_that_is_named() -> None:
    found = answer("run", GPTQ, "-p", "hi", "--max-new-tokens", 2, "--kernel", "reference_linear")
    assert found["kernels"] == {"reference_linear": 14}


# --- inspect, explain -----------------------------------------------------------------------------------------------


def test_inspect() -> None:
    found = answer("inspect", PACKED)
    assert found["method"] == "compressed-tensors" and found["format_version"].startswith("pack-quantized")
    assert found["schemes"] == {"W4A16-g128-sym": 14, "not quantized": 2}
    assert found["parameters"] == 1_705_216 and 7.7 < found["bits_per_weight"] < 7.8
    assert {"module", "scheme", "reason"} == found["layers"][0].keys()
    ignored = next(layer for layer in found["layers"] if layer["module"] == "lm_head")
    assert ignored["scheme"] is None and "ignore" in ignored["reason"]
    text = qcore("inspect", PACKED).stdout
    assert "model.layers.{0-1}.self_attn.q_proj" in text and "W4A16-g128-sym" in text


def test_inspect_counts_parameters_alike_in_every_format() -> None:
    counts = {path.name: answer("inspect", path)["parameters"] for path in (GGUF, GPTQ, PACKED, GOLDEN / "base")}
    assert len(set(counts.values())) == 1, counts


def test_explain_traces_every_candidate() -> None:
    found = answer("explain", GPTQ, "--platform", "x86_cpu")
    assert found["runs"] is True and found["platform"] == "x86_cpu"
    layer = next(layer for layer in found["layers"] if layer["scheme"])
    assert layer["kernel"] in {candidate["kernel"] for candidate in layer["candidates"] if candidate["accepted"]}
    for candidate in layer["candidates"]:
        assert candidate["accepted"] == (candidate["refusal"] is None)
        assert candidate["accepted"] or candidate["refusal"]["fix"]
    assert {"reference_linear", "torch_int4pack", "onednn_int8"} <= {
        candidate["kernel"] for candidate in layer["candidates"]
    }


@pytest.mark.parametrize(
    ("platform", "dtype"), [("volta", "float16"), ("turing", "float16"), ("ampere", "bfloat16"), ("amd", "bfloat16")]
)
def test_explain_computes_in_what_the_platform_is_fast_in(platform: str, dtype: str) -> None:
    found = explain(GPTQ, platform=platform)
    assert found.dtype == dtype
    for layer in found.layers:
        if layer.selection and layer.selection.kernel and layer.selection.kernel.op == "linear":
            assert layer.selection.kernel.family in ("triton", "marlin", "torch"), layer


def test_verify_stands_in_for_one_plugin_that_can() -> None:
    both = ("--simulate", "--compile-only", "--plugin", "xpu")
    for given, said in (
        (both, "one of the two"),
        (("--simulate",), "--plugin"),
        (("--simulate", "--plugin", "cpu"), "nothing to stand in"),
        (("--simulate", "--plugin", "cuda"), "nothing to stand in"),  # whatever packages its kernels miss
    ):
        done = qcore("verify", *given)
        assert done.returncode == 3 or done.returncode == 2, done.stderr
        assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(find_spec("jax") is not None, reason="what is said where jax is missing")
@pytest.mark.parametrize("way", ["--simulate", "--compile-only"])
def test_verify_says_what_brings_a_plugins_packages(way: str) -> None:
    done = qcore("verify", "--plugin", "tpu", way)
    assert done.returncode == 3 and 'pip install "qcore-tpu[jax]"' in done.stderr


def test_explain_says_what_to_install_for_a_platform_without_a_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    core_alone = sim_registry()
    monkeypatch.setattr("qcore.explanation.registry", lambda: core_alone)
    found = explain(GPTQ, platform="hopper")
    assert not found.runs and found.refusal is not None
    assert found.refusal.code == "plugin-missing" and "qcore[cuda]" in found.refusal.fix


@pytest.mark.parametrize("platform", [column.id for column in COLUMNS])
def test_explain_answers_for_every_platform(platform: str) -> None:
    found = explain(GPTQ, platform=platform)
    quantized = [layer for layer in found.layers if layer.selection]
    assert found.runs and found.refusal is None and quantized
    proved = {(record.platform, record.kernel): record.grade for record in current_records(registry())[0]}
    assert proved["x86_cpu", "native_linear_int8"] == "measured"
    for layer in quantized:
        assert layer.selection and layer.selection.kernel
        assert layer.evidence == proved.get((platform, layer.selection.kernel.name), "declared")


@pytest.mark.parametrize("dtype", ["auto", "checkpoint", "float32"])
@pytest.mark.parametrize("path", [GGUF, GPTQ, PACKED])
def test_explain_says_what_run_does(path: Path, dtype: str) -> None:
    explained = answer("explain", path, "--dtype", dtype)
    ran = answer("run", path, "-p", "hi", "--max-new-tokens", 1, "--dtype", dtype)
    kernels = Counter(layer["kernel"] for layer in explained["layers"] if layer["kernel"])
    assert explained["runs"] is True and explained["dtype"] == ran["dtype"]
    assert dict(kernels) == ran["kernels"]


def test_explain_in_words() -> None:
    text = qcore("explain", GGUF).stdout
    assert "W4A16-gguf:q4_0" in text and "runs on" in text and "model.layers.{0-1}.mlp.up_proj" in text


# --- eval, plugins, doctor, bench -----------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 20)
    return path


def test_eval_with_a_reference(text: Path, tmp_path: Path) -> None:
    picture = tmp_path / "kld.png"
    found = answer(
        "eval",
        GPTQ,
        "--text",
        text,
        "--reference",
        GOLDEN / "base",
        "--context",
        64,
        "--max-tokens",
        200,
        "--plot",
        picture,
    )
    assert found.keys() == {
        "perplexity",
        "tokens",
        "bits_per_weight",
        "kld_mean",
        "kld_p99",
        "kld_p999",
        "top1_agreement",
        "perplexity_ci95",
        "kld_mean_ci95",
        "top1_agreement_ci95",
    }
    for name in ("perplexity", "kld_mean", "top1_agreement"):
        low, high = found[f"{name}_ci95"]
        assert low < found[name] < high
    assert found["tokens"] == 200 - 4 and 1 < found["perplexity"] < 2000
    assert 0 < found["kld_mean"] < found["kld_p99"] <= found["kld_p999"] < 0.1 and found["top1_agreement"] > 0.8
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_eval_of_a_model_against_itself_is_zero(text: Path) -> None:
    found = answer("eval", GGUF, "--text", text, "--reference", GGUF, "--max-tokens", 60)
    assert found["kld_mean"] == 0 and found["top1_agreement"] == 1


def test_perplexity_is_that_of_transformers(text: Path) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokens = PreTrainedTokenizerFast(tokenizer_file=str(GOLDEN / "base" / "tokenizer.json"))(
        text.read_text(), return_tensors="pt"
    )["input_ids"][:, :100]
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "base", dtype=torch.float32)
    with torch.inference_mode():
        loss = model(tokens, labels=tokens).loss
    found = answer("eval", GOLDEN / "base", "--text", text, "--max-tokens", 100, "--dtype", "float32")
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)


def test_plugins_and_doctor() -> None:
    plugins = {plugin["name"]: plugin for plugin in answer("plugins")}
    assert plugins["core"]["status"] == plugins["cpu"]["status"] == "loaded"
    assert plugins["cpu"]["api"] == [1, 1] and "x86_cpu" in plugins["cpu"]["platforms"]
    assert set(plugins["core"]["methods"]) >= {"gguf", "gptq", "compressed-tensors", "dense"}
    doctor = answer("doctor")
    assert torch.__version__.startswith(doctor["versions"]["torch"].partition("+")[0])
    missing = {row["platform"]: row for row in doctor["missing"]}
    assert len(missing) + len({device["platform"] for device in doctor["devices"]}) == len(COLUMNS)
    assert all(
        row["missing"] and row["fix"] and row["plugin"] == PLATFORM_PLUGINS[name] for name, row in missing.items()
    )
    for command in ("plugins", "doctor"):
        assert qcore(command).returncode == 0


def test_bench_load() -> None:
    found = answer("bench", "load", GPTQ)
    assert found.keys() >= {"load_s", "peak_rss_mib", "quantized_mib", "largest_tensor_mib"}
    assert found["above_baseline_mib"] < found["limit_mib"]


# --- Mistakes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mistakes(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("this is a text\n")
    (tmp_path / "notes.txt").write_text("hello")
    for name, quantization in (("unknown", {"quant_method": "foo"}), ("bad", {"quant_method": "gptq", "bits": "four"})):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
        save_file({"a.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "config.json").write_text("{}")
    save_file({"a.weight": torch.ones(2, 2)}, shards / "model-00001-of-00002.safetensors")
    (shards / "model.safetensors.index.json").write_text(
        json.dumps(
            {"weight_map": {"a.weight": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        )
    )
    return tmp_path


@pytest.mark.parametrize("command", ["inspect", "explain", "run", "bench load"])
@pytest.mark.parametrize(
    ("name", "code", "status"),
    [
        ("nowhere", "path-not-found", 4),
        ("empty", "not-a-checkpoint", 4),
        ("text.gguf", "bad-magic", 4),
        ("notes.txt", "bad-magic", 4),
        ("unknown", "unknown-method", 3),
        ("bad", "bad-field", 4),
        ("shards", "shard-missing", 4),
    ],
)
def test_bad_paths(mistakes: Path, command: str, name: str, code: str, status: int) -> None:
    extra = ["-p", "hi"] if command == "run" else []
    done = qcore(*command.split(), mistakes / name, *extra)
    assert done.returncode == status
    assert code in done.stderr and "fix:" in done.stderr and name in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    found = json.loads(qcore(*command.split(), mistakes / name, *extra, "--json").stdout)
    assert found["refusal"]["code"] == code


@pytest.mark.parametrize(
    ("arguments", "status", "clue"),
    [
        (["run", GGUF], 2, "prompt"),
        (["run", GGUF, "-p", ""], 2, "prompt is empty"),
        (["run", GGUF, "-p", "hi", "--max-new-tokens", "0"], 2, "max-new-tokens"),
        (["run", GGUF, "-p", "hi", "--kernel", "warp"], 2, "unknown-kernel"),
        (["run", GGUF, "-p", "hi", "--device", "cuda:9"], 3, "no-device"),
        (["run", GGUF, "-p", "hi", "--dtype", "int3"], 2, "bad-argument"),
        (["run", GGUF, "-p", "hi", "--activations", "wild"], 2, "bad-argument"),
        (["run", GGUF, "-p", "word " * 600], 2, "context"),
        (["explain", GGUF, "--platform", "abacus"], 2, "unknown-platform"),
        (["explain", GGUF, "--dtype", "int3"], 2, "bad-argument"),
        (["eval", GGUF, "--text", "/no/such/file"], 4, "path-not-found"),
        (["eval", GGUF, "--text", GGUF / "tiny-q4_0.gguf"], 4, "bad-text"),
        (["frobnicate"], 2, "frobnicate"),
        ([], 2, "Usage"),
    ],
)
def test_wrong_usage(arguments: list[object], status: int, clue: str) -> None:
    done = qcore(*arguments)
    assert done.returncode == status, done.stderr
    assert clue in done.stderr + done.stdout and "Traceback" not in done.stderr


def test_without_a_device_the_answer_says_what_to_install() -> None:
    done = qcore("run", GGUF, "-p", "hi", QCORE_DISABLE="cpu")
    assert done.returncode == 3 and "qcore[cpu]" in done.stderr


def test_a_closed_pipe_is_no_fault() -> None:
    command = f"{sys.executable} -m qcore inspect {GGUF} --json | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and done.stdout.strip() == "{"


def test_generated_docs_are_current() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qcore.cli.docs", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_matrix_in_all_its_forms(tmp_path: Path) -> None:
    cells = answer("matrix", "--row", "gptq")["cells"]
    assert len(cells) == len(COLUMNS) and {cell["row"] for cell in cells} == {"gptq"}
    one = answer("matrix", "--row", "gptq", "--platform", "x86_cpu")["cells"]
    assert [cell["supported"] for cell in one] == [True] and one[0]["records"][0]["grade"] == "measured"
    table = qcore("matrix", "--markdown").stdout
    assert table.startswith("| | Volta |") and "| GPTQ |" in table
    done = qcore("matrix", "--html", tmp_path / "m.html")
    assert (
        done.returncode == 0 and done.stdout == "" and (tmp_path / "m.html").read_text().startswith("<!doctype html>")
    )
    words = qcore("matrix", "--row", "marlin", "--platform", "volta").stdout
    assert "not supported" in words and "wrong-platform" in words and "fix:" in words


@pytest.mark.parametrize(
    ("arguments", "code", "clue"),
    [
        (("matrix", "--row", "abacus"), 2, "unknown-row"),
        (("matrix", "--platform", "abacus"), 2, "unknown-platform"),
        (("matrix", "--html", "/proc/nowhere/m.html"), 2, "cannot be written"),
        (("verify", "--plugin", "abacus"), 3, "plugin-missing"),
        (("verify", "--platform", "abacus"), 2, "unknown-platform"),
        (("verify", "--kernel", "abacus"), 2, "unknown-kernel"),
        (("verify", "--plugin", "gaudi"), 3, "no-device"),
        (("plugins", "new", "Acme"), 2, "bad-argument"),
        (("plugins", "new", "cuda"), 2, "bad-argument"),
        (("plugins", "new", "acme", "--out", "/proc"), 2, "cannot be written"),
        (("plugins", "new", "acme", "--title", 'a"b'), 2, "source code"),
    ],
)
def test_wrong_requests_of_the_matrix_are_refused(arguments: tuple[str, ...], code: int, clue: str) -> None:
    done = qcore(*arguments)
    assert done.returncode == code and clue in done.stderr and "Traceback" not in done.stderr


def test_verify_reports_and_records(tmp_path: Path) -> None:
    found = answer("verify", "--plugin", "cpu", "--row", "int8_w8a8", "--kernel", "onednn_int8")["findings"]
    assert {row["scheme"] for row in found} == {"W8A8-int8-dyn", "W8A8-int8-static"}
    assert all(0 < row["error"] <= row["bound"] and row["cases"] == 18 and not row["failures"] for row in found)


def test_a_new_package_is_whole_and_never_overwritten(tmp_path: Path) -> None:
    assert qcore("plugins", "new", "acme", "--title", "Acme NPU", "--out", tmp_path).returncode == 0
    made = tmp_path / "qcore-acme"
    files = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    assert files >= {
        "pyproject.toml",
        "README.md",
        "qcore_acme/plugin.py",
        "qcore_acme/evidence.json",
        "tests/conftest.py",
    }
    assert not any("$" in (made / name).read_text() for name in files) and [p.name for p in tmp_path.iterdir()] == [
        "qcore-acme"
    ]
    again = qcore("plugins", "new", "acme", "--out", tmp_path)
    assert again.returncode == 2 and "exists already" in again.stderr
