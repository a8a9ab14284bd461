// The kernels of every instruction set that the processor has, against sums in double: all codes, kinds of scales and offsets, input
// types and odd shapes. Memory ends where a weight ends, so that sanitizers see a read past it.
//
//     test_native [SEED] [ISA ...]      prints a line for each instruction set; exit status 1 where one is wrong
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"
#include "ggml_blocks.h"
#include "linear.h"

using namespace qcore;

extern "C" int qcore_pack_blocks(Header*, const uint8_t*, int64_t, int64_t);
extern "C" void qcore_pack_codes(Header*, const uint8_t*, int64_t, int64_t, int64_t, int64_t, const int32_t*, int64_t);

namespace {

std::mt19937 generator;

int64_t below(int64_t count) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(count)); }
float uniform() { return static_cast<float>(generator()) / 4294967296.0f; }

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

uint16_t bf16(float value) { return static_cast<uint16_t>((to_bits(value) + 0x7fff + (to_bits(value) >> 16 & 1)) >> 16); }

// float16 of a number, cut off; small ones become 0.
uint16_t f16(float value) {
  if (std::fabs(value) < 1e-4f) return 0;
  const uint32_t bits = to_bits(value);
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) - 112) << 10) | (bits >> 13 & 0x3ff));
}

double small_float(int code, int exponent_bits, int mantissa_bits, int bias) {
  const int mantissa = code & ((1 << mantissa_bits) - 1), exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1);
  const double value = exponent ? std::ldexp(1 + std::ldexp(mantissa, -mantissa_bits), exponent - bias)
                                : std::ldexp(std::ldexp(mantissa, -mantissa_bits), 1 - bias);
  return code >> (exponent_bits + mantissa_bits) & 1 ? -value : value;
}

float wide_f16(uint16_t half) {  // infinities become large numbers
  return static_cast<float>(small_float(half, 5, 10, 15));
}

struct Case {
  Code code;
  int64_t rows, columns, group;
  Scale scale;
  Offset offset;
  Input input;
  Float type;
  bool ordered;
};

struct Weight {
  std::unique_ptr<uint8_t[]> bytes;  // no more than the weight has
  std::vector<double> dense;         // [rows][columns]
  const Header& header() const { return *reinterpret_cast<const Header*>(bytes.get()); }
};

