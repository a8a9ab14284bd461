// A row by weights whose codes name tuples of a grid: their blocks are read as they are, one row of the weight after the other.
#pragma once
#include "activations.h"
#include "grids.h"

namespace qcore {
namespace QCORE_ISA {

QCORE_INLINE __m256 eight_floats(__m128i codes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)); }

// Row m of a batch by a row of the weight. Sums of whole numbers are exact until they are scaled.
template <bool integers, class Block>
float multiply_grid_row(Block type, const Header& h, const Batch& batch, int64_t m, int64_t row) {
  constexpr int groups = 32 / Block::group;
  const uint64_t* const tuples = tuples_of(h);
  const uint8_t* block = grid_row_at(h, row);
  const int64_t bytes = grid_block_bytes(h.code), runs = h.columns / 32;
  const int8_t* x = batch.codes + m * h.padded;
  const float *wide = batch.values + m * h.padded, *scales = batch.scales + m * batch.sections;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 total = _mm256_setzero_ps();
  for (int64_t run = 0; run < runs; run++) {
    const __m256i codes = type.codes(block, tuples, static_cast<int>(run % 8));
    float low = type.scale(block, static_cast<int>(run % 8), 0), high = low;
    if constexpr (groups == 2) high = type.scale(block, static_cast<int>(run % 8), 1);
    if constexpr (integers) {
      low *= scales[groups * run], high *= scales[groups * run + groups - 1];
      const __m256i given = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 32 * run));
      const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(given, codes));
      const __m256 scale = _mm256_set_m128(_mm_set1_ps(high), _mm_set1_ps(low));
      total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(products, ones)), scale, total);
    } else {
      const __m128i first = _mm256_castsi256_si128(codes), second = _mm256_extracti128_si256(codes, 1);
      const float* const given = wide + 32 * run;
      __m256 sum = _mm256_mul_ps(eight_floats(first), _mm256_loadu_ps(given));
      sum = _mm256_fmadd_ps(eight_floats(_mm_srli_si128(first, 8)), _mm256_loadu_ps(given + 8), sum);
      total = _mm256_fmadd_ps(sum, _mm256_set1_ps(low), total);
      sum = _mm256_mul_ps(eight_floats(second), _mm256_loadu_ps(given + 16));
      sum = _mm256_fmadd_ps(eight_floats(_mm_srli_si128(second, 8)), _mm256_loadu_ps(given + 24), sum);
      total = _mm256_fmadd_ps(sum, _mm256_set1_ps(high), total);
    }
    if (run % 8 == 7) block += bytes;
  }
  return sum_of(total);
}

// The panels first .. last - 1.
inline void multiply_grid_rows(const Job& job, int64_t first, int64_t last, Store store) {
  const Header& h = *job.weight;
  with_grid(h.code, [&](auto type) {
    for (int64_t panel = first; panel < last; panel++)
      for (int64_t m = 0; m < job.batch.rows; m++) {
        alignas(64) float out[kPanel] = {};
        for (int64_t row = panel * kPanel; row < (panel + 1) * kPanel && row < h.rows; row++)
          out[row % kPanel] = job.batch.numbers == Numbers::kIntegers ? multiply_grid_row<true>(type, h, job.batch, m, row)
                                                                      : multiply_grid_row<false>(type, h, job.batch, m, row);
        store(job, m, panel, out);
      }
  });
}

}  // namespace QCORE_ISA
}  // namespace qcore
