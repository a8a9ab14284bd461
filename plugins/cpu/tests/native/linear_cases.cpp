// Products with every code, kind of scale and offset, input and odd shape.
#include "cases.h"
#include "weights.h"

namespace qcore {
namespace {

constexpr Code kCodes[] = {Code::kInt1,   Code::kInt2,   Code::kInt3, Code::kInt4,      Code::kInt5, Code::kInt6, Code::kInt7, Code::kInt8,
                           Code::kTable3, Code::kTable4, Code::kE4M3, Code::kE4M3Fnuz, Code::kE5M2, Code::kE3M2, Code::kE2M3};
constexpr int64_t kGroups[] = {16, 32, 64, 96, 128, 0};
constexpr int64_t kShapes[][2] = {{1, 1}, {5, 33}, {16, 32}, {17, 96}, {40, 280}, {33, 1064}, {49, 2080}, {150, 2080}};

}  // namespace

void linear_cases(const Kernels& kernels, Tally& tally) {
  for (int turn = 0; turn < 40; turn++)
    for (const Code code : kCodes) {
      const bool integer = static_cast<int64_t>(code) <= 8, whole = integer || code == Code::kTable3 || code == Code::kTable4;
      const auto& shape = kShapes[below(8)];
      Case c{code, shape[0], shape[1], kGroups[below(6)], static_cast<Scale>(below(5)), Offset::kNone, Input::kExact, static_cast<Float>(below(3)), below(3) == 0};
      if (below(5) == 0 && c.group && 256 % c.group == 0) c.scale = Scale::kRuns;
      if (integer && bits_of(code) < 8 && below(3) == 0) c.offset = Offset::kZeroU8;
      if (integer && below(3) == 0) c.offset = Offset::kZeroS8;
      if (c.scale <= Scale::kBF16 && below(3) == 0) c.offset = Offset::kFloat;
      if (whole && below(2)) c.input = static_cast<Input>(1 + below(3));
      if (!whole && below(2)) c.input = static_cast<Input>(4 + below(3)), c.ordered = false;
      if (c.input == Input::kFloatBlocks && c.group == 96) c.group = 64;
      const Weight w = make(c);
      constexpr int64_t kRows[] = {1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 24, 35, 64, 97};
      const int64_t rows = kRows[below(14)];
      const double error = worst(kernels, c.type, w, rows);
      if (!tally.count(c.type, error))
        std::printf("%s: code %d, [%d, %d], group %d, scale %d, offset %d, input %d, type %d, %sordered, %d rows: error %.3g\n", kernels.name,
                    (int)c.code, (int)c.rows, (int)c.columns, (int)c.group, (int)c.scale, (int)c.offset, (int)c.input, (int)c.type, c.ordered ? "" : "not ", (int)rows, error);
    }
}

}  // namespace qcore
