// What a decoder's step is made of besides single products.
#include <algorithm>

#include "cases.h"
#include "decoder.h"
#include "weights.h"

namespace qcore {
namespace {

// The number that a byte stands for, before its scale.
double kept_value(Kept kept, uint8_t byte, double zero) {
  return kept == Kept::kInt8 ? static_cast<int8_t>(byte) - zero : kept == Kept::kE4M3 ? small_float(byte, 4, 3, 7) : small_float(byte, 5, 2, 15);
}

// Keys or values as they are kept, and the numbers that they stand for.
struct Side {
  std::vector<uint8_t> rows;
  std::vector<double> numbers;
  std::vector<float> scale, zero;
  KvSide side{};
  double off = 0;  // from what was given, at most, in steps of what keeps them
};

Side make_side(const Kernels& kernels, const Attention& a, bool stored) {
  Side made;
  made.rows.resize(a.kv_heads * a.capacity * a.row_bytes), made.numbers.resize(a.kv_heads * a.capacity * a.head_dim);
  for (int64_t head = 0; head < a.kv_heads; head++) made.scale.push_back(0.01f + 0.01f * uniform()), made.zero.push_back(static_cast<float>(below(9)) - 4);
  if (stored) made.side.scale = made.scale.data();
  if (stored && a.kept == Kept::kInt8) made.side.zero = made.zero.data();
  std::vector<float> given(a.head_dim);
  for (int64_t head = 0; head < a.kv_heads; head++)
    for (int64_t t = 0; t < a.capacity; t++) {
      uint8_t* const row = made.rows.data() + (head * a.capacity + t) * a.row_bytes;
      double* const numbers = made.numbers.data() + (head * a.capacity + t) * a.head_dim;
      for (float& value : given) value = uniform() * 2 - 1;
      if (a.kept == Kept::kPlain) {
        for (int64_t i = 0; i < a.head_dim; i++) numbers[i] = write_float(row, a.type, i, given[i]);
        continue;
      }
      kernels.keep(given.data(), made.side, a.kept, head, a.head_dim, row);
      float scale = made.scale[head];
      if (!stored) std::memcpy(&scale, row + a.head_dim, 4);
      for (int64_t i = 0; i < a.head_dim; i++) {
        numbers[i] = kept_value(a.kept, row[i], made.side.zero ? made.zero[head] : 0) * scale;
        // Half a step: of a whole number, or of a float's last bit, which is a subnormal one's at least.
        const double exponent = std::floor(std::log2(std::max(std::fabs(static_cast<double>(given[i])) / scale, 1e-30)));
        const double step = a.kept == Kept::kInt8 ? 1 : a.kept == Kept::kE4M3 ? std::ldexp(1, std::max<int>(exponent, -6) - 3) : std::ldexp(1, std::max<int>(exponent, -14) - 2);
        made.off = std::max(made.off, std::fabs(numbers[i] - given[i]) / (step * scale));
      }
    }
  return made;
}

}  // namespace

void attention_cases(const Kernels& kernels, Tally& tally) {
  for (int turn = 0; turn < 80; turn++) {
    Attention a{};
    a.kept = static_cast<Kept>(below(4)), a.type = static_cast<Float>(below(3));
    const bool stored = below(2);
    a.rows = turn % 2 ? 1 : 2 + below(70);
    a.kv_heads = 1 + below(3), a.heads = a.kv_heads * (1 + below(9)), a.head_dim = 16 * (1 + below(6));
    a.position = below(300), a.window = below(2) ? 1 + below(a.position + a.rows) : 0, a.capacity = a.last(a.rows - 1) + below(5);
    a.row_bytes = a.kept == Kept::kPlain ? a.head_dim * width_of(a.type) : a.head_dim + (stored ? 0 : 4);
    a.scale = 1.0f / std::sqrt(static_cast<float>(a.head_dim)), a.softcap = below(3) ? 0.0f : 2.0f;
    const Side keys = make_side(kernels, a, stored), values = make_side(kernels, a, stored);
    a.keys = keys.rows.data(), a.values = values.rows.data(), a.key_side = keys.side, a.value_side = values.side;
    a.stride = a.heads * a.head_dim + 16 * below(2);
    const auto queries = std::make_unique<float[]>(a.rows * a.stride);
    for (int64_t i = 0; i < a.rows * a.stride; i++) {  // numbers of the model's type
      uint8_t number[4];
      queries[i] = write_float(number, a.type, 0, (uniform() * 2 - 1) * 3);
    }
    a.queries = queries.get();
    std::vector<float> parts(a.rows == 1 ? a.heads * a.spans() * a.part() : 0);
    const auto out = std::make_unique<uint8_t[]>(a.rows * a.heads * a.head_dim * width_of(a.type));
    a.parts = parts.data(), a.out = out.get();
    if (a.rows == 1) {
      kernels.attend(a, 0, a.kv_heads * a.spans());
      kernels.join(a, 0, a.heads);
    } else {
      kernels.attend_rows(a, 0, a.kv_heads * a.row_blocks());
    }
    Errors errors;
    for (int64_t row = 0; row < a.rows; row++)
      for (int64_t head = 0; head < a.heads; head++) {
        const int64_t rows = head / a.share() * a.capacity;
        std::vector<double> sums(a.head_dim), sizes(a.head_dim);
        double total = 0;
        for (int64_t t = a.first(row); t < a.last(row); t++) {
          double score = 0;
          for (int64_t i = 0; i < a.head_dim; i++) score += queries[row * a.stride + head * a.head_dim + i] * keys.numbers[(rows + t) * a.head_dim + i];
          score *= a.scale;
          if (a.softcap != 0) score = std::tanh(score / a.softcap) * a.softcap;
          total += std::exp(score);
          for (int64_t i = 0; i < a.head_dim; i++) {
            const double product = std::exp(score) * values.numbers[(rows + t) * a.head_dim + i];
            sums[i] += product, sizes[i] += std::fabs(product);
          }
        }
        for (int64_t i = 0; i < a.head_dim; i++) errors.add(read_float(out.get(), a.type, (row * a.heads + head) * a.head_dim + i), sums[i] / total, sizes[i] / total);
      }
    const double error = errors.greatest(), off = std::max(keys.off, values.off);
    const bool near = stored || off <= 0.5001;  // a scale that is given may be too small
    if (!tally.count(a.type, near ? error : 1))
      std::printf("%s: attention of %d tokens at %d, window %d, %d heads in %d, of %d, kept %d, type %d, %s: error %.3g, kept rows off by %.3g steps\n", kernels.name, (int)a.rows,
                  (int)a.position, (int)a.window, (int)a.heads, (int)a.kv_heads, (int)a.head_dim, (int)a.kept, (int)a.type, stored ? "stored scales" : "a scale a row", error, off);
  }
}

void score_cases(const Kernels& kernels, Tally& tally) {
  for (int turn = 0; turn < 10; turn++) {
    const int64_t count = 1 + below(9), columns = 1 + below(99);
    const auto rows = std::make_unique<float[]>(count * columns), x = std::make_unique<float[]>(columns), out = std::make_unique<float[]>(count);
    for (int64_t i = 0; i < count * columns; i++) rows[i] = uniform() - 0.25f;
    for (int64_t i = 0; i < columns; i++) x[i] = uniform() - 0.25f;
    kernels.score(rows.get(), count, x.get(), columns, out.get());
    Errors errors;
    for (int64_t row = 0; row < count; row++) {
      double sum = 0;
      for (int64_t i = 0; i < columns; i++) sum += static_cast<double>(rows[row * columns + i]) * x[i];
      errors.add(out[row], sum);
    }
    const double error = errors.greatest();
    if (!tally.count(Float::kF32, error)) std::printf("%s: scores of %d rows of %d: error %.3g\n", kernels.name, (int)count, (int)columns, error);
  }
}

void product_cases(const Kernels& kernels, Tally& tally) {
  for (int turn = 0; turn < 40; turn++) {
    const int64_t columns = 256 * (1 + below(3));
    const Float type = static_cast<Float>(below(3));
    const Input input = static_cast<Input>(below(2));
    std::vector<Weight> weights;
    for (int i = 0; i < 3; i++) {
      const Code codes[] = {Code::kInt4, Code::kInt4, Code::kInt8, Code::kTable4};
      const Case c{codes[below(4)], 1 + below(40), columns, below(2) ? 32 : 64, Scale::kF16, Offset::kNone, input, type, below(6) == 0};
      weights.push_back(below(4) ? make(c) : grid_weight(c.rows, columns, input));
    }
    const int64_t stride = below(2) ? columns : 0;  // a row for each product, or one for all
    const auto x = std::make_unique<uint8_t[]>((stride ? 3 : 1) * columns * width_of(type));
    for (int64_t k = 0; k < (stride ? 3 : 1) * columns; k++) write_float(x.get(), type, k, uniform() + 0.25f);
    std::vector<std::vector<uint8_t>> together, alone;
    std::vector<Product> products;
    for (const Weight& w : weights) {
      together.emplace_back(w.header().rows * width_of(type)), alone.emplace_back(w.header().rows * width_of(type));
      products.push_back({&w.header(), together.back().data()});
      linear(kernels, w.header(), {x.get() + (products.size() - 1) * stride * width_of(type), 1, columns, type}, alone.back().data());
    }
    linears(kernels, products.data(), 3, {x.get(), stride ? 3 : 1, columns, type}, type, stride != 0);
    if (!tally.count(type, together == alone ? 0 : 1))
      std::printf("%s: products of %d columns, codes %d %d %d, input %d, type %d: not the same as alone\n", kernels.name, (int)columns, (int)weights[0].header().code,
                  (int)weights[1].header().code, (int)weights[2].header().code, (int)input, (int)type);
  }
}

}  // namespace qcore
