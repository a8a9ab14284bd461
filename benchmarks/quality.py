"""Quality of quantized models, ours beside other tools': python benchmarks/quality.py MODEL --calibration TEXT --held-out TEXT [--only PATTERN] [--peers FOLDER]

Every tool quantizes MODEL, unquantized and in float32, by what it sees of the same windows of token ids, those that `qcore quantize` takes of the calibration text. Each checkpoint is
then read by `qcore eval` in float32 and compared with MODEL on the held-out text. Tools run one at a time, each in a virtual environment of its own:

    FOLDER/llm-compressor   pip install torch==2.13.0 llmcompressor==0.14.0.1
    FOLDER/gptqmodel        pip install torch==2.13.0 gptqmodel==7.6.0; pip install --no-deps gptqmodel==7.7.0, which wants a newer torch
    FOLDER/auto-round       pip install torch==2.13.0 auto-round==0.16.1 compressed-tensors==0.19.0 gguf
    FOLDER/llama.cpp        pip install llama-cpp-python==0.3.36

Results are kept in a JSON file; what succeeded is not run again, so that a run that was stopped goes on. The table of docs/benchmarks.md is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qcore.calibration.texts import windows_of
from qcore.checkpoint.open import open_checkpoint
from qcore.checkpoint.source import TensorInfo

LAYERS = frozenset(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
                    "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"))  # fmt: skip
"""What all tools quantize: the matrices of decoder blocks, by transformers' names and GGUF's. GGUF's mixtures quantize the embedding too."""


@dataclass(frozen=True)
class Row:
    """how: the tool's own words for the scheme; qcore's are options of `qcore quantize`, the others' as quality_peers.py says."""

    scheme: str
    tool: str
    algorithm: str
    how: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.scheme} {self.tool} {self.algorithm}"

    @property
    def file(self) -> str:
        """Of its checkpoint: a folder, or the file that llama.cpp and qcore write for GGUF."""
        gguf = self.scheme.startswith("Q") and self.tool != "auto-round"
        return self.name.replace(" ", "_") + ".gguf" * gguf


@dataclass(frozen=True)
class Settings:
    model: Path
    calibration: Path
    held_out: Path
    peers: Path
    work: Path
    samples: int
    seqlen: int
    tokens: int
    iterations: int
    keep: bool


def _ours(scheme: str, algorithm: str, format: str = "compressed-tensors") -> Row:
    shown = NAMES.get(scheme, scheme.removesuffix("-sym"))
    return Row(shown, "qcore", algorithm, {"scheme": scheme, "algorithm": algorithm, "format": format})


NAMES = {"W8A8-int8-dyn": "W8A8-int8", "FP8_DYNAMIC": "FP8-dynamic", "FP8": "FP8-static"}
"""The names of qcore's schemes in the table, where they are not the same but for -sym."""


def _compressor(
    shown: str, algorithm: str, last: str, before: Mapping[str, Any] | None = None, **arguments: Any
) -> Row:
    """last: the modifier that quantizes; before: one that prepares the weights."""
    steps = [*(before or {}).items(), (last, {"targets": "Linear", "ignore": ["lm_head"], **arguments})]
    return Row(shown, "llm-compressor", algorithm, {"modifiers": steps})


