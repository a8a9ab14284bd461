// What the kernels here need of a GPU, in PTX: loads, arithmetic on pairs of 16-bit floats, and the matrix unit. emulator.h has the same on a CPU.
// Pairs are 32-bit words, the first number lowest. Layouts of fragments: PTX ISA, "Matrix Fragments for mma.m16n8k16".
#pragma once

typedef unsigned int u32;
typedef unsigned char u8;
typedef unsigned short u16;

struct alignas(16) Vector {
  u32 word[4];
};

struct alignas(8) Pair {
  u32 word[2];
};

#define DYNAMIC_SHARED(name) extern __shared__ Vector name[]

__device__ inline Vector load_once(const Vector* from) {  // weights are read once: they need not stay in the first cache
  Vector v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(from));
  return v;
}

// Copies of 16 bytes, or of a word, into shared memory that go on behind what the thread does next; `commit` ends a batch of them, and `wait_for<n>` waits until no more than the
// last n batches are on their way. Before Ampere they are done at once.
__device__ inline void copy_async(Vector* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<u32>(__cvta_generic_to_shared(to))), "l"(from) : "memory");
#else
  *to = *static_cast<const Vector*>(from);
#endif
}

__device__ inline void copy_word_async(u32* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(static_cast<u32>(__cvta_generic_to_shared(to))), "l"(from) : "memory");
#else
  *to = *static_cast<const u32*>(from);
#endif
}

__device__ inline void commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int n>
__device__ inline void wait_for() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

__device__ inline void sync_warp() { __syncwarp(); }

// Into the second cache. It changes nothing that can be seen.
__device__ inline void prefetch(const Vector* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// From Hopper on a kernel may begin while the one before it ends, and waits here before it reads or writes what others may have written or read.
__device__ inline void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void let_later_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// (word & kept) | set
template <u32 kept, u32 set>
__device__ inline u32 masked(u32 word) {
  u32 out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(word), "n"(kept), "n"(set));
  return out;
}

// (word & kept) ^ flipped
template <u32 kept, u32 flipped>
__device__ inline u32 masked_and_flipped(u32 word) {
  u32 out;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(out) : "r"(word), "n"(kept), "n"(flipped));
  return out;
}

__device__ inline u32 permuted(u32 low, u32 high, u32 selector) {
  return __byte_perm(low, high, selector);
}

struct Half {
  static constexpr int kBytes = 2;
  static __device__ u32 subtracted(u32 a, u32 b) {
    u32 out;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
  }
  static __device__ u32 fused(u32 a, u32 b, u32 c) {  // a * b + c, rounded once
    u32 out;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
  }
  static __device__ u32 pair(float low, float high) {
    u32 out;
    asm("{.reg .f16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}" : "=r"(out) : "f"(low), "f"(high));
    return out;
  }
  static __device__ float wide(u16 bits) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
    return out;
  }
  static __device__ float at(const void* numbers, long long place) { return wide(static_cast<const u16*>(numbers)[place]); }
  static __device__ void multiply(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
  }
};

struct Brain {  // bfloat16, from compute capability 8.0 on
  static constexpr int kBytes = 2;
  static __device__ u32 fused(u32 a, u32 b, u32 c) {
    u32 out;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
  }
  static __device__ u32 pair(float low, float high) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
  }
  static __device__ float wide(u16 bits) { return __int_as_float(static_cast<u32>(bits) << 16); }
  static __device__ float at(const void* numbers, long long place) { return wide(static_cast<const u16*>(numbers)[place]); }
  static __device__ void multiply(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Single {
  static constexpr int kBytes = 4;
  static __device__ float at(const void* numbers, long long place) { return static_cast<const float*>(numbers)[place]; }
};

__device__ inline float as_float(u32 bits) { return __int_as_float(bits); }
__device__ inline u32 as_bits(float number) { return __float_as_uint(number); }
__device__ inline float times(float a, float b) { return __fmul_rn(a, b); }  // rounded, whatever is added to it

// sum + a . b of four bytes each, signed.
__device__ inline int dot(u32 a, u32 b, int sum) { return __dp4a(static_cast<int>(a), static_cast<int>(b), sum); }

// What the thread has whose lane differs in these bits.
__device__ inline u32 of_lane(u32 word, int bits) { return __shfl_xor_sync(0xffffffff, word, bits); }

// PTX ISA, "Matrix Fragments for mma.m8n8k16", from Turing on: bytes 4 t .. 4 t + 3 of row g of a, and of column g of b; sums of row g, columns 2 t and 2 t + 1.
__device__ inline void multiply_bytes(int& first, int& second, u32 a, u32 b) {
  asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};" : "+r"(first), "+r"(second) : "r"(a), "r"(b));
}
