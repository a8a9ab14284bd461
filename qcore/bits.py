"""Packing codes of 1 to 8 bits, or of 12, into bytes: a little-endian bit stream along the last dimension.

Code i of a row occupies bits i*b .. i*b + b - 1 of the row, counted from the lowest bit of its first byte. For 4 bits
that is nibble pairs, low first. Each row is padded with zeros to a whole byte.
"""

from __future__ import annotations

import torch


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., n] integers in 0 .. 2^bits - 1 -> uint8 [..., packed_bytes(n, bits)]."""
    if bits == 12:
        return _pack_pairs(codes)
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes
    count = codes.shape[-1]
    if bits in (1, 2, 4):
        per_byte = 8 // bits
        runs = torch.nn.functional.pad(codes, (0, -count % per_byte)).unflatten(-1, (-1, per_byte))
        packed: torch.Tensor = runs[..., 0].clone()
        for i in range(1, per_byte):
            packed |= runs[..., i] << (bits * i)
        return packed
    runs = torch.nn.functional.pad(codes, (0, -count % 8)).unflatten(-1, (-1, 8)).to(torch.int16)
    packed = torch.zeros(*runs.shape[:-1], bits + 1, dtype=torch.int16, device=codes.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= runs[..., i] << shift & 0xFF
        packed[..., byte + 1] |= runs[..., i] << shift >> 8
    return packed[..., :bits].to(torch.uint8).flatten(-2)[..., : packed_bytes(count, bits)].contiguous()


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """uint8 [..., packed_bytes(count, bits)] -> uint8 [..., count]; int16 for 12 bits."""
    if bits == 12:
        return _unpack_pairs(packed, count)
    if bits == 8:
        return packed[..., :count]
    mask = (1 << bits) - 1
    if bits in (1, 2, 4):
        parts = [packed >> shift & mask for shift in range(0, 8, bits)]
        return torch.stack(parts, -1).flatten(-2)[..., :count]
    stream = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits)).to(torch.int16)
    stream = torch.nn.functional.pad(stream, (0, 1))
    codes = []
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        codes.append((stream[..., byte] | stream[..., byte + 1] << 8) >> shift & mask)
    return torch.stack(codes, -1).flatten(-2)[..., :count].to(torch.uint8)


def _pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """12 bits: two codes in three bytes."""
    count = codes.shape[-1]
    first, second = torch.nn.functional.pad(codes.to(torch.int32), (0, count % 2)).unflatten(-1, (-1, 2)).unbind(-1)
    packed = torch.stack([first & 0xFF, first >> 8 | (second & 0xF) << 4, second >> 4], -1).to(torch.uint8)
    return packed.flatten(-2)[..., : packed_bytes(count, 12)].contiguous()


def _unpack_pairs(packed: torch.Tensor, count: int) -> torch.Tensor:
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 3)).to(torch.int16)
    low, middle, high = padded.unflatten(-1, (-1, 3)).unbind(-1)
    return torch.stack([low | (middle & 0xF) << 8, middle >> 4 | high << 4], -1).flatten(-2)[..., :count]
