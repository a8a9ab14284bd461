"""llama.cpp's importance matrices, in both forms, and what is wrong with them."""

import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore.checkpoint.gguf_writer import GgufTensor, write_gguf
from qcore.checkpoint.imatrix import read_imatrix
from qcore.refusal import Refused

Q, UP, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_up.weight", "blk.0.ffn_down_exps.weight"


def entry(name: str | bytes = Q, calls: int = 4, values: tuple[float, ...] = (2.0, 0.0, 6.0), **wrong: int) -> bytes:
    data = name if isinstance(name, bytes) else name.encode()
    head = struct.pack("<i", wrong.get("length", len(data))) + data
    return head + struct.pack(f"<ii{len(values)}f", calls, wrong.get("count", len(values)), *values)


def binary(*entries: bytes, count: int | None = None, tail: bytes = b"") -> bytes:
    return struct.pack("<i", len(entries) if count is None else count) + b"".join(entries) + tail


def tensor(name: str, values: torch.Tensor, dtype: str = "F32") -> GgufTensor:
    return GgufTensor(name, dtype, tuple(values.shape), lambda: [values])


def code_of(path: Path) -> str:
    with pytest.raises(Refused) as refused:
        read_imatrix(path)
    assert refused.value.refusal.kind == "bad-file" and refused.value.refusal.fix
    return refused.value.refusal.code


def test_the_binary_form_is_read(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    run = struct.pack("<ii", 100, 4) + b"wiki"
    path.write_bytes(binary(entry(), entry(UP, 0, (1.0, 3.0)), tail=run))
    found = read_imatrix(path)
    assert list(found) == [Q, UP]
    assert found[Q].dtype == torch.float32 and found[Q].tolist() == [0.5, 0.0, 1.5]
    assert found[UP].tolist() == [1.0, 3.0]


def test_the_gguf_form_is_read(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    write_gguf(
        path,
        {"general.type": "imatrix", "imatrix.datasets": ["wiki"], "imatrix.chunk_count": 100},
        [
            tensor(f"{Q}.in_sum2", torch.tensor([2.0, 0.0, 6.0])),
            tensor(f"{Q}.counts", torch.tensor([4.0])),
            tensor(f"{EXPERTS}.in_sum2", torch.tensor([[2.0, 4.0], [0.0, 0.0], [9.0, 3.0]])),
            tensor(f"{EXPERTS}.counts", torch.tensor([[2.0], [0.0], [3.0]])),
        ],
    )
    found = read_imatrix(path)
    assert list(found) == [Q, EXPERTS]
    assert found[Q].tolist() == [0.5, 0.0, 1.5]
    assert found[EXPERTS].tolist() == [1.0, 2.0, 1.0, 1.0, 3.0, 1.0]  # ones for the expert that no token reached


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "bad-magic"),
        (b"\1\0", "bad-magic"),
        (b"PK\x03\x04" + bytes(100), "bad-magic"),
        (b"hello, this is no matrix\n" * 10, "bad-magic"),
        (binary(entry(), count=0), "bad-magic"),
        (binary(entry(), count=-1), "bad-magic"),
        (binary(entry(), count=1000), "bad-magic"),
        (binary(entry(), count=2), "truncated"),
        (binary(entry())[:-1], "truncated"),
        (binary(entry())[:20], "truncated"),
        (binary(entry(length=0)), "bad-field"),
        (binary(entry(length=-1)), "bad-field"),
        (binary(entry(length=1 << 30)), "bad-field"),
        (binary(entry(length=1000)), "truncated"),
        (binary(entry(count=0)), "bad-field"),
        (binary(entry(count=-1)), "bad-field"),
        (binary(entry(count=4)), "truncated"),
        (binary(entry(count=(1 << 31) - 1)), "truncated"),
        (binary(entry(calls=-1)), "bad-field"),
        (binary(entry(b"\xff\xfe")), "bad-text"),
        (binary(entry("a\nb")), "bad-text"),
        (binary(entry(), entry()), "duplicate"),
        (binary(entry(values=(1.0, float("nan")))), "bad-content"),
        (binary(entry(values=(1.0, float("inf")))), "bad-content"),
        (binary(entry(values=(1.0, -1.0))), "bad-content"),
    ],
)
def test_a_wrong_binary_file_is_refused(tmp_path: Path, data: bytes, code: str) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(data)
    assert code_of(path) == code


SUMS, COUNTS = tensor(f"{Q}.in_sum2", torch.ones(3, 4)), tensor(f"{Q}.counts", torch.ones(3, 1))


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ([], "missing-tensor"),
        ([COUNTS], "missing-tensor"),
        ([SUMS], "missing-tensor"),
        ([SUMS, tensor(f"{Q}.counts", torch.ones(2, 1))], "bad-shape"),
        ([SUMS, tensor(f"{Q}.counts", torch.ones(3, 1).half(), "F16")], "bad-dtype"),
        ([SUMS, tensor(f"{Q}.counts", -torch.ones(3, 1))], "bad-content"),
        ([tensor(f"{Q}.in_sum2", torch.full((3, 4), torch.nan)), COUNTS], "bad-content"),
    ],
)
def test_a_wrong_gguf_file_is_refused(tmp_path: Path, tensors: list[GgufTensor], code: str) -> None:
    path = tmp_path / "imatrix.gguf"
    write_gguf(path, {}, tensors)
    assert code_of(path) == code


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert code_of(tmp_path / "none.dat") == "path-not-found"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_files_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    changed = bytearray(binary(entry(), entry(UP, 2, (1.0, 3.0)), tail=bytes(8)))
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.dat"
    path.write_bytes(changed[: data.draw(st.integers(0, len(changed)))])
    try:
        read_imatrix(path)
    except Refused as refused:
        assert refused.refusal.kind == "bad-file"
