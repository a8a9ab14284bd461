// Attention of one token: keys and values as they are kept, and a query's sum over them. In float32.
//
// Positions are looked at in spans of 128, and the query heads that share keys together; a span's sums are joined with the others'
// afterwards, in their order, so that the answer is the same however many threads there are (FlashDecoding's split, Dao et al. 2023).
#pragma once
#include <cmath>

#include "around.h"
#include "decoder.h"

namespace qcore {
namespace QCORE_ISA {

// The nearest code of a float of 8 bits, ties to even; values beyond the greatest number become it.
template <Code code>
uint8_t float8_of(float value, float greatest) {
  constexpr FloatShape shape = shape_of(code);
  const float magnitude = std::fmin(std::fabs(value), greatest);
  int32_t found;
  if (magnitude < shape.smallest() * (1 << shape.mantissa)) {
    found = static_cast<int32_t>(std::nearbyint(magnitude / shape.smallest()));
  } else {
    std::memcpy(&found, &magnitude, 4);
    found += (1 << (22 - shape.mantissa)) - 1 + (found >> (23 - shape.mantissa) & 1);
    found = (found >> (23 - shape.mantissa)) - ((127 - shape.bias) << shape.mantissa);
  }
  return static_cast<uint8_t>(found | (std::signbit(value) ? 128 : 0));
}

// A head's key or value as a row of codes, as qcore.kernels.kv_cache has it. count is a multiple of 16.
inline void keep_row(const float* from, const KvSide& side, Kept kept, int64_t head, int64_t count, void* to) {
  uint8_t* const row = static_cast<uint8_t*>(to);
  const float greatest_code = kept == Kept::kInt8 ? 127.0f : kept == Kept::kE4M3 ? 448.0f : 57344.0f;
  float scale;
  if (side.scale) {
    scale = side.scale[head];
  } else {
    scale = std::fmax(greatest(from, 0, count) / greatest_code, 1.17549435e-38f);
    std::memcpy(row + count, &scale, 4);
  }
  const F16 divisor = all_f(scale), factor = all_f(side.inverse ? side.inverse[head] : 0), zero = all_f(side.zero ? side.zero[head] : 0);
  for (int64_t i = 0; i < count; i += 16) {
    const F16 x = load_f(from + i), scaled = side.inverse ? mul(x, factor) : div(x, divisor);
    if (kept == Kept::kInt8) {
      narrow_s8(reinterpret_cast<int8_t*>(row + i), clamp_f(add(round_f(scaled), zero), -128, 127));
      continue;
    }
    alignas(64) float values[16];
    store_f(values, scaled);
    for (int64_t k = 0; k < 16; k++)
      row[i + k] = kept == Kept::kE4M3 ? float8_of<Code::kE4M3>(values[k], greatest_code) : float8_of<Code::kE5M2>(values[k], greatest_code);
  }
}

// Keys or values of a kv head: rows one after the other. What a row holds is its codes, less `zero`, times its scale.
template <Kept kept, Float type>
struct KeptRows {
  const uint8_t* rows;
  int64_t row_bytes, count;
  const float* scale;  // null: behind each row's codes
  float zero;

  KeptRows(const Attention& a, const void* all, const KvSide& side, int64_t head)
      : rows(static_cast<const uint8_t*>(all) + head * a.capacity * a.row_bytes), row_bytes(a.row_bytes), count(a.head_dim),
        scale(side.scale ? side.scale + head : nullptr), zero(side.zero ? side.zero[head] : 0) {}

  QCORE_INLINE F16 codes(int64_t t, int64_t i) const {
    const uint8_t* const row = rows + t * row_bytes;
    if constexpr (kept == Kept::kInt8) return sub_f(to_float(widen_s8(reinterpret_cast<const int8_t*>(row) + i)), all_f(zero));
    else if constexpr (kept == Kept::kE4M3) return small_float<Code::kE4M3>(widen_u8(row + i));
    else if constexpr (kept == Kept::kE5M2) return small_float<Code::kE5M2>(widen_u8(row + i));
    else return get(row, type, i);
  }

