// ggml's blocks on their way into panels.
#include <cstdio>
#include <memory>

#include "cases.h"
#include "ggml_blocks.h"
#include "packed.h"

extern "C" int qcore_pack_blocks(qcore::Header*, const uint8_t*, int64_t, int64_t);

namespace qcore {

// Blocks of ggml's are taken apart within their memory, and a scale that is no number is seen wherever it stands.
bool blocks_are_taken_apart() {
  bool good = true;
  for (const BlockForm& form : kForms)
    for (const int64_t rows : {1, 16, 21}) {
      Header h{};
      const int64_t count = 512 / form.columns, groups = groups_of(form.stored), padded = (rows + 15) / 16 * 16;
      h.rows = rows, h.columns = h.padded = 512, h.group = form.columns / (groups ? groups : 1), h.groups = 512 / h.group;
      h.code = static_cast<Code>(form.low.bits + form.high.bits);
      const int64_t cells = padded * h.groups * (groups ? 1 : 2), above = has_half(form.stored) && groups ? padded * 2 * 2 : 0;
      h.codes = sizeof h, h.scales = h.codes + padded * 512 * bits_of(h.code) / 8, h.offsets = h.scales + cells;
      const int64_t end = h.offsets + cells;
      if (above) h.super_scales = end, h.super_offsets = end + above;
      const auto bytes = std::make_unique<uint8_t[]>(end + 2 * above);
      std::memcpy(bytes.get(), &h, sizeof h);
      const auto blocks = std::make_unique<uint8_t[]>(rows * count * form.bytes);
      for (int64_t i = 0; i < rows * count * form.bytes; i++) blocks[i] = static_cast<uint8_t>(below(256));
      auto scale = [&](int64_t block, uint8_t high) {
        uint8_t* const at = blocks.get() + block * form.bytes + form.half;
        if (!has_half(form.stored)) *at = high == 0x7c ? 255 : 100;
        else at[1] = high;
        if (has_half(form.stored) && has_minimum(form.stored) && form.stored != Stored::kSign) at[3] = 0x2c;
      };
      for (int64_t block = 0; block < rows * count; block++) scale(block, 0x2c);
      auto pack = [&] { return qcore_pack_blocks(reinterpret_cast<Header*>(bytes.get()), blocks.get(), count * form.bytes, form.type); };
      bool right = pack() == 1;
      scale(below(rows * count), 0x7c);
      right = pack() == 0 && right;
      if (!right) std::printf("blocks of type %d, %d rows: wrong\n", (int)form.type, (int)rows);
      good = right && good;
    }
  return good;
}

}  // namespace qcore