Weight make(const Case& c) {
  Header h{};
  h.magic = kMagic, h.version = kVersion, h.rows = c.rows, h.columns = c.columns, h.padded = (c.columns + 31) / 32 * 32;
  h.code = c.code, h.group = c.group && c.group < h.padded ? c.group : h.padded, h.groups = (h.padded + h.group - 1) / h.group;
  h.scale = c.scale, h.offset = c.offset, h.input = c.input, h.coarse_group = 1, h.tensor_scale = 1;
  const int bits = bits_of(c.code);
  const bool integer = static_cast<int64_t>(c.code) <= 8, table = c.code == Code::kTable3 || c.code == Code::kTable4;
  if (integer && bits < 8) h.zero = below(1 << bits);
  if (c.input == Input::kStatic) h.input_scale = 0.02;
  const int64_t panels = panels_of(h), cells = panels * h.groups * 16;
  int64_t place = sizeof(Header);
  auto section = [&](int64_t& at, int64_t size) { at = place, place += (size + 63) / 64 * 64; };
  section(h.codes, panels * panel_bytes(h));
  section(h.scales, cells * (c.scale == Scale::kF32 ? 4 : c.scale == Scale::kF16 || c.scale == Scale::kBF16 ? 2 : 1));
  if (c.offset != Offset::kNone) section(h.offsets, cells * 4);
  if (c.scale == Scale::kRuns) section(h.super_scales, panels * ((h.padded + 255) / 256) * 16 * 2);
  if (c.ordered) section(h.order, h.padded * 4);
  if (table) section(h.table, 64);
  h.total = place;
  Weight w{std::make_unique<uint8_t[]>(place), std::vector<double>(c.rows * c.columns)};
  std::memcpy(w.bytes.get(), &h, sizeof h);
  std::vector<uint8_t> codes(c.rows * c.columns);
  for (auto& code : codes) code = static_cast<uint8_t>(below(1 << bits) & (c.code == Code::kE5M2 ? 0xbf : 0xff));  // no large ones
  float entries[16];
  for (int i = 0; i < 16; i++) entries[i] = static_cast<float>(below(255) - 127);
  if (table && c.input == Input::kExact && below(2))
    for (float& entry : entries) entry *= 0.3717f;  // more digits than bfloat16 has
  if (table) std::memcpy(w.bytes.get() + h.table, entries, 64);
  std::vector<int32_t> order(h.padded);
  for (int64_t k = 0; k < c.columns; k++) order[k] = static_cast<int32_t>(k);
  if (c.ordered) {
    for (int64_t k = c.columns - 1; k > 0; k--) std::swap(order[k], order[below(k + 1)]);
    std::memcpy(w.bytes.get() + h.order, order.data(), h.padded * 4);
  }
  for (int64_t n = 0; n < c.rows; n++)
    for (int64_t g = 0; g < h.groups; g++) {
      const int64_t cell = (n / 16 * h.groups + g) * 16 + n % 16;
      double scale = 0.01 + 0.02 * uniform(), offset = 0, zero = 0;
      uint8_t* const stored = w.bytes.get() + h.scales;
      if (c.scale == Scale::kF32) {
        const float value = static_cast<float>(scale);
        std::memcpy(stored + 4 * cell, &value, 4), scale = value;
      } else if (c.scale == Scale::kF16) {
        const uint16_t half = f16(static_cast<float>(scale));
        std::memcpy(stored + 2 * cell, &half, 2), scale = wide_f16(half);
      } else if (c.scale == Scale::kBF16) {
        const uint16_t half = bf16(static_cast<float>(scale));
        std::memcpy(stored + 2 * cell, &half, 2), scale = from_bits(static_cast<uint32_t>(half) << 16);
      } else if (c.scale == Scale::kE8M0) {
        stored[cell] = static_cast<uint8_t>(118 + below(4)), scale = std::ldexp(1, stored[cell] - 127);
      } else if (c.scale == Scale::kE4M3) {
        stored[cell] = static_cast<uint8_t>(1 + below(40)), scale = small_float(stored[cell], 4, 3, 7);
      } else {
        const int64_t runs = 256 / h.group, supers = (h.groups + runs - 1) / runs, super = (n / 16 * supers + g / runs) * 16 + n % 16;
        uint16_t half = f16(0.001f * static_cast<float>(1 + (n + g / runs) % 7));
        std::memcpy(w.bytes.get() + h.super_scales + 2 * super, &half, 2);
        stored[cell] = static_cast<uint8_t>(below(64) - 32), scale = static_cast<int8_t>(stored[cell]) * static_cast<double>(wide_f16(half));
      }
      uint8_t* const extra = w.bytes.get() + h.offsets;
      if (c.offset == Offset::kZeroU8) zero = extra[cell] = static_cast<uint8_t>(below(1 << bits));
      if (c.offset == Offset::kZeroS8) extra[cell] = static_cast<uint8_t>(below(20) - 10), zero = static_cast<int8_t>(extra[cell]);
      if (c.offset == Offset::kFloat) {
        offset = 0.02 * uniform();
        if (c.scale == Scale::kF32) {
          const float value = static_cast<float>(offset);
          std::memcpy(extra + 4 * cell, &value, 4), offset = value;
        } else {
          const uint16_t half = c.scale == Scale::kF16 ? f16(static_cast<float>(offset)) : bf16(static_cast<float>(offset));
          std::memcpy(extra + 2 * cell, &half, 2);
          offset = c.scale == Scale::kF16 ? wide_f16(half) : from_bits(static_cast<uint32_t>(half) << 16);
        }
      }
      for (int64_t k = g * h.group; k < (g + 1) * h.group && k < c.columns; k++) {
        const int q = codes[n * c.columns + order[k]];
        double value = 0;
        if (integer) value = (bits == 8 ? static_cast<int8_t>(q) : q) - static_cast<double>(h.zero);
        else if (table) value = entries[q];
        else if (c.code == Code::kE4M3) value = small_float(q, 4, 3, 7);
        else if (c.code == Code::kE4M3Fnuz) value = small_float(q, 4, 3, 8);
        else if (c.code == Code::kE5M2) value = small_float(q, 5, 2, 15);
        else if (c.code == Code::kE3M2) value = small_float(q, 3, 2, 3);
        else value = small_float(q, 2, 3, 1);
        w.dense[n * c.columns + order[k]] = (value - zero) * scale + offset;
      }
    }
  std::vector<int32_t> given(order.begin(), order.begin() + c.columns);
  const int stream = below(2) ? bits : 8;  // a bit stream, or a byte each
  const int64_t row_bytes = (c.columns * stream + 7) / 8;
  const auto exact = std::make_unique<uint8_t[]>(c.rows * row_bytes);  // zeros
  for (int64_t n = 0; n < c.rows; n++)
    for (int64_t bit = 0; bit < c.columns * stream; bit++)
      exact[n * row_bytes + bit / 8] |= static_cast<uint8_t>((codes[n * c.columns + bit / stream] >> bit % stream & 1) << bit % 8);
  qcore_pack_codes(reinterpret_cast<Header*>(w.bytes.get()), exact.get(), row_bytes, stream, 0, c.rows, c.ordered ? given.data() : nullptr, 0);
  return w;
}

