// device.cuh for a CPU, and a grid of threads: what a kernel computes can be seen where there is no GPU. Threads are fibers that run one after the
// other; at a barrier, or where a warp multiplies, each waits for the others.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

typedef uint32_t u32;
typedef uint8_t u8;
typedef uint16_t u16;

#define EMULATED
#define __device__
#define __shared__ static  // blocks run one after the other

struct alignas(16) Vector {
  u32 word[4];
};

struct alignas(8) Pair {
  u32 word[2];
};

#define DYNAMIC_SHARED(name) static Vector name[1 << 14]

struct Index {
  int x, y, z;
};

typedef uint64_t Tile;  // where rows of 128 bytes begin, which leaves four bits for the product
constexpr Tile kNextProduct = 1, kVector = 16;

namespace emulated {

struct Warp {
  u32 a[32][4], b[32][2];
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done = false;
};

inline Index thread, block, grid;
inline int arrived, generation, alive;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline const std::function<void()>* body;

// Lets every other thread of the warp come as far: they all wait equally often.
inline void wait() {
  const int self = thread.x;
  swapcontext(&fibers[self].context, &scheduler);
  thread.x = self;
}

// The same for the block, whose warps may not.
inline void barrier() {
  const int mine = generation;
  if (++arrived == alive) arrived = 0, ++generation;
  while (mine == generation) wait();
}

inline void enter() {
  const int self = thread.x;
  (*body)();
  fibers[self].done = true;
  if (--alive == arrived && alive) arrived = 0, ++generation;
}

inline void run(Index size, int threads, const std::function<void()>& kernel) {
  grid = size, body = &kernel;
  fibers = std::vector<Fiber>(threads), warps = std::vector<Warp>((threads + 31) / 32);
  for (block.z = 0; block.z < size.z; ++block.z)
    for (block.y = 0; block.y < size.y; ++block.y)
      for (block.x = 0; block.x < size.x; ++block.x) {
        arrived = 0, alive = threads;
        for (Fiber& fiber : fibers) {
          fiber.done = false;
          getcontext(&fiber.context);
          fiber.context.uc_stack.ss_sp = fiber.stack.data();
          fiber.context.uc_stack.ss_size = fiber.stack.size();
          fiber.context.uc_link = &scheduler;
          makecontext(&fiber.context, enter, 0);
        }
        for (bool left = true; left;) {
          left = false;
          for (int i = 0; i < threads; ++i) {
            if (fibers[i].done) continue;
            thread.x = i;
            swapcontext(&scheduler, &fibers[i].context);
            left |= !fibers[i].done;
          }
        }
      }
}

inline float bits_to_float(u32 bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline float half_to_float(u16 bits) {
  _Float16 value;
  memcpy(&value, &bits, 2);
  return value;
}

inline u16 half_of(double value) {
  const _Float16 narrow = static_cast<_Float16>(value);
  u16 bits;
  memcpy(&bits, &narrow, 2);
  return bits;
}

inline float brain_to_float(u16 bits) { return bits_to_float(static_cast<u32>(bits) << 16); }

inline u16 brain_of(double exact) {  // products and sums of bfloat16 numbers here are exact in float32
  const float value = static_cast<float>(exact);
  u32 bits;
  memcpy(&bits, &value, 4);
  if (value != value) return 0x7fc0;
  return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// PTX ISA, mma.m16n8k16: rows g and g + 8 of a, columns 2 t and 2 t + 8 of a and rows of b; sums of rows g, g + 8 and columns 2 t, 2 t + 1.
template <float (*wide)(u16)>
void multiply(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const int lane = thread.x % 32, g = lane / 4, t = lane % 4;
  Warp& warp = warps[thread.x / 32];
  memcpy(warp.a[lane], a, sizeof a);
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  wait();
  for (int j = 0; j < 4; ++j) {
    const int row = g, column = 2 * t + j % 2, half = j / 2;
    double sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int owner = k % 8 / 2, shift = k % 2 * 16;
      const u32 left = warp.a[row * 4 + owner][k / 8 * 2 + half], right = warp.b[column * 4 + owner][k / 8];
      sum += static_cast<double>(wide(static_cast<u16>(left >> shift))) * wide(static_cast<u16>(right >> shift));
    }
    sums[j] += static_cast<float>(sum);
  }
  wait();
}

inline int dot(u32 a, u32 b, int sum) {
  for (int shift = 0; shift < 32; shift += 8) sum += static_cast<int8_t>(a >> shift) * static_cast<int8_t>(b >> shift);
  return sum;
}

inline u32 of_lane(u32 word, int bits) {
  Warp& warp = warps[thread.x / 32];
  warp.a[thread.x % 32][0] = word;
  wait();
  const u32 found = warp.a[thread.x % 32 ^ bits][0];
  wait();
  return found;
}

// PTX ISA, mma.m8n8k16: as device.cuh says.
inline void multiply_bytes(int& first, int& second, u32 a, u32 b) {
  const int lane = thread.x % 32, g = lane / 4, t = lane % 4;
  Warp& warp = warps[thread.x / 32];
  warp.a[lane][0] = a, warp.b[lane][0] = b;
  wait();
  for (int owner = 0; owner < 4; ++owner) {
    first = dot(warp.a[g * 4 + owner][0], warp.b[2 * t * 4 + owner][0], first);
    second = dot(warp.a[g * 4 + owner][0], warp.b[(2 * t + 1) * 4 + owner][0], second);
  }
  wait();
}

// wgmma.m64nNk16: a warp has the rows of mma.m16n8k16, and every row of the tile; see wgmma.cuh.
template <float (*wide)(u16), int N>
void multiply_tile(float (&sums)[N / 2], const u32 (&a)[4], Tile at, bool keep) {
  const int lane = thread.x % 32, g = lane / 4, t = lane % 4;
  Warp& warp = warps[thread.x / 32];
  const Vector* tile = reinterpret_cast<const Vector*>(at & ~static_cast<Tile>(15));
  const int product = static_cast<int>(at & 15);
  memcpy(warp.a[lane], a, sizeof a);
  wait();
  for (int i = 0; i < N / 2; ++i) {
    const int row = i / 4 * 8 + 2 * t + i % 2;
    double sum = 0;
    for (int k = 0; k < 16; ++k) {
      const u32 left = warp.a[g * 4 + k % 8 / 2][k / 8 * 2 + i / 2 % 2];
      const u32 right = tile[row * 8 + ((2 * product + k / 8) ^ (row & 7))].word[k % 8 / 2];
      sum += static_cast<double>(wide(static_cast<u16>(left >> k % 2 * 16))) * wide(static_cast<u16>(right >> k % 2 * 16));
    }
    sums[i] = (keep ? sums[i] : 0) + static_cast<float>(sum);
  }
  wait();
}

}  // namespace emulated

#define threadIdx emulated::thread
#define blockIdx emulated::block
#define gridDim emulated::grid

inline void __syncthreads() { emulated::barrier(); }

inline Vector load_once(const Vector* from) { return *from; }

inline void copy_async(Vector* to, const void* from) { memcpy(to, from, sizeof *to); }
inline void copy_word_async(u32* to, const void* from) { memcpy(to, from, sizeof *to); }
inline void commit() {}
template <int n>
void wait_for() {}
inline void sync_warp() { emulated::wait(); }
inline void prefetch(const Vector*) {}
inline void wait_for_earlier() {}
inline void let_later_begin() {}

template <u32 kept, u32 set>
u32 masked(u32 word) {
  return (word & kept) | set;
}

template <u32 kept, u32 flipped>
u32 masked_and_flipped(u32 word) {
  return (word & kept) ^ flipped;
}

inline u32 permuted(u32 low, u32 high, u32 selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  u32 out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<u32>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return out;
}

inline float as_float(u32 bits) { return emulated::bits_to_float(bits); }
inline u32 as_bits(float number) {
  u32 bits;
  memcpy(&bits, &number, 4);
  return bits;
}

inline float times(float a, float b) { return a * b; }

using emulated::dot;
using emulated::multiply_bytes;
using emulated::of_lane;

template <float (*to)(u16), u16 (*of)(double)>
struct Sixteen {
  static constexpr int kBytes = 2;
  static u32 each(u32 a, u32 b, u32 c, double (*f)(double, double, double)) {
    u32 out = 0;
    for (int shift = 0; shift < 32; shift += 16)
      out |= static_cast<u32>(of(f(to(static_cast<u16>(a >> shift)), to(static_cast<u16>(b >> shift)), to(static_cast<u16>(c >> shift))))) << shift;
    return out;
  }
  static u32 subtracted(u32 a, u32 b) {
    return each(a, b, 0, [](double p, double q, double) { return p - q; });
  }
  static u32 fused(u32 a, u32 b, u32 c) {
    return each(a, b, c, [](double p, double q, double r) { return p * q + r; });
  }
  static u32 pair(float low, float high) { return of(low) | static_cast<u32>(of(high)) << 16; }
  static float wide(u16 bits) { return to(bits); }
  static float at(const void* numbers, long long place) { return to(static_cast<const u16*>(numbers)[place]); }
  static void multiply(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) { emulated::multiply<to>(sums, a, b0, b1); }
};

struct Half : Sixteen<emulated::half_to_float, emulated::half_of> {};
struct Brain : Sixteen<emulated::brain_to_float, emulated::brain_of> {};

struct Single {
  static constexpr int kBytes = 4;
  static float at(const void* numbers, long long place) { return static_cast<const float*>(numbers)[place]; }
};

inline void begin_products() {}
inline void end_products() {}
template <int n>
void wait_for_products() {}
inline void publish() {}
inline Tile tile_at(const Vector* rows) { return reinterpret_cast<Tile>(rows); }

template <class T, int N>
struct Products;
template <int N>
struct Products<Half, N> {
  static void multiply(float (&sums)[N / 2], const u32 (&a)[4], Tile tile, bool keep) {
    emulated::multiply_tile<emulated::half_to_float, N>(sums, a, tile, keep);
  }
};
template <int N>
struct Products<Brain, N> {
  static void multiply(float (&sums)[N / 2], const u32 (&a)[4], Tile tile, bool keep) {
    emulated::multiply_tile<emulated::brain_to_float, N>(sums, a, tile, keep);
  }
};
