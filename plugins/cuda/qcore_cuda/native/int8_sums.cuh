// What products of int8 do with their sums, which are exact: scaled and stored, or stored as they are where blocks share columns; and the product of a few rows of x.
#pragma once

// scales: of the weight's rows [N]. inputs: of x's rows [M]. out: T [M, N], or int32 [gridDim.y, M, N] where blocks along y share columns.
struct Results {
  const float* inputs;
  const float* scales;
  void* out;
  int M, N;
};

template <int n>
struct alignas(4 * n) Words {
  u32 word[n];
};

__device__ inline float scaled(int sum, float scale, float input) { return static_cast<float>(sum) * scale * input; }

// Sums of a row of x and COUNT of the weight's, from one on which COUNT divides.
template <class T, int COUNT>
__device__ inline void store(const Results& to, const int (&sums)[COUNT], int m, int n) {
  if (m >= to.M) return;
  if (gridDim.y > 1) {
    constexpr int kTogether = COUNT < 4 ? COUNT : 4;
    int* at = static_cast<int*>(to.out) + (static_cast<long long>(blockIdx.y) * to.M + m) * to.N + n;
#pragma unroll
    for (int i = 0; i < COUNT; i += kTogether) {
      if (to.N % kTogether == 0 && n + i < to.N) {
        Words<kTogether> words;
#pragma unroll
        for (int j = 0; j < kTogether; ++j) words.word[j] = static_cast<u32>(sums[i + j]);
        *reinterpret_cast<Words<kTogether>*>(at + i) = words;
      } else {
#pragma unroll
        for (int j = 0; j < kTogether; ++j)
          if (n + i + j < to.N) at[i + j] = sums[i + j];
      }
    }
    return;
  }
  constexpr int kTogether = COUNT < 8 ? COUNT : 8;
  const float input = to.inputs[m];
  u16* at = static_cast<u16*>(to.out) + static_cast<long long>(m) * to.N + n;
#pragma unroll
  for (int i = 0; i < COUNT; i += kTogether) {
    Words<kTogether / 2> words;
#pragma unroll
    for (int j = 0; j < kTogether; j += 2) {
      const float first = n + i + j < to.N ? to.scales[n + i + j] : 0, second = n + i + j + 1 < to.N ? to.scales[n + i + j + 1] : 0;
      words.word[j / 2] = T::pair(scaled(sums[i + j], first, input), scaled(sums[i + j + 1], second, input));
    }
    if (to.N % kTogether == 0 && n + i < to.N) {
      *reinterpret_cast<Words<kTogether / 2>*>(at + i) = words;
    } else {
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        if (n + i + j < to.N) at[i + j] = static_cast<u16>(words.word[j / 2] >> j % 2 * 16);
    }
  }
}

// out: T [M, N] of parts, int32 [shares, M, N]. A thread has one.
template <class T>
__device__ void add_shares(const int* parts, const float* inputs, const float* scales, u16* out, int shares, int M, int N) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  wait_for_earlier();
  let_later_begin();
  if (i >= M * N) return;
  int sum = 0;
  for (int share = 0; share < shares; ++share) sum += parts[static_cast<long long>(share) * M * N + i];
  const float result = scaled(sum, scales[i % N], inputs[i / N]);
  out[i] = static_cast<u16>(T::pair(result, result));
}
