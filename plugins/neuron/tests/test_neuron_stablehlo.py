"""What the checker of programs takes, and what it refuses; the tables that it is made of."""

from __future__ import annotations

import pytest

from qcore_neuron import operators
from qcore_neuron.operators import OPERATIONS, TYPES
from qcore_neuron.stablehlo import faults, operations

PROGRAM = """
module @IrToHlo.7 attributes {mhlo.cross_program_prefetches = [], mhlo.is_dynamic = false} {
  func.func @main(%arg0: tensor<32x64xi8>, %arg1: tensor<4x64xbf16>, %arg2: tensor<5xi64>) -> tensor<4x32xbf16> {
    %cst = stablehlo.constant dense<0.000000e+00> : tensor<f32>
    %0 = stablehlo.convert %arg0 : (tensor<32x64xi8>) -> tensor<32x64xbf16>
    %1 = stablehlo.transpose %0, dims = [1, 0] {result_layout = dense<[0, 1]> : tensor<2xindex>, xla_shape = "bf16[64,32]{0,1}"} : (tensor<32x64xbf16>) -> tensor<64x32xbf16>
    %2 = stablehlo.reduce(%3 init: %cst) applies stablehlo.maximum across dimensions = [1] : (tensor<4x64xf32>, tensor<f32>) -> tensor<4xf32>
    %4 = "stablehlo.gather"(%arg1, %5) <{dimension_numbers = #stablehlo.gather<offset_dims = [0], collapsed_slice_dims = [1], start_index_map = [1], index_vector_dim = 1>, slice_sizes = array<i64: 4, 1>}> : (tensor<4x64xbf16>, tensor<64xi32>) -> tensor<4x64xbf16>
    %6 = stablehlo.convert %arg2 : (tensor<5xi64>) -> tensor<5xi32>
    %7 = stablehlo.compare  GE, %2, %2 : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xi1>
    %8 = stablehlo.dot_general %arg1, %1, contracting_dims = [1] x [0], precision = [DEFAULT, DEFAULT] : (tensor<4x64xbf16>, tensor<64x32xbf16>) -> tensor<4x32xbf16>
    return %8 : tensor<4x32xbf16>
  }
}
"""
"""As torch-xla 2.9 writes them."""


def test_a_program_that_is_taken() -> None:
    assert faults(PROGRAM, e4m3fn=False) == []
    names = [operation.name for operation in operations(PROGRAM)]
    assert names == ["func.func", *(f"stablehlo.{name}" for name in ("constant", "convert", "transpose", "reduce", "gather", "convert", "compare", "dot_general"))]  # fmt: skip
    assert [operation.applies for operation in operations(PROGRAM)].count("maximum") == 1


@pytest.mark.parametrize(
    ("line", "what", "page"),
    [
        ("%0 = stablehlo.round_nearest_even %1 : tensor<4xf32>", "round_nearest_even", "EVRF001"),
        ("%0 = chlo.top_k(%1, k = 3) : tensor<4xf32> -> (tensor<3xf32>, tensor<3xi32>)", "chlo.top_k", "EVRF001"),
        ("%0 = stablehlo.custom_call @Sharding(%1) : (tensor<4xf32>) -> tensor<4xf32>", "custom_call", "EVRF001"),
        ('%0:2 = "stablehlo.sort"(%1, %2) <{dimension = 0 : i64}> ({', "sort", "EVRF001"),
        ("%0 = stablehlo.convert %1 : (tensor<4xf32>) -> tensor<4xf64>", "type f64", "ESPP004"),
        ("%0 = stablehlo.add %1, %2 : tensor<4xi64>", "type i64", "ESPP004"),
        ("%0 = stablehlo.convert %1 : (tensor<4xf32>) -> tensor<4xcomplex<f32>>", "type complex", "ESPP004"),
        ("%0 = stablehlo.convert %1 : (tensor<4xf32>) -> tensor<4xf8E4M3FNUZ>", "type f8E4M3FNUZ", "ESPP004"),
        ("%0 = stablehlo.convert %1 : (tensor<4xf8E4M3FN>) -> tensor<4xf32>", "type f8E4M3FN", "EVRF051"),
        ("%0 = stablehlo.add %1, %2 : tensor<?x4xf32>", "dynamic", "EMOD025"),
        ("%0 = stablehlo.dot_general %1, %2, contracting_dims = [1] x [0] : (tensor<4x4xi32>, tensor<4x4xi32>) -> tensor<4x4xi32>", "integers", "EVRF035"),
        ("%0 = stablehlo.shift_right_arithmetic %1, %2 : tensor<4xui8>", "32 bits", "EVRF022"),
        ('%0 = "stablehlo.gather"(%1, %2) <{dimension_numbers = #stablehlo.gather<offset_dims = [0, 1], start_index_map = [0]>}> : (tensor<4x64xf32>, tensor<1xi32>) -> tensor<2x64xf32>', "gather", "neuron-cc-ops-xla"),
        ("%0 = stablehlo.reduce(%1 init: %2) applies stablehlo.or across dimensions = [0] : (tensor<4xi1>, tensor<i1>) -> tensor<i1>", "reduction by or", "neuron-cc-ops-xla"),
        ("%0 = stablehlo.reduce(%1 init: %2) across dimensions = [0] : (tensor<4xf32>, tensor<f32>) -> tensor<f32>", "of its own", "neuron-cc-ops-xla"),
    ],
)  # fmt: skip
def test_what_is_refused_and_where_that_is_said(line: str, what: str, page: str) -> None:
    found = faults(PROGRAM.replace("    return", f"    {line}\n    return"), e4m3fn=False)
    assert found and all(fault.line == line for fault in found)
    assert any(what in fault.what and page in fault.source for fault in found)


def test_e4m3_is_taken_on_trn3_or_with_the_setting() -> None:
    line = "%0 = stablehlo.convert %1 : (tensor<4xf8E4M3FN>) -> tensor<4xf32>"
    assert faults(line, e4m3fn=True) == [] and len(faults(line, e4m3fn=False)) == 1


def test_other_texts_are_no_programs() -> None:
    with pytest.raises(ValueError, match="no operation"):
        faults("HloModule m\nENTRY %e (p: f32[2]) -> f32[2] { ROOT %p = f32[2] parameter(0) }", e4m3fn=True)


def test_every_entry_has_a_source() -> None:
    for known in (*OPERATIONS.values(), *TYPES.values()):
        assert known.listed and known.source.startswith("https://")
    assert operators.error_page("EVRF051").endswith("/compiler/error-codes/EVRF051.html")