def _weights(bits: int, group: int, *, symmetric: bool = True) -> dict[str, Any]:
    """For compressed-tensors."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}
    return {"targets": ["Linear"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def _integers(bits: int, group: int) -> tuple[Row, ...]:
    """By group, weights alone."""
    scheme = f"W{bits}A16-g{group}"
    both = {"bits": bits, "group_size": group}
    format = "gptq" if group == 128 else "compressed-tensors"  # which has no smaller last group, as 576 columns have
    return (
        *(_ours(f"{scheme}-sym", algorithm, format) for algorithm in ("rtn-mse", "gptq", "awq", "auto_round", "hadamard+gptq")),
        _compressor(scheme, "gptq", "GPTQModifier", **_weights(bits, group)),
        _compressor(scheme, "awq", "QuantizationModifier", {"AWQModifier": {}}, **_weights(bits, group)),
        Row(scheme, "gptqmodel", "gptq", both),
        Row(scheme, "auto-round", "auto_round", {"format": "auto_round", "sym": True, **both}),
        *(_ours(f"{scheme}-asym", algorithm, format) for algorithm in ("gptq", "awq", "auto_round")),
        _compressor(f"{scheme}-asym", "gptq", "GPTQModifier", **_weights(bits, group, symmetric=False)),
        _compressor(f"{scheme}-asym", "awq", "QuantizationModifier", {"AWQModifier": {}}, **_weights(bits, group, symmetric=False)),
        Row(f"{scheme}-asym", "gptqmodel", "gptq", {"sym": False, **both}),
        Row(f"{scheme}-asym", "gptqmodel", "awq", {"sym": False, "quant_method": "awq", "format": "gemm", **both}),
        Row(f"{scheme}-asym", "auto-round", "auto_round", {"format": "auto_round", "sym": False, **both}),
    )  # fmt: skip


SMOOTH = {"SmoothQuantModifier": {"smoothing_strength": 0.8}}
"""As LLM Compressor's example for int8."""
ROWS = (
    *_integers(4, 64),
    *_integers(4, 128),
    *_integers(3, 64),
    *_integers(2, 64),
    *(_ours("W8A8-int8-dyn", algorithm) for algorithm in ("rtn-mse", "gptq", "smoothquant", "smoothquant+gptq", "hadamard+gptq")),
    _compressor("W8A8-int8", "rtn", "QuantizationModifier", scheme="W8A8"),
    _compressor("W8A8-int8", "gptq", "GPTQModifier", scheme="W8A8"),
    _compressor("W8A8-int8", "smoothquant+gptq", "GPTQModifier", SMOOTH, scheme="W8A8"),
    Row("W8A8-int8", "auto-round", "auto_round", {"format": "llm_compressor", "scheme": "INT8_W8A8"}),
    *(_ours("FP8_DYNAMIC", algorithm) for algorithm in ("rtn", "rtn-mse", "gptq")),
    _compressor("FP8-dynamic", "rtn", "QuantizationModifier", scheme="FP8_DYNAMIC"),
    _compressor("FP8-dynamic", "gptq", "GPTQModifier", scheme="FP8_DYNAMIC"),
    *(_ours("FP8", algorithm) for algorithm in ("rtn", "rtn-mse", "gptq")),
    _compressor("FP8-static", "rtn", "QuantizationModifier", scheme="FP8"),
    Row("FP8-static", "auto-round", "auto_round", {"format": "llm_compressor", "scheme": "FP8_STATIC"}),
    *(_ours("NVFP4A16", algorithm) for algorithm in ("rtn", "rtn-mse", "gptq", "auto_round")),
    _compressor("NVFP4A16", "rtn", "QuantizationModifier", scheme="NVFP4A16"),
    _compressor("NVFP4A16", "gptq", "GPTQModifier", scheme="NVFP4A16"),
    *(_ours("NVFP4", algorithm) for algorithm in ("rtn", "rtn-mse", "gptq", "auto_round")),
    _compressor("NVFP4", "rtn", "QuantizationModifier", scheme="NVFP4"),
    _compressor("NVFP4", "gptq", "GPTQModifier", scheme="NVFP4"),
    Row("NVFP4", "auto-round", "auto_round", {"format": "llm_compressor", "scheme": "NVFP4"}),
    Row("Q4_K_M", "qcore", "plain", {"scheme": "Q4_K_M"}),
    _ours("Q4_K_M", "gptq", "gguf"),
    Row("Q4_K_M", "qcore", "imatrix", {"scheme": "Q4_K_M", "imatrix": True}),
    Row("Q4_K_M", "llama.cpp", "plain", {"ftype": 15}),
    Row("Q4_K_M", "llama.cpp", "imatrix", {"ftype": 15, "imatrix": True}),
    Row("Q4_K_M", "auto-round", "auto_round", {"format": "gguf:q4_k_m"}),
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """A process. cpu_seconds: of all its threads, which other work on the machine makes no longer. peak_mib: of memory that was resident at once."""

    code: int
    seconds: float
    cpu_seconds: float
    peak_mib: float
    said: str
    complained: str


def ran(command: Sequence[str | Path], log: Path) -> Ended:
    """stdout in `said`, stderr in the log, in whose folder it runs: tools leave logs where they are."""
    began = time.perf_counter()
    with log.open("w+b") as errors, log.with_suffix(".out").open("w+b") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=errors, cwd=log.parent)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (errors, out):
            file.seek(0)
        said, complained = (file.read().decode("utf-8", "replace") for file in (out, errors))
    seconds, cpu = time.perf_counter() - began, used.ru_utime + used.ru_stime
    return Ended(process.returncode, seconds, cpu, used.ru_maxrss / 1024, said, complained)


