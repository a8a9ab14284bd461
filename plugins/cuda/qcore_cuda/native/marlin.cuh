// Weight-only products y = x W^T for few rows of x. The weight lies in memory as the matrix unit's left side wants it in registers: a warp reads 512
// bytes in a row, and each thread decodes its own into pairs of 16-bit floats with a handful of instructions for eight of them.
//
// Source of the idea: Frantar et al., "MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on LLMs" (2024), and Kim et al., "Who Says
// Elephants Can't Run" (2022), for decoding by masks. Here weights are the left side, so that eight rows of x suffice for a product, columns are
// permuted so that a thread's part of x is 32 bytes in a row, and whole numbers are multiplied: sums of a group are scaled.
//
// A chunk is 16 rows by 64 columns, of a warp. Thread (g = lane / 4, t = lane % 4) has of rows g and g + 8 the columns 16 t .. 16 t + 15; product s of the four
// takes columns 16 t + 4 s and the three after it: registers 0 to 3 are (row g, first two), (g + 8, first two), (g, last two), (g + 8, last two).
#pragma once

// Decoded<T>::step(words, s, zero): the four registers of product s, before they are scaled.

template <class T>
struct Int4;  // one word for a product: bits 0, 4, 8, 12 hold the first of registers 0 to 3, bits 16 .. 28 the second

template <>
struct Int4<Half> {
  static constexpr int kVectors = 1;
  static constexpr float kFactor = 1;
  u32 low[2], high[2];  // of rows g and g + 8: 1024 + z, and -(64 + z)
  __device__ void zeros(u32 first, u32 second) {
    u32 zero[2] = {first, second};
    for (int i = 0; i < 2; ++i) {
      low[i] = (0x6400 | zero[i]) * 0x10001;
      high[i] = (0xd400 | zero[i] << 4) * 0x10001;
    }
  }
  __device__ void step(const Vector* words, int s, u32 (&a)[4]) const {
    u32 q = words->word[s];
    a[0] = Half::subtracted(masked<0x000f000f, 0x64006400>(q), low[0]);
    a[1] = Half::fused(masked<0x00f000f0, 0x64006400>(q), 0x2c002c00, high[1]);
    q >>= 8;
    a[2] = Half::subtracted(masked<0x000f000f, 0x64006400>(q), low[0]);
    a[3] = Half::fused(masked<0x00f000f0, 0x64006400>(q), 0x2c002c00, high[1]);
  }
};

template <>
struct Int4<Brain> {
  static constexpr int kVectors = 1;
  static constexpr float kFactor = 1;
  u32 low[2];  // -(128 + z)
  __device__ void zeros(u32 first, u32 second) {
    low[0] = (0xc300 | first) * 0x10001;
    low[1] = (0xc300 | second) * 0x10001;
  }
  __device__ void step(const Vector* words, int s, u32 (&a)[4]) const {
    u32 q = words->word[s];
    for (int i = 0; i < 4; ++i) a[i] = Brain::fused(masked<0x000f000f, 0x43004300>(q >> 4 * i), 0x3f803f80, low[i % 2]);
  }
};

template <class T>
struct Int8;  // two words: bytes 0 and 1 are register 0 (or 2), bytes 2 and 3 register 1 (or 3); 128 is added to codes

template <>
struct Int8<Half> {
  static constexpr int kVectors = 2;
  static constexpr float kFactor = 1;
  __device__ void zeros(u32, u32) {}
  __device__ void step(const Vector* words, int s, u32 (&a)[4]) const {
    for (int i = 0; i < 4; ++i) {
      u32 q = words[s / 2].word[s % 2 * 2 + i / 2];
      a[i] = Half::subtracted(permuted(q, 0x64646464, i % 2 ? 0x4342 : 0x4140), 0x64806480);
    }
  }
};

template <>
struct Int8<Brain> {
  static constexpr int kVectors = 2;
  static constexpr float kFactor = 1;
  __device__ void zeros(u32, u32) {}
  __device__ void step(const Vector* words, int s, u32 (&a)[4]) const {
    for (int i = 0; i < 4; ++i) {
      u32 q = words[s / 2].word[s % 2 * 2 + i / 2];
      float first = as_float(permuted(q, 0x4b000000, i % 2 ? 0x7652 : 0x7650)) - 8388736.0f;
      float second = as_float(permuted(q, 0x4b000000, i % 2 ? 0x7653 : 0x7651)) - 8388736.0f;
      a[i] = Brain::pair(first, second);
    }
  }
};