  QCORE_INLINE void fetch(int64_t t) const {
    for (int64_t at = 0; at < row_bytes; at += 64) _mm_prefetch(reinterpret_cast<const char*>(rows + t * row_bytes + at), _MM_HINT_T0);
  }

  // factors[k] *= the scale of row begin + k
  void scale_all(int64_t begin, int64_t full, float* factors) const {
    if constexpr (kept != Kept::kPlain)
      for (int64_t k = 0; k < full; k++) {
        float found;
        if (scale) found = *scale;
        else std::memcpy(&found, rows + (begin + k) * row_bytes + count, 4);
        factors[k] *= found;
      }
  }
};

// Scores of a span into chances of it: e^(score - most). Returns their sum.
inline float chances_of(const Attention& a, float* scores, int64_t full, float& most) {
  if (a.softcap != 0)
    for (int64_t t = 0; t < full; t++) scores[t] = std::tanh(scores[t] / a.softcap) * a.softcap;
  for (int64_t t = full; t % 16; t++) scores[t] = -INFINITY;
  F16 highest = all_f(-INFINITY), totals = zero_f();
  for (int64_t t = 0; t < full; t += 16) highest = max_f(highest, load_f(scores + t));
  most = max_of(highest);
  for (int64_t t = 0; t < full; t += 16) {
    F16 chances = exp_f(sub_f(load_f(scores + t), all_f(most)));
    if (full - t < 16) {
      store_f(scores + t, chances);
      for (int64_t k = full; k % 16; k++) scores[k] = 0;
      chances = load_f(scores + t);
    }
    store_f(scores + t, chances);
    totals = add(totals, chances);
  }
  return sum_of(totals);
}

constexpr int64_t kKeysAhead = 32;  // rows: memory answers meanwhile

// `heads` of the heads that share a kv head, from `head` on, over positions begin .. begin + full - 1.
template <int heads, class Rows>
void attend_span(const Attention& a, const Rows& keys, const Rows& values, int64_t head, int64_t begin, int64_t full, float* part, int64_t part_stride) {
  constexpr int turns = heads == 1 ? 4 : heads == 2 ? 2 : 1;  // positions at once: as many sums as hide the latency of one
  alignas(64) float scores[heads][kAttentionSpan + 16];
  const float* const query = a.queries + head * a.head_dim;
  for (int64_t t = 0; t < full; t += turns) {
    for (int turn = 0; turn < turns; turn++) {
      keys.fetch(begin + t + turn + kKeysAhead);
      values.fetch(begin + t + turn);
    }
    F16 sums[4] = {zero_f(), zero_f(), zero_f(), zero_f()};
    for (int64_t i = 0; i < a.head_dim; i += 16)
      for (int turn = 0; turn < turns; turn++) {
        const F16 key = keys.codes(begin + (t + turn < full ? t + turn : t), i);
        for (int h = 0; h < heads; h++) sums[turn * heads + h] = fma(load_f(query + h * a.head_dim + i), key, sums[turn * heads + h]);
      }
    alignas(16) float found[4];
    sums_of(sums, found);
    for (int turn = 0; turn < turns; turn++)
      for (int h = 0; h < heads; h++) scores[h][t + turn] = found[turn * heads + h] * a.scale;
  }
  for (int h = 0; h < heads; h++) {
    float* const end = part + h * part_stride + a.head_dim;
    keys.scale_all(begin, full, scores[h]);
    end[1] = chances_of(a, scores[h], full, end[0]);
    values.scale_all(begin, full, scores[h]);
  }
  for (int64_t i = 0; i < a.head_dim; i += 16) {
    F16 sums[4] = {zero_f(), zero_f(), zero_f(), zero_f()};
    int64_t t = 0;
    for (; t + turns <= full; t += turns)
      for (int turn = 0; turn < turns; turn++) {
        const F16 value = values.codes(begin + t + turn, i);
        for (int h = 0; h < heads; h++) sums[turn * heads + h] = fma(all_f(scores[h][t + turn]), value, sums[turn * heads + h]);
      }
    for (; t < full; t++)
      for (int h = 0; h < heads; h++) sums[h] = fma(all_f(scores[h][t]), values.codes(begin + t, i), sums[h]);
    for (int h = 0; h < heads; h++) {
      F16 sum = sums[h];
      for (int turn = 1; turn < turns; turn++) sum = add(sum, sums[turn * heads + h]);
      store_f(part + h * part_stride + i, sum);
    }
  }
}

template <Kept kept, Float type>
void attend_kept(const Attention& a, int64_t kv_head, int64_t span) {
  using Rows = KeptRows<kept, type>;
  const Rows keys(a, a.keys, a.key_side, kv_head), values(a, a.values, a.value_side, kv_head);
  const int64_t share = a.share(), begin = a.first(0) + span * kAttentionSpan, full = a.last(0) - begin < kAttentionSpan ? a.last(0) - begin : kAttentionSpan;
  const int64_t stride = a.spans() * a.part();
  for (int64_t h = 0; h < share;) {
    const int64_t head = kv_head * share + h, count = share - h < 4 ? share - h : 4;
    float* const part = a.parts + head * stride + span * a.part();
    if (count == 1) attend_span<1>(a, keys, values, head, begin, full, part, stride);
    else if (count == 2) attend_span<2>(a, keys, values, head, begin, full, part, stride);
    else if (count == 3) attend_span<3>(a, keys, values, head, begin, full, part, stride);
    else attend_span<4>(a, keys, values, head, begin, full, part, stride);
    h += count;
  }
}

// Parts first .. last - 1: all spans of the first kv head, then of the next. head_dim is a multiple of 16.
inline void attend(const Attention& a, int64_t first, int64_t last) {
  for (int64_t item = first; item < last; item++) {
    const int64_t kv_head = item / a.spans(), span = item % a.spans();
    switch (a.kept) {
      case Kept::kInt8: attend_kept<Kept::kInt8, Float::kF32>(a, kv_head, span); break;
      case Kept::kE4M3: attend_kept<Kept::kE4M3, Float::kF32>(a, kv_head, span); break;
      case Kept::kE5M2: attend_kept<Kept::kE5M2, Float::kF32>(a, kv_head, span); break;
      default:
        if (a.type == Float::kF32) attend_kept<Kept::kPlain, Float::kF32>(a, kv_head, span);
        else if (a.type == Float::kF16) attend_kept<Kept::kPlain, Float::kF16>(a, kv_head, span);
        else attend_kept<Kept::kPlain, Float::kBF16>(a, kv_head, span);
    }
  }
}

// What heads first .. last - 1 have found, of all their spans.
inline void join(const Attention& a, int64_t first, int64_t last) {
  for (int64_t head = first; head < last; head++) {
    float* const parts = a.parts + head * a.spans() * a.part();
    float most = -INFINITY, total = 0;
    for (int64_t s = 0; s < a.spans(); s++) most = std::fmax(most, parts[s * a.part() + a.head_dim]);
    for (int64_t s = 0; s < a.spans(); s++) {
      float* const end = parts + s * a.part() + a.head_dim;
      end[0] = std::exp(end[0] - most);
      total += end[0] * end[1];
    }
    for (int64_t i = 0; i < a.head_dim; i += 16) {
      F16 sum = zero_f();
      for (int64_t s = 0; s < a.spans(); s++) sum = fma(all_f(parts[s * a.part() + a.head_dim]), load_f(parts + s * a.part() + i), sum);
      put(mul(sum, all_f(1 / total)), a.type, a.out, head * a.head_dim + i);
    }
  }
}

}  // namespace QCORE_ISA
}  // namespace qcore
