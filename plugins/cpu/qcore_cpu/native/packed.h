// The packed weight: one block of bytes with a header, which the kernels stream from front to back.
//
// Rows (output channels) are cut into panels of 16 and columns into chunks of 32. A chunk of b-bit codes takes 64 b bytes:
// one vector of 64 bytes holds, for each of the 16 rows, a 32-bit word with the codes of 4 * 8 / b columns. Where b is not
// a power of two, planes of 4, 2 and 1 bits follow each other, the low bits first. Quad t (0..7) of a chunk is columns
// 4 t .. 4 t + 3, one byte each; plane vectors hold quads on top of each other:
//
//   8 bits   vector t          byte j of the word            column 4 t + j
//   4 bits   vector t / 2      byte j, bits 4 (t % 2) ..     column 4 t + j
//   2 bits   vector t / 4      byte j, bits 2 (t % 4) ..     column 4 t + j
//   1 bit    vector 0          byte j, bit t                 column 4 t + j
//
// so that one shift and one mask give the 16 x 4 bytes that VNNI instructions and the B operand of AMX tiles want. Scales
// are [panel][group][16]. Rows and columns beyond the weight's are zeros.
#pragma once
#include <cstdint>

// Functions that Python calls.
#define QCORE_API extern "C" __attribute__((visibility("default")))

namespace qcore {

constexpr int64_t kMagic = 0x55504345524f4351;  // "QCORECPU"
constexpr int64_t kVersion = 1;
constexpr int64_t kPanel = 16;
constexpr int64_t kChunk = 32;
constexpr int64_t kFloat8Block = 128;  // activations of e4m3 that share a scale, where they are in blocks

// What the bits of a code are. Integers of 8 bits are signed; narrower ones are unsigned, and `Header::zero` is subtracted.
enum class Code : int64_t {
  kInt1 = 1, kInt2, kInt3, kInt4, kInt5, kInt6, kInt7, kInt8,
  kTable3 = 19,      // an index into 8 floats
  kTable4,           // an index into 16 floats
  kE4M3 = 32,        // 8-bit floats, bias 7; every code is a number
  kE4M3Fnuz,         // the same, bias 8
  kE5M2,             // bias 15
  kE3M2 = 40,        // 6-bit floats, bias 3
  kE2M3,             // bias 1
  kIQ2XXS = 48,      // ggml's blocks, rows as in the file; the grid, eight int8 to an entry, is at Header::table
  kIQ2XS,
  kIQ1S,
  kIQ1M,
};

enum class Scale : int64_t {
  kF32 = 0, kF16, kBF16,
  kE8M0,        // 2^(byte - 127)
  kE4M3,        // 8-bit floats, times Header::tensor_scale
  kRuns,        // int8 codes times the float16 of the 256 columns that they belong to
  kNibbles,     // the low halves of bytes, the same
  kTable8,      // index into 256 floats, times a coarser float32 for each coarse_group fine groups, plus Header::shift
};

// What else a group has: w = (q - Header::zero - z) * scale + offset.
enum class Offset : int64_t {
  kNone = 0,
  kZeroU8,      // z, unsigned
  kZeroS8,      // z, signed
  kFloat,       // an offset, a float of the scales' type
  kRuns,        // an offset: -(uint8 code * float16 of the 256 columns)
  kNibbles,     // the same, the code being the high half of the scale's byte
};

// How activations are treated.
enum class Input : int64_t {
  kExact = 0,   // in float32
  kBlocks,      // rounded to int8 with one scale for each group of columns, or for each 128 of a longer one
  kToken,       // rounded to int8 with one scale for each row
  kStatic,      // rounded to int8 with Header::input_scale
  kFloatToken,  // the same three, rounded to e4m3; in blocks of 128 columns
  kFloatStatic,
  kFloatBlocks,
};
constexpr bool is_whole(Input input) { return input >= Input::kBlocks && input <= Input::kStatic; }
constexpr bool is_float8(Input input) { return input >= Input::kFloatToken; }

struct Header {  // every field has 8 bytes
  int64_t magic, version;
  int64_t rows, columns, padded;          // padded: columns, rounded up to whole chunks
  Code code;
  int64_t zero;
  int64_t group, groups;                  // columns that share a scale (a multiple of 16), and how many groups a row has
  Scale scale;
  Offset offset;
  Input input;
  int64_t codes, scales, offsets;         // where the sections begin, in bytes from the header
  int64_t super_scales, super_offsets;    // float16 [panel][256 columns][16] of Scale and Offset kRuns and kNibbles
  int64_t order;                          // int32 [padded], the input column of each packed one; 0 where they are in order
  int64_t table;                          // float32: a code's 16 entries, then Scale::kTable8's 256
  int64_t total;                          // bytes of the whole
  double tensor_scale, shift, input_scale;
  int64_t coarse_group;
  int64_t reserved[8];
};
static_assert(sizeof(Header) == 256);

constexpr int bits_of(Code code) {
  const int value = static_cast<int>(code);
  return value <= 8 ? value : value < 32 ? value - 16 : value < 40 ? 8 : 6;
}
constexpr bool is_integer(Code code) { return code <= Code::kInt8; }
constexpr bool is_table(Code code) { return code == Code::kTable3 || code == Code::kTable4; }
constexpr bool is_grid(Code code) { return code >= Code::kIQ2XXS; }

inline int64_t grid_block_bytes(Code code) {  // of 256 codes
  return code == Code::kIQ2XXS ? 66 : code == Code::kIQ2XS ? 74 : code == Code::kIQ1S ? 50 : 56;
}

inline int64_t panels_of(const Header& h) { return (h.rows + kPanel - 1) / kPanel; }

inline int64_t panel_bytes(const Header& h) { return h.padded * kPanel * bits_of(h.code) / 8; }

}  // namespace qcore
