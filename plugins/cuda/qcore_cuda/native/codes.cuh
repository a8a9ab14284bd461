// Weights as tensor cores take them: chunks of codes, decoded in registers into pairs of 16-bit floats by a handful of instructions for eight of them.
//
// Source of the idea: Frantar et al., "MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on LLMs" (2024), and Kim et al., "Who Says
// Elephants Can't Run" (2022), for decoding by masks. Here weights are the left side, so that eight rows of x suffice for a product, and whole
// numbers are multiplied: sums of a group are scaled.
//
// A chunk is 16 rows by 64 columns, four products of 16 columns each. Thread (g = lane / 4, t = lane % 4) has of rows g and g + 8 the columns 2 t, 2 t + 1, 2 t + 8 and
// 2 t + 9 of each: registers 0 to 3 are (row g, first two), (g + 8, first two), (g, last two), (g + 8, last two).
//
// A record is what 16 rows have of a group: their scales, and behind these their zero points, a byte each.
#pragma once

// Code<T>: kVectors of 16 bytes a thread has of a chunk, whose numbers are kFactor too small; whether it subtracts kZeros. `begin` reads a table where there is one. `step` gives the four registers of product s, before they are scaled. `zeros` says what is subtracted from the codes of rows g and g + 8.

template <class T>
struct Int4;  // one word for a product: bits 0, 4, 8, 12 hold the first of registers 0 to 3, bits 16 .. 28 the second

template <>
struct Int4<Half> {
  static constexpr int kVectors = 1;
  static constexpr float kFactor = 1;
  static constexpr bool kZeros = true;
  __device__ void begin(const Vector*) {}
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
  static constexpr bool kZeros = true;
  __device__ void begin(const Vector*) {}
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
  static constexpr bool kZeros = false;
  static constexpr float kFactor = 1;
  __device__ void begin(const Vector*) {}
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
  static constexpr bool kZeros = false;
  static constexpr float kFactor = 1;
  __device__ void begin(const Vector*) {}
  __device__ void zeros(u32, u32) {}
  __device__ void step(const Vector* words, int s, u32 (&a)[4]) const {
    for (int i = 0; i < 4; ++i) {
      u32 q = words[s / 2].word[s % 2 * 2 + i / 2];
      const u32 codes = permuted(q, 0, i % 2 ? 0x4342 : 0x4140);
      // 128 and the low seven bits, less 128 where the eighth is set, else 256.
      a[i] = Brain::fused(masked<0x007f007f, 0x43004300>(codes), 0x3f803f80, masked_and_flipped<0x00800080, 0xc380c380>(codes));
    }
  }
};

template <class T>
struct Float8;  // e4m3, two words: bytes 1 and 3 are register 0 (or 2), bytes 0 and 2 register 1 (or 3)

template <>
struct Float8<Half> {
  static constexpr int kVectors = 2;
  static constexpr bool kZeros = false;
  static constexpr float kFactor = 256;  // exponents count from 8 lower
  __device__ void begin(const Vector*) {}
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
  static constexpr bool kZeros = false;
  static constexpr float kFactor = 1;
  __device__ void begin(const Vector*) {}
  __device__ void zeros(u32, u32) {}
  __device__ void step(const Vector* words, int s, u32 (&a)[4]) const {
    for (int i = 0; i < 4; ++i) {
      u32 q = words[s / 2].word[s % 2 * 2 + i / 2] << (i % 2 ? 8 : 0);
      a[i] = Brain::fused((q & 0x80008000) | (q & 0x7f007f00) >> 4, 0x7b807b80, 0x80008000);  // times 2^120
    }
  }
};

// Places in a table of 16 numbers; one word for a product: bits 8 i and 8 i + 4 hold the first and second of register i.
template <class T>
struct Table4 {
  static constexpr int kVectors = 1;
  static constexpr bool kZeros = false;
  static constexpr float kFactor = 1;
  Vector low, high;  // bytes of the entries
  __device__ void begin(const Vector* table) { low = table[0], high = table[1]; }
  __device__ void zeros(u32, u32) {}
  // Bytes of four entries: from both halves of the table, of which the code's highest bit chooses.
  static __device__ u32 chosen(const Vector& bytes, u32 places, u32 halves) {
    return permuted(permuted(bytes.word[0], bytes.word[1], places), permuted(bytes.word[2], bytes.word[3], places), halves);
  }
  __device__ void step(const Vector* words, int s, u32 (&a)[4]) const {
    u32 q = words->word[s];
    for (int i = 0; i < 4; i += 2) {
      const u32 places = q & 0x7777, halves = masked<0x4444, 0x3210>(q >> 1);
      const u32 lower = chosen(low, places, halves), upper = chosen(high, places, halves);
      a[i] = permuted(lower, upper, 0x5140);
      a[i + 1] = permuted(lower, upper, 0x7362);
      q >>= 16;
    }
  }
};

// What a record holds of scales of type S: `at` is the scale of one of its rows, `zero` its zero point. kVectors: of 16 bytes.
template <class S, bool ZEROS>
struct Record {
  static constexpr int kScales = 16 * S::kBytes, kVectors = (kScales + (ZEROS ? 16 : 0)) / 16;
  static __device__ float at(const Vector* record, int row) { return S::at(record, row); }
  static __device__ u32 zero(const Vector* record, int row) { return reinterpret_cast<const u8*>(record)[kScales + row]; }
};