template <class T>
struct Float8;  // e4m3, two words: bytes 1 and 3 are register 0 (or 2), bytes 0 and 2 register 1 (or 3)

template <>
struct Float8<Half> {
  static constexpr int kVectors = 2;
  static constexpr float kFactor = 256;  // exponents count from 8 lower
  __device__ void zeros(u32, u32) {}
  __device__ void step(const Vector* words, int s, u32 (&a)[4]) const {
    for (int i = 0; i < 4; ++i) {
      u32 q = words[s / 2].word[s % 2 * 2 + i / 2] << (i % 2 ? 8 : 0);
      a[i] = (q & 0x80008000) | (q & 0x7f007f00) >> 1;
    }
  }
};

template <>
struct Float8<Brain> {
  static constexpr int kVectors = 2;
  static constexpr float kFactor = 1;
  __device__ void zeros(u32, u32) {}
  __device__ void step(const Vector* words, int s, u32 (&a)[4]) const {
    for (int i = 0; i < 4; ++i) {
      u32 q = words[s / 2].word[s % 2 * 2 + i / 2] << (i % 2 ? 8 : 0);
      a[i] = Brain::fused((q & 0x80008000) | (q & 0x7f007f00) >> 4, 0x7b807b80, 0x80008000);  // times 2^120
    }
  }
};

constexpr int kWarps = 8;
constexpr int kAhead = 4;  // chunks whose weights are on their way; as many may be read behind the last one

// out: T [M, N], or float32 [gridDim.y, M, N] where sums are shared. x: T [M, K]. weight: chunks, those of a row of chunks together. scales: S [groups, N].
// zeros: u8 [groups, N] where ZEROS; otherwise `center` is subtracted. chunks: of a row. GROUP: chunks of a group, 0: all. A block has 16 rows of the
// weight and TOKENS x 8 rows of x; its warps share the groups, or the chunks where all are one group, and so do blocks along y.
template <template <class> class Code, class T, class S, int TOKENS, int GROUP, bool ZEROS>
__device__ void multiply(const u16* x, const Vector* weight, const void* scales, const u8* zeros, void* out, int M, int N, int chunks, int center) {
  constexpr int kUnit = GROUP ? GROUP : 1, kBody = kUnit > kAhead ? kUnit : kAhead, kVectors = Code<T>::kVectors;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int row = blockIdx.x * 16, token = blockIdx.z * TOKENS * 8;
  const int workers = gridDim.y * kWarps, worker = blockIdx.y * kWarps + warp;
  const int units = (chunks + kUnit - 1) / kUnit;
  const int first = static_cast<int>(static_cast<long long>(units) * worker / workers) * kUnit;
  const int end = static_cast<int>(static_cast<long long>(units) * (worker + 1) / workers) * kUnit;
  int left = (end < chunks ? end : chunks) - first;

  weight += (static_cast<long long>(blockIdx.x) * chunks + first) * kVectors * 32 + lane;
  long long place = static_cast<long long>(GROUP ? first / kUnit : 0) * N + row + g;
  const Vector* given[TOKENS];
#pragma unroll
  for (int n = 0; n < TOKENS; ++n) {
    const int m = token + n * 8 + g;  // rows behind the last one are its copies, and not stored
    given[n] = reinterpret_cast<const Vector*>(x + (static_cast<long long>(m < M ? m : M - 1) * chunks + first) * 64 + t * 16);
  }

  float total[TOKENS][4] = {};
  float sums[TOKENS][4] = {};
  Code<T> code;
  Vector held[kAhead][kVectors];
  const auto fetch = [&](int chunk) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) held[chunk % kAhead][v] = load_once(weight + (chunk * kVectors + v) * 32);
  };
  const auto begin_group = [&] {
    if constexpr (ZEROS)
      code.zeros(zeros[place], zeros[place + 8]);
    else
      code.zeros(center, center);
  };
  const auto end_group = [&] {
    const float scale[2] = {S::at(scales, place) * Code<T>::kFactor, S::at(scales, place + 8) * Code<T>::kFactor};
#pragma unroll
    for (int n = 0; n < TOKENS; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        total[n][j] += sums[n][j] * scale[j / 2];
        sums[n][j] = 0;
      }
    place += N;
  };
  // kBody chunks, or those that are left where `guarded`, a constant once this is inlined.
  const auto body = [&](bool guarded) {
#pragma unroll
    for (int chunk = 0; chunk < kBody; ++chunk) {
      if (guarded && chunk >= left) break;
      if (GROUP && chunk % kUnit == 0) begin_group();
      u32 decoded[4][4];
#pragma unroll
      for (int s = 0; s < 4; ++s) code.step(held[chunk % kAhead], s, decoded[s]);
      fetch(chunk + kAhead);
#pragma unroll
      for (int n = 0; n < TOKENS; ++n) {
        const Vector part[2] = {given[n][chunk * 8], given[n][chunk * 8 + 1]};
#pragma unroll
        for (int s = 0; s < 4; ++s) T::multiply(sums[n], decoded[s], part[s / 2].word[s % 2 * 2], part[s / 2].word[s % 2 * 2 + 1]);
      }
      if (GROUP && (chunk % kUnit == kUnit - 1 || (guarded && chunk == left - 1))) end_group();
    }
    weight += kBody * kVectors * 32;
#pragma unroll
    for (int n = 0; n < TOKENS; ++n) given[n] += kBody * 8;
    left -= kBody;
  };
  if (!GROUP) begin_group();
  if (left > 0) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) fetch(i);
    while (left >= kBody) body(false);
    if (left > 0) body(true);
  }
  if (!GROUP) end_group();

  __shared__ float parts[kWarps][128];
