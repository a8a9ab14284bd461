"""What texts of compiled programs say that they move, by hand; lane/lane_traffic.py has libtpu's own."""

from __future__ import annotations

import pytest

from qcore_tpu.traffic import laid_out_anew, traffic

ATTENTION = """HloModule step
%inner (p.1: bf16[1,3,8192,64]) -> bf16[3,64,8192] {
  %p.1 = bf16[1,3,8192,64]{2,3,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %bitcast.1 = bf16[3,64,8192]{2,1,0:T(8,128)(2,1)} bitcast(%p.1)
}
%scores (p.2: bf16[3,3,64], p.3: bf16[1,3,8192,64]) -> bf16[3,3,8192] {
  %p.2 = bf16[3,3,64]{2,1,0:T(4,128)(2,1)S(1)} parameter(0)
  %p.3 = bf16[1,3,8192,64]{2,3,1,0:T(8,128)(2,1)} parameter(1)
  %fusion.1 = bf16[3,64,8192]{2,1,0:T(8,128)(2,1)} fusion(%p.3), kind=kLoop, calls=%inner
  ROOT %convolution.1 = bf16[3,3,8192]{2,1,0:T(4,128)(2,1)S(1)} convolution(%p.2, %fusion.1), dim_labels=0bf_0io->0bf
}
ENTRY %main (q: bf16[3,3,64], k: bf16[1,3,8192,64]) -> bf16[3,3,8192] {
  %q = bf16[3,3,64]{2,1,0:T(4,128)(2,1)S(1)} parameter(0)
  %k = bf16[1,3,8192,64]{2,3,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %fusion.2 = bf16[3,3,8192]{2,1,0:T(4,128)(2,1)S(1)} fusion(%q, %k), kind=kOutput, calls=%scores
}
"""
KEYS = 3 * 8192 * 64 * 2


def program(*lines: str) -> str:
    return "\n".join(["HloModule one", "ENTRY %main () -> f32[] {", *(f"  {line}" for line in lines), "}"])


def test_what_goes_on_as_an_inner_operations_result_is_read() -> None:
    assert traffic(ATTENTION) == KEYS
    assert traffic(ATTENTION.replace("(8,128)(2,1)}", "(8,128)(2,1)S(1)}")) == 0


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("%x = f32[256,128]{1,0:T(8,128)S(1)} add(%a, %a)", 2 * 256 * 128 * 4),
        ("%x = f32[256,128]{1,0:T(8,128)} negate(%a)", 2 * 256 * 128 * 4),
        ("%x = (f32[256,128]{1,0:T(8,128)S(1)}, f32[256,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)", 256 * 128 * 4),
        ("%x = ((f32[256,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a)", 8 * 128 * 4),
        ("%x = f32[1,128]{1,0:T(1,128)S(1)} slice(%a), slice={[3:4], [0:128]}", 128 * 4),
        ("%x = f32[128,256]{0,1:T(8,128)} bitcast(%a)", 0),
    ],
    ids=["read twice", "read and written", "prefetched", "fetched in part", "slice", "bitcast"],
)  # fmt: skip
def test_operations(line: str, moved: int) -> None:
    assert traffic(program("%a = f32[256,128]{1,0:T(8,128)} parameter(0)", line)) == moved


def test_what_fills_up_tiles_is_moved() -> None:
    given = "%a = s8[576,192]{1,0:T(32,128)(4,1)} parameter(0)"
    assert traffic(program(given, "%x = s8[576,192]{1,0:T(32,128)(4,1)S(1)} negate(%a)")) == 576 * 256


def test_other_orders_are_told_from_other_places() -> None:
    given = "%a = s8[1536,640]{0,1:T(32,128)(4,1)} parameter(0)"
    turned, moved = (f"%x = s8[1536,640]{{{order}:T(32,128)(4,1)S(1)}} copy(%a)" for order in ("1,0", "0,1"))
    assert laid_out_anew(program(given, turned)) == 1536 * 640 and laid_out_anew(program(given, moved)) == 0


def test_what_is_not_understood_is_no_number() -> None:
    with pytest.raises(ValueError, match="no program"):
        traffic("HloModule empty")
    with pytest.raises(ValueError, match="whose bytes are not known"):
        traffic(program("%a = f32[8,128]{1,0} parameter(0)", "%x = f32[8,128]{1,0} while(%a), body=%b"))
