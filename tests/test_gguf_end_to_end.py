"""Every GGUF architecture from file to logits, against the transformers model that the file was made from."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import qcore
from qcore.model.linear import QuantizedEmbedding, QuantizedLinear
from test_gguf_model import MODELS, converted, metadata_of, original_of

TOKENS = torch.tensor([[1, 5, 9, 33, 3, 7, 20, 21]])


def write(path: Path, name: str, model: Any, kind: str) -> None:
    """The model as llama.cpp's converter would write it; matrices in `kind` where their rows are whole blocks."""
    writer = gguf.GGUFWriter(path, name)
    for key, value in metadata_of(name).items():
        if key == "general.architecture":
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add[type(value)](key, value)
    wanted = getattr(gguf.GGMLQuantizationType, kind)
    for tensor, values in converted(name, model).items():
        array = values.float().numpy()
        if array.ndim == 2 and array.shape[1] % 32 == 0 and kind != "F32":
            writer.add_tensor(tensor, gguf.quants.quantize(array, wanted), raw_dtype=wanted)
        else:
            writer.add_tensor(tensor, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize(("kind", "bound"), [("F32", 1e-5), ("Q8_0", 0.05)])
def test_logits(tmp_path: Path, name: str, kind: str, bound: float) -> None:
    torch.manual_seed(0)
    original = original_of(name).float().eval()
    write(tmp_path / "m.gguf", name, original, kind)
    model = qcore.load_model(tmp_path / "m.gguf", dtype=torch.float32)
    with torch.inference_mode():
        got, expected = model(TOKENS).logits, original(TOKENS).logits
    assert (got - expected).norm() / expected.norm() < bound
    replaced = [m for m in model.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)]
    assert bool(replaced) == (kind == "Q8_0")
