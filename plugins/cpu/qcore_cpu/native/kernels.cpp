// The kernels of one instruction set: compiled once for each, with QCORE_ISA as its name. Where QCORE_EXACT_OF, QCORE_INTEGER_OF or
// QCORE_HALVES_OF names another, that one's serve here too, for they would be the same.
#include "kernels.h"

#include <vector>

#include "activations.h"
#include "around.h"
#include "attention.h"
#include "attention_rows.h"
#include "blocks.h"
#include "grid_rows.h"
#ifdef __AVX512BF16__
#include "halves.h"
#endif
#ifdef __AMX_TILE__
#include "tiles.h"
#endif

#define QCORE_TEXT2(x) #x
#define QCORE_TEXT(x) QCORE_TEXT2(x)
#define QCORE_JOIN2(a, b) a##b
#define QCORE_JOIN(a, b) QCORE_JOIN2(a, b)

namespace qcore {

#ifdef QCORE_EXACT_OF
#define QCORE_EXACT QCORE_JOIN(exact_, QCORE_EXACT_OF)
#else
#define QCORE_EXACT QCORE_JOIN(exact_, QCORE_ISA)
CodeKernels QCORE_EXACT(Code code) {
  using namespace QCORE_ISA;
  return made_for<CodeKernels>(AllCodes{}, code, [](auto c) { return exact_kernels<c>(); });
}
#endif

#ifdef QCORE_INTEGER_OF
#define QCORE_INTEGER QCORE_JOIN(integer_, QCORE_INTEGER_OF)
#else
#define QCORE_INTEGER QCORE_JOIN(integer_, QCORE_ISA)
CodeKernels QCORE_INTEGER(Code code) {
  using namespace QCORE_ISA;
  return made_for<CodeKernels>(WholeCodes{}, code, [](auto c) { return integer_kernels<c>(); });
}
#endif

#ifdef __AVX512BF16__
#ifdef QCORE_HALVES_OF
#define QCORE_HALVES QCORE_JOIN(halves_, QCORE_HALVES_OF)
#else
#define QCORE_HALVES QCORE_JOIN(halves_, QCORE_ISA)
CodeKernels QCORE_HALVES(Code code) {
  using namespace QCORE_ISA;
  return made_for<CodeKernels>(AllCodes{}, code, [](auto c) { return half_kernels<c>(); });
}
#endif
#endif

namespace QCORE_ISA {
namespace {

CodeKernels choose(Code code, Numbers numbers) {
  if (numbers == Numbers::kIntegers) return QCORE_INTEGER(code);
#ifdef __AVX512BF16__
  if (numbers == Numbers::kHalves) return QCORE_HALVES(code);
#endif
  return QCORE_EXACT(code);
}

// One row of a panel's results, in the type of the output.
void store(const Job& job, int64_t row, int64_t panel, const float* values) {
  const int64_t first = panel * kPanel, place = row * job.weight->rows + first;
  const int64_t count = job.weight->rows - first < kPanel ? job.weight->rows - first : kPanel;
  if (count == kPanel) return put(load_f(values), job.out_type, job.out, place);
  put_some(load_f(values), job.out_type, job.out, place, count);
}

void multiply(const Job& job, int64_t first, int64_t last) {
#ifdef __AMX_TILE__
  if (job.batch.way == Way::kTiles) return multiply_tiles(job, first, last, store);
#endif
  const Header& h = *job.weight;
  if (by_grid_rows(h, job.batch.way)) return multiply_grid_rows(job, first, last, store);
  const CodeKernels kernels = choose(opened_code(h.code), job.batch.numbers);
  if (job.batch.way == Way::kBlocks) return multiply_blocks(job, kernels, first, last, store);
  static thread_local std::vector<float> floats;
  static thread_local std::vector<uint8_t> expanded;
  floats.resize(2 * h.groups * kPanel);
  if (is_grid(h.code)) expanded.resize(h.padded * kPanel);
  alignas(64) float out[kRowsAtOnce * kPanel];
  for (int64_t panel = first; panel < last; panel++) {
    const Strip strip = open_panel(h, panel, floats.data(), expanded.data(), job.batch.rows <= job.batch.run);
    for (int64_t row = 0; row < job.batch.rows; row += job.batch.run) {
      const int64_t rows = job.batch.rows - row < job.batch.run ? job.batch.rows - row : job.batch.run;
      kernels.rows[rows - 1](strip, job.batch, row, out);
      for (int64_t r = 0; r < rows; r++) store(job, row + r, panel, out + kPanel * r);
    }
  }
}

void look_up(const Header& h, int64_t row, float* out) {
  static thread_local std::vector<float> floats, values;
  static thread_local std::vector<uint8_t> expanded;
  floats.resize(2 * h.groups * kPanel);
  values.resize(h.padded * kPanel);
  if (is_grid(h.code)) expanded.resize(h.padded * kPanel);
  QCORE_EXACT(opened_code(h.code)).unpack(open_panel(h, row / kPanel, floats.data(), expanded.data()), 0, h.padded, values.data());
  const int32_t* const order = h.order ? reinterpret_cast<const int32_t*>(section_at(h, h.order)) : nullptr;
  for (int64_t k = 0; k < h.columns; k++) out[order ? order[k] : k] = values[k * kPanel + row % kPanel];
}

}  // namespace
}  // namespace QCORE_ISA

const Kernels* QCORE_JOIN(kernels_, QCORE_ISA)() {
  using namespace QCORE_ISA;
#ifdef __AMX_TILE__
  constexpr bool tiles = true;
#else
  constexpr bool tiles = false;
#endif
#ifdef __AVX512BF16__
  constexpr bool halves = true;
#else
  constexpr bool halves = false;
#endif
  static const Kernels kernels{QCORE_TEXT(QCORE_ISA), tiles, halves, Dot<8>::width == 2, kRowsAtOnce, kFloatRun, kHalfRun, kIntegerRun, kPackedRun, prepare, multiply, look_up,
                               normalize, add_scaled, rotate, activate, score, attend, join, attend_rows, narrow_values, keep_row, widen_values};
  return &kernels;
}

}  // namespace qcore
