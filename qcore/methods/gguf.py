"""GGUF: ggml's self-contained blocks, kept as they are; names, config and tokenizer come from the file's header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qcore.blocks.types import BLOCK_TYPES
from qcore.checkpoint.gguf import GgufSource
from qcore.checkpoint.source import TensorInfo
from qcore.elements import Block
from qcore.gguf.config import model_config
from qcore.gguf.names import GgufParameter, parameter_names, row_permutation
from qcore.method import CheckpointFiles, Method, ModulePlan, rows_of_a_piece
from qcore.pool import lent_bytes
from qcore.refusal import bad_file
from qcore.scheme import weight_only

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from qcore.tensor import LayerTensors


class Gguf(Method):
    name = "gguf"

    def recognizes(self, files: CheckpointFiles) -> bool:
        return isinstance(files.source, GgufSource)

    def format_version(self, files: CheckpointFiles) -> str:
        return f"v{files.source.metadata['GGUF.version']}"

    def model_config(self, files: CheckpointFiles) -> dict[str, Any]:
        def read(name: str) -> list[float]:
            values: list[float] = files.source.read(name).flatten().tolist()
            return values

        return model_config(files.source.metadata, files.source.tensors, read)

    def load_tokenizer(self, files: CheckpointFiles) -> PreTrainedTokenizerBase:
        from qcore.gguf.tokenizer import build_tokenizer

        return build_tokenizer(files.source.metadata, file=files.path)

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        plan = {}
        for name, source in self._names(files).items():
            module, _, part = name.rpartition(".")
            info = files.source.tensors[source.tensor]
            blocks = info.dtype.lower() in BLOCK_TYPES
            if part == "weight" and (len(info.shape) == 2 or (len(info.shape) == 3 and blocks)):
                scheme = weight_only(Block(info.dtype.lower())) if blocks else None
                plan[module] = ModulePlan(scheme, f"{source.tensor} is {info.dtype}", info.shape)
        return plan

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        from qcore.tensor import LayerTensors, QuantizedTensor

        names = self._names(files)
        source = names[f"{module}.weight"]
        info = files.source.tensors[source.tensor]
        codes = _in_order(files.source.read(source.tensor), source)
        scheme = weight_only(Block(info.dtype.lower()))
        bias = self.read_parameter(files, f"{module}.bias") if f"{module}.bias" in names else None
        return LayerTensors(QuantizedTensor(scheme, info.shape, codes.reshape(*info.shape[:-1], -1)), bias)

    def parameters(self, files: CheckpointFiles, plan: Mapping[str, ModulePlan]) -> dict[str, TensorInfo]:
        tensors = {name: files.source.tensors[source.tensor] for name, source in self._names(files).items()}
        for name, info in tensors.items():
            module = name.rpartition(".")[0]
            if info.dtype.lower() in BLOCK_TYPES and module not in plan:
                raise bad_file("unknown-variant", "only matrices are read in block types", file=info.file,
                               tensor=info.name, field="shape", found=f"{info.dtype} {list(info.shape)}",
                               expected="two dimensions, or a plain float type",
                               fix="Convert the model again; llama.cpp keeps such tensors in F32.")  # fmt: skip
        quantized = {module for module, entry in plan.items() if entry.scheme}
        return {name: info for name, info in tensors.items() if name.rpartition(".")[0] not in quantized}

    def read_parameter(self, files: CheckpointFiles, name: str) -> torch.Tensor:
        source = self._names(files)[name]
        tensor = _in_order(files.source.read(source.tensor), source)
        if source.row and tensor.dim() == 1:
            tensor = tensor.unsqueeze(0)
        return tensor + source.add if source.add else tensor

    def read_pieces(self, files: CheckpointFiles, name: str) -> Iterator[torch.Tensor]:
        """Of the whole tensor, whose rows may stand in another order in the file."""
        whole = self.read_parameter(files, name)
        return iter(
            whole.split(rows_of_a_piece(whole.nbytes, len(whole))) if whole.numel() and whole.dim() else [whole]
        )

    def _names(self, files: CheckpointFiles) -> dict[str, GgufParameter]:
        """Computed once for each opened file: it walks every tensor's name."""
        if not files.source.tensors:
            raise bad_file("missing-tensor", "the file holds no tensors", file=files.path, field="tensors", expected="a model's weights",
                           fix="Vocabulary-only files cannot be run; use the model's own file.")  # fmt: skip
        return files.once("names", lambda: parameter_names(files.source.metadata, files.source.tensors))


def _in_order(tensor: torch.Tensor, source: GgufParameter) -> torch.Tensor:
    """Rows in transformers' order: files of some architectures hold q and k in the order of ggml's rotary embedding."""
    if source.heads is None:
        return tensor
    import torch

    order = row_permutation(tensor.shape[0], source.heads)
    return torch.index_select(tensor, 0, order, out=lent_bytes(tensor.nbytes).view(tensor.dtype).view(tensor.shape))


METHOD = Gguf()
