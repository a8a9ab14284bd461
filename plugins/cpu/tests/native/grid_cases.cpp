// Weights in ggml's IQ2_XXS, IQ2_XS, IQ1_S and IQ1_M, with tables of tuples of their own (ggml's dequantize_row_iq*, in double).
#include "cases.h"
#include "weights.h"

namespace qcore {
namespace {

uint32_t word_at(const uint8_t* p) { return static_cast<uint32_t>(p[0] | p[1] << 8); }

// 256 numbers of a block.
void dequantize(Code code, const uint8_t* block, const int8_t* table, double* out) {
  const bool one = code == Code::kIQ1S || code == Code::kIQ1M;
  uint32_t half = word_at(block);
  if (code == Code::kIQ1M) {
    half = 0;
    for (int i = 0; i < 4; i++) half |= word_at(block + 48 + 2 * i) >> 12 << 4 * i;
  }
  const double d = wide_f16(static_cast<uint16_t>(half));
  for (int k = 0; k < 256; k++) {
    const int run = k / 32, i = k % 32 / 8, j = k % 8, part = k % 32 / 16;
    int place = 0, scale = 0, seven = 0;
    if (code == Code::kIQ2XXS) {
      const uint8_t* const at = block + 2 + 8 * run;
      const uint32_t word = word_at(at + 4) | word_at(at + 6) << 16;
      place = at[i], seven = word >> 7 * i & 127, scale = static_cast<int>(word >> 28);
    } else if (code == Code::kIQ2XS) {
      const uint32_t word = word_at(block + 2 + 8 * run + 2 * i);
      place = word & 511, seven = static_cast<int>(word >> 9), scale = block[66 + run] >> 4 * part & 15;
    } else if (code == Code::kIQ1S) {
      const uint32_t word = word_at(block + 34 + 2 * run);
      place = static_cast<int>(block[2 + 4 * run + i] | (word >> 3 * i & 7) << 8 | word >> 15 << 11), scale = word >> 12 & 7;
    } else {
      const int high = block[32 + 2 * run + i / 2] >> 4 * (i % 2) & 15;
      place = block[4 * run + i] | high << 8, scale = word_at(block + 48 + run / 2 * 2) >> (6 * (run % 2) + 3 * part) & 7;
    }
    int signs = seven;
    for (int bit = 0; bit < 7; bit++) signs ^= (seven >> bit & 1) << 7;
    const double value = table[8 * place + j] * d * (2 * scale + 1) / 8;
    out[k] = !one && signs >> j & 1 ? -value : value;
  }
}

Weight make(Code code, int64_t rows, int64_t columns, Input input) {
  const bool one = code == Code::kIQ1S || code == Code::kIQ1M;
  const int64_t block_bytes = grid_block_bytes(code), blocks = rows * columns / 256;
  const int64_t tuples = one ? 4096 : code == Code::kIQ2XS ? 512 : 256;
  Header h{};
  h.magic = kMagic, h.version = kVersion, h.rows = rows, h.columns = h.padded = columns, h.code = code, h.coarse_group = 1, h.tensor_scale = 1;
  h.group = code == Code::kIQ2XXS || code == Code::kIQ1S ? 32 : 16, h.groups = columns / h.group, h.input = input, h.input_scale = 0.02;
  h.codes = sizeof h, h.table = h.codes + (blocks * block_bytes + 63) / 64 * 64, h.total = h.table + 8 * tuples;
  Weight w{std::make_unique<uint8_t[]>(h.total), std::vector<double>(rows * columns), {}};
  std::memcpy(w.bytes.get(), &h, sizeof h);
  int8_t* const table = reinterpret_cast<int8_t*>(w.bytes.get() + h.table);
  for (int64_t i = 0; i < 8 * tuples; i++) {
    const int8_t first = static_cast<int8_t>(one ? 8 * (below(3) - 1) + 1 : below(44));
    table[i] = one && i >= 4 * tuples ? static_cast<int8_t>(table[i - 4 * tuples] - 2) : first;
  }
  for (int64_t b = 0; b < blocks; b++) {
    uint8_t* const block = w.bytes.get() + h.codes + b * block_bytes;
    for (int64_t i = 0; i < block_bytes; i++) block[i] = static_cast<uint8_t>(below(256));
    const uint16_t d = f16(0.001f * static_cast<float>(1 + below(9)));
    if (code == Code::kIQ1M)
      for (int i = 0; i < 4; i++) block[49 + 2 * i] = static_cast<uint8_t>((block[49 + 2 * i] & 15) | (d >> 4 * i & 15) << 4);
    else
      std::memcpy(block, &d, 2);
    dequantize(code, block, table, w.dense.data() + 256 * b);
  }
  return w;
}

}  // namespace

void grid_cases(const Kernels& kernels, Tally& tally) {
  for (int turn = 0; turn < 20; turn++)
    for (const Code code : {Code::kIQ2XXS, Code::kIQ2XS, Code::kIQ1S, Code::kIQ1M}) {
      const int64_t rows = 1 + below(40), columns = 256 * (1 + below(4)), given[] = {1, 1, 2, 3, 5, 19};
      const Input input = static_cast<Input>(below(4));
      const Float type = static_cast<Float>(below(3));
      const Weight w = make(code, rows, columns, input);
      const int64_t many = given[below(6)];
      const double error = worst(kernels, type, w, many);
      if (!tally.count(type, error))
        std::printf("%s: code %d, [%d, %d], input %d, type %d, %d rows: error %.3g\n", kernels.name, (int)code, (int)rows, (int)columns, (int)input, (int)type, (int)many, error);
    }
}

Weight grid_weight(int64_t rows, int64_t columns, Input input) { return make(Code::kIQ2XXS, rows, columns, input); }

}  // namespace qcore
