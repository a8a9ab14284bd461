"""One run of another tool, in its own environment: python quality_peers.py JOB.json. benchmarks/quality.py writes the job and reads the answer.

The job: tool, how (the tool's own words for the scheme), model (a folder, or the GGUF file of llama.cpp), windows (token ids, all of one length), out, imatrix, answer.
The answer: seconds of the work without imports, on the clock and of all threads, and the tool's version. Every model is read in float32, as it is stored.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import struct
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

Job = Mapping[str, Any]


def llm_compressor(job: Job) -> None:
    """how: modifiers, each its class and arguments."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not torch.accelerator.is_available():  # AWQ pins memory for one, and ends where there is none
        IntermediatesCache.pin_memory = lambda *_: None
    classes = {one.__name__: one for one in (AWQModifier, GPTQModifier, QuantizationModifier, SmoothQuantModifier)}
    recipe = [classes[name](**arguments) for name, arguments in job["how"]["modifiers"]]
    windows = job["windows"]
    texts = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(one) for one in windows]})
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    oneshot(model=model, tokenizer=tokenizer, recipe=recipe, dataset=texts, num_calibration_samples=len(windows),
            max_seq_length=len(windows[0]), shuffle_calibration_samples=False)  # fmt: skip
    model.save_pretrained(job["out"], save_compressed=True)
    tokenizer.save_pretrained(job["out"])


def gptqmodel(job: Job) -> None:
    """how: arguments of QuantizeConfig."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    os.environ.setdefault(
        "GPTQMODEL_CPU_WORKERS", "2"
    )  # its default on two cores, one, is less than its loader asks for
    model = GPTQModel.load(job["model"], QuantizeConfig(device="cpu", **job["how"]), dtype=torch.float32)
    model.quantize([{"input_ids": one, "attention_mask": [1] * len(one)} for one in job["windows"]], batch_size=1)
    model.save(job["out"])


def auto_round(job: Job) -> None:
    """how: format, and arguments of AutoRound."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    how = dict(job["how"])
    written = how.pop("format")
    windows = torch.tensor(job["windows"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tool = AutoRound(model, tokenizer, nsamples=len(windows), seqlen=windows.shape[1], device_map="cpu",
                     dataset=[one[None] for one in windows], **how)  # fmt: skip
    tool.quantize_and_save(job["out"], format=written)


def llama_cpp(job: Job) -> None:
    """how: ftype, llama.cpp's number of the mixture."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = job["how"]["ftype"], 1
    if job["imatrix"]:
        rows = read_imatrix(Path(job["imatrix"]))
        arrays = {name: (ctypes.c_float * len(values))(*values) for name, values in rows.items()}
        # The list ends with a row without a name.
        row = llama_cpp.llama_cpp.llama_model_imatrix_data
        listed = (row * (len(arrays) + 1))(
            *(row(name.encode(), values, len(values)) for name, values in arrays.items())
        )
        params.imatrix = ctypes.cast(listed, ctypes.POINTER(row))
    Path(job["out"]).parent.mkdir(parents=True, exist_ok=True)
    failed = llama_cpp.llama_model_quantize(str(job["model"]).encode(), str(job["out"]).encode(), ctypes.byref(params))
    if failed:
        raise SystemExit(f"llama_model_quantize answered {failed}")


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def imatrix(job: Job) -> None:
    """What llama-imatrix finds, the mean square of each layer's inputs, in its binary form: the same windows, where its own tool would take others."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    sums: dict[str, Any] = {}

    def listen(name: str) -> Callable[..., None]:
        def add(_module: object, inputs: tuple[Any, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].flatten(0, -2).double().square().sum(0)

        return add

    for name, module in model.named_modules():
        _, _, within = name.partition("layers.")
        layer, _, part = within.partition(".")
        if part in GGUF_NAMES:
            module.register_forward_pre_hook(listen(f"blk.{layer}.{GGUF_NAMES[part]}.weight"))
    with torch.inference_mode():
        for one in job["windows"]:
            model.model(torch.tensor([one]), use_cache=False)
    tokens = sum(map(len, job["windows"]))
    with Path(job["out"]).open("wb") as file:
        file.write(struct.pack("<i", len(sums)))
        for name, values in sums.items():
            means = (values / tokens).tolist()
            file.write(struct.pack(f"<i{len(name)}sii{len(means)}f", len(name), name.encode(), 1, len(means), *means))


def read_imatrix(path: Path) -> dict[str, list[float]]:
    """Means by weight, of llama-imatrix's binary form."""
    data, at, found = path.read_bytes(), 4, {}
    for _ in range(struct.unpack_from("<i", data)[0]):
        (length,) = struct.unpack_from("<i", data, at)
        name = data[at + 4 : at + 4 + length].decode()
        at += 4 + length
        calls, count = struct.unpack_from("<ii", data, at)
        found[name] = [value / calls for value in struct.unpack_from(f"<{count}f", data, at + 8)]
        at += 8 + 4 * count
    return found


@dataclass(frozen=True)
class Tool:
    """package: whose version is told. imports: what takes time to import, and is not counted."""

    run: Callable[[Job], None]
    package: str
    imports: tuple[str, ...]


TOOLS = {
    "llm-compressor": Tool(llm_compressor, "llmcompressor", ("torch", "transformers", "datasets", "llmcompressor")),
    "gptqmodel": Tool(gptqmodel, "gptqmodel", ("torch", "gptqmodel")),
    "auto-round": Tool(auto_round, "auto-round", ("torch", "transformers", "auto_round")),
    "llama.cpp": Tool(llama_cpp, "llama-cpp-python", ("llama_cpp",)),
    "imatrix": Tool(imatrix, "transformers", ("torch", "transformers")),
}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    tool = TOOLS[job["tool"]]
    for name in tool.imports:
        importlib.import_module(name)
    began, busy = time.perf_counter(), time.process_time()
    tool.run(job)
    answer = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - busy,
        "version": metadata.version(tool.package),
    }
    Path(job["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
