// y = x W^T for one row of x. Every block takes whole rows of chunks, one after the other, and its warps share their columns, of which each keeps its own part of x.
// A warp reads its chunks in a row into a ring in shared memory, far ahead of the one that it multiplies, and into the next row of chunks without a pause.
#pragma once

#include "codes.cuh"

constexpr int kWarps = 8;

// out: T [N], or float32 [gridDim.y, N] where blocks along y share columns. x: T [K]. weight: chunks, those of a row of chunks together, and one more. records:
// [N / 16, groups], and as many more as a chunk has. table: of codes that are places in one. chunks: of a row. center: subtracted from codes where there are no ZEROS.
// GROUP: products of a group (1, 2 or a multiple of 4), 0: all. Chunks are read in pairs, where groups allow it, DEPTH of which a warp has a place for.
template <template <class> class Code, class T, class S, int GROUP, bool ZEROS, int DEPTH>
__device__ void vector(
    const u32* x, const Vector* weight, const Vector* records, const Vector* table, void* out, int N, int chunks, int center) {
  using R = Record<S, ZEROS>;
  constexpr int kEach = GROUP && GROUP < 4 ? 4 / GROUP : 1;  // records of a chunk
  constexpr int kLong = GROUP > 4 ? GROUP / 4 : 1;           // chunks of a record
  constexpr int kUnit = kLong > 1 && kLong % 2 ? 1 : 2, kChunk = Code<T>::kVectors * 32;
  constexpr bool kEvery = GROUP && kLong <= kUnit;  // every unit has records of its own
  constexpr int kRecords = (kLong == 1 && GROUP ? kUnit : 1) * kEach * R::kVectors, kPlace = kUnit * kChunk + kRecords;
  DYNAMIC_SHARED(memory);  // the rings, and behind them x
  __shared__ float parts[2][kWarps][16];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int tiles = N / 16, worker = blockIdx.y * kWarps + warp, workers = gridDim.y * kWarps;
  const int units = (chunks + kUnit - 1) / kUnit, groups = GROUP ? (chunks * 4 + GROUP - 1) / GROUP : 1;
  const int first = static_cast<int>(static_cast<long long>(units) * worker / workers);
  const int count = static_cast<int>(static_cast<long long>(units) * (worker + 1) / workers) - first;
  const int rows = (tiles - blockIdx.x + gridDim.x - 1) / gridDim.x;  // of chunks, of this block

  // Weights are asked for before x may be read.
  const Vector* from = weight + (static_cast<long long>(blockIdx.x) * chunks + first * kUnit) * kChunk + lane;
  const long long skip = (static_cast<long long>(gridDim.x) * chunks - count * kUnit) * kChunk;
  if (lane < (DEPTH < count ? DEPTH : count) * kUnit * kChunk / 8) prefetch(from + lane * 7);
  wait_for_earlier();
  let_later_begin();

  // A thread's words of a chunk of x are kept together; behind the last chunk are zeros.
  const int inputs = kWarps * DEPTH * kPlace + (first - static_cast<int>(static_cast<long long>(units) * blockIdx.y / gridDim.y)) * kUnit * 8;
  for (int i = lane; i < count * kUnit * 32; i += 32) {
    u32* word = reinterpret_cast<u32*>(memory + inputs + i / 32 * 8) + i % 4 * 8 + i % 32 / 4;
    if (first * kUnit * 32 + i < chunks * 32)
      copy_word_async(word, x + first * kUnit * 32 + i);
    else
      *word = 0;
  }
  commit();

  const int own = warp * DEPTH * kPlace, last = own + (DEPTH - 1) * kPlace;
  const Vector* record_from = records + (static_cast<long long>(blockIdx.x) * groups + (GROUP ? first * kUnit * kEach / kLong : 0)) * R::kVectors + lane;
  const long long record_skip = (static_cast<long long>(gridDim.x) * groups - (kEvery ? count * (kRecords / R::kVectors) : 0)) * R::kVectors;
  int to = own, ahead = rows * count, ahead_unit = 0;
  const auto fetch = [&] {
    if (ahead > 0) {
      --ahead;
#pragma unroll
      for (int v = 0; v < kUnit * Code<T>::kVectors; ++v) copy_async(&memory[to + lane + v * 32], from + v * 32);
      from += kUnit * kChunk;
      if constexpr (kEvery) {
#pragma unroll
        for (int v = 0; v < kRecords; v += 32)
          if (v + 32 <= kRecords || lane < kRecords - v) copy_async(&memory[to + kUnit * kChunk + lane + v], record_from + v);
        record_from += kRecords;
      } else if (ahead_unit == 0 || (GROUP && (first + ahead_unit) % (kLong / kUnit) == 0)) {
        const int group = GROUP ? (first + ahead_unit) * kUnit / kLong - first * kUnit / kLong : 0;
        if (lane < kRecords) copy_async(&memory[to + kUnit * kChunk + lane], record_from + group * R::kVectors);
      }
      if (++ahead_unit == count) ahead_unit = 0, from += skip, record_from += record_skip;
      to = to == last ? own : to + kPlace;
    }
    commit();
  };
  for (int i = 0; i < DEPTH - 1; ++i) fetch();

  Code<T> code;
  code.begin(table);
  int place = own, side = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, side ^= 1) {
    float total[2] = {}, sums[4] = {}, scale[2] = {};  // of rows g and g + 8, in every one of the product's eight columns
    const auto begin_group = [&](const Vector* record) {
      scale[0] = R::at(record, g) * Code<T>::kFactor, scale[1] = R::at(record, g + 8) * Code<T>::kFactor;
      if constexpr (ZEROS)
        code.zeros(R::zero(record, g), R::zero(record, g + 8));
      else
        code.zeros(center, center);
    };
    const auto end_group = [&] {
      total[0] += sums[0] * scale[0], total[1] += sums[2] * scale[1];
      for (int j = 0; j < 4; ++j) sums[j] = 0;
    };
    for (int unit = 0; unit < count; ++unit) {
      wait_for<DEPTH - 2>();
      sync_warp();
      fetch();
      const Vector* record = &memory[place + kUnit * kChunk];
      if constexpr (!GROUP || kLong > 1)
        if (kEvery || unit == 0 || (GROUP && (first + unit) % (kLong / kUnit) == 0)) begin_group(record);
#pragma unroll
      for (int c = 0; c < kUnit; ++c) {
        Vector words[Code<T>::kVectors];
#pragma unroll
        for (int v = 0; v < Code<T>::kVectors; ++v) words[v] = memory[place + c * kChunk + v * 32 + lane];
        const Vector* given = &memory[inputs + (unit * kUnit + c) * 8 + t * 2];
        const Vector part[2] = {given[0], given[1]};
        const int there = c && (first + unit) * kUnit + c == chunks ? 0 : c;
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          if constexpr (GROUP && GROUP <= 4)
            if (s % GROUP == 0) begin_group(record + (there * kEach + s / GROUP) * R::kVectors);
          u32 a[4];
          code.step(words, s, a);
          T::multiply(sums, a, part[s / 2].word[s % 2 * 2], part[s / 2].word[s % 2 * 2 + 1]);
          if constexpr (GROUP && GROUP <= 4)
            if (s % GROUP == GROUP - 1) end_group();
        }
      }
      if constexpr (!GROUP || kLong > 1)
        if (kEvery || unit == count - 1 || (GROUP && (first + unit) % (kLong / kUnit) == kLong / kUnit - 1)) end_group();
      place = place == last ? own : place + kPlace;
    }
    if (t == 0) parts[side][warp][g] = total[0], parts[side][warp][g + 8] = total[1];
    __syncthreads();  // one is enough: the other side is written before the next
    if (threadIdx.x < 16) {
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += parts[side][w][threadIdx.x];
      const int where = tile * 16 + threadIdx.x;
      if (gridDim.y > 1)
        static_cast<float*>(out)[static_cast<long long>(blockIdx.y) * N + where] = sum;
      else
        static_cast<u16*>(out)[where] = static_cast<u16>(T::pair(sum, sum));
    }
  }
}
