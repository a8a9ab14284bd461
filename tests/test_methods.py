"""A format is one file in qcore/methods/: shown by adding one, with nothing else changed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qcore
from makers import dense_llama, write

NEW_FORMAT = '''
"""Ternary weights as one byte each, with one scale: the format of an invented tool."""

from qcore.method import Method, ModulePlan, dense_modules, require_tensor
from qcore.elements import Int, Level, PerTensor
from qcore.scheme import weight_only

SCHEME = weight_only(Int(2, signed=True), Level(PerTensor()))


class Ternary(Method):
    name = "ternary"
    quant_methods = ("ternary",)
    parts = frozenset({"trits", "scale"})

    def plan(self, files):
        plan = dense_modules(files.source.tensors, "stored unquantized")
        for name, info in files.source.tensors.items():
            if name.endswith(".trits"):
                require_tensor(files, name, dtypes=["U8"])
                plan[name.removesuffix(".trits")] = ModulePlan(SCHEME, "quantization_config", info.shape)
        return plan

    def decode(self, files, module):
        from qcore.bits import pack
        from qcore.tensor import LayerTensors, QuantizedTensor

        trits, scale = files.source.read(f"{module}.trits"), files.source.read(f"{module}.scale")
        return LayerTensors(QuantizedTensor(SCHEME, tuple(trits.shape), pack(trits + 1, 2), (scale.reshape(1, 1),)))


METHOD = Ternary()
'''

PROBE = """
import sys, torch, qcore, qcore.methods
qcore.methods.__path__.append(sys.argv[1])
ckpt = qcore.open_checkpoint(sys.argv[2])
module = "model.layers.0.mlp.up_proj"
print(ckpt.method, ckpt.plan[module], float(ckpt.dequantize(module).sum()))
model = qcore.load_model(sys.argv[2])
print(type(model.model.layers[0].mlp.up_proj).__name__, model(torch.tensor([[1, 2]])).logits.shape[-1])
"""


def test_a_new_format_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "ternary.py").write_text(NEW_FORMAT)
    tensors, module = dense_llama(), "model.layers.0.mlp.up_proj"
    del tensors[f"{module}.weight"]
    tensors[f"{module}.trits"] = torch.tensor([0, 1, 2, 1], dtype=torch.uint8).repeat(96, 16)
    tensors[f"{module}.scale"] = torch.tensor(0.5)
    path = write(tmp_path / "model", tensors, {"quant_method": "ternary"})
    command = [sys.executable, "-c", PROBE, str(tmp_path / "methods"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["ternary W2A16-tensor-sym 0.0", "QuantizedLinear 128"]
    with pytest.raises(qcore.Refused, match="unknown-method"):  # and without the file it is refused by name
        qcore.open_checkpoint(path)


def test_formats_that_are_not_read_yet_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("hqq", "mxfp4"):
        path = write(tmp_path / name, dense_llama(), {"quant_method": name, "bits": 4})
        with pytest.raises(qcore.Refused) as caught:
            qcore.open_checkpoint(path)
        assert caught.value.refusal.code == "unknown-method" and name in caught.value.refusal.fact
