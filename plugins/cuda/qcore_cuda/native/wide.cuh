// y = x W^T for some tens of rows of x. A block's warps have 32 rows of the weight each, and as many of them as there are share the columns of a step; x comes
// through shared memory, for it is read by all, and everything is on its way some steps ahead.
#pragma once

#include "codes.cuh"

constexpr int kWarps = 8, kTiles = 2;  // kTiles: of 16 rows, of a warp

// As vector.cuh's. DEEP: chunks of a step, which as many warps share; the others have rows of their own. STEPS: that are on their way. Blocks along x: for each
// 8 / DEEP x 32 rows of the weight one for every TOKENS x 8 rows of x. kEach records of a chunk are on their way with it.
//
// ROUTED: weights and records are stacked, of an expert each, with what vector.cuh reads behind the last chunk; routes, [blocks, 3], says of each block along x the
// first row, the one behind the last, and the expert; where `single` is set, [M], of each row the expert, and a block has one. Blocks without rows have nothing to do.
template <template <class> class Code, class T, class S, int TOKENS, int GROUP, bool ZEROS, int DEEP, int STEPS, bool ROUTED = false>
__device__ void wide(
    const u16* x, const Vector* weight, const Vector* records, const Vector* table, void* out, int M, int N, int chunks, int center,
    const int* routes = nullptr, int single = 0) {
  using R = Record<S, ZEROS>;
  constexpr int kVectors = Code<T>::kVectors, kAside = kWarps / DEEP;
  constexpr int kEach = GROUP && GROUP < 4 ? 4 / GROUP : 1, kLong = GROUP > 4 ? GROUP / 4 : 1;
  constexpr int kInputs = TOKENS * 8 * DEEP * 8, kOwn = kTiles * (kVectors * 32 + kEach * R::kVectors), kStep = kInputs + kWarps * kOwn;
  DYNAMIC_SHARED(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, aside = warp / DEEP, deep = warp % DEEP;
  const int tiles = N / 16, steps = (chunks + DEEP - 1) / DEEP, groups = GROUP ? (chunks * 4 + GROUP - 1) / GROUP : 1;
  int blocks = (M + TOKENS * 8 - 1) / (TOKENS * 8);
  if constexpr (ROUTED) blocks = gridDim.x / ((tiles + kAside * kTiles - 1) / (kAside * kTiles));
  int token = blockIdx.x % blocks * TOKENS * 8, last = M;  // the first row of x, and the one behind the last
  const int tile = (blockIdx.x / blocks * kAside + aside) * kTiles;
  if constexpr (ROUTED) {
    wait_for_earlier();
    const int block = blockIdx.x % blocks, expert = single ? routes[block] : routes[3 * block + 2];
    token = single ? block : routes[3 * block], last = single ? block + 1 : routes[3 * block + 1];
    if (token >= last) return;
    weight += expert * (static_cast<long long>(tiles) * chunks + 1) * kVectors * 32;
    records += expert * (static_cast<long long>(tiles) * groups + kEach) * R::kVectors;
  }
  const int first = static_cast<int>(static_cast<long long>(steps) * blockIdx.y / gridDim.y);
  const int end = static_cast<int>(static_cast<long long>(steps) * (blockIdx.y + 1) / gridDim.y);
  const int begin = first * DEEP + deep;  // this warp's first chunk

  long long rows[kTiles];  // of chunks; those behind the last one are its copies, and not stored
#pragma unroll
  for (int r = 0; r < kTiles; ++r) rows[r] = tile + r < tiles ? tile + r : tiles - 1;
  if (begin < chunks)
#pragma unroll
    for (int r = 0; r < kTiles; ++r)
      if (lane < 4 * kVectors) prefetch(weight + (rows[r] * chunks + begin) * kVectors * 32 + lane * 8);
  wait_for_earlier();
  let_later_begin();

  const auto fetch = [&](int step) {
    if (step < end) {
      Vector* slot = memory + step % STEPS * kStep;
      for (int i = threadIdx.x; i < kInputs; i += kWarps * 32) {
        const int m = i / (DEEP * 8), v = i % (DEEP * 8), column = (step * DEEP * 8 + v) * 8, row = token + m < last ? token + m : last - 1;
        // Vectors of a row change places, so that threads of different rows use different banks.
        if (column < chunks * 64) copy_async(&slot[m * DEEP * 8 + (v ^ m & 7)], x + static_cast<long long>(row) * chunks * 64 + column);
      }
      const int chunk = step * DEEP + deep;
      if (chunk < chunks) {
        Vector* own = slot + kInputs + warp * kOwn;
#pragma unroll
        for (int r = 0; r < kTiles; ++r) {
          const Vector* from = weight + (rows[r] * chunks + chunk) * kVectors * 32 + lane;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) copy_async(&own[(r * kVectors + v) * 32 + lane], from + v * 32);
        }
        if (chunk == begin || (GROUP && chunk / kLong != (chunk - DEEP) / kLong)) {
          const int group = GROUP ? chunk * kEach / kLong : 0;
          for (int i = lane; i < kTiles * kEach * R::kVectors; i += 32) {
            const long long from = (i < kEach * R::kVectors ? rows[0] : rows[1]) * groups + group;
            copy_async(&own[kTiles * kVectors * 32 + i], records + from * R::kVectors + i % (kEach * R::kVectors));
          }
        }
      }
    }
    commit();
  };
  for (int i = 0; i < STEPS - 1; ++i) fetch(first + i);

  constexpr int kCodes = Code<T>::kZeros ? kTiles : 1;
  Code<T> code[kCodes];
  float total[kTiles][TOKENS][4] = {}, sums[kTiles][TOKENS][4] = {}, scale[kTiles][2] = {};
  for (int r = 0; r < kCodes; ++r) code[r].begin(table);
  const auto begin_group = [&](const Vector* own, int place) {
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
      const Vector* record = own + (r * kEach + place) * R::kVectors;
      scale[r][0] = R::at(record, g) * Code<T>::kFactor, scale[r][1] = R::at(record, g + 8) * Code<T>::kFactor;
      if constexpr (ZEROS)
        code[r % kCodes].zeros(R::zero(record, g), R::zero(record, g + 8));
      else
        code[r % kCodes].zeros(center, center);
    }
  };
  const auto end_group = [&] {
#pragma unroll
    for (int r = 0; r < kTiles; ++r)
#pragma unroll
      for (int n = 0; n < TOKENS; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) total[r][n][j] += sums[r][n][j] * scale[r][j / 2], sums[r][n][j] = 0;
  };
  for (int step = first; step < end; ++step) {
    wait_for<STEPS - 2>();
    __syncthreads();
    fetch(step + STEPS - 1);
    const int chunk = step * DEEP + deep;
    if (chunk >= chunks) continue;
    const Vector* slot = memory + step % STEPS * kStep;
    const Vector* own = slot + kInputs + warp * kOwn;
    const Vector* record = own + kTiles * kVectors * 32;
    if (GROUP >= 4 || !GROUP)
      if (chunk == begin || (GROUP && chunk / kLong != (chunk - DEEP) / kLong)) begin_group(record, 0);
    Vector words[kTiles][kVectors];
#pragma unroll
    for (int r = 0; r < kTiles; ++r)
#pragma unroll
      for (int v = 0; v < kVectors; ++v) words[r][v] = own[(r * kVectors + v) * 32 + lane];
    const u32* given = reinterpret_cast<const u32*>(slot) + (g * DEEP + deep) * 32 + t;
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      if constexpr (GROUP && GROUP < 4)
        if (s % GROUP == 0) begin_group(record, s / GROUP);
      u32 a[kTiles][4];
#pragma unroll
      for (int r = 0; r < kTiles; ++r) code[r % kCodes].step(words[r], s, a[r]);
#pragma unroll
      for (int n = 0; n < TOKENS; ++n) {
        const u32 first_half = given[n * 8 * DEEP * 32 + (2 * s ^ g) * 4], second_half = given[n * 8 * DEEP * 32 + (2 * s + 1 ^ g) * 4];
#pragma unroll
        for (int r = 0; r < kTiles; ++r) T::multiply(sums[r][n], a[r], first_half, second_half);
      }
      if constexpr (GROUP && GROUP < 4)
        if (s % GROUP == GROUP - 1) end_group();
    }
    if (GROUP >= 4 || !GROUP) {
      const int later = chunk + DEEP;
      if (later >= chunks || step + 1 == end || (GROUP && later / kLong != chunk / kLong)) end_group();
    }
  }

  // What warps have of the same rows is added by the first of them.
  if constexpr (DEEP > 1) {
    wait_for<0>();
    __syncthreads();
    float* parts = reinterpret_cast<float*>(memory);
    constexpr int kPart = kTiles * TOKENS * 4;
    if (deep)
#pragma unroll
      for (int i = 0; i < kPart; ++i) parts[(warp * kPart + i) * 32 + lane] = total[i / (TOKENS * 4)][i / 4 % TOKENS][i % 4];
    __syncthreads();
    if (deep) return;
#pragma unroll
    for (int i = 0; i < kPart; ++i)
      for (int other = 1; other < DEEP; ++other) total[i / (TOKENS * 4)][i / 4 % TOKENS][i % 4] += parts[((warp + other) * kPart + i) * 32 + lane];
  }
#pragma unroll
  for (int r = 0; r < kTiles; ++r)
#pragma unroll
    for (int n = 0; n < TOKENS; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int m = token + n * 8 + 2 * t + j % 2;
        if (m >= last || tile + r >= tiles) continue;
        const long long to = static_cast<long long>(m) * N + (tile + r) * 16 + g + j / 2 * 8;
        const float sum = total[r][n][j];
        if (gridDim.y > 1)
          static_cast<float*>(out)[static_cast<long long>(blockIdx.y) * M * N + to] = sum;
        else
          static_cast<u16*>(out)[to] = static_cast<u16>(T::pair(sum, sum));
      }
}
