"""The product y = x W^T as one Pallas kernel: a weight's codes are unpacked, scaled and multiplied block by block in the TPU's vector memory, so that it is nowhere
dense. Inputs are rounded to 8 bits there too, where they are.

The grid runs over rows of x, rows of the weight (outputs) and blocks of its columns, the last fastest. x's rows are there whole: they are read once for all
outputs, and rounded once. Of the weight every byte is read once for each block of x's rows, of which there is one up to 512 rows of ordinary layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from qcore_tpu.chips import Chip
from qcore_tpu.kernels.form import Form, Rounding
from qcore_tpu.kernels.inputs import stands_for
from qcore_tpu.kernels.numbers import codes_of, divided, numbers_of, rounded_to, tuples_of
from qcore_tpu.sharding import specs_of

_OUTPUTS = 512
"""Outputs of a block, at most."""
_ROWS = 512
"""Rows of x in a block, at most."""
_FOR_INPUTS = 0.375
"""Of vector memory for x: the rows of a block, those that are read meanwhile for the next, and the rounded ones."""
_MEMORY = 64 << 20
"""Bytes of vector memory that are asked for, at most; the rest is left to XLA."""
_EPS = float(jnp.finfo(jnp.float32).eps)


@partial(jax.jit, static_argnames=("form", "chip", "mesh"))
def product(x: jax.Array, parts: Mapping[str, jax.Array], form: Form, chip: Chip, mesh: Any = None) -> jax.Array:
    """x [M, K] in bfloat16 or float32 -> [M, N] in x's type, summed in float32.

    parts: `codes` [bytes, N] as form has them. `scales`, `zeros` [blocks, groups of a block, N] where there are groups, `coarse` and `coarse_zeros` [blocks, coarse
    groups of a block, N] that multiply them. `tail` float32 [1, N], multiplies sums. `table` float32 [1, 2^bits]. `grid` int32, of tuples. `input_scale` float32 [1, 1], of static inputs. `order`
    int32 [K], the columns of x in the weight's order. Where the chip's matrix unit does not multiply what inputs are rounded to, they are multiplied in bfloat16, which has
    all of these numbers.

    mesh: of several chips, each of which has some of the outputs (qcore_tpu.sharding). Pallas compiles it for TPUs; elsewhere it is interpreted.
    """
    given = dict(parts)
    if form.rounding is not None and form.rounding.before:
        x = stands_for(x, form.rounding, given.pop("input_scale", None))
        form = replace(form, rounding=None)
    if "order" in given:
        x = x[:, given.pop("order")]
    if form.tuples:  # the first columns of all tuples, then the second ones; of different groups one beside the other
        tuples = x.reshape(len(x), -1, form.block // form.group, form.group // 8, 8)
        x = tuples.transpose(0, 1, 4, 3, 2).reshape(x.shape)
    columns = given["codes"].shape[0] * 8 // form.bits
    x = jnp.pad(x, ((0, 0), (0, columns - x.shape[1]))) if columns > x.shape[1] else x
    multiply = partial(_on_chip, form=form, chip=chip)
    if mesh is None:
        return multiply(x, given)
    specs = specs_of(given, mesh)
    apart = jax.shard_map(
        multiply, mesh=mesh, in_specs=(PartitionSpec(), specs), out_specs=specs["codes"], check_vma=False
    )
    found: jax.Array = apart(x, given)
    return found


def _on_chip(x: jax.Array, parts: dict[str, jax.Array], *, form: Form, chip: Chip) -> jax.Array:
    found: jax.Array = jax.lax.platform_dependent(
        x, parts,
        tpu=partial(_call, form=form, chip=chip, interpret=False),
        default=partial(_call, form=form, chip=chip, interpret=True),
    )  # fmt: skip
    return found


def unit_of(form: Form, chip: Chip) -> Any:
    """The type in which rounded inputs are multiplied."""
    if form.rounding is not None and form.rounding.element == "int8" and chip.int8:
        return jnp.int8
    if form.rounding is not None and form.rounding.element == "e4m3fn" and chip.fp8:
        return jnp.float8_e4m3fn
    return jnp.bfloat16


def memory_of(chip: Chip) -> int:
    """Bytes of vector memory that the product may have."""
    return min(chip.memory, _MEMORY)


def rows_of_block(rows: int, columns: int, itemsize: int, form: Form, chip: Chip) -> int:
    """Of x, of so many rows and columns, itemsize bytes each."""
    each = 2 * itemsize * columns
    if form.rounding is not None:
        each += jnp.dtype(unit_of(form, chip)).itemsize * columns + 8 * form.block
    most = max(16, min(_ROWS, int(_FOR_INPUTS * memory_of(chip)) // each // 16 * 16))
    return rows if rows <= most else most


def outputs_of_block(outputs: int) -> int:
    """Blocks of about the same size; the last one may reach over the end."""
    if outputs <= _OUTPUTS:
        return outputs
    return -(-outputs // -(-outputs // _OUTPUTS) // 128) * 128


def _call(x: jax.Array, parts: dict[str, jax.Array], *, form: Form, chip: Chip, interpret: bool) -> jax.Array:
    (rows, columns), outputs = x.shape, parts["codes"].shape[1]
    bm, bn, bk = rows_of_block(rows, columns, x.dtype.itemsize, form, chip), outputs_of_block(outputs), form.block
    if form.tuples:
        bn = -(-bn // 128) * 128  # looked up by whole vectors
    grid = (pl.cdiv(rows, bm), pl.cdiv(outputs, bn), columns // bk)
    specs: dict[str, Any] = {
        "codes": pl.BlockSpec((form.byte_rows(bk), bn), lambda i, j, k: (k, j)),
        **{
            name: pl.BlockSpec((None, parts[name].shape[1], bn), lambda i, j, k: (k, 0, j))
            for name in ("scales", "zeros", "coarse", "coarse_zeros")
            if name in parts
        },
        "tail": pl.BlockSpec((1, bn), lambda i, j, k: (0, j)),
        "table": pl.BlockSpec(memory_space=pltpu.SMEM),
        "input_scale": pl.BlockSpec(memory_space=pltpu.SMEM),
        "grid": pl.BlockSpec(parts["grid"].shape if "grid" in parts else None, lambda i, j, k: (0, 0)),
    }
    names = [name for name in specs if name in parts]
    scratch = {"sums": pltpu.VMEM((bm, bn), jnp.float32)}
    if form.rounding is not None:
        unit = unit_of(form, chip)
        if unit == jnp.int8 and not form.group:
            scratch["sums"] = pltpu.VMEM((bm, bn), jnp.int32)
        scratch["rounded"] = pltpu.VMEM((bm, columns), unit)
        if form.rounding.dynamic:
            shape = (columns // bk, bm, bk // form.rounding.group) if form.rounding.group else (bm, 1)
            scratch["input_scales"] = pltpu.VMEM(shape, jnp.float32)
    kernel = partial(_kernel, names=("x", *names, "out", *scratch), form=form, dot=partial(_dot, wide=interpret))
    fetched = sum(_bytes(parts[name]) for name in names if name not in ("table", "input_scale"))
    moved = _bytes(x) + grid[0] * fetched + rows * outputs * x.dtype.itemsize
    found: jax.Array = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[pl.BlockSpec((bm, columns), lambda i, j, k: (i, 0)), *(specs[name] for name in names)],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), x.dtype),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel" if form.rounding is None else "arbitrary", "arbitrary"),
            vmem_limit_bytes=memory_of(chip),
        ),
        cost_estimate=pl.CostEstimate(flops=2 * rows * columns * outputs, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
    )(x, *(parts[name] for name in names))
    return found


def _kernel(*refs: Any, names: tuple[str, ...], form: Form, dot: Callable[..., jax.Array]) -> None:
    """One step of the grid."""
    ref = dict(zip(names, refs, strict=True))
    block, last = pl.program_id(2), pl.num_programs(2) - 1

    def begin() -> None:
        ref["sums"][...] = jnp.zeros_like(ref["sums"])

    def finish() -> None:
        sums = ref["sums"][...].astype(jnp.float32)
        if "tail" in ref:
            sums = sums * ref["tail"][...]
        if form.rounding is not None and not form.rounding.group:
            sums = sums * _row_scales(ref)
        ref["out"][...] = sums.astype(ref["out"].dtype)

    pl.when(block == 0)(begin)
    columns = _columns(ref["x"], block, form.block)
    if form.rounding is None:
        x = ref["x"][:, columns]
        ref["sums"][...] += dot(x, weight_of(ref, form).astype(x.dtype))
    else:
        _round(ref, form.rounding, form.block, block)
        codes = _numbers(ref, form)
        if form.group:
            ref["sums"][...] += _dot_by_group(ref, form, codes, block, dot)
        else:
            ref["sums"][...] += dot(ref["rounded"][:, columns], codes)
    pl.when(block == last)(finish)


def _columns(x: Any, block: Any, size: int) -> Any:
    """A block of x's columns; where there is one alone it may be of any size."""
    return slice(None) if x.shape[1] == size else pl.ds(pl.multiple_of(block * size, 128), size)