// What the kernels' input stands for: float32 [rows][columns] in the packed order's runs.
void round_like(const Header& h, std::vector<float>& row) {
  const int32_t* order = reinterpret_cast<const int32_t*>(reinterpret_cast<const char*>(&h) + h.order);
  const int64_t span = h.input != Input::kBlocks ? h.padded : h.group > 128 && (h.groups == 1 || h.group % 128 == 0) ? 128 : h.group;
  for (int64_t begin = 0; begin < h.columns; begin += span) {
    float most = 0;
    auto at = [&](int64_t k) -> float& { return row[h.order ? order[k] : k]; };
    const int64_t end = begin + span < h.columns ? begin + span : h.columns;
    for (int64_t k = begin; k < end; k++) most = std::fmax(most, std::fabs(at(k)));
    float scale = static_cast<float>(h.input_scale);
    if (h.input != Input::kStatic) scale = most / (h.input == Input::kBlocks ? 127.0f : 127.5f);
    if (scale == 0) continue;
    for (int64_t k = begin; k < end; k++) at(k) = std::nearbyint(std::fmin(std::fmax(at(k) / scale, -128.0f), 127.0f)) * scale;
  }
}

double worst(const Kernels& kernels, const Case& c, const Weight& w, int64_t rows) {
  const int64_t width = c.type == Float::kF32 ? 4 : 2;
  const auto x = std::make_unique<uint8_t[]>(rows * c.columns * width), out = std::make_unique<uint8_t[]>(rows * c.rows * width);
  std::vector<std::vector<float>> given(rows, std::vector<float>(c.columns));
  for (int64_t m = 0; m < rows; m++) {
    for (int64_t k = 0; k < c.columns; k++) {
      float value = (uniform() + uniform() + uniform() - 1.5f) * (k == 3 ? 8 : 1);
      if (std::fabs(value) < 1e-3f) value = 0.5f;
      uint8_t* const to = x.get() + (m * c.columns + k) * width;
      if (c.type == Float::kF32) std::memcpy(to, &value, 4);
      const uint16_t half = c.type == Float::kF16 ? f16(value) : bf16(value);
      if (c.type != Float::kF32) std::memcpy(to, &half, 2), value = c.type == Float::kF16 ? wide_f16(half) : from_bits(static_cast<uint32_t>(half) << 16);
      given[m][k] = value;
    }
    if (c.input != Input::kExact) round_like(w.header(), given[m]);
  }
  linear(kernels, w.header(), x.get(), rows, c.columns, c.type, out.get());
  std::vector<double> expected(rows * c.rows);
  double square = 0;
  for (int64_t m = 0; m < rows; m++)
    for (int64_t n = 0; n < c.rows; n++) {
      double sum = 0;
      for (int64_t k = 0; k < c.columns; k++) sum += given[m][k] * w.dense[n * c.columns + k];
      expected[m * c.rows + n] = sum, square += sum * sum;
    }
  const double usual = std::sqrt(square / static_cast<double>(expected.size()));
  double most = 0;
  for (size_t i = 0; i < expected.size(); i++) {
    float value;
    uint16_t half;
    if (c.type == Float::kF32) std::memcpy(&value, out.get() + 4 * i, 4);
    else std::memcpy(&half, out.get() + 2 * i, 2), value = c.type == Float::kF16 ? wide_f16(half) : from_bits(static_cast<uint32_t>(half) << 16);
    const double off = std::fabs(value - expected[i]), error = off / (std::fabs(expected[i]) + usual + 1e-3);
    most = error <= most ? most : error;  // NaN stays
  }
  return most;
}

constexpr Code kCodes[] = {Code::kInt1,   Code::kInt2,   Code::kInt3, Code::kInt4,      Code::kInt5, Code::kInt6, Code::kInt7, Code::kInt8,
                           Code::kTable3, Code::kTable4, Code::kE4M3, Code::kE4M3Fnuz, Code::kE5M2, Code::kE3M2, Code::kE2M3};
constexpr int64_t kGroups[] = {16, 32, 64, 96, 128, 0};
constexpr int64_t kShapes[][2] = {{1, 1}, {5, 33}, {16, 32}, {17, 96}, {40, 280}, {33, 1064}, {49, 2080}};

