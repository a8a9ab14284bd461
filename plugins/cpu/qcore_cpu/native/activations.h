// Rows of activations made ready: widened, put into the order of the packed columns, and rounded where the product wants it.
#pragma once
#include <cmath>
#include <vector>

#include "integer.h"
#include "kernels.h"
#include "scales.h"

namespace qcore {
namespace QCORE_ISA {

inline F16 get(const void* from, Float type, int64_t place) {
  if (type == Float::kF32) return load_f(static_cast<const float*>(from) + place);
  if (type == Float::kF16) return widen_f16(static_cast<const uint16_t*>(from) + place);
  return widen_bf16(static_cast<const uint16_t*>(from) + place);
}

inline float get_one(const void* from, Float type, int64_t place) {
  if (type == Float::kF32) return static_cast<const float*>(from)[place];
  const uint16_t half = static_cast<const uint16_t*>(from)[place];
  if (type == Float::kF16) return _cvtsh_ss(half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void widen_values(const void* from, Float type, int64_t count, float* to) {
  int64_t place = 0;
  for (; place + 16 <= count; place += 16) store_f(to + place, get(from, type, place));
  for (; place < count; place++) to[place] = get_one(from, type, place);
}

// A row as float32 [padded], in the order of the packed columns, with zeros behind the last.
inline void widen(const void* row, Float type, const Header& h, float* values) {
  if (h.order) {
    const int32_t* order = reinterpret_cast<const int32_t*>(section_at(h, h.order));
    for (int64_t k = 0; k < h.columns; k++) values[k] = get_one(row, type, order[k]);
  } else {
    widen_values(row, type, h.columns, values);
  }
  for (int64_t k = h.columns; k < h.padded; k++) values[k] = 0;
}

inline float sum_of(__m256 eight) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
// Each lane of the lower half and its partner in the upper one, added.
inline __m256 folded(F16 lanes) {
#ifdef __AVX512F__
  return _mm256_add_ps(_mm512_castps512_ps256(lanes.v), _mm512_extractf32x8_ps(lanes.v, 1));
#else
  return _mm256_add_ps(lanes.a, lanes.b);
#endif
}
inline float sum_of(F16 lanes) { return sum_of(folded(lanes)); }
// The sums of four at once.
inline void sums_of(const F16 (&lanes)[4], float* sums) {
  const __m256 low = _mm256_hadd_ps(folded(lanes[0]), folded(lanes[1])), high = _mm256_hadd_ps(folded(lanes[2]), folded(lanes[3]));
  const __m256 all = _mm256_hadd_ps(low, high);
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

inline float max_of(F16 x) {
  alignas(64) float lanes[16];
  store_f(lanes, x);
  float found = lanes[0];
  for (float lane : lanes) found = found < lane ? lane : found;
  return found;
}

// Calls f(section, begin, end).
template <class F>
QCORE_INLINE void each_section(const Batch& batch, int64_t padded, F&& f) {
  for (int64_t s = 0, begin = 0; s < batch.sections; s++, begin += batch.section)
    f(s, begin, begin + batch.section < padded ? begin + batch.section : padded);
}

inline float greatest(const float* values, int64_t begin, int64_t end) {
  F16 most = zero_f();
  for (int64_t k = begin; k < end; k += 16) most = max_f(most, abs_f(load_f(values + k)));
  return max_of(most);
}

// Calls f(begin, end, scale) for the runs of a row that have a scale each: their greatest magnitude / steps, or one that is given; and leaves it to the
// sections in them, `run` apart, unless `scales` is null.
template <class F>
inline void each_scaled(const float* values, const Header& h, const Batch& batch, int64_t span, float steps, bool given, float* scales, F&& f) {
  for (int64_t begin = 0, s = 0; begin < h.padded; begin += span) {
    const int64_t end = begin + span < h.padded ? begin + span : h.padded;
    float scale = static_cast<float>(h.input_scale);
    if (!given) {
      scale = greatest(values, begin, end) / steps;
      if (scale == 0) scale = 1.1920929e-07f;  // as compressed-tensors has it; any number will do
    }
    f(begin, end, scale);
    for (; scales && s < batch.sections && s * batch.section < end; s++) scales[s * batch.run] = scale;
  }
}

// int8 codes and their scales, of sections or of the whole row.
inline void round_row(const float* values, const Header& h, const Batch& batch, int8_t* codes, float* scales) {
  const bool blocks = h.input == Input::kBlocks;
  const float steps = blocks ? 127.0f : 127.5f;  // of compressed-tensors, where the scheme rounds inputs
  each_scaled(values, h, batch, blocks ? batch.section : h.padded, steps, h.input == Input::kStatic, scales, [&](int64_t begin, int64_t end, float scale) {
    const F16 divisor = all_f(scale);
    for (int64_t k = begin; k < end; k += 16) narrow_s8(codes + k, round_f(clamp_f(div(load_f(values + k), divisor), -128, 127)));
  });
}

// The nearest of e4m3, ties to even; the greatest for all beyond.
inline F16 nearest_e4m3(F16 x) {
  const F16 value = clamp_f(x, -448, 448);
  const I16 bits = as_int(value);
  const F16 normal = as_float(add(bits, add(all_i(0x7ffff), srl(bits, 20) & all_i(1))) & all_i(~0xfffff));  // three bits of its mantissa
  const F16 step = all_f(24576);  // whose last bit is the least number, 2^-9
  return where_within(value, all_f(-0x1p-6f), all_f(0x1p-6f), sub_f(add(value, step), step), normal);
}

// A row rounded to e4m3, in place: what the numbers stand for, or, where there is room for `scales`, the numbers and a scale for each section.
inline void round_float8(const Header& h, const Batch& batch, float* values, float* scales) {
  const int64_t span = h.input == Input::kFloatBlocks ? kFloat8Block : h.padded;
  each_scaled(values, h, batch, span, 448, h.input == Input::kFloatStatic, scales, [&](int64_t begin, int64_t end, float scale) {
    const F16 divisor = all_f(scale), factor = all_f(scales ? 1 : scale);
    for (int64_t k = begin; k < end; k += 16) store_f(values + k, mul(nearest_e4m3(div(load_f(values + k), divisor)), factor));
  });
}

// Columns 0 2 1 3 of each quad.
inline void put_pairs(const int8_t* from, int64_t count, int16_t* to) {
  for (int64_t k = 0; k < count; k += 4) to[k] = from[k], to[k + 1] = from[k + 2], to[k + 2] = from[k + 1], to[k + 3] = from[k + 3];
}
// The same of bfloat16: the high halves of floats whose low halves are zeros.
inline void put_halves(const float* from, int64_t count, uint16_t* to) {
  const uint16_t* high = reinterpret_cast<const uint16_t*>(from) + 1;
  for (int64_t k = 0; k < count; k += 4)
    to[k] = high[2 * k], to[k + 1] = high[2 * k + 4], to[k + 2] = high[2 * k + 2], to[k + 3] = high[2 * k + 6];
}

// A row's words of 32 bits into its places among the rows of a run.
inline void put_run(const void* row, int64_t words, int64_t m, int64_t run, void* to) {
  const int32_t* from = static_cast<const int32_t*>(row);
  int32_t* const first = static_cast<int32_t*>(to) + m / run * run * words + m % run;
  for (int64_t word = 0; word < words; word++) first[word * run] = from[word];
}

// A row's bytes into its places in the tiles.
inline void put_tiles(const void* row, int64_t bytes, int64_t m, int64_t steps, int64_t width, uint8_t* tiles) {
  uint8_t* const to = tiles + m / 16 * steps * 16 * width + m % 16 * width;
  for (int64_t step = 0, done = 0; step < steps; step++, done += width) {
    const int64_t count = bytes - done < width ? bytes - done : width;
    std::memcpy(to + step * 16 * width, static_cast<const uint8_t*>(row) + done, count);
    std::memset(to + step * 16 * width + count, 0, width - count);
  }
}

// values[k] / 2^(8 (k % 4)): what in_place codes are multiplied by.
inline void put_in_place(float* values, int64_t padded) {
  alignas(64) constexpr float factors[16] = {1, 0x1p-8f, 0x1p-16f, 0x1p-24f, 1, 0x1p-8f, 0x1p-16f, 0x1p-24f, 1, 0x1p-8f, 0x1p-16f, 0x1p-24f, 1, 0x1p-8f, 0x1p-16f, 0x1p-24f};
  const F16 factor = load_f(factors);
  for (int64_t k = 0; k < padded; k += 16) store_f(values + k, mul(load_f(values + k), factor));
}

inline void prepare(const Job& job, int64_t first, int64_t last) {
  const Header& h = *job.weight;
  const Batch& batch = job.batch;
  static thread_local std::vector<float> values;
  static thread_local std::vector<int16_t> narrow;
  static thread_local std::vector<int8_t> codes;
  const int64_t padded = h.padded;
  values.resize(padded);
  auto put = [&](const void* row, int64_t bytes, int64_t m, void* to) {
    if (batch.way == Way::kTiles) put_tiles(row, bytes, m, tile_steps(batch, padded), batch.tile_bytes, batch.tiles);
    else put_run(row, bytes / 4, m, batch.run, to);
  };
  for (int64_t m = first; m < last; m++) {
    widen(static_cast<const char*>(job.x) + m * job.stride * width_of(job.type), job.type, h, values.data());
    const int64_t start = batch.place(m, 0);
    float* const sums = batch.sums + start;
    if (is_float8(h.input)) round_float8(h, batch, values.data(), batch.scales ? batch.scales + start : nullptr);
    if (batch.numbers != Numbers::kIntegers) {
      each_section(batch, padded, [&](int64_t s, int64_t begin, int64_t end) {
        F16 lanes = zero_f();
        for (int64_t k = begin; k < end; k += 16) lanes = add(lanes, load_f(values.data() + k));
        sums[s * batch.run] = sum_of(lanes) * (batch.scales ? batch.scales[start + s * batch.run] : 1);
      });
      if (batch.numbers == Numbers::kFloats) {
        if (batch.way == Way::kRows && in_place(h.code)) put_in_place(values.data(), padded);
        put(values.data(), 4 * padded, m, batch.values);
      } else {
        narrow.resize(padded);
        put_halves(values.data(), padded, reinterpret_cast<uint16_t*>(narrow.data()));
        put(narrow.data(), 2 * padded, m, batch.halves);
      }
      continue;
    }
    codes.resize(padded);
    float* const scales = batch.scales + start;
    round_row(values.data(), h, batch, codes.data(), scales);
    each_section(batch, padded, [&](int64_t s, int64_t begin, int64_t end) {
      int32_t total = 0;
      for (int64_t k = begin; k < end; k++) total += codes[k];
      const int64_t place = s * batch.run;
      batch.totals[start + place] = total;
      batch.shifts[start + place] = total * zero_of(h);
      sums[place] = static_cast<float>(total) * scales[place];
    });
    if (batch.pairs) {
      narrow.resize(padded);
      put_pairs(codes.data(), padded, narrow.data());
      put(narrow.data(), 2 * padded, m, batch.pairs);
    } else {
      put(codes.data(), padded, m, batch.codes);
    }
  }
}

}  // namespace QCORE_ISA
}  // namespace qcore
