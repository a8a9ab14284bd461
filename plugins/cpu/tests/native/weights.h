// Packed weights of random contents, and the numbers that they stand for.
#pragma once
#include <algorithm>
#include <cstdio>
#include <memory>
#include <vector>

#include "linear.h"
#include "numbers.h"

extern "C" void qcore_pack_codes(qcore::Header*, const uint8_t*, int64_t, int64_t, int64_t, int64_t, const int32_t*, int64_t);

namespace qcore {

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
  std::vector<double> rounded;       // the same, a table's entries in bfloat16, as many rows of that type have them; or empty
  const Header& header() const { return *reinterpret_cast<const Header*>(bytes.get()); }
};

// Random codes, scales and offsets.
inline Weight make(const Case& c) {
  Header h{};
  h.magic = kMagic, h.version = kVersion, h.rows = c.rows, h.columns = c.columns, h.padded = (c.columns + 31) / 32 * 32;
  h.code = c.code, h.group = c.group && c.group < h.padded ? c.group : h.padded, h.groups = (h.padded + h.group - 1) / h.group;
  h.scale = c.scale, h.offset = c.offset, h.input = c.input, h.coarse_group = 1, h.tensor_scale = 1;
  const int bits = bits_of(c.code);
  const bool integer = static_cast<int64_t>(c.code) <= 8, table = c.code == Code::kTable3 || c.code == Code::kTable4;
  if (integer && bits < 8) h.zero = below(1 << bits);
  if (c.input == Input::kStatic || c.input == Input::kFloatStatic) h.input_scale = 0.02;
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
  Weight w{std::make_unique<uint8_t[]>(place), std::vector<double>(c.rows * c.columns), std::vector<double>(table ? c.rows * c.columns : 0)};
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
  enum Scales { kEven, kWithZeros, kUneven, kExtreme };  // the last where a float16 need not hold them
  const Scales scales = static_cast<Scales>(below(4));
  for (int64_t n = 0; n < c.rows; n++)
    for (int64_t g = 0; g < h.groups; g++) {
      const int64_t cell = (n / 16 * h.groups + g) * 16 + n % 16;
      double scale = 0.01 + 0.02 * uniform(), offset = 0, zero = 0;
      if (scales == kWithZeros) scale *= static_cast<double>(below(3)) - 1;
      if (scales == kUneven) scale = std::ldexp(scale, static_cast<int>(below(12)) - 6);
      if (scales == kExtreme && c.scale != Scale::kF16 && c.type != Float::kF16 && below(4) == 0) scale = std::ldexp(scale, below(2) ? 40 : -40);
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
        if (table) w.rounded[n * c.columns + order[k]] = from_bits(static_cast<uint32_t>(bf16(entries[q])) << 16) * scale + offset;
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

// Blocks whose codes name tuples (grid_cases.cpp).
Weight grid_weight(int64_t rows, int64_t columns, Input input);

// What the kernels' input stands for: float32 [rows][columns] in the packed order's runs.
inline void round_like(const Header& h, std::vector<float>& row) {
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

// The same of e4m3.
inline void round_like_float8(const Header& h, std::vector<float>& row) {
  const int64_t span = h.input == Input::kFloatBlocks ? 128 : h.padded;
  for (int64_t begin = 0; begin < h.columns; begin += span) {
    const int64_t end = begin + span < h.columns ? begin + span : h.columns;
    float most = 0, scale = static_cast<float>(h.input_scale);
    for (int64_t k = begin; k < end; k++) most = std::fmax(most, std::fabs(row[k]));
    if (h.input != Input::kFloatStatic) scale = most / 448;
    if (scale == 0) continue;
    for (int64_t k = begin; k < end; k++) {
      const double value = std::fmin(std::fmax(row[k] / scale, -448.0f), 448.0f);
      const double step = std::ldexp(1, std::max(std::ilogb(value == 0 ? 1e-9 : value), -6) - 3);
      row[k] = static_cast<float>(std::nearbyint(value / step) * step) * scale;
    }
  }
}

// The greatest error of a product of `rows` random rows.
inline double worst(const Kernels& kernels, Float type, const Weight& w, int64_t rows) {
  const Header& h = w.header();
  const auto x = std::make_unique<uint8_t[]>(rows * h.columns * width_of(type)), out = std::make_unique<uint8_t[]>(rows * h.rows * width_of(type));
  std::vector<std::vector<float>> given(rows, std::vector<float>(h.columns));
  for (int64_t m = 0; m < rows; m++) {
    for (int64_t k = 0; k < h.columns; k++) {
      const float value = (uniform() + uniform() + uniform() - 1.5f) * (k == 3 ? 8 : 1);
      given[m][k] = write_float(x.get(), type, m * h.columns + k, std::fabs(value) < 1e-3f ? 0.5f : value);
    }
    if (is_whole(h.input)) round_like(h, given[m]);
    if (is_float8(h.input)) round_like_float8(h, given[m]);
  }
  linear(kernels, h, {x.get(), rows, h.columns, type}, out.get());
  auto error_from = [&](const std::vector<double>& dense) {
    Errors errors;
    for (int64_t m = 0; m < rows; m++)
      for (int64_t n = 0; n < h.rows; n++) {
        double sum = 0;
        for (int64_t k = 0; k < h.columns; k++) sum += given[m][k] * dense[n * h.columns + k];
        errors.add(read_float(out.get(), type, m * h.rows + n), sum);
      }
    return errors.greatest();
  };
  const double error = error_from(w.dense);
  return type == Float::kBF16 && !w.rounded.empty() ? std::fmin(error, error_from(w.rounded)) : error;
}

}  // namespace qcore
