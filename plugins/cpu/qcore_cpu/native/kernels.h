// What one instruction set's kernels are asked: to make rows of activations ready, and to multiply them by a run of panels.
#pragma once
#include <initializer_list>

#include "packed.h"

namespace qcore {

enum class Float : int64_t { kF32 = 0, kF16, kBF16 };

constexpr int64_t width_of(Float type) { return type == Float::kF32 ? 4 : 2; }  // bytes

// What is multiplied.
enum class Numbers : int64_t {
  kFloats,    // float32 by float32
  kHalves,    // bfloat16 by bfloat16, where activations are that; both sides exact but for tables of many rows, whose numbers are rounded
  kIntegers,  // int8 by int8
};

// How.
enum class Way : int64_t {
  kRows,    // some at once: codes become numbers in registers
  kBlocks,  // rows by blocks of a panel, which are unpacked into the cache unless Batch::in_place
  kTiles,   // rows by unpacked blocks, in tiles of 16 x 16
};

// Rows of activations, made ready once a call and read by every thread. `padded` is the weight's.
struct Batch {
  Numbers numbers;
  Way way;
  int64_t rows;
  int64_t run;            // rows that lie interleaved: [rows / run][columns][run]; nothing behind the last row
  int64_t section;        // columns of a section: of a group of the weight, or of a part of one
  int64_t sections;
  int64_t tile_bytes;     // of a row of a tile: 64, or fewer where sections are shorter
  bool in_place;          // of kBlocks: codes become numbers in registers, for they are used by few rows
  float* values;          // [rows / run][padded][run]: kFloats
  uint16_t* halves;       // [rows / run][padded / 2][run][2], bfloat16, of each quad columns 0 2 1 3: kHalves
  int8_t* codes;          // [rows / run][padded / 4][run][4]: kIntegers
  int16_t* pairs;         // [rows / run][padded / 2][run][2], of each quad columns 0 2 1 3; where 8-bit products are made of 16-bit ones
  uint8_t* tiles;         // [rows / 16][steps][16][tile_bytes]: halves or codes
  float* scales;          // [rows / run][sections][run], of codes, and of halves that stand for e4m3; else null
  int32_t* totals;        // in the same places: sums of codes
  int32_t* shifts;        // the same, what the zero point of the weight's codes adds to sums of products
  float* sums;            // the same, sums of what the rows stand for