#pragma unroll
  for (int n = 0; n < TOKENS; ++n) {
    for (int j = 0; j < 4; ++j) parts[warp][(2 * t + j % 2) * 16 + g + j / 2 * 8] = total[n][j];
    __syncthreads();
    const int m = token + n * 8 + threadIdx.x / 16;
    if (threadIdx.x < 128 && m < M) {
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += parts[w][threadIdx.x];
      const long long to = static_cast<long long>(m) * N + row + threadIdx.x % 16;
      if (gridDim.y > 1)
        static_cast<float*>(out)[static_cast<long long>(blockIdx.y) * M * N + to] = sum;
      else
        static_cast<u16*>(out)[to] = static_cast<u16>(T::pair(sum, sum));
    }
    __syncthreads();
  }
}

// Rows of the weight made dense: T [rows, K] from row `start` on, which 16 divides. A warp has one chunk.
template <template <class> class Code, class T, class S, int GROUP, bool ZEROS>
__device__ void make_dense(
    const Vector* weight, const void* scales, const u8* zeros, u16* out, int start, int rows, int N, int chunks, int center) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int chunk = blockIdx.x * kWarps + threadIdx.x / 32, row = start + blockIdx.y * 16;
  if (chunk >= chunks || row >= start + rows) return;
  Code<T> code;
  const long long group = static_cast<long long>(GROUP ? chunk / GROUP : 0) * N + row + g;
  if constexpr (ZEROS)
    code.zeros(zeros[group], zeros[group + 8]);
  else
    code.zeros(center, center);
  Vector words[Code<T>::kVectors];
  for (int v = 0; v < Code<T>::kVectors; ++v)
    words[v] = load_once(weight + ((static_cast<long long>(row / 16) * chunks + chunk) * Code<T>::kVectors + v) * 32 + lane);
  for (int s = 0; s < 4; ++s) {
    u32 a[4];
    code.step(words, s, a);
    for (int i = 0; i < 4; ++i) {
      const float scale = S::at(scales, group + i % 2 * 8) * Code<T>::kFactor;
      const long long place = (static_cast<long long>(row - start + g + i % 2 * 8) * chunks + chunk) * 64 + t * 16 + s * 4 + i / 2 * 2;
      for (int j = 0; j < 2; ++j) out[place + j] = static_cast<u16>(T::pair(T::wide(static_cast<u16>(a[i] >> 16 * j)) * scale, 0));
    }
  }
}
