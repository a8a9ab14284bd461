// The kernels of one instruction set: compiled once for each, with QCORE_ISA as its name. Where QCORE_EXACT_OF or QCORE_INTEGER_OF
// names another, that one's kernels for few rows serve here too, for they would be the same.
#include "kernels.h"

#include <vector>

#include "activations.h"
#include "around.h"
#include "exact.h"
#include "grids.h"
#include "integer.h"
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
namespace QCORE_ISA {
namespace {

constexpr int kRowsAtOnce = 4;  // kernels exist for 1, 2 and 4 rows

// The kernels of some codes; each function gives null for any other.
template <Code... codes>
struct Choices {
  static RowsKernel exact(Code code, int64_t rows) {
    RowsKernel found = nullptr;
    ((code == codes ? void(found = rows == 1 ? exact_rows<codes, 1> : rows == 2 ? exact_rows<codes, 2> : exact_rows<codes, 4>) : void()), ...);
    return found;
  }
  static RowsKernel integer(Code code, int64_t rows) {
    RowsKernel found = nullptr;
    ((code == codes ? void(found = rows == 1 ? integer_rows<codes, 1> : rows == 2 ? integer_rows<codes, 2> : integer_rows<codes, 4>) : void()), ...);
    return found;
  }
#ifdef __AVX512BF16__
  static RowsKernel halves(Code code, int64_t rows) {
    RowsKernel found = nullptr;
    ((code == codes ? void(found = rows == 1 ? half_rows<codes, 1> : rows == 2 ? half_rows<codes, 2> : half_rows<codes, 4>) : void()), ...);
    return found;
  }
#endif
};
using Whole = Choices<Code::kInt1, Code::kInt2, Code::kInt3, Code::kInt4, Code::kInt5, Code::kInt6, Code::kInt7, Code::kInt8, Code::kTable3,
                      Code::kTable4>;
using SmallFloats = Choices<Code::kE4M3, Code::kE4M3Fnuz, Code::kE5M2, Code::kE3M2, Code::kE2M3>;

}  // namespace
}  // namespace QCORE_ISA

#ifdef QCORE_EXACT_OF
#define QCORE_EXACT QCORE_JOIN(exact_, QCORE_EXACT_OF)
#else
#define QCORE_EXACT QCORE_JOIN(exact_, QCORE_ISA)
RowsKernel QCORE_EXACT(Code code, int64_t rows) {
  const RowsKernel found = QCORE_ISA::Whole::exact(code, rows);
  return found ? found : QCORE_ISA::SmallFloats::exact(code, rows);
}
#endif

#ifdef QCORE_INTEGER_OF
#define QCORE_INTEGER QCORE_JOIN(integer_, QCORE_INTEGER_OF)
#else
#define QCORE_INTEGER QCORE_JOIN(integer_, QCORE_ISA)
RowsKernel QCORE_INTEGER(Code code, int64_t rows) { return QCORE_ISA::Whole::integer(code, rows); }
#endif

