// LLM.int8: columns of x in which a magnitude reaches a threshold are kept as they are and meet the weight's codes in float32; what is left of a row is rounded to int8. The arithmetic of
// codes and scales is that of qcore.kernels.llm_int8.
// x: T [M, K], whose rows are `stride` numbers apart. least: the threshold's bits. kept: a byte for each column, 1 where it is kept, [16 vectors].
#pragma once

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kInfinity = 0x7c00;  // of a float16; what is greater is no number
constexpr int kMarked = 32;        // rows of a block that marks
constexpr int kRows = 8;           // of x, that a thread of `add_outliers` has
constexpr int kMost = 1 << 17;     // columns, of which sums of products of bytes fit into 32 bits

// kept: zeros before. Blocks along x have a column a thread, those along y kMarked rows.
__device__ void mark(const u16* x, u8* kept, int M, int K, int stride, int least) {
  const int column = blockIdx.x * kThreads + threadIdx.x, begin = blockIdx.y * kMarked;
  wait_for_earlier();
  let_later_begin();
  if (column >= K) return;
  bool found = false;
  for (int m = begin; m < M && m < begin + kMarked; ++m) {
    const int magnitude = x[static_cast<long long>(m) * stride + column] & 0x7fff;
    found |= magnitude >= least && magnitude <= kInfinity;
  }
  if (found) kept[column] = 1;
}

// A block has one row of x. codes: int8 [M, 16 vectors], zeros in columns that are kept and behind column K. scales: [M].
template <class T>
__device__ void round_inside(const u16* x, const u8* kept, u8* codes, float* scales, int K, int stride, int vectors, int least) {
  __shared__ int parts[kWarps];
  const u16* row = x + static_cast<long long>(blockIdx.x) * stride;
  wait_for_earlier();
  let_later_begin();
  int most = 0;
  for (int column = threadIdx.x; column < K; column += kThreads) {
    const int magnitude = row[column] & 0x7fff;
    if (magnitude > most && (magnitude < least || magnitude > kInfinity)) most = magnitude;
  }
#pragma unroll
  for (int bits = 16; bits; bits /= 2) {
    const int other = static_cast<int>(of_lane(static_cast<u32>(most), bits));
    most = other > most ? other : most;
  }
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) most = parts[warp] > most ? parts[warp] : most;

  const float largest = T::wide(static_cast<u16>(most)), steps = most && most <= kInfinity ? times(1.f / largest, 127.f) : 0;
  for (int column = threadIdx.x; column < 16 * vectors; column += kThreads) {
    const bool inside = column < K && !kept[column];
    const float number = inside ? times(T::wide(row[column]), steps) : 0.f;
    codes[static_cast<long long>(blockIdx.x) * 16 * vectors + column] = static_cast<u8>(as_bits(number + 12582912.f));  // 1.5 x 2^23
  }
  if (threadIdx.x == 0) scales[blockIdx.x] = largest * static_cast<float>(6.200124e-05 * 127.0);
}

// out: T [M, N], to which products of the columns that are kept are added. weight: int8 [N, 16 vectors]. Blocks along x: of 32 outputs, whose columns warps share; those along y take
// turns at kRows rows of x.
template <class T>
__device__ void add_outliers(
    const u16* x, const Vector* kept, const u8* weight, const float* scales, u16* out, int M, int N, int stride, int vectors) {
  __shared__ Vector masks[kMost / 128];  // a bit for each column
  __shared__ float parts[kWarps][kRows][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = blockIdx.x * 32 + lane, words = (vectors + 7) / 8;
  const u8* codes = weight + static_cast<long long>(n < N ? n : N - 1) * 16 * vectors;
  wait_for_earlier();
  let_later_begin();
  for (int v = threadIdx.x; v < words * 8; v += kThreads) {
    u32 mask = 0;
    if (v < vectors) {
      const Vector flags = kept[v];
#pragma unroll
      for (int i = 0; i < 16; ++i) mask |= (flags.word[i / 4] >> i % 4 * 8 & 1) << i;
    }
    reinterpret_cast<u16*>(masks)[v] = static_cast<u16>(mask);
  }
  __syncthreads();
  for (int begin = blockIdx.y * kRows; begin < M; begin += gridDim.y * kRows) {
    float sums[kRows] = {};
    bool found = false;
    for (int i = 0; i < words; ++i) {
      const Vector mask = masks[i];
      if (!(mask.word[0] | mask.word[1] | mask.word[2] | mask.word[3])) continue;
      found = true;
      for (int bit = warp; bit < 128; bit += kWarps) {
        if (!(masks[i].word[bit / 32] >> bit % 32 & 1)) continue;
        const float code = static_cast<float>(static_cast<signed char>(codes[i * 128 + bit]));
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          if (begin + r < M) sums[r] += T::wide(x[static_cast<long long>(begin + r) * stride + i * 128 + bit]) * code;
      }
    }
    if (!found) return;  // so for the whole block
#pragma unroll
    for (int r = 0; r < kRows; ++r) parts[warp][r][lane] = sums[r];
    __syncthreads();
    static_assert(kRows == kWarps, "a warp adds a row");
    if (begin + warp < M && n < N) {
      float sum = 0;
      for (int other = 0; other < kWarps; ++other) sum += parts[other][warp][lane];
      u16* to = out + static_cast<long long>(begin + warp) * N + n;
      sum = T::wide(*to) + sum * scales[n];
      *to = static_cast<u16>(T::pair(sum, sum));
    }
    __syncthreads();
  }
}