  // Where a row's section is in these four.
  int64_t place(int64_t row, int64_t s) const { return (row - row % run) * sections + s * run + row % run; }
};

// Those that are multiplied where there are no tiles.
inline const char* numbers_of(const Batch& batch) {
  for (const void* numbers : {static_cast<const void*>(batch.values), static_cast<const void*>(batch.halves), static_cast<const void*>(batch.pairs)})
    if (numbers) return static_cast<const char*>(numbers);
  return reinterpret_cast<const char*>(batch.codes);
}

// Columns that a row of a tile holds, and how many tiles a row of the weight takes.
inline int64_t tile_columns(const Batch& batch) { return batch.numbers == Numbers::kHalves ? batch.tile_bytes / 2 : batch.tile_bytes; }
inline int64_t tile_steps(const Batch& batch, int64_t padded) { return (padded + tile_columns(batch) - 1) / tile_columns(batch); }

// Whether codes that name tuples are multiplied as they are: a scale for each of their groups, or none.
inline bool by_grid_rows(const Header& h, Way way) {
  return is_grid(h.code) && way == Way::kRows && (h.input == Input::kExact || h.input == Input::kBlocks);
}

// Whether a row of floats is multiplied by codes where they stand in their quads, a power of two too large, and is made as much smaller
// for it: a shift less for each code, and the same products, unless a number of the row is below 2^-102.
constexpr bool in_place(Code code) { return is_integer(code) && code != Code::kInt8; }

struct Job {
  const Header* weight;
  Batch batch;
  const void* x;          // rows `stride` elements apart
  int64_t stride;
  void* out;              // [rows][Header::rows]
  Float type, out_type;   // of x and out
};

// What will be wanted next from memory, to be fetched meanwhile: so many bytes for each chunk.
struct Stream {
  const uint8_t* at;
  int64_t bytes;
};

// Sixteen numbers for each group of a panel.
struct GroupFloats {
  enum Kind { kSpread, kHalves, kSigned, kUnsigned, kExponents, kFloats8 };
  // kSpread: [groups][16]; null where there are none. kSigned, kUnsigned: what codes are multiplied by, for 1 << shift groups; kFloats8: for all.
  const float* floats;
  Kind kind;
  const uint8_t* stored;  // [groups][16], float16 or codes of a byte
  int64_t shift;
};

// One panel.
struct Strip {
  const Header* h;
  const uint8_t* codes;
  GroupFloats scales, offsets;
  const float* zeros;  // of each group, negated; null where there are none
  const float* table;
  Stream ahead[2];  // scales and offsets of the next panel
  const float* ratios;  // of running sums (running.h)
};

// Some rows of a batch, the first ones of the run that begins with `row`, by a panel: out [rows][16].
using RowKernel = void (*)(const Strip& strip, const Batch& batch, int64_t row, float* out);

// Columns first .. first + columns - 1 of a panel, whole chunks, as numbers of CodeKernels::width bytes.
using Unpack = void (*)(const Strip& strip, int64_t first, int64_t columns, void* block);

// Columns of some panels, unpacked: from whole sections to whole sections.
struct Block {
  const Strip* strips;
  int64_t first, columns;
  const char* numbers;
  int64_t bytes;    // from a panel's numbers to the next one's
  Stream ahead[4];  // codes, scales and offsets
  int64_t shares, share;  // of what is ahead rows fetch one line in so many, beginning with this one
};

// totals [..][16] += some rows of a batch, the first ones of the run that begins with `row`, by a block. A panel's totals begin `apart` behind
// those of the one before it.
using BlockKernel = void (*)(const Block& block, const Batch& batch, int64_t row, float* totals, int64_t apart);

// Of sums that run through all groups of a panel (running.h).
struct Running {
  bool (*fits)(const Strip& strip);
  void (*open)(Strip& strip, float* ratios);
  void (*clear)(const Strip& strip, int64_t first, int64_t columns, void* block);
  const BlockKernel* (*blocks)(const Strip& strip);
  void (*close)(const Strip& strip, int64_t rows, float* totals);
};

// Codes that blocks of rows may take as they are packed.
constexpr bool is_taken_packed(Numbers numbers, Code code) {
  if (numbers == Numbers::kHalves) return code == Code::kInt4 || code == Code::kTable4;
  return numbers == Numbers::kIntegers && (code == Code::kInt4 || code == Code::kInt5 || code == Code::kInt6 || code == Code::kInt8);
}

// Whether they do where a section is half a chunk, too: 6-bit codes are of groups of 16.
constexpr bool in_short_sections(Numbers numbers, Code code) { return numbers == Numbers::kIntegers && code == Code::kInt6; }

// What there is for one code.
struct CodeKernels {
  const RowKernel* rows;                       // of 1, 2 .. Kernels::rows_at_once rows
  Unpack unpack;
  const BlockKernel* blocks;  // of 1, 2 .. Batch::run rows
  int64_t width;
  const Running* running = nullptr;
  const BlockKernel* packed = nullptr;  // of 1, 2 .. Kernels::packed_run rows, where Batch::in_place
};

// One row of a panel's results, to where the job wants them.
using Store = void (*)(const Job& job, int64_t row, int64_t panel, const float* values);

struct Attention;
struct KvSide;
enum class Kept : int64_t;

struct Kernels {
  const char* name;
  bool has_tiles;
  bool has_halves;        // kHalves
  bool has_pairs;         // integer products of 8-bit codes read Batch::pairs
  int64_t rows_at_once;            // Batch::run of rows, at most
  int64_t float_run, half_run, integer_run, packed_run;  // of blocks, the last where they are in place; 0: they never are
  void (*prepare)(const Job& job, int64_t first_row, int64_t last_row);
  void (*multiply)(const Job& job, int64_t first_panel, int64_t last_panel);
  // A row of the weight as float32 [columns].
  void (*look_up)(const Header& weight, int64_t row, float* out);
  // Of a decoder: around.h, attention.h, attention_rows.h.
  void (*normalize)(const float* x, const float* weight, int64_t count, float epsilon, Float type, void* out);
  void (*add)(const float* from, float factor, int64_t count, float* to);
  void (*rotate)(float* x, const float* cosines, const float* sines, int64_t count);
  void (*activate)(const float* gate, const float* up, int64_t count, int64_t activation, Float type, void* out);
  void (*score)(const float* rows, int64_t count, const float* x, int64_t columns, float* out);
  void (*attend)(const Attention& attention, int64_t first_part, int64_t last_part);
  void (*join)(const Attention& attention, int64_t first_head, int64_t last_head);
  void (*attend_rows)(const Attention& attention, int64_t first_block, int64_t last_block);
  void (*narrow)(const float* from, Float type, int64_t count, void* to);
  void (*keep)(const float* from, const KvSide& side, Kept kept, int64_t head, int64_t count, void* row);
  void (*widen)(const void* from, Float type, int64_t count, float* to);
};

// Kernels of one instruction set that another uses too (kernels.cpp); null for a code that they do not know.
CodeKernels exact_avx2(Code code);
CodeKernels exact_avx512(Code code);
CodeKernels integer_avx512(Code code);
CodeKernels halves_avx512bf16(Code code);

const Kernels* kernels_avx2();
const Kernels* kernels_avxvnni();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512bf16();
const Kernels* kernels_amx();

}  // namespace qcore
