"""The product y = x W^T as one Pallas kernel: a weight's codes are unpacked, scaled and multiplied block by block in the TPU's vector memory, so that it is nowhere
dense. Inputs are rounded to 8 bits there too, where they are.

The grid runs over rows of x, rows of the weight (outputs) and blocks of its columns, the last fastest. x's rows are there whole: they are read once for all
outputs, and rounded once. Of the weight every byte is read once for each block of x's rows, of which there is one up to 512 rows of ordinary layers.

Of a mixture's experts, held as one, each block of x's rows is one expert's (qcore_tpu.kernels.experts), whose weight alone is read for it.
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
from qcore_tpu.kernels.experts import blocks_of
from qcore_tpu.kernels.experts import rows_of_block as rows_of_expert
from qcore_tpu.kernels.form import Form, Rounding
from qcore_tpu.kernels.inputs import stands_for
from qcore_tpu.kernels.numbers import codes_of, divided, numbers_of, rounded_to, tuples_of
from qcore_tpu.sharding import BY_OUTPUT, specs_of

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

    Of experts, parts but for `table` and `grid` are stacked, [experts, ..], and `experts` int32 [M] says whose each row is, in ascending order.

    mesh: of several chips, each of which has some of the outputs (qcore_tpu.sharding). Pallas compiles it for TPUs; elsewhere it is interpreted.
    """
    given = dict(parts)
    experts = given.pop("experts", None)
    if form.rounding is not None and form.rounding.before:
        whole = given.pop("input_scale", None)
        x = stands_for(x, form.rounding, whole if whole is None or experts is None else whole[experts, 0])
        form = replace(form, rounding=None)
    if "order" in given:
        order = given.pop("order")
        x = x[:, order] if experts is None else jnp.take_along_axis(x, order[experts], 1)
    if form.tuples:  # the first columns of all tuples, then the second ones; of different groups one beside the other
        tuples = x.reshape(len(x), -1, form.block // form.group, form.group // 8, 8)
        x = tuples.transpose(0, 1, 4, 3, 2).reshape(x.shape)
    columns = given["codes"].shape[-2] * 8 // form.bits
    x = jnp.pad(x, ((0, 0), (0, columns - x.shape[1]))) if columns > x.shape[1] else x
    if experts is None:
        return _over(x, given, form, chip, mesh)
    count, (rows, itemsize) = len(given["codes"]), (len(x), x.dtype.itemsize)
    size = rows_of_expert(rows, count, rows_of_block(_ROWS, columns, itemsize, form, chip))
    blocks = blocks_of(experts, count, size)
    given |= {"owner": blocks.owner, "used": blocks.used}
    return _over(x[blocks.source], given, form, chip, mesh)[blocks.place]


def _over(x: jax.Array, parts: dict[str, jax.Array], form: Form, chip: Chip, mesh: Any) -> jax.Array:
    """On one chip, or each chip's outputs on it."""
    multiply = partial(_on_chip, form=form, chip=chip)
    if mesh is None:
        return multiply(x, parts)
    specs, nowhere = specs_of(parts, mesh), PartitionSpec()
    out = PartitionSpec(None, *specs["codes"][-1:])
    apart = jax.shard_map(multiply, mesh=mesh, in_specs=(nowhere, specs), out_specs=out, check_vma=False)
    found: jax.Array = apart(x, parts)
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
    (rows, columns), outputs, bk = x.shape, parts["codes"].shape[-1], form.block
    blocks, stacked = parts.get("owner"), "owner" in parts
    bm = rows_of_block(rows, columns, x.dtype.itemsize, form, chip) if blocks is None else rows // len(blocks)
    bn = outputs_of_block(outputs)
    if form.tuples:
        bn = -(-bn // 128) * 128  # looked up by whole vectors
    grid = (pl.cdiv(rows, bm), pl.cdiv(outputs, bn), columns // bk)

    def held(*shape: int | None, place: Callable[[Any, Any], tuple[Any, ...]]) -> Any:
        """Part of an array, by outputs and columns; of experts that of the block's own. Blocks beyond those that are used stay at the last part, for which nothing is read."""
        if not stacked:
            return pl.BlockSpec(shape, lambda i, j, k: place(j, k))

        def of_expert(i: Any, j: Any, k: Any, owner: Any, used: Any) -> tuple[Any, ...]:
            is_used = i < used[0]
            at = place(jnp.where(is_used, j, grid[1] - 1), jnp.where(is_used, k, grid[2] - 1))
            return owner[i], *at

        return pl.BlockSpec((None, *shape), of_expert)

    groups = [name for name in ("scales", "zeros", "coarse", "coarse_zeros") if name in parts]
    specs: dict[str, Any] = {
        "codes": held(form.byte_rows(bk), bn, place=lambda j, k: (k, j)),
        **{name: held(None, parts[name].shape[-2], bn, place=lambda j, k: (k, 0, j)) for name in groups},
        "tail": held(1, bn, place=lambda j, k: (0, j)),
        "table": pl.BlockSpec(memory_space=pltpu.SMEM),
        "input_scale": pl.BlockSpec(memory_space=pltpu.SMEM),
        "grid": pl.BlockSpec(parts["grid"].shape if "grid" in parts else None, lambda i, *_: (0, 0)),
    }
    first = [name for name in ("owner", "used") if name in parts]
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
    kernel = partial(
        _kernel, names=(*first, "x", *names, "out", *scratch), form=form, dot=partial(_dot, wide=interpret)
    )
    each = sum(_bytes(parts[name]) for name in names if name not in ("table", "input_scale"))
    fetched = grid[0] * (each // len(parts["codes"]) if stacked else each)
    moved = _bytes(x) + fetched + rows * outputs * x.dtype.itemsize
    given = [parts[name] for name in names]
    if (
        stacked and not interpret
    ):  # of which XLA would else fetch all into vector memory beforehand, those too that are not chosen
        given = [
            pltpu.with_memory_space_constraint(part, pltpu.HBM) if name in BY_OUTPUT else part
            for name, part in zip(names, given, strict=True)
        ]
    found: jax.Array = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(first),
            grid=grid,
            in_specs=[pl.BlockSpec((bm, columns), lambda i, *_: (i, 0)), *(specs[name] for name in names)],
            out_specs=pl.BlockSpec((bm, bn), lambda i, j, *_: (i, j)),
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel" if form.rounding is None else "arbitrary", "arbitrary"),
            vmem_limit_bytes=memory_of(chip),
        ),
        cost_estimate=pl.CostEstimate(flops=2 * rows * columns * outputs, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
    )(*(parts[name] for name in first), x, *given)
    return found


def _kernel(*refs: Any, names: tuple[str, ...], form: Form, dot: Callable[..., jax.Array]) -> None:
    """One step of the grid."""
    ref = dict(zip(names, refs, strict=True))
    rows, outputs, block = (pl.program_id(axis) for axis in range(3))
    if "owner" not in ref:
        _step(ref, form, dot, outputs, block)
        return
    if "input_scale" in ref:
        ref["own_scale"] = ref["input_scale"][ref["owner"][rows], 0, 0]
    pl.when(rows < ref["used"][0])(lambda: _step(ref, form, dot, outputs, block))


def _step(ref: dict[str, Any], form: Form, dot: Callable[..., jax.Array], outputs: Any, block: Any) -> None:
    """outputs, block: those of the grid."""

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
        _round(ref, form.rounding, form.block, outputs == 0, block)
        codes = _numbers(ref, form)
        if form.group:
            ref["sums"][...] += _dot_by_group(ref, form, codes, block, dot)
        else:
            ref["sums"][...] += dot(ref["rounded"][:, columns], codes)
    pl.when(block == pl.num_programs(2) - 1)(finish)


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


def _round(ref: Mapping[str, Any], rounding: Rounding, size: int, first: Any, block: Any) -> None:
    """Rounds x's columns of this block, while the first outputs are made."""
    columns = _columns(ref["x"], block, size)

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
    if "input_scales" in ref:
        found: jax.Array = ref["input_scales"][...]
        return found
    return ref["own_scale"] if "own_scale" in ref else ref["input_scale"][0, 0]


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
