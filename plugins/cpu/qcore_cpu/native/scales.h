// Scales and offsets of a panel as float32 [groups][16], from whatever they are stored in.
#pragma once
#include "codes.h"
#include "kernels.h"

namespace qcore {
namespace QCORE_ISA {

QCORE_INLINE const uint8_t* section_at(const Header& h, int64_t offset) { return reinterpret_cast<const uint8_t*>(&h) + offset; }

// 2^(byte - 127).
QCORE_INLINE F16 exponents(const uint8_t* bytes) {
  const I16 exponent = widen_u8(bytes);
  return where_zero(exponent, as_float(all_i(1 << 22)), as_float(sll(exponent, 23)));  // 2^-127 is no normal float32
}

// The numbers of a group. left: whether they may be as they are stored; else they are spread, which takes less code.
template <bool left = false>
QCORE_INLINE F16 floats_of(const GroupFloats& all, int64_t g) {
  if constexpr (!left) return load_f(all.floats + 16 * g);
  const uint8_t* const stored = all.stored + 16 * g;
  // The most frequent ones first: a jump through a table would take longer.
  if (all.kind == GroupFloats::kHalves) return widen_f16(reinterpret_cast<const uint16_t*>(all.stored) + 16 * g);
  if (all.kind == GroupFloats::kSpread) return load_f(all.floats + 16 * g);
  switch (all.kind) {
    case GroupFloats::kSigned: return mul(to_float(widen_s8(reinterpret_cast<const int8_t*>(stored))), load_f(all.floats + 16 * (g >> all.shift)));
    case GroupFloats::kUnsigned: return mul(to_float(widen_u8(stored)), load_f(all.floats + 16 * (g >> all.shift)));
    case GroupFloats::kExponents: return exponents(stored);
    default: return mul(small_float<Code::kE4M3>(widen_u8(stored)), load_f(all.floats));
  }
}

template <class Read>
QCORE_INLINE void each_group(const Header& h, float* out, Read&& read) {
  for (int64_t g = 0; g < h.groups; g++) store_f(out + 16 * g, read(g));
}

// The same where a coarser scale stands above every `fine` groups: open(which one) gives what reads a group.
template <class Open>
QCORE_INLINE void each_group_below(const Header& h, int64_t fine, float* out, Open&& open) {
  for (int64_t g = 0, coarse = 0; g < h.groups; coarse++) {
    const auto read = open(coarse);
    for (const int64_t end = g + fine < h.groups ? g + fine : h.groups; g < end; g++) store_f(out + 16 * g, read(g));
  }
}

inline void spread_floats(const Header& h, Scale type, const uint8_t* stored, float* out) {
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(stored);
  if (type == Scale::kF32) return each_group(h, out, [&](int64_t g) QCORE_INSIDE { return load_f(reinterpret_cast<const float*>(stored) + 16 * g); });
  if (type == Scale::kF16) return each_group(h, out, [&](int64_t g) QCORE_INSIDE { return widen_f16(halves + 16 * g); });
  each_group(h, out, [&](int64_t g) QCORE_INSIDE { return widen_bf16(halves + 16 * g); });
}

// Of a group's in memory.
inline int64_t bytes_of(Scale type) { return type == Scale::kF32 ? 4 : type == Scale::kF16 || type == Scale::kBF16 ? 2 : 1; }
inline int64_t bytes_of(Offset offset, Scale type) {
  return offset == Offset::kNone || offset == Offset::kNibbles ? 0 : offset == Offset::kFloat ? bytes_of(type) : 1;
}

// What stands above codes of a byte: float16 [256 columns][16], times a factor.
inline void spread_above(const Header& h, int64_t section, int64_t panel, float factor, float* out) {
  const int64_t supers = (h.padded + 255) / 256;
  const uint16_t* const super = reinterpret_cast<const uint16_t*>(section_at(h, section)) + panel * supers * kPanel;
  for (int64_t i = 0; i < supers; i++) store_f(out + 16 * i, mul(widen_f16(super + 16 * i), all_f(factor)));
}

inline void spread_scales(const Header& h, int64_t panel, float* out) {
  const int64_t first = panel * h.groups * kPanel;
  const uint8_t* stored = section_at(h, h.scales) + first * bytes_of(h.scale);
  switch (h.scale) {
    case Scale::kF32:
    case Scale::kF16:
    case Scale::kBF16:
      return spread_floats(h, h.scale, stored, out);
    case Scale::kE8M0:
      return each_group(h, out, [&](int64_t g) QCORE_INSIDE { return exponents(stored + 16 * g); });
    case Scale::kE4M3:
      return each_group(h, out, [&](int64_t g) QCORE_INSIDE {
        return mul(small_float<Code::kE4M3>(widen_u8(stored + 16 * g)), all_f(static_cast<float>(h.tensor_scale)));
      });
    case Scale::kRuns:
    case Scale::kNibbles: {
      const bool nibbles = h.scale == Scale::kNibbles;
      const int64_t runs = 256 / h.group, supers = (h.groups + runs - 1) / runs;
      const uint16_t* super = reinterpret_cast<const uint16_t*>(section_at(h, h.super_scales)) + panel * supers * kPanel;
      return each_group_below(h, runs, out, [&](int64_t run) QCORE_INSIDE {
        const F16 d = mul(widen_f16(super + 16 * run), all_f(static_cast<float>(h.tensor_scale)));
        return [=](int64_t g) QCORE_INSIDE {
          const uint8_t* codes = stored + 16 * g;
          return mul(to_float(nibbles ? widen_u8(codes) & all_i(15) : widen_s8(reinterpret_cast<const int8_t*>(codes))), d);
        };
      });
    }
    case Scale::kTable8: {
      const float* table = reinterpret_cast<const float*>(section_at(h, h.table)) + 16;
      const int64_t supers = (h.groups + h.coarse_group - 1) / h.coarse_group;
      const float* const super = reinterpret_cast<const float*>(section_at(h, h.super_scales)) + panel * supers * kPanel;
      return each_group_below(h, h.coarse_group, out, [&](int64_t coarse) QCORE_INSIDE {
        const F16 above = load_f(super + 16 * coarse), shift = all_f(static_cast<float>(h.shift));
        return [=](int64_t g) QCORE_INSIDE { return add(mul(as_float(gather(table, widen_u8(stored + 16 * g))), above), shift); };
      });
    }
  }
}

inline bool before_scaling(Offset offset) { return offset == Offset::kZeroU8 || offset == Offset::kZeroS8; }

inline void spread_offsets(const Header& h, int64_t panel, float* out) {
  const int64_t first = panel * h.groups * kPanel;
  const uint8_t* stored = section_at(h, h.offsets);
  switch (h.offset) {
    case Offset::kNone:
      return;
    case Offset::kZeroU8:
      return each_group(h, out, [&](int64_t g) QCORE_INSIDE {
        return to_float(sub(zero_i(), widen_u8(stored + first + 16 * g)));
      });
    case Offset::kZeroS8:
      return each_group(h, out, [&](int64_t g) QCORE_INSIDE {
        const int8_t* codes = reinterpret_cast<const int8_t*>(stored) + first + 16 * g;
        return to_float(sub(zero_i(), widen_s8(codes)));
      });
    case Offset::kFloat:
      return spread_floats(h, h.scale, stored + first * bytes_of(h.scale), out);
    case Offset::kRuns:
    case Offset::kNibbles: {
      const bool nibbles = h.offset == Offset::kNibbles;
      const uint8_t* from = nibbles ? section_at(h, h.scales) : stored;
      const int64_t runs = 256 / h.group, supers = (h.groups + runs - 1) / runs;
      const uint16_t* super = reinterpret_cast<const uint16_t*>(section_at(h, h.super_offsets)) + panel * supers * kPanel;
      return each_group_below(h, runs, out, [&](int64_t run) QCORE_INSIDE {
        const F16 d = widen_f16(super + 16 * run);
        return [=](int64_t g) QCORE_INSIDE {
          const I16 code = widen_u8(from + first + 16 * g);
          return mul(to_float(sub(zero_i(), nibbles ? srl(code, 4) : code)), d);
        };
      });
    }
  }
}

// A panel's scales, and what comes to its groups, from memory: where they are used once, spreading them takes longer than reading codes and halves as
// they are stored. floats: room for as many as would be spread.
inline GroupFloats left_scales(const Header& h, int64_t panel, float* floats) {
  const int64_t cells = panel * h.groups * kPanel;
  const uint8_t* const stored = section_at(h, h.scales) + cells * bytes_of(h.scale);
  if (h.scale == Scale::kF16) return {floats, GroupFloats::kHalves, stored, 0};
  if (h.scale == Scale::kE8M0) return {floats, GroupFloats::kExponents, stored, 0};
  if (h.scale == Scale::kE4M3) {
    store_f(floats, all_f(static_cast<float>(h.tensor_scale)));
    return {floats, GroupFloats::kFloats8, stored, 0};
  }
  spread_above(h, h.super_scales, panel, static_cast<float>(h.tensor_scale), floats);
  return {floats, GroupFloats::kSigned, stored, __builtin_ctzll(256 / h.group)};
}

inline GroupFloats left_offsets(const Header& h, int64_t panel, float* floats) {
  const int64_t cells = panel * h.groups * kPanel;
  const uint8_t* const stored = section_at(h, h.offsets) + cells * bytes_of(h.offset, h.scale);
  if (h.offset == Offset::kFloat) return {floats, GroupFloats::kHalves, stored, 0};
  spread_above(h, h.super_offsets, panel, -1, floats);
  return {floats, GroupFloats::kUnsigned, stored, __builtin_ctzll(256 / h.group)};
}

// Whether they can be had so.
inline bool can_be_left(const Header& h) {
  const bool alone = h.scale == Scale::kE8M0 || h.scale == Scale::kE4M3;
  const bool scales = alone || h.scale == Scale::kF16 || (h.scale == Scale::kRuns && 256 % h.group == 0);
  return scales && (h.offset == Offset::kNone || (h.offset == Offset::kFloat && h.scale == Scale::kF16) || (h.offset == Offset::kRuns && h.scale == Scale::kRuns));
}

}  // namespace QCORE_ISA
}  // namespace qcore