def failure(ended: Ended, stage: str) -> dict[str, Any]:
    lines = [line for line in ended.complained.splitlines() if line.strip()]
    return {"failed": stage, "why": "\n".join(lines[-8:])[-1500:]}


def own(command: str, *arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "qcore", command, *arguments]


def job(tool: str, python: str, settings: Settings, log: str, **words: Any) -> tuple[Ended, dict[str, Any]]:
    """What a tool answers in its own environment; an empty answer where it failed."""
    text = settings.calibration.read_text()
    windows = windows_of(open_checkpoint(settings.model), text, settings.samples, settings.seqlen)
    answer, written = settings.work / "answer.json", settings.work / "job.json"
    answer.unlink(missing_ok=True)
    words = {"tool": tool, "model": settings.model, "windows": windows.tolist(), "answer": answer, **words}
    written.write_text(json.dumps(words, default=str))
    command = [settings.peers / python / "bin" / "python", Path(__file__).with_name("quality_peers.py"), written]
    ended = ran(command, settings.work / f"{log}.log")
    return ended, json.loads(answer.read_text()) if answer.exists() and not ended.code else {}


def imatrix_of(settings: Settings) -> Path:
    """Of the same windows; made once."""
    made = settings.work / "imatrix.dat"
    if not made.exists():
        ended, answer = job("imatrix", "llm-compressor", settings, "imatrix", out=made)
        if not answer:
            raise SystemExit(ended.complained[-2000:])
    return made


def dense_gguf(settings: Settings) -> Path:
    """The model as llama.cpp reads it, in float32."""
    made = settings.work / "dense.gguf"
    if not made.exists():
        subprocess.run(own("quantize", settings.model, "--scheme", "F32", "--out", made), check=True)
    return made


def quantized(row: Row, settings: Settings, out: Path) -> dict[str, Any]:
    """seconds, peak_mib and version; or failed and why."""
    how, log = dict(row.how), row.file
    matrix = imatrix_of(settings) if how.pop("imatrix", False) else None
    if row.tool == "qcore":
        command = own("quantize", settings.model, "--scheme", how["scheme"], "--out", out)
        if "algorithm" in how:
            command += ["--algorithm", how["algorithm"], "--calibration", settings.calibration]
            command += ["--samples", str(settings.samples), "--seqlen", str(settings.seqlen), "--format", how["format"]]
        if matrix is not None:
            command += ["--imatrix", matrix]
        ended = ran(command, settings.work / f"{log}.log")
        found = {"seconds": ended.seconds, "cpu_seconds": ended.cpu_seconds, "version": ""}
    else:
        if row.tool == "auto-round":
            how["iters"] = settings.iterations
        model = dense_gguf(settings) if row.tool == "llama.cpp" else settings.model
        ended, found = job(row.tool, row.tool, settings, log, how=how, model=model, out=out, imatrix=matrix)
    if ended.code:
        return failure(ended, row.tool)
    if row.tool == "auto-round":
        found["iterations"] = settings.iterations
    return {**found, "peak_mib": ended.peak_mib}


def written_at(out: Path) -> Path:
    """AutoRound names folders and files itself."""
    inside = sorted(out.rglob("*.gguf")) if out.is_dir() else []
    configs = sorted(out.rglob("config.json")) if out.is_dir() else []
    return inside[0] if inside else configs[0].parent if configs else out


