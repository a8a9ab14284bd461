// y = x W^T for some tens of rows of x on Hopper's matrix unit: as wide.cuh, but a warpgroup's products run while its threads decode the weights of the next, and read x
// from shared memory themselves.
#pragma once

#include "codes.cuh"
#ifndef EMULATED
#include "wgmma.cuh"
#endif

// As vector.cuh's. A block has 64 rows of the weight for each of its WARPS / 4 warpgroups, and TOKENS rows of x; a step is CHUNKS of them, and STEPS have their
// places. Blocks along
// x: for all of its rows of the weight one for every TOKENS rows of x.
template <template <class> class Code, class T, class S, int TOKENS, int GROUP, bool ZEROS, int WARPS, int CHUNKS, int STEPS>
__device__ void warpgroup(
    const u16* x, const Vector* weight, const Vector* records, const Vector* table, void* out, int M, int N, int chunks, int center) {
  using R = Record<S, ZEROS>;
  constexpr int kVectors = Code<T>::kVectors, kEach = GROUP && GROUP < 4 ? 4 / GROUP : 1, kLong = GROUP > 4 ? GROUP / 4 : 1;
  constexpr int kProducts = 4 / kEach;  // that are of one group, of a chunk
  constexpr int kInputs = TOKENS * 8, kRecords = kEach * R::kVectors, kOwn = kVectors * 32 + kRecords;  // of a chunk
  constexpr int kStep = (CHUNKS * (kInputs + WARPS * kOwn) + 63) / 64 * 64;  // x's rows begin at multiples of 1,024 bytes
  constexpr int kMine = (kInputs + WARPS * 32 - 1) / (WARPS * 32);
  DYNAMIC_SHARED(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int blocks = (M + TOKENS - 1) / TOKENS, token = blockIdx.x % blocks * TOKENS;
  const int tiles = N / 16, tile = blockIdx.x / blocks * WARPS + warp, groups = GROUP ? (chunks * 4 + GROUP - 1) / GROUP : 1;
  const int steps = (chunks + CHUNKS - 1) / CHUNKS;
  const int first = CHUNKS * static_cast<int>(static_cast<long long>(steps) * blockIdx.y / gridDim.y);
  const int end = CHUNKS * static_cast<int>(static_cast<long long>(steps) * (blockIdx.y + 1) / gridDim.y);  // more than there are, where their number is no multiple

  const long long row = tile < tiles ? tile : tiles - 1;  // of chunks; those behind the last one are its copies, and not stored
  const Vector* from = weight + (row * chunks + first) * kVectors * 32 + lane;
  const Vector* const record_from = records + row * groups * R::kVectors + lane;
  if (lane < 4 * kVectors) prefetch(from + lane * 7);
  wait_for_earlier();
  let_later_begin();

  const u16* input_from[kMine];
  int input_to[kMine];
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int place = threadIdx.x + i * WARPS * 32, m = place / 8, v = place % 8, own = token + m < M ? token + m : M - 1;
    input_from[i] = x + (static_cast<long long>(own) * chunks + first) * 64 + v * 8;
    input_to[i] = m * 8 + (v ^ m & 7);
  }
  // Where groups of chunks begin and end in a step, which begins at a multiple of CHUNKS: known beforehand, but for the longest.
  constexpr bool kShort = GROUP && CHUNKS % kLong == 0;
  const auto begins = [&](int chunk, int c) {
    if constexpr (kShort) return c % kLong == 0;
    return chunk + c == first || (GROUP && (chunk + c) % kLong == 0);
  };
  const auto ends = [&](int chunk, int c) {
    if constexpr (kShort) return c % kLong == kLong - 1;
    return chunk + c == end - 1 || (GROUP && (chunk + c) % kLong == kLong - 1);
  };

  int ahead = first, to = 0;
  const Vector* record_now = record_from + (GROUP ? first / kLong * kRecords : 0);
  const auto copy_inputs = [&](int c, int i) {
    if (kInputs % (WARPS * 32) == 0 || threadIdx.x + i * WARPS * 32 < kInputs)
      copy_async(&memory[to + c * kInputs + input_to[i]], input_from[i] + c * 64);
  };
  const auto copy_weights = [&](int c) {
    const int own = to + CHUNKS * kInputs + (warp * CHUNKS + c) * kOwn + lane;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) copy_async(&memory[own + v * 32], from + (c * kVectors + v) * 32);
    if (begins(ahead, c)) {
      const Vector* record = kShort ? record_now + c / kLong * kRecords : record_from + (GROUP ? (ahead + c) / kLong * kRecords : 0);
#pragma unroll
      for (int v = 0; v < kRecords; v += 32)
        if (lane < kRecords - v) copy_async(&memory[own + kVectors * 32 + v], record + v);
    }
  };
  const auto fetch = [&] {
    if (ahead + CHUNKS <= chunks) {
      if (ahead < end)
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
          for (int i = 0; i < kMine; ++i) copy_inputs(c, i);
          copy_weights(c);
        }
    } else if (ahead < end) {
      for (int c = 0; c < CHUNKS; ++c)
        if (ahead + c < chunks) {
          for (int i = 0; i < kMine; ++i) copy_inputs(c, i);
          copy_weights(c);
        } else {  // zeros, times whatever weights stand there
          for (int i = 0; i < kMine; ++i)
            if (threadIdx.x + i * WARPS * 32 < kInputs) memory[to + c * kInputs + input_to[i]] = Vector{};
        }
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) input_from[i] += CHUNKS * 64;
    from += CHUNKS * kVectors * 32;
    if (kShort) record_now += CHUNKS / kLong * kRecords;
    ahead += CHUNKS;
    to = to == (STEPS - 1) * kStep ? 0 : to + kStep;
    commit();
  };
  for (int i = 0; i < STEPS - 2; ++i) fetch();

  Code<T> code;
  code.begin(table);
  float total[TOKENS / 2] = {}, sums[TOKENS / 2], scale[2] = {}, next_scale[2] = {};
  u32 held[2][kProducts][4];  // one is multiplied while the other is decoded
  const auto add_group = [&] {
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) total[i] += sums[i] * scale[i / 2 % 2];
  };
  const Tile tiles_of_inputs = tile_at(memory);
  int slot = 0;
  // The products of a chunk that are of one group, when those before them are done; `ended`: they were a group's last ones.
  const auto batch = [&](int chunk, int c, int part, bool ended, u32 (&a)[kProducts][4]) {
    const Vector* own = &memory[slot + CHUNKS * kInputs + (warp * CHUNKS + c) * kOwn];
    const bool fresh = kEach > 1 || begins(chunk, c);
    if (fresh) {
      const Vector* record = own + kVectors * 32 + part * R::kVectors;
      const bool there = c == 0 || chunk + c < chunks;
      for (int i = 0; i < 2; ++i) next_scale[i] = there ? R::at(record, g + 8 * i) * Code<T>::kFactor : 0;
      if constexpr (ZEROS)
        code.zeros(R::zero(record, g), R::zero(record, g + 8));
      else
        code.zeros(center, center);
    }
    Vector words[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) words[v] = own[v * 32 + lane];
    wait_for_products<0>();
    if (ended) add_group();
    if (fresh) scale[0] = next_scale[0], scale[1] = next_scale[1];
#pragma unroll
    for (int s = 0; s < kProducts; ++s) {  // one runs while the next is decoded
      code.step(words, part * kProducts + s, a[s]);
      begin_products();
      Products<T, TOKENS>::multiply(sums, a[s], tiles_of_inputs + (slot + c * kInputs) * kVector + (part * kProducts + s) * kNextProduct, s > 0 || !fresh);
      end_products();
    }
  };
  for (int chunk = first; chunk < end; chunk += CHUNKS) {
    wait_for<STEPS - 3>();
    publish();
    __syncthreads();
    fetch();  // into what was multiplied two steps ago
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int part = 0; part < kEach; ++part) {
        const bool ended = kEach > 1 ? chunk > first || c + part > 0 : c > 0 ? ends(chunk, c - 1) : chunk > first && ends(chunk - CHUNKS, CHUNKS - 1);
        batch(chunk, c, part, ended, held[(c * kEach + part) % 2]);
      }
    slot = slot == (STEPS - 1) * kStep ? 0 : slot + kStep;
  }
  wait_for_products<0>();
  add_group();
#pragma unroll
  for (int i = 0; i < TOKENS / 2; ++i) {
    const int m = token + i / 4 * 8 + 2 * t + i % 2;
    if (m >= M || tile >= tiles) continue;
    const long long where = static_cast<long long>(m) * N + tile * 16 + g + i / 2 % 2 * 8;
    if (gridDim.y > 1)
      static_cast<float*>(out)[static_cast<long long>(blockIdx.y) * M * N + where] = total[i];
    else
      static_cast<u16*>(out)[where] = static_cast<u16>(T::pair(total[i], total[i]));
  }
}
