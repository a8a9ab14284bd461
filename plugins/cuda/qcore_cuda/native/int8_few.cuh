// y = x W^T of int8 for a few rows of x, by dot products of four bytes: the weight is read once, 16 bytes a thread, as it is stored, and x from the first cache.
#pragma once

#include "int8_sums.cuh"

constexpr int kWarps = 8, kOutputs = 4;  // kOutputs: of a warp; together they have 2^5

// Lane l gets the sum over all lanes of counts[l * COUNT / 32]. COUNT: a power of two, of 32 at most. Lanes give away half of what they have, and so they end with one.
template <int COUNT, int BITS = 16>
__device__ inline int sum_across(const int* counts) {
  if constexpr (COUNT == 1) {
    int sum = counts[0];
#pragma unroll
    for (int bits = BITS; bits; bits /= 2) sum += static_cast<int>(of_lane(static_cast<u32>(sum), bits));
    return sum;
  } else {
    const bool upper = threadIdx.x & BITS;
    int halves[COUNT / 2];
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
      const int low = counts[i], high = counts[i + COUNT / 2];
      halves[i] = (upper ? high : low) + static_cast<int>(of_lane(static_cast<u32>(upper ? low : high), BITS));
    }
    return sum_across<COUNT / 2, BITS / 2>(halves);
  }
}

// x: int8 [M, K], M at most TOKENS. weight: int8 [N, K]. vectors: of 16 columns, of a row. 2^shift warps share columns; the others of a block have rows of their own.
template <class T, int TOKENS>
__device__ void few(const Vector* x, const float* inputs, const Vector* weight, const float* scales, void* out, int M, int N, int vectors, int shift) {
  constexpr int kCount = TOKENS * kOutputs, kAtOnce = kCount < 32 ? kCount : 32;
  __shared__ int parts[kWarps][kCount];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, own = kWarps * kOutputs >> shift, begin = blockIdx.x * own;
  const Vector *from[kOutputs], *given[TOKENS];
  wait_for_earlier();
  let_later_begin();
#pragma unroll
  for (int r = 0; r < kOutputs; ++r) {
    const int n = begin + (warp >> shift) * kOutputs + r;
    from[r] = weight + static_cast<long long>(n < N ? n : N - 1) * vectors;
  }
#pragma unroll
  for (int m = 0; m < TOKENS; ++m) given[m] = x + static_cast<long long>(m < M ? m : M - 1) * vectors;

  int sums[TOKENS][kOutputs] = {};
  for (int v = (warp & (1 << shift) - 1) * 32 + lane; v < vectors; v += 32 << shift) {
    Vector codes[kOutputs];
#pragma unroll
    for (int r = 0; r < kOutputs; ++r) codes[r] = load_once(from[r] + v);
#pragma unroll
    for (int m = 0; m < TOKENS; ++m) {
      const Vector row = given[m][v];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int r = 0; r < kOutputs; ++r) sums[m][r] = dot(row.word[i], codes[r].word[i], sums[m][r]);
    }
  }
#pragma unroll
  for (int first = 0; first < kCount; first += kAtOnce) {
    int counts[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) counts[i] = sums[(first + i) / kOutputs][(first + i) % kOutputs];
    const int sum = sum_across<kAtOnce>(counts);
    if (lane % (32 / kAtOnce) == 0) parts[warp][first + lane / (32 / kAtOnce)] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < TOKENS * own; i += kWarps * 32) {
    const int m = i >> 5 - shift, r = i & own - 1;
    if (m >= M || begin + r >= N) continue;
    int sum = 0;
    for (int other = 0; other < 1 << shift; ++other) sum += parts[(r / kOutputs << shift) + other][m * kOutputs + r % kOutputs];
    const float result = scaled(sum, scales[begin + r], inputs[m]);
    static_cast<u16*>(out)[static_cast<long long>(m) * N + begin + r] = static_cast<u16>(T::pair(result, result));
  }
}