bool passes(const Kernels& kernels, int turns) {
  int cases = 0, wrong = 0;
  double most[3] = {};
  for (int turn = 0; turn < turns; turn++)
    for (const Code code : kCodes) {
      const bool integer = static_cast<int64_t>(code) <= 8, whole = integer || code == Code::kTable3 || code == Code::kTable4;
      const auto& shape = kShapes[below(7)];
      Case c{code, shape[0], shape[1], kGroups[below(6)], static_cast<Scale>(below(5)), Offset::kNone, Input::kExact, static_cast<Float>(below(3)), below(3) == 0};
      if (below(5) == 0 && c.group && 256 % c.group == 0) c.scale = Scale::kRuns;
      if (integer && bits_of(code) < 8 && below(3) == 0) c.offset = Offset::kZeroU8;
      if (integer && below(3) == 0) c.offset = Offset::kZeroS8;
      if (c.scale <= Scale::kBF16 && below(3) == 0) c.offset = Offset::kFloat;
      if (whole && below(2)) c.input = static_cast<Input>(1 + below(3));
      const Weight w = make(c);
      constexpr int64_t kRows[] = {1, 2, 3, 4, 7, 16, 17, 35};
      const int64_t rows = kRows[below(8)];
      const double error = worst(kernels, c, w, rows);
      const double bound = c.type == Float::kF32 ? 2e-5 : c.type == Float::kF16 ? 1e-3 : 8e-3;
      cases++;
      double& highest = most[static_cast<int>(c.type)];
      highest = error <= highest ? highest : error;
      if (!(error <= bound)) {
        wrong++;
        std::printf("%s: code %d, [%d, %d], group %d, scale %d, offset %d, input %d, type %d, %sordered, %d rows: error %.3g\n", kernels.name,
                    (int)c.code, (int)c.rows, (int)c.columns, (int)c.group, (int)c.scale, (int)c.offset, (int)c.input, (int)c.type, c.ordered ? "" : "not ", (int)rows, error);
      }
    }
  std::printf("%s: %d of %d cases wrong; greatest errors %.2g (float32), %.2g (float16), %.2g (bfloat16)\n", kernels.name, wrong, cases, most[0], most[1], most[2]);
  std::fflush(stdout);
  return !wrong;
}

// Blocks of ggml's are taken apart within their memory, and a scale that is no number is seen wherever it stands.
bool blocks_pass() {
  bool good = true;
  for (const BlockForm& form : kForms)
    for (const int64_t rows : {1, 16, 21}) {
      Header h{};
      const int64_t count = 512 / form.columns, groups = groups_of(form.stored), padded = (rows + 15) / 16 * 16;
      h.rows = rows, h.columns = h.padded = 512, h.group = form.columns / (groups ? groups : 1), h.groups = 512 / h.group;
      h.code = static_cast<Code>(form.low.bits + form.high.bits);
      const int64_t cells = padded * h.groups * (groups ? 1 : 2), above = has_half(form.stored) && groups ? padded * 2 * 2 : 0;
      h.codes = sizeof h, h.scales = h.codes + padded * 512 * bits_of(h.code) / 8, h.offsets = h.scales + cells;
      const int64_t end = h.offsets + cells;
      if (above) h.super_scales = end, h.super_offsets = end + above;
      const auto bytes = std::make_unique<uint8_t[]>(end + 2 * above);
      std::memcpy(bytes.get(), &h, sizeof h);
      const auto blocks = std::make_unique<uint8_t[]>(rows * count * form.bytes);
      for (int64_t i = 0; i < rows * count * form.bytes; i++) blocks[i] = static_cast<uint8_t>(below(256));
      auto scale = [&](int64_t block, uint8_t high) {
        uint8_t* const at = blocks.get() + block * form.bytes + form.half;
        if (!has_half(form.stored)) *at = high == 0x7c ? 255 : 100;
        else at[1] = high;
        if (has_half(form.stored) && has_minimum(form.stored) && form.stored != Stored::kSign) at[3] = 0x2c;
      };
      for (int64_t block = 0; block < rows * count; block++) scale(block, 0x2c);
      auto pack = [&] { return qcore_pack_blocks(reinterpret_cast<Header*>(bytes.get()), blocks.get(), count * form.bytes, form.type); };
      bool right = pack() == 1;
      scale(below(rows * count), 0x7c);
      right = pack() == 0 && right;
      if (!right) std::printf("blocks of type %d, %d rows: wrong\n", (int)form.type, (int)rows);
      good = right && good;
    }
  return good;
}

}  // namespace

int main(int count, char** arguments) {
  generator.seed(count > 1 ? static_cast<unsigned>(std::atoi(arguments[1])) : 1);
  bool good = blocks_pass();
  if (count > 2)
    for (int i = 2; i < count; i++) {
      const Kernels* const kernels = kernels_named(arguments[i]);
      if (!kernels) std::printf("%s: not on this processor\n", arguments[i]);
      good = kernels && passes(*kernels, 40) && good;
    }
  else
    for (const char* name : {"amx", "avx512", "avxvnni", "avx2"})
      if (const Kernels* const kernels = kernels_named(name)) good = passes(*kernels, 40) && good;
  return good ? 0 : 1;
}
