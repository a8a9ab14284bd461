// y = x W^T of int8 for many rows of x: blocks of rows of x and of the weight come through shared memory, 64 columns at a time, the next ones on their way in registers meanwhile.
//
// Of the instructions of a step of 64 columns, as NVRTC 12.9 orders them for tiles of 128 x 128: on sm_70 1024 of 1281 are dot products (IDP), each of which keeps its pipe for two
// cycles, so that 1281 issue in 2048; on sm_75 256 of 351 are products of tensor cores (IMMA), of four cycles each. Shared memory is busy for half of that time on sm_70, which reads 128
// bytes of it a cycle, and for three quarters on sm_75 at 64.
// A product's order of columns is free, for sums are exact: a thread reads 16 columns of a row at once, for both sides, and takes their words one after the other.
#pragma once

#include "int8_sums.cuh"

constexpr int kTogether = 8;  // blocks of rows of x that take turns at a block of the weight's rows: what blocks that run at a time read stays in the cache

// Where a vector of a row's four is. Two rows are a line of 128 bytes, all banks, whose vectors change places from one line to the next: eight threads that read a vector each use
// all banks where their rows follow each other, where they are every other row, and where they are two rows with all their vectors. The last three bits are the place in the line.
__device__ inline int place(u32 row, u32 vector) { return row / 2 * 8 + ((row % 2 * 4 + vector) ^ (row / 2 & 7)); }

// By dot products of four bytes: a thread has ROWS x OUTPUTS sums, of every (4 DOWN)-th row of x, and of pairs of the weight's. A block has DOWN x ACROSS warps.
template <int ROWS, int OUTPUTS, int DOWN, int ACROSS>
struct Dots {
  static constexpr int kRows = 4 * ROWS * DOWN, kOutputs = 8 * OUTPUTS * ACROSS;  // of a block
  int sums[ROWS][OUTPUTS] = {};
  int row = threadIdx.x / 32 / ACROSS * 4 + threadIdx.x % 32 / 8, output = threadIdx.x / 32 % ACROSS * 8 * OUTPUTS + threadIdx.x % 8 * 2;
  int of_x = place(row, 0), of_weight = place(kRows + output, 0);

  __device__ void multiply(const Vector* memory) {
    const Pair* halves = reinterpret_cast<const Pair*>(memory);
#pragma unroll 1
    for (int h = 0; h < 8; ++h) {
      Pair given[ROWS];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) given[i] = halves[(2 * of_x ^ h ^ (4 * DOWN * i & 15)) + 32 * DOWN * i];
#pragma unroll
      for (int j = 0; j < OUTPUTS; ++j) {
        const Pair codes = halves[(2 * of_weight ^ (j % 2 * 8 + h)) + j / 2 * 128];
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
          for (int i = 0; i < ROWS; ++i) sums[i][j] = dot(given[i].word[s], codes.word[s], sums[i][j]);
      }
    }
  }

  template <class T>
  __device__ void store_in(const Results& to, int m, int n) const {
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < OUTPUTS; j += 2) {
        const int pair[2] = {sums[i][j], sums[i][j + 1]};
        store<T>(to, pair, m + row + 4 * DOWN * i, n + output + j * 8);
      }
  }
};

// By tensor cores: a warp has ROWS x OUTPUTS products of 8 x 8. The weight's rows are dealt to products so that those of a thread follow each other.
template <int ROWS, int OUTPUTS, int DOWN, int ACROSS>
struct Tensors {
  static constexpr int kRows = 8 * ROWS * DOWN, kOutputs = 8 * OUTPUTS * ACROSS;
  int sums[ROWS][2 * OUTPUTS] = {};
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, row = threadIdx.x / 32 / ACROSS * 8 + g, output = threadIdx.x / 32 % ACROSS * 8 * OUTPUTS;
  int of_x = place(row, t), of_weight = place(kRows + output + g / 2 * 2 * OUTPUTS + g % 2, t);

  __device__ void multiply(const Vector* memory) {
    Vector given[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) given[i] = memory[(of_x ^ (4 * DOWN * i & 7)) + 32 * DOWN * i];
#pragma unroll
    for (int j = 0; j < OUTPUTS; ++j) {
      const Vector codes = memory[(of_weight ^ j) + 8 * j];
#pragma unroll
      for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int i = 0; i < ROWS; ++i) multiply_bytes(sums[i][2 * j], sums[i][2 * j + 1], given[i].word[s], codes.word[s]);
    }
  }

  template <class T>
  __device__ void store_in(const Results& to, int m, int n) const {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) store<T>(to, sums[i], m + row + 8 * DOWN * i, n + output + t * 2 * OUTPUTS);
  }
};

// x: int8 [M, K]. weight: int8 [N, K]. vectors: of 16 columns, of a row, a multiple of four. Unit: what multiplies. Blocks along x: one for each kRows of x and kOutputs of the weight.
template <class T, template <int, int, int, int> class Unit, int ROWS, int OUTPUTS, int DOWN, int ACROSS>
__device__ void tile(const Vector* x, const float* inputs, const Vector* weight, const float* scales, void* out, int M, int N, int vectors) {
  using Own = Unit<ROWS, OUTPUTS, DOWN, ACROSS>;
  constexpr int kRows = Own::kRows, kOutputs = Own::kOutputs, kThreads = DOWN * ACROSS * 32;
  constexpr int kVectors = (kRows + kOutputs) * 4, kEach = kVectors / kThreads, kGiven = kRows * 4 / kThreads;  // kEach: of a thread, the first kGiven of them x's
  static_assert(kVectors % kThreads == 0 && kRows * 4 % kThreads == 0 && kThreads % 64 == 0, "threads have whole vectors, at the same place in lines");
  __shared__ Vector memory[2][kVectors];
  const int steps = vectors / 4;
  const int down = (M + kRows - 1) / kRows, turn = (N + kOutputs - 1) / kOutputs * kTogether, before = blockIdx.x / turn * kTogether;
  const int beside = down - before < kTogether ? down - before : kTogether;
  const int row = (before + blockIdx.x % turn % beside) * kRows, output = blockIdx.x % turn / beside * kOutputs;
  const int first = steps * blockIdx.y / gridDim.y, end = steps * (blockIdx.y + 1) / gridDim.y;
  wait_for_earlier();
  let_later_begin();

  const Vector* given = x + static_cast<long long>(row) * vectors + first * 4;
  const Vector* codes = weight + static_cast<long long>(output) * vectors + first * 4;
  int from[kEach];  // rows behind the last one are its copies, and not stored
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int r = (i * kThreads + static_cast<int>(threadIdx.x)) / 4 - (i < kGiven ? 0 : kRows), last = i < kGiven ? M - 1 - row : N - 1 - output;
    from[i] = (r < last ? r : last) * vectors + threadIdx.x % 4;
  }
  Vector held[kEach];
  const auto fetch = [&] {
#pragma unroll
    for (int i = 0; i < kEach; ++i) held[i] = (i < kGiven ? given : codes)[from[i]];
    given += 4, codes += 4;
  };
  const int own = place(threadIdx.x / 4, threadIdx.x % 4);
  const auto keep = [&](int side) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) memory[side][own + i * kThreads] = held[i];
  };

  Own unit;
  fetch();
  keep(0);
  __syncthreads();
  for (int step = first, side = 0; step < end; ++step, side ^= 1) {
    const bool more = step + 1 < end;
    if (more) fetch();
    unit.multiply(memory[side]);
    if (more) keep(side ^ 1);  // all have read it before the last barrier
    __syncthreads();
  }
  unit.template store_in<T>({inputs, scales, out, M, N}, row, output);
}
