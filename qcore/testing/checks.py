"""What a kernel is checked for. Each check takes a bench and raises AssertionError with what was found and expected.

The definition that kernels are held against is QuantizedTensor.dequantize() and, where a scheme quantizes its input,
qcore.kernels.activations.quantize_input, multiplied in float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, cast

import torch

from qcore.accuracy import error_bound, worst_error
from qcore.elements import FlatGroup, Group, Int, Tile
from qcore.kernel import Kernel
from qcore.kernels.activations import quantize_input
from qcore.kernels.kv_cache import KvRounding
from qcore.kernels.stacking import StackableLinear
from qcore.model.linear import QuantizedEmbedding, QuantizedLinear
from qcore.platform import Device
from qcore.refusal import Refused
from qcore.scheme import Scheme
from qcore.tensor import LayerTensors
from qcore.testing.layers import random_layer, smallest_columns

BATCHES = (*range(1, 18), 512)
"""Rows of activations: decoding with one to sixteen sequences and one more, and a prompt."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

SIZES = ("tiny", "odd", "large")

ROUTES = ({3: 1}, {1: 1, 4: 1}, {0: 3, 1: 1, 4: 5}, {0: 70, 2: 13, 3: 1})
"""Rows of each of five experts: a row alone, which are decoded; few, and many, for some of them none."""