def bits_of(checkpoint: Path, dense: Path) -> float:
    """Of LAYERS' tensors as they are in the file, scales and all, for each weight."""

    def layers(path: Path) -> list[TensorInfo]:
        infos = open_checkpoint(path).files.source.tensors.values()
        return [info for info in infos if LAYERS & set(info.name.split("."))]

    weights = sum(prod(info.shape) for info in layers(dense))
    return 8 * sum(info.nbytes for info in layers(checkpoint)) / weights


def measured(row: Row, settings: Settings) -> dict[str, Any]:
    out = settings.work / "made" / row.file
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    found = quantized(row, settings, out)
    if "failed" in found:
        return found
    checkpoint = written_at(out)
    ended = ran(own("eval", checkpoint, "--text", settings.held_out, "--reference", settings.model, "--dtype", "float32",
                    "--max-tokens", str(settings.tokens), "--context", "512", "--json"), settings.work / f"{row.file}.eval.log")  # fmt: skip
    if ended.code:
        found |= failure(ended, "qcore eval")
    else:
        found |= json.loads(ended.said)
        found["bits"] = bits_of(checkpoint, settings.model)
    if not settings.keep:
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    return found


def line(row: Row, result: Mapping[str, Any]) -> str:
    if "failed" in result:
        return f"| {row.scheme} | {row.tool} | {row.algorithm} | {result['failed']}: {result['why'].splitlines()[-1][:160]} |"

    def mean(name: str, shown: str) -> str:
        low, high = result[f"{name}_ci95"]
        return f"{result[name]:{shown}} ({low:{shown}} to {high:{shown}})"

    how = row.algorithm + (f", {result['iterations']} iterations" if "iterations" in result else "")
    tails = f"{result['kld_p99']:.3g} | {result['kld_p999']:.3g}"
    return (f"| {row.scheme} | {row.tool} {result['version']} | {how} | {result['bits']:.2f} | {mean('kld_mean', '.4f')} | {tails} "
            f"| {mean('top1_agreement', '.2%')} | {result['perplexity']:.2f} | {result['seconds']:.0f} | {result['cpu_seconds']:.0f} | {result['peak_mib']:,.0f} |")  # fmt: skip


def read_results(kept: Path) -> dict[str, Any]:
    return dict(json.loads(kept.read_text())) if kept.exists() else {}


def _absolute(value: Any) -> Any:
    return value.resolve() if isinstance(value, Path) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="A folder with a model in float32.")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument(
        "--peers", type=Path, default=Path("peers"), help="A folder with a virtual environment for each tool."
    )
    parser.add_argument(
        "--work", type=Path, default=Path("quality"), help="A folder for results.json, logs and checkpoints."
    )
    parser.add_argument("--only", default="", help="An expression that is found in a row's name: 'W4A16-g64 .* gptq'.")
    parser.add_argument("--table", action="store_true", help="Run nothing; print what is in results.json.")
    parser.add_argument("--again", action="store_true", help="Run what is in results.json too.")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192, help="Of the held-out text.")
    parser.add_argument("--iterations", type=int, default=200, help="AutoRound's; 200 are its own default.")
    parser.add_argument("--keep", action="store_true", help="Leave the checkpoints in the folder.")
    given = vars(parser.parse_args())
    only, again, table = given.pop("only"), given.pop("again"), given.pop("table")
    settings = Settings(**{name: _absolute(value) for name, value in given.items()})
    kept = settings.work / "results.json"
    settings.work.mkdir(parents=True, exist_ok=True)
    results = read_results(kept)
    chosen = [row for row in ROWS if re.search(only, row.name)]
    for row in chosen:
        if not table and (again or "kld_mean" not in results.get(row.name, ())):
            found = measured(row, settings)
            results = {**read_results(kept), row.name: found}  # others may have written meanwhile
            kept.write_text(json.dumps(results, indent=1))
            print(line(row, results[row.name]), file=sys.stderr, flush=True)
    print(
        "| scheme | tool | algorithm | bits | KLD, mean | 99 % | 99.9 % | same likeliest token | perplexity | seconds | of processors | MiB |"
    )
    print("|" + "---|" * 12)
    for row in chosen:
        if row.name in results:
            print(line(row, results[row.name]))


if __name__ == "__main__":
    main()
