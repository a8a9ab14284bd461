// Beside the products: rows of the weight made dense, for many rows of x; and sums of what blocks share.
#pragma once

#include "codes.cuh"

constexpr int kWarps = 8, kChunks = 4;  // kChunks: of a warp

// T [rows, K] from row `start` on, which 16 divides; the rest as vector.cuh's.
template <template <class> class Code, class T, class S, int GROUP, bool ZEROS>
__device__ void make_dense(
    const Vector* weight, const Vector* records, const Vector* table, Vector* out, int start, int chunks, int center) {
  using R = Record<S, ZEROS>;
  constexpr int kVectors = Code<T>::kVectors, kRow = 9;  // vectors of a row of a chunk, and one, so that rows begin at other banks
  __shared__ Vector dense[kWarps][16 * kRow];
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, groups = GROUP ? (chunks * 4 + GROUP - 1) / GROUP : 1;
  const long long tile = start / 16 + blockIdx.y;
  Vector* own = dense[threadIdx.x / 32];
  wait_for_earlier();
  let_later_begin();
  Code<T> code;
  code.begin(table);
  for (int i = 0; i < kChunks; ++i) {
    const int chunk = (blockIdx.x * kWarps + threadIdx.x / 32) * kChunks + i;
    if (chunk >= chunks) return;
    Vector words[kVectors];
    for (int v = 0; v < kVectors; ++v) words[v] = load_once(weight + ((tile * chunks + chunk) * kVectors + v) * 32 + lane);
    u32* to = reinterpret_cast<u32*>(own) + g * kRow * 4 + t;
    for (int s = 0; s < 4; ++s) {
      const Vector* record = records + (tile * groups + (GROUP ? (chunk * 4 + s) / GROUP : 0)) * R::kVectors;
      const float scale[2] = {R::at(record, g) * Code<T>::kFactor, R::at(record, g + 8) * Code<T>::kFactor};
      if constexpr (ZEROS)
        code.zeros(R::zero(record, g), R::zero(record, g + 8));
      else
        code.zeros(center, center);
      u32 a[4];
      code.step(words, s, a);
      for (int j = 0; j < 4; ++j) {
        const float low = T::wide(static_cast<u16>(a[j])), high = T::wide(static_cast<u16>(a[j] >> 16));
        to[j % 2 * 8 * kRow * 4 + s * 8 + j / 2 * 4] = T::pair(low * scale[j % 2], high * scale[j % 2]);
      }
    }
    sync_warp();
    for (int v = lane; v < 128; v += 32)
      out[((static_cast<long long>(blockIdx.y) * 16 + v / 8) * chunks + chunk) * 8 + v % 8] = own[v / 8 * kRow + v % 8];
    sync_warp();
  }
}

// out: T [count] of parts, float32 [shares, count], added one after the other. A thread has two, of which there are an even number.
template <class T>
__device__ void add(const Pair* parts, u32* out, int shares, int count) {
  const int i = blockIdx.x * kWarps * 32 + threadIdx.x;
  wait_for_earlier();
  let_later_begin();
  if (2 * i >= count) return;
  float first = 0, second = 0;
  for (int share = 0; share < shares; ++share) {
    const Pair part = parts[static_cast<long long>(share) * (count / 2) + i];
    first += as_float(part.word[0]), second += as_float(part.word[1]);
  }
  out[i] = T::pair(first, second);
}
