// What stands around the linear layers of a decoder, in float32: norms and activations.
#pragma once
#include <cmath>

#include "decoder.h"
#include "activations.h"

namespace qcore {
namespace QCORE_ISA {

inline void put(F16 value, Float type, void* out, int64_t place) {
  if (type == Float::kF32) store_f(static_cast<float*>(out) + place, value);
  else if (type == Float::kF16) narrow_f16(static_cast<uint16_t*>(out) + place, value);
  else narrow_bf16(static_cast<uint16_t*>(out) + place, value);
}

// Calls f(place, full) for runs of 16; of the last, `full` is how many count.
template <class F>
QCORE_INLINE void each_run(int64_t count, F&& f) {
  for (int64_t place = 0; place < count; place += 16) f(place, count - place < 16 ? count - place : 16);
}

inline F16 load_some(const float* from, int64_t count) {
  if (count == 16) return load_f(from);
  alignas(64) float values[16] = {};
  std::memcpy(values, from, count * 4);
  return load_f(values);
}

inline void put_some(F16 value, Float type, void* out, int64_t place, int64_t count) {
  if (count == 16) return put(value, type, out, place);
  alignas(64) float values[16];
  put(value, type, values, 0);
  std::memcpy(static_cast<char*>(out) + place * width_of(type), values, count * width_of(type));
}

// out = x / rms(x) * weight, or x itself where there is no weight.
inline void normalize(const float* x, const float* weight, int64_t count, float epsilon, Float type, void* out) {
  F16 factor = all_f(1);
  if (weight) {
    F16 squares = zero_f();
    each_run(count, [&](int64_t place, int64_t full) {
      const F16 value = load_some(x + place, full);
      squares = fma(value, value, squares);
    });
    factor = all_f(1.0f / std::sqrt(sum_of(squares) / static_cast<float>(count) + epsilon));
  }
  each_run(count, [&](int64_t place, int64_t full) {
    F16 value = load_some(x + place, full);
    if (weight) value = mul(mul(value, factor), load_some(weight + place, full));
    put_some(value, type, out, place, full);
  });
}

inline void narrow_values(const float* from, Float type, int64_t count, void* to) {
  each_run(count, [&](int64_t place, int64_t full) { put_some(load_some(from + place, full), type, to, place, full); });
}

// e^x: x = n ln 2 + r, a polynomial of degree 6 in r (Taylor's, |r| <= 0.35: 2e-7 of the value).
inline F16 exp_f(F16 x) {
  const F16 given = clamp_f(x, -87.0f, 88.0f);
  const F16 n = round_f(mul(given, all_f(1.44269504f)));
  F16 r = fma(n, all_f(-0.693145752f), given);
  r = fma(n, all_f(-1.42860677e-6f), r);
  F16 sum = all_f(1.0f / 720);
  for (const float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = fma(sum, r, all_f(factor));
  return as_float(add(as_int(sum), sll(to_int(n), 23)));
}

// to += from * factor
inline void add_scaled(const float* from, float factor, int64_t count, float* to) {
  each_run(count, [&](int64_t place, int64_t full) {
    put_some(fma(load_some(from + place, full), all_f(factor), load_some(to + place, full)), Float::kF32, to, place, full);
  });
}

// The two halves of `count` numbers, turned by their positions' angles.
inline void rotate(float* x, const float* cosines, const float* sines, int64_t count) {
  const int64_t half = count / 2;
  each_run(half, [&](int64_t i, int64_t full) {
    const F16 low = load_some(x + i, full), high = load_some(x + half + i, full);
    const F16 turned_low = sub_f(mul(low, load_some(cosines + i, full)), mul(high, load_some(sines + i, full)));
    const F16 turned_high = fma(high, load_some(cosines + half + i, full), mul(low, load_some(sines + half + i, full)));
    put_some(turned_low, Float::kF32, x, i, full);
    put_some(turned_high, Float::kF32, x, half + i, full);
  });
}

// out = activation(gate) * up
inline void activate(const float* gate, const float* up, int64_t count, int64_t kind, Float type, void* out) {
  each_run(count, [&](int64_t place, int64_t full) {
    const F16 x = load_some(gate + place, full);
    F16 inside = x;  // x * sigmoid(inside)
    if (static_cast<Activation>(kind) == Activation::kGeluTanh)  // (1 + tanh(t)) / 2 = sigmoid(2 t)
      inside = mul(mul(x, fma(mul(x, x), all_f(0.044715f), all_f(1))), all_f(2 * 0.7978845608f));
    const F16 sigmoid = div(all_f(1), add(all_f(1), exp_f(mul(inside, all_f(-1)))));
    put_some(mul(mul(x, sigmoid), load_some(up + place, full)), type, out, place, full);
  });
}

// out[i] = the product of row i of `count` and x, both of `columns`.
inline void score(const float* rows, int64_t count, const float* x, int64_t columns, float* out) {
  for (int64_t row = 0; row < count; row += 4) {
    const int64_t full = count - row < 4 ? count - row : 4;
    F16 sums[4] = {zero_f(), zero_f(), zero_f(), zero_f()};
    each_run(columns, [&](int64_t place, int64_t inside) {
      const F16 given = load_some(x + place, inside);
      for (int64_t i = 0; i < 4; i++) sums[i] = fma(given, load_some(rows + (row + (i < full ? i : 0)) * columns + place, inside), sums[i]);
    });
    alignas(16) float found[4];
    sums_of(sums, found);
    std::memcpy(out + row, found, full * sizeof(float));
  }
}

}  // namespace QCORE_ISA
}  // namespace qcore