def weight_of(ref: Mapping[str, Any], form: Form) -> jax.Array:
    """float32 [columns of a block, N], of a block's parts, references or arrays."""
    if form.tuples:  # of different groups one beside the other
        values, scales = tuples_of(ref["codes"][...], ref["grid"], form), _by_group(ref, "scales", "coarse")
        return (values.reshape(-1, *scales.shape) * scales).reshape(values.shape)
    values = numbers_of(codes_of(ref["codes"][...], form), form, ref.get("table"))
    if not form.group:
        return values
    scales = _by_group(ref, "scales", "coarse")
    zeros = _by_group(ref, "zeros", "coarse_zeros") if form.zero else None
    values = values.reshape(scales.shape[0], form.group, -1)
    if zeros is not None and form.zero == "subtracted":
        values = values - zeros[:, None]
    values = values * scales[:, None]
    if zeros is not None and form.zero == "added":
        values = values + zeros[:, None]
    return values.reshape(form.block, -1)


def _by_group(ref: Mapping[str, Any], name: str, coarse: str) -> jax.Array:
    """float32 [groups of a block, N]."""
    values: jax.Array = ref[name][...].astype(jnp.float32)
    if coarse in ref:
        wide = ref[coarse][...]
        values = (values.reshape(wide.shape[0], -1, values.shape[-1]) * wide[:, None]).reshape(values.shape)
    return values


