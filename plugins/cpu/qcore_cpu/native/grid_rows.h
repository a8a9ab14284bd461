// A row by weights whose codes name tuples of a grid: their blocks are read as they are, one row of the weight after the other.
#pragma once
#include "activations.h"
#include "grids.h"

namespace qcore {
namespace QCORE_ISA {

QCORE_INLINE __m256 eight_floats(__m128i codes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)); }

// Sums of four products each: of unsigned bytes by signed ones.
QCORE_INLINE __m256i fours(__m256i a, __m256i b) {
#if defined(__AVX512VNNI__)
  return _mm256_dpbusd_epi32(_mm256_setzero_si256(), a, b);
#elif defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), a, b);
#else
  return _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1));
#endif
}

// Row m of a batch by a row of the weight. Sums of whole numbers are exact until they are scaled.
template <bool integers, class Block>
float multiply_grid_row(Block type, const Header& h, const Batch& batch, int64_t m, int64_t row) {
  constexpr int groups = 256 / Block::group;
  const uint64_t* const tuples = tuples_of(h);
  const uint8_t* const block = grid_row_at(h, row);
  const int64_t bytes = grid_block_bytes(h.code), blocks = h.columns / 256;
  const int8_t* x = batch.codes + m * h.padded;
  const float *wide = batch.values + m * h.padded, *scales = batch.scales + m * batch.sections;
  const int32_t* totals = batch.totals + m * batch.sections;
  const __m256i halves = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  __m256 total = _mm256_setzero_ps(), biased = _mm256_setzero_ps();
  OpenedBlock both[2];
  auto open = [&](int64_t i) {
    OpenedBlock& opened = both[i % 2];
    type.open(block + i * bytes, opened);
    if constexpr (integers)
      for (int k = 0; k < groups; k += 8) {
        const __m256 scale = _mm256_mul_ps(_mm256_load_ps(opened.scales + k), _mm256_loadu_ps(scales + groups * i + k));
        _mm256_store_ps(opened.scales + k, scale);
        if constexpr (Block::bias) {
          const __m256i sums = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(totals + groups * i + k));
          biased = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scale, biased);
        }
      }
  };
  open(0);
  for (int64_t i = 0; i < blocks; i++) {
    if (i + 1 < blocks) open(i + 1);  // its loads wait for its stores; meanwhile the block before it is multiplied
    const OpenedBlock& opened = both[i % 2];
    for (int run = 0; run < 8; run++) {
      __m256 scale;
      if constexpr (groups == 8) scale = _mm256_broadcast_ss(opened.scales + run);
      else scale = _mm256_permutevar8x32_ps(_mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(opened.scales + 2 * run))), halves);
      if constexpr (integers) {
        const __m256i given = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 256 * i + 32 * run)), magnitudes = magnitudes_of(type, opened, tuples, run);
        const __m256i products = fours(magnitudes, Block::bias ? given : _mm256_sign_epi8(given, signs_of(opened, run)));
        total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), scale, total);
      } else {
        const __m256i codes = codes_of(type, opened, tuples, run);
        const __m128i first = _mm256_castsi256_si128(codes), second = _mm256_extracti128_si256(codes, 1);
        const float* const given = wide + 256 * i + 32 * run;
        __m256 sum = _mm256_mul_ps(eight_floats(first), _mm256_loadu_ps(given));
        sum = _mm256_fmadd_ps(eight_floats(_mm_srli_si128(first, 8)), _mm256_loadu_ps(given + 8), sum);
        total = _mm256_fmadd_ps(sum, _mm256_broadcastss_ps(_mm256_castps256_ps128(scale)), total);
        sum = _mm256_mul_ps(eight_floats(second), _mm256_loadu_ps(given + 16));
        sum = _mm256_fmadd_ps(eight_floats(_mm_srli_si128(second, 8)), _mm256_loadu_ps(given + 24), sum);
        total = _mm256_fmadd_ps(sum, _mm256_broadcastss_ps(_mm256_extractf128_ps(scale, 1)), total);
      }
    }
  }
  if constexpr (integers && Block::bias != 0) total = _mm256_fmadd_ps(biased, _mm256_set1_ps(-Block::bias), total);
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