@dataclass(frozen=True)
class Bench:
    """A kernel with one layer to run: scheme, dtype of activations (a key of DTYPES), size of the weight (one of SIZES).
    given: the layer, where it is not to be a random one."""

    kernel: Kernel
    scheme: Scheme
    dtype: str
    size: str
    device: Device
    given: LayerTensors | None = None

    def __str__(self) -> str:
        return f"{self.kernel.name}, {self.scheme}, {self.dtype}, {self.size} {self.shape[0]} x {self.shape[1]}"

    @cached_property
    def shape(self) -> tuple[int, int]:
        """[N, K]: the smallest that the kernel takes, an odd multiple of it, and one of a real layer's size."""
        rows, columns = smallest_shape(self.kernel, self.scheme)
        if self.size == "tiny":
            return rows, columns
        if self.size == "large" and self.kernel.op == "kv_cache":
            return 32, 128  # heads, head_dim
        if self.size == "large":
            return -(-1024 // rows) * rows, -(-2048 // columns) * columns
        return rows * 5 if rows > 1 else 37, columns * 3 if columns > 1 else 203

    @cached_property
    def layer(self) -> LayerTensors:
        return self.given or _layer_of(self.scheme, *self.shape)

    @cached_property
    def packed(self) -> torch.nn.Module:
        """The layer on the kernel, on the device. Raises AssertionError where the kernel refuses what its row claims."""
        try:
            packed = self.kernel.load().from_layer(self.layer, DTYPES[self.dtype])
        except Refused as error:
            raise AssertionError(f"{self}: its row claims the layer, from_layer refuses it: {error.refusal}") from error
        return packed.to(self.device.torch_device)

    @cached_property
    def weight(self) -> torch.Tensor:
        """float64 [N, K]"""
        return self.given.weight.dequantize().double() if self.given else _weight_of(self.scheme, *self.shape)

    @property
    def bound(self) -> float:
        return error_bound(self.kernel, self.scheme, self.dtype)

    def input(self, *leading: int, seed: int = 1) -> torch.Tensor:
        """Random activations [*leading, K] on the CPU, or states [*leading, N, K] for a kv cache; one column is larger than the
        others, as in real models."""
        own = self.shape if self.kernel.op == "kv_cache" else self.shape[1:]
        x = torch.randn(*leading, *own, generator=torch.Generator().manual_seed(seed))
        x[..., :1] *= 8
        return x.to(DTYPES[self.dtype])

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """float64 [..., N]: what the layer should give, without bias; of a kv cache [..., N, K]."""
        if x.dim() == 1:
            return self.product(x[None])[0]
        given, layer = x.float(), self.layer
        if self.kernel.op == "kv_cache":
            scale, zero = layer.weight.scales[0].float(), layer.weight.zeros
            if zero is None:
                return quantize_input(given, self.scheme.weight, scale).double()
            shift = zero.double()  # whole codes are shifted, so that halves go where they go without a zero point
            return (((given / scale).round().double() + shift).clamp(-128, 127) - shift) * scale.double()
        if self.scheme.input is not None:
            given = quantize_input(given, self.scheme.input, layer.input_scale, layer.input_zero)
        elif self.kernel.quantizes_input:
            given = self.rounded(given)
        return given.double() @ self.weight.t()

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """What the kernel says that its rounded input stands for. Raises AssertionError where that is farther from x than half
        of a step of its row's 8 bits."""
        values: torch.Tensor = self.packed.rounded(x)  # type: ignore[operator]
        step = x.abs().amax(-1, keepdim=True) / 127
        if bool(((values - x).abs() > 0.501 * step).any()):
            raise AssertionError(f"{self}: rounded inputs are farther off than 8 bits allow")
        return values

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The kernel's answer, on the CPU."""
        out: torch.Tensor = self.packed(x.to(self.device.torch_device))
        return out.cpu()

    def compare(self, what: str, got: torch.Tensor, expected: torch.Tensor, bound: float | None = None) -> float:
        """The error. Raises AssertionError where shape or dtype are wrong or the error is above the bound."""
        most = self.bound if bound is None else bound
        if tuple(got.shape) != tuple(expected.shape):
            raise AssertionError(f"{self}: {what}: shape {list(got.shape)}, expected {list(expected.shape)}")
        if got.dtype != DTYPES[self.dtype]:
            raise AssertionError(f"{self}: {what}: dtype {got.dtype}, expected {self.dtype}")
        error = worst_error(got, expected)
        if not error <= most:
            raise AssertionError(f"{self}: {what}: error {error:.3g}, expected at most {most:.3g} (qcore.accuracy)")
        return error


_layer_of = lru_cache(maxsize=len(SIZES))(random_layer)
"""The same for every type of activations, so each is made once."""


@lru_cache(maxsize=len(SIZES))
def _weight_of(scheme: Scheme, rows: int, columns: int) -> torch.Tensor:
    """float64 [rows, columns]: what the weight of `_layer_of` stands for."""
    return _layer_of(scheme, rows, columns).weight.dequantize().double()


def smallest_shape(kernel: Kernel, scheme: Scheme) -> tuple[int, int]:
    """The least [N, K] that the row claims for the scheme, one whole group or tile at least unless it takes ragged ones."""
    rows, columns = kernel.multiples
    columns = math.lcm(columns, smallest_columns(scheme))
    if not kernel.ragged:
        finest = scheme.weight.granularity
        if isinstance(finest, FlatGroup):
            columns = math.lcm(columns, finest.size)
        for level in scheme.weight.scales:
            if isinstance(level.granularity, Group):
                columns = math.lcm(columns, level.granularity.size)
            if isinstance(level.granularity, Tile):
                rows, columns = math.lcm(rows, level.granularity.rows), math.lcm(columns, level.granularity.cols)
    return rows, columns


def numbers(bench: Bench) -> float:
    """The products of every batch size are within the bound; for an embedding, the rows that are looked up."""
    if bench.kernel.op == "embedding":
        tokens = torch.arange(bench.shape[0]).flip(0)
        return bench.compare("rows looked up", bench.run(tokens), bench.weight[tokens])
    batches = BATCHES if bench.size == "odd" else (1, 16)
    x = bench.input(max(batches))
    whole = None if _per_tensor(bench.scheme) else bench.product(x)
    errors = [
        bench.compare(f"batch of {m}", bench.run(x[:m]), bench.product(x[:m]) if whole is None else whole[:m])
        for m in batches
    ]
    return max(errors)


def largest_codes(bench: Bench) -> float:
    """Weights and activations of the largest codes, all of one sign: pairs of 8-bit products do not fit into 16 bits."""
    element = bench.scheme.weight.element
    if bench.kernel.op != "linear" or not isinstance(element, Int):
        return 0.0
    weight = bench.layer.weight
    codes = weight.codes.clone()
    signed = codes.dtype == torch.int8
    codes[::2], codes[1::2] = (127, -128) if signed else (255, 0)
    extreme = replace(bench, given=replace(bench.layer, weight=replace(weight, codes=codes)))
    x = bench.input(4)
    x[0], x[1] = 1.0, -1.0
    return extreme.compare("largest codes", extreme.run(x), extreme.product(x))


def leading_dimensions(bench: Bench) -> float:
    """A vector gives a vector, and a batch of sequences a batch of sequences."""
    if bench.kernel.op == "embedding":
        tokens = torch.tensor([[0, bench.shape[0] - 1], [0, 0]])
        return bench.compare("[2, 2] tokens", bench.run(tokens), bench.weight[tokens])
    model = bench.packed
    if bench.kernel.op == "linear":
        model = QuantizedLinear(bench.scheme, bench.shape, bench.kernel, model)
    inputs = [bench.input(*shape) for shape in ((), (2, 3), (1, 1, 2))]
    place = bench.device.torch_device
    return max(bench.compare(f"input {list(x.shape)}", model(x.to(place)).cpu(), bench.product(x)) for x in inputs)


def strided_input(bench: Bench) -> float:
    """An input that is not contiguous gives the same, and stays as it was."""
    columns = bench.shape[1]
    wide = torch.stack([bench.input(3), bench.input(3, seed=2)], -1).to(bench.device.torch_device)
    before, x = wide.clone(), wide[..., 0]
    error = bench.compare("strided input", bench.packed(x).cpu(), bench.product(x.cpu().contiguous()))
    turned = bench.input(3).to(bench.device.torch_device).transpose(0, 1).contiguous().transpose(0, 1)
    error = max(error, bench.compare("transposed input", bench.packed(turned).cpu(), bench.product(turned.cpu())))
    if not torch.equal(wide, before):
        raise AssertionError(f"{bench}: the kernel changed its input of {columns} columns")
    return error


def empty_input(bench: Bench) -> float:
    """No rows in, no rows out."""
    if bench.kernel.op == "embedding":
        return bench.compare("no tokens", bench.run(torch.zeros(0, dtype=torch.int64)), bench.weight[:0])
    x = bench.input(0)
    return bench.compare("empty input", bench.run(x), bench.product(x))


def bias_and_multiplier(bench: Bench) -> float:
    """In its place in a model: y = kernel(x * multiplier) + bias."""
    if bench.kernel.op == "embedding":
        model: torch.nn.Module = QuantizedEmbedding(bench.scheme, bench.shape, bench.kernel, bench.packed, scale=0.5)
        tokens = torch.zeros(2, dtype=torch.int64)
        got = model(tokens.to(bench.device.torch_device)).cpu()
        return bench.compare("scaled rows", got, bench.weight[tokens] * 0.5)
    dtype, place = DTYPES[bench.dtype], bench.device.torch_device
    random = torch.Generator().manual_seed(3)
    bias = torch.randn(bench.shape[0], generator=random).to(dtype)
    multiplier = torch.full((bench.shape[1],), 0.5, dtype=dtype)  # a power of two, so that the product is exact
    linear = QuantizedLinear(bench.scheme, bench.shape, bench.kernel, bench.packed, bias, multiplier).to(place)
    x = bench.input(4)
    return bench.compare("bias", linear(x.to(place)).cpu(), bench.product(x * multiplier) + bias.double())


def packed_size(bench: Bench) -> float:
    """The packed weight is not held dense: at most 1.5 times the canonical size, and something for padding. A kv cache holds
    a byte for each number, and at most a scale for each token and head."""
    if bench.kernel.op == "kv_cache":
        packed = cast(KvRounding, bench.packed)
        rows, states = packed.encode(bench.input(2).to(bench.device.torch_device)), 2 * bench.shape[0]
        if rows.nbytes > states * (bench.shape[1] + 4):
            raise AssertionError(f"{bench}: {states} states take {rows.nbytes:,} bytes")
        return 0.0
    held = sum(part.numel() * part.element_size() for part in bench.packed.buffers())
    allowed = 1.5 * bench.layer.weight.nbytes + 65536
    if held > allowed:
        raise AssertionError(f"{bench}: it holds {held:,} bytes, expected at most {allowed:,.0f}")
    return 0.0


def attention(bench: Bench) -> float:
    """Where a kv cache's rows are read in attention: under scales that are stored and, without zero points, of run time; for one query and for some, of a
    text and of a batch whose shorter texts are filled up from the left. The definition is softmax attention in float64 to the decoded rows."""
    if bench.kernel.op != "kv_cache" or not hasattr(bench.packed, "attends"):
        return 0.0
    heads, group, size, place = 3, 4, 128, bench.device.torch_device
    weight, random = random_layer(bench.scheme, heads, size).weight, torch.Generator().manual_seed(4)
    scale, zero = (None if part is None else part.float().view(-1, 1, 1) for part in (weight.scales[0], weight.zeros))
    error = 0.0
    for parts in [(scale, zero), (None, None)][: 1 + (zero is None)]:
        make: Any = type(bench.packed)
        own, reference = make(weight.scheme.weight.element, *parts), KvRounding(weight.scheme.weight.element, *parts)
        for texts, queries, tokens in ((1, 1, 70), (2, 5, 5), (2, 3, 66)):
            shapes = [(texts, heads * group, queries, size), *[(texts, heads, tokens, size)] * 2]
            query, *states = (torch.randn(*shape, generator=random).to(DTYPES[bench.dtype]) for shape in shapes)
            rows = [own.encode(part.to(place)) for part in states]
            causal = queries in (1, tokens)
            seen = torch.ones(texts, 1, queries, tokens, dtype=torch.bool).tril(tokens - queries)
            if not causal:
                seen[-1, ..., : tokens // 2] = False
            asked = (query.to(place), *rows, own, None if causal else seen.to(place))
            if not own.attends(*asked):
                raise AssertionError(f"{bench}: attention does not take {texts} x {queries} queries of {tokens} tokens")
            got = own.attention(*asked, size**-0.5, causal).cpu()
            dense = [reference.decode(part.cpu(), torch.float32).double().repeat_interleave(group, 1) for part in rows]
            scores = (query.double() @ dense[0].mT * size**-0.5).masked_fill(~seen, float("-inf"))
            expected = (scores.softmax(-1) @ dense[1]).transpose(1, 2)
            error = max(error, bench.compare(f"{queries} queries of {tokens} tokens", got, expected))
    return error


def stacked_experts(bench: Bench) -> float:
    """Layers that are held as one give each row what its own gives, however many rows each of them has."""
    kernel, place = cast("type[StackableLinear]", bench.kernel.load()), bench.device.torch_device
    layers = [random_layer(bench.scheme, *bench.shape, seed=seed) for seed in range(5)]
    layers = [
        replace(layer, input_scale=None if layer.input_scale is None else layer.input_scale * (1 + number / 8))
        for number, layer in enumerate(layers)
    ]
    experts = [replace(bench, given=layer) for layer in layers]
    packed = [cast("StackableLinear", expert.packed) for expert in experts]
    if not kernel.stackable(packed):
        return 0.0
    stack, errors = kernel.stacked(packed).to(place), []
    for route in ROUTES:
        x, counts = bench.input(sum(route.values())), list(route.values())
        chosen = torch.tensor(list(route)).repeat_interleave(torch.tensor(counts)).to(torch.int32)
        parts = zip(route, x.split(counts), strict=True)
        expected = torch.cat([experts[expert].product(part) for expert, part in parts])
        got: torch.Tensor = stack(x.to(place), chosen.to(place))
        errors.append(bench.compare(f"experts {route}", got.cpu(), expected))
    return max(errors)


CHECKS: dict[str, Callable[[Bench], float]] = {
    "numbers": numbers,
    "largest_codes": largest_codes,
    "leading_dimensions": leading_dimensions,
    "strided_input": strided_input,
    "empty_input": empty_input,
    "bias_and_multiplier": bias_and_multiplier,
    "packed_size": packed_size,
    "attention": attention,
    "stacked_experts": stacked_experts,
}
"""Every check by the name of the capability that it needs; the error that it returns is the worst that it saw."""


def _per_tensor(scheme: Scheme) -> bool:
    """Whether the input's scale depends on the whole batch, so that parts of a product must be made one by one."""
    return scheme.input is not None and scheme.input.dynamic and str(scheme.input.granularity) == "tensor"