def _numbers(ref: Mapping[str, Any], form: Form) -> jax.Array:
    """Codes in the type of rounded inputs."""
    unit, held = ref["rounded"].dtype, ref["codes"][...]
    if unit == jnp.float8_e4m3fn:
        return pltpu.bitcast(held, unit)
    if held.dtype == unit:
        return held
    codes = codes_of(held, form)
    return (codes - form.center).astype(unit) if unit == jnp.int8 else numbers_of(codes, form, None).astype(unit)


def _round(ref: Mapping[str, Any], rounding: Rounding, size: int, block: Any) -> None:
    """Rounds x's columns of this block, while the first outputs are made."""
    first, columns = pl.program_id(1) == 0, _columns(ref["x"], block, size)

    def look() -> None:
        def larger(place: jax.Array, found: jax.Array) -> jax.Array:
            part = ref["x"][:, _columns(ref["x"], place, size)].astype(jnp.float32)
            return jnp.maximum(found, jnp.max(jnp.abs(part), 1, keepdims=True))

        none = jnp.zeros(ref["input_scales"].shape, jnp.float32)
        ref["input_scales"][...] = _scale(jax.lax.fori_loop(0, pl.num_programs(2), larger, none), rounding)

    def take() -> None:
        values = ref["x"][:, columns].astype(jnp.float32)
        if rounding.group:
            parts = [values[:, start : start + rounding.group] for start in range(0, size, rounding.group)]
            scales = [_scale(jnp.max(jnp.abs(part), 1, keepdims=True), rounding) for part in parts]
            codes = [_codes(divided(part, scale), rounding) for part, scale in zip(parts, scales, strict=True)]
            taken = jnp.concatenate(codes, 1)
            ref["input_scales"][block] = jnp.concatenate(scales, 1)
        else:
            taken = _codes(divided(values, _row_scales(ref)), rounding)
        ref["rounded"][:, columns] = taken.astype(ref["rounded"].dtype)

    if rounding.dynamic and not rounding.group:
        pl.when(first & (block == 0))(look)
    pl.when(first)(take)


def _row_scales(ref: Mapping[str, Any]) -> jax.Array:
    """float32 [M, 1], or one number where it is stored."""
    found: jax.Array = ref["input_scales"][...] if "input_scales" in ref else ref["input_scale"][0, 0]
    return found


def _scale(magnitude: jax.Array, rounding: Rounding) -> jax.Array:
    """As qcore.kernels.activations has it: a row of zeros takes any."""
    scale = divided(magnitude, 127.5 if rounding.element == "int8" else 448.0)
    return jnp.where(scale == 0, _EPS, scale)


def _codes(scaled: jax.Array, rounding: Rounding) -> jax.Array:
    """float32, whole or of e4m3."""
    return (
        jnp.round(jnp.clip(scaled, -128, 127)) if rounding.element == "int8" else rounded_to(scaled, rounding.element)
    )


def _dot_by_group(
    ref: Mapping[str, Any], form: Form, codes: jax.Array, block: Any, dot: Callable[..., jax.Array]
) -> jax.Array:
    """Sums of each group scaled, float32."""
    x, scales = ref["rounded"][:, _columns(ref["x"], block, form.block)], _by_group(ref, "scales", "coarse")
    inputs = ref["input_scales"][block] if form.rounding is not None and form.rounding.group else None
    total = jnp.zeros(ref["sums"].shape, jnp.float32)
    for group in range(form.block // form.group):
        own = slice(group * form.group, (group + 1) * form.group)
        sums = dot(x[:, own], codes[own]).astype(jnp.float32) * scales[group : group + 1]
        total = total + (sums if inputs is None else sums * inputs[:, group : group + 1])
    return total


def _dot(x: jax.Array, weight: jax.Array, *, wide: bool) -> jax.Array:
    """x [M, K] times [K, N], both of one type: sums in int32 of int8, else in float32. wide: small floats are widened, for XLA's product on CPUs does not take all."""
    if wide and x.dtype.itemsize < 4 and x.dtype != jnp.int8:
        x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    kind = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, weight, (((1,), (0,)), ((), ())), precision=exact, preferred_element_type=kind)


def _bytes(array: jax.Array) -> int:
    count: int = array.size * array.dtype.itemsize
    return count
