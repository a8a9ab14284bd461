// Rows of activations rounded to int8 with a float32 scale each, the arithmetic that of qcore.kernels.activations to the last bit: divided by the scale, clamped, and rounded half to even.
#pragma once

constexpr int kThreads = 256;

// A block has one row of x, T [gridDim.x, K], whose rows are `stride` numbers apart; EVEN says that vectors of eight may be read. codes: int8 [gridDim.x, 8 units], zeros behind
// column K. scales: [gridDim.x]. given: [1], the scale where it is not `dynamic`.
// The row is read twice, the second time from a cache. Magnitudes are compared as whole numbers, of which those of what is no number are the largest: such a row has no scale.
template <class T>
__device__ void round_rows(const u16* x, const float* given, Pair* codes, float* scales, int K, int stride, int units, int dynamic, int even) {
  __shared__ u32 parts[kThreads / 32];
  const u16* row = x + static_cast<long long>(blockIdx.x) * stride;
  const auto load = [&](int unit) {
    Vector numbers = {};
    if (even) {
      if (unit * 8 < K) numbers = reinterpret_cast<const Vector*>(row)[unit];
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (unit * 8 + i < K) numbers.word[i / 2] |= static_cast<u32>(row[unit * 8 + i]) << i % 2 * 16;
    }
    return numbers;
  };
  const auto greater = [](u32 a, u32 b) { return a > b ? a : b; };
  wait_for_earlier();
  let_later_begin();

  u32 most = 0;
  for (int unit = threadIdx.x; unit < units; unit += kThreads) {
    const Vector numbers = load(unit);
#pragma unroll
    for (int i = 0; i < 4; ++i) most = greater(most, greater(numbers.word[i] & 0x7fff, numbers.word[i] >> 16 & 0x7fff));
  }
#pragma unroll
  for (int bits = 16; bits; bits /= 2) most = greater(most, of_lane(most, bits));
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) most = greater(most, parts[warp]);

  const float largest = T::wide(static_cast<u16>(most)), infinity = as_float(0x7f800000);
  float scale = dynamic ? largest / 127.5f : *given;
  if (scale == 0 && dynamic) scale = as_float(0x34000000);  // 2^-23: a row of zeros has none of its own
  for (int unit = threadIdx.x; unit < units; unit += kThreads) {
    const Vector numbers = load(unit);
    Pair eight = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float number = T::wide(static_cast<u16>(numbers.word[i / 2] >> i % 2 * 16)) / scale;
      const float held = number > 127.f ? 127.f : number < -128.f ? -128.f : number;
      eight.word[i / 4] |= (as_bits(held + 12582912.f) & 0xff) << i % 4 * 8;  // 1.5 x 2^23: the whole number is in the last bits of the sum
    }
    codes[static_cast<long long>(blockIdx.x) * units + unit] = eight;
  }
  if (threadIdx.x == 0) scales[blockIdx.x] = largest != largest || scale == infinity ? as_float(0x7fc00000) : scale;
}