namespace QCORE_ISA {
namespace {

RowsKernel choose(Code code, Method method, int64_t rows) {
  if (method == Method::kIntegers) return QCORE_INTEGER(code, rows);
#ifdef __AVX512BF16__
  if (method == Method::kHalves) {
    const RowsKernel found = Whole::halves(code, rows);
    return found ? found : SmallFloats::halves(code, rows);
  }
#endif
  return QCORE_EXACT(code, rows);
}

// One row of a panel's results, in the type of the output.
void store(const Job& job, int64_t row, int64_t panel, const float* values) {
  const int64_t first = panel * kPanel, place = row * job.weight->rows + first;
  const int64_t count = job.weight->rows - first < kPanel ? job.weight->rows - first : kPanel;
  alignas(64) uint16_t narrow[16];
  if (job.type == Float::kF32) {
    std::memcpy(static_cast<float*>(job.out) + place, values, count * sizeof(float));
    return;
  }
  if (job.type == Float::kF16) narrow_f16(narrow, load_f(values));
  else narrow_bf16(narrow, load_f(values));
  std::memcpy(static_cast<uint16_t*>(job.out) + place, narrow, count * sizeof(uint16_t));
}

void multiply(const Job& job, int64_t first, int64_t last) {
#ifdef __AMX_TILE__
  if (in_tiles(job.batch.method)) return multiply_tiles(job, first, last, store);
#endif
  const Header& h = *job.weight;
  static thread_local std::vector<float> floats;
  static thread_local std::vector<uint8_t> expanded;
  floats.resize(2 * h.groups * kPanel);
  if (is_grid(h.code)) expanded.resize(h.padded * kPanel);
  const Code code = opened_code(h.code);
  alignas(64) float out[kRowsAtOnce * kPanel];
  for (int64_t panel = first; panel < last; panel++) {
    const Strip strip = open_panel(h, panel, floats.data(), expanded.data());
    for (int64_t row = 0, rows; row < job.batch.rows; row += rows) {
      const int64_t left = job.batch.rows - row;
      rows = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      choose(code, job.batch.method, rows)(strip, job.batch, row, out);
      for (int64_t m = 0; m < rows; m++) store(job, row + m, panel, out + kPanel * m);
    }
  }
}

template <Code code>
void spread_codes(const Strip& strip, float* out) {
  const Floats<code> floats(strip.table);
  const F16 zero = all_f(is_integer(code) ? static_cast<float>(-strip.h.zero) : 0);
  const uint8_t* chunk = strip.codes;
  for (int64_t base = 0; base < strip.h.padded; base += kChunk, chunk += 64 * bits_of(code))
    each_column<code, 0, 32>(chunk, floats, [&](F16 value, auto column) QCORE_INSIDE {
      store_f(out + 16 * (base + column), is_integer(code) ? add(value, zero) : value);
    });
}

template <Code... codes>
void spread_any(Code code, const Strip& strip, float* out) {
  ((code == codes ? spread_codes<codes>(strip, out) : void()), ...);
}

void look_up(const Header& h, int64_t row, float* out) {
  static thread_local std::vector<float> floats, values;
  static thread_local std::vector<uint8_t> expanded;
  floats.resize(2 * h.groups * kPanel);
  values.resize(h.padded * kPanel);
  if (is_grid(h.code)) expanded.resize(h.padded * kPanel);
  const int64_t lane = row % kPanel;
  const Strip strip = open_panel(h, row / kPanel, floats.data(), expanded.data());
  spread_any<Code::kInt1, Code::kInt2, Code::kInt3, Code::kInt4, Code::kInt5, Code::kInt6, Code::kInt7, Code::kInt8, Code::kTable3, Code::kTable4,
             Code::kE4M3, Code::kE4M3Fnuz, Code::kE5M2, Code::kE3M2, Code::kE2M3>(opened_code(h.code), strip, values.data());
  const int32_t* const order = h.order ? reinterpret_cast<const int32_t*>(section_at(h, h.order)) : nullptr;
  for (int64_t k = 0; k < h.columns; k++) {
    const int64_t cell = k / h.group * kPanel + lane;
    const float zero = strip.zeros ? strip.zeros[cell] : 0, offset = strip.offsets ? strip.offsets[cell] : 0;
    out[order ? order[k] : k] = (values[k * kPanel + lane] + zero) * strip.scales[cell] + offset;
  }
}

}  // namespace
}  // namespace QCORE_ISA

const Kernels* QCORE_JOIN(kernels_, QCORE_ISA)() {
  using namespace QCORE_ISA;
#ifdef __AVX512BF16__
  constexpr bool halves = true;
#else
  constexpr bool halves = false;
#endif
#ifdef __AMX_TILE__
  constexpr int64_t tiles_from = 4;
#else
  constexpr int64_t tiles_from = 0;
#endif
  static const Kernels kernels{QCORE_TEXT(QCORE_ISA), halves, Dot<8>::pairs, tiles_from, prepare, multiply, look_up,
                               normalize, activate, attend, narrow_values, widen_values};
  return &kernels;
}

}  // namespace qcore
