"""Putting layers on kernels: the best that takes a layer, or the next where its code cannot have it after all."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from qcore.checkpoint.open import Checkpoint
from qcore.discovery import registry
from qcore.elements import Level, PerChannel
from qcore.kernel import Kernel, Op
from qcore.model.linear import QuantizedEmbedding, QuantizedLinear, StackedLinear
from qcore.model.probe import failed, wrong_answer, wrong_stack
from qcore.platform import Device
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, TensorScheme
from qcore.select import LayerRequest, Selection, select
from qcore.tensor import LayerTensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qcore.kernels.kv_cache import KvRounding

log = logging.getLogger("qcore")


class Packer:
    """Kernels for the layers of one model on one device. kernel: the one that linear layers run on where it takes them.
    own: layers compute in the types that their plan states; else all do in `dtype`.

    Raises Refused (unknown-kernel).
    """

    def __init__(
        self, device: Device, dtype: torch.dtype, kernel: str | None, exact: bool, *, own: bool = False
    ) -> None:
        self.device, self.dtype, self.kernel, self.exact, self.own = device, dtype, kernel, exact, own
        self.kernels = registry().kernels
        self.trusted: set[tuple[str, Scheme]] = set()
        self.said: set[Refusal] = set()
        self.stacks: dict[tuple[str, Scheme], bool] = {}
        self.selections: dict[LayerRequest, Selection] = {}
        names = sorted({known.name for known, _ in self.kernels if known.op == "linear"})
        if kernel is not None and kernel not in names:
            raise Refused(Refusal("unknown-kernel", "usage", kernel, "no registered kernel has this name",
                                  fix=f"Name one of: {', '.join(names)}."))  # fmt: skip

    def linear(self, layer: LayerTensors, computes: str = "", *, expert: bool = False) -> QuantizedLinear:
        """The layer [N, K] with its bias, on the device. computes: what its plan states. expert: it is one of a mixture's."""
        dtype: torch.dtype = getattr(torch, computes) if computes and self.own else self.dtype
        kernel, packed, shape = self._pack("linear", layer, dtype, expert)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        new = QuantizedLinear(layer.weight.scheme, shape, kernel, packed, bias, layer.input_multiplier,
                              None if dtype == self.dtype else dtype)  # fmt: skip
        return new.to(self.device.torch_device)

    def stackable(self, layers: Sequence[torch.nn.Module]) -> bool:
        """Whether experts can be held as one, on a kernel that gives what it gives for each of them."""
        if not StackedLinear.stackable(layers):
            return False
        first = layers[0]
        kernel = next(known for known, _ in registry().kernels if known.name == first.kernel_name)
        if (kernel.name, first.scheme) not in self.stacks:
            wrong = wrong_stack(kernel, layers[:2], first.computes or self.dtype, self.device.torch_device)
            self.stacks[kernel.name, first.scheme] = wrong is None
            if wrong is not None:
                log.warning("%s", wrong)
        return self.stacks[kernel.name, first.scheme]

    def plain(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Linear:
        """torch's own layer, on the device."""
        rows, columns = weight.shape
        new = torch.nn.Linear(columns, rows, bias=bias is not None, device="meta")
        new.weight = self.parameter(weight)
        if bias is not None:
            new.bias = self.parameter(bias)
        return new

    def parameter(self, values: torch.Tensor, dtype: torch.dtype | None = None) -> torch.nn.Parameter:
        """The values, on the device."""
        return torch.nn.Parameter(values.to(self.device.torch_device, dtype or self.dtype), requires_grad=False)

    def embedding(self, layer: LayerTensors, scale: float | None) -> QuantizedEmbedding:
        """The embedding [N, K], on the device."""
        kernel, packed, shape = self._pack("embedding", layer, self.dtype)
        return QuantizedEmbedding(layer.weight.scheme, shape, kernel, packed, scale).to(self.device.torch_device)

    def kv_cache(self, scheme: TensorScheme) -> type[KvRounding]:
        """What holds keys and values. Raises Refused (no-kernel)."""
        computed = torch.float32 if self.dtype == torch.float64 else self.dtype  # no kernel rounds from more
        # A weight's words have none for scales of run time: what takes a scale for each head computes one for each token too.
        held = replace(scheme, scales=(Level(PerChannel()),), dynamic=False) if scheme.dynamic else scheme
        request = LayerRequest("kv_cache", Scheme(held), (1, 1), str(computed).removeprefix("torch."))
        selection = select(request, self.device.platform, self.kernels, self.device)
        if selection.kernel is None:
            assert selection.refusal is not None
            raise Refused(selection.refusal)
        return cast("type[KvRounding]", selection.kernel.load())

    def _pack(
        self, op: Op, layer: LayerTensors, computed: torch.dtype, expert: bool = False
    ) -> tuple[Kernel, torch.nn.Module, tuple[int, int]]:
        """A kernel that refuses the tensors' contents gives way to the next, and it is said."""
        named = self.kernel if op == "linear" else None
        dtype, kernels = str(computed).removeprefix("torch."), self.kernels
        rows, columns = layer.weight.shape
        while True:
            request = LayerRequest(op, layer.weight.scheme, (rows, columns), dtype, self.exact, named, expert)
            selection = self._selected(request, kernels)
            if selection.kernel is None:
                assert selection.refusal is not None
                if named is None:
                    raise Refused(selection.refusal)
                log.warning("kernel %s does not take %s; another is chosen for it", named, layer.weight.scheme)
                named = None
                continue
            chosen = selection.kernel
            packed = self._packed(chosen, layer, computed)
            if isinstance(packed, torch.nn.Module):
                return chosen, packed, (rows, columns)
            if packed not in self.said:  # what is so of a shape is so of all layers that have it
                log.warning("%s", packed)
                self.said.add(packed)
            kernels = [row for row in kernels if row[0] is not chosen]

    def _selected(self, request: LayerRequest, kernels: Sequence[tuple[Kernel, str]]) -> Selection:
        """Most layers of a model ask for the same as others."""
        if kernels is not self.kernels:
            return select(request, self.device.platform, kernels, self.device)
        if request not in self.selections:
            self.selections[request] = select(request, self.device.platform, kernels, self.device)
        return self.selections[request]

    def _packed(self, kernel: Kernel, layer: LayerTensors, dtype: torch.dtype) -> torch.nn.Module | Refusal:
        """The layer on the kernel, or why the kernel cannot have it after all."""
        try:
            packed = kernel.load().from_layer(layer, dtype).to(self.device.torch_device)
        except Refused as error:
            return error.refusal
        except Exception as fault:  # a plugin's fault is to harm nobody
            return failed(kernel, fault)
        trusted = (kernel.name, layer.weight.scheme)
        if trusted not in self.trusted and kernel.family != "reference":
            if wrong := wrong_answer(kernel, packed, layer, dtype, self.device.torch_device):
                self.kernels, self.selections = [row for row in self.kernels if row[0] is not kernel], {}
                return wrong
            self.trusted.add(trusted)
        return packed


def agreed_bias(checkpoint: Checkpoint, module: str, bias: torch.Tensor | None, *, wanted: bool) -> torch.Tensor | None:
    """The bias that the checkpoint gives a module. Raises Refused (missing-tensor, unexpected-tensor)."""
    if bias is not None and not wanted and not bool(bias.any()):
        return None  # AutoGPTQ writes zeros where a layer has no bias
    if (bias is not None) != wanted:
        raise bad_file("missing-tensor" if wanted else "unexpected-tensor",
                       "the model and the checkpoint disagree on a bias", file=checkpoint.path,
                       tensor=f"{module}.bias", expected="a bias" if wanted else "none")  # fmt: skip
    return bias
