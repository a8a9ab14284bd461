// Many rows: columns of a panel are unpacked into the cache once, and used by every row.
#pragma once
#include "exact.h"
#include "grids.h"
#include "scratch.h"
#include "unpack.h"

namespace qcore {
namespace QCORE_ISA {

constexpr int64_t kBlockBytes = 16 << 10;  // that are unpacked at once: half of what the first cache holds

// Rows that share what is loaded of a block: as many as there are registers for.
#ifdef __AVX512F__
constexpr int kFloatRun = 12, kIntegerRun = 12;
constexpr int parts_of(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }
#elif defined(__AVXVNNI__)
constexpr int kFloatRun = 6, kIntegerRun = 6;
constexpr int parts_of(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#else
constexpr int kFloatRun = 6, kIntegerRun = 4;
constexpr int parts_of(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif

template <int rows>
void add_floats(const Strip&, const Batch&, int64_t, int64_t, int64_t columns, const void* given, const void* unpacked, float* totals) {
  constexpr int parts = parts_of(rows);  // so that one addition need not wait for the one before
  const float *x = static_cast<const float*>(given), *block = static_cast<const float*>(unpacked);
  F16 sum[parts][rows];
  unroll<parts * rows>([&](auto i) QCORE_INSIDE { sum[i / rows][i % rows] = zero_f(); });
  for (int64_t k = 0; k < columns; k += 4) {
    unroll<4>([&](auto i) QCORE_INSIDE {
      const F16 weight = load_f(block + 16 * i);
      unroll<rows>([&](auto r) QCORE_INSIDE {
        F16& to = sum[i % parts][r];
        to = fma(weight, all_f(x[kFloatRun * i + r]), to);
      });
    });
    x += 4 * kFloatRun;
    block += 64;
  }
  unroll<rows>([&](auto r) QCORE_INSIDE {
    F16 all = sum[0][r];
    for (int p = 1; p < parts; p++) all = add(all, sum[p][r]);
    store_f(totals + 16 * r, add(load_f(totals + 16 * r), all));
  });
}

// Sections end in the block: of whole numbers, and of halves.
template <class D, int rows>
void add_codes(const Strip& strip, const Batch& batch, int64_t row, int64_t first, int64_t columns, const void* given, const void* unpacked, float* totals) {
  constexpr int steps_of_half = D::width == 2 ? 8 : 4;  // half a chunk: a section may be no longer
  const char *x = static_cast<const char*>(given), *block = static_cast<const char*>(unpacked);
  const typename D::End ends(strip, batch);
  const int64_t stop = first + columns;
  Section section(*strip.h, batch, first);
  for (int64_t begin = first, end; begin < stop; begin = end, section.next()) {
    end = begin + section.length < stop ? begin + section.length : stop;
    D dot[rows];
    auto multiply = [&](auto steps) QCORE_INSIDE {
      unroll<steps>([&](auto step) QCORE_INSIDE {
        const I16 codes = load_i(block + 64 * step);
        unroll<rows>([&](auto r) QCORE_INSIDE { dot[r].add_step(codes, x + 4 * (kIntegerRun * step + r)); });
        if constexpr (step % D::fitting == D::fitting - 1 || step == steps - 1) unroll<rows>([&](auto r) QCORE_INSIDE { dot[r].end_run(); });
      });
      block += 64 * steps;
      x += 4 * kIntegerRun * steps;
    };
    if (section.length < kChunk) multiply(std::integral_constant<int, steps_of_half>{});
    else
      for (int64_t k = begin; k < end; k += kChunk) multiply(std::integral_constant<int, 2 * steps_of_half>{});
    unroll<rows>([&](auto r) QCORE_INSIDE {
      float* const total = totals + 16 * r;
      store_f(total, ends.add(row + r, section.number, section.of_group, dot[r].take(), load_f(total)));
    });
  }
}

template <int... rows>
const BlockKernel* float_blocks(std::integer_sequence<int, rows...>) {
  static constexpr BlockKernel kernels[] = {add_floats<rows + 1>...};
  return kernels;
}
template <class D, int... rows>
const BlockKernel* code_blocks(std::integer_sequence<int, rows...>) {
  static constexpr BlockKernel kernels[] = {add_codes<D, rows + 1>...};
  return kernels;
}

template <Code code>
CodeKernels exact_kernels() {
  return {exact_row<code>, unpack_floats<code>, float_blocks(std::make_integer_sequence<int, kFloatRun>{}), 4};
}
template <Code code>
CodeKernels integer_kernels() {
  using D = DotOf<code>;
  return {integer_row<code>, unpack_codes<code>, code_blocks<D>(std::make_integer_sequence<int, kIntegerRun>{}), D::width};
}

// The panels first .. last - 1.
inline void multiply_blocks(const Job& job, const CodeKernels& kernels, int64_t first, int64_t last, Store store) {
  static thread_local Scratch memory;
  const Header& h = *job.weight;
  const Batch& batch = job.batch;
  const int64_t line = kPanel * kernels.width, usual = kBlockBytes / line;
  const int64_t columns = batch.section < usual ? usual / batch.section * batch.section : batch.section;
  const int64_t floats = 2 * h.groups * kPanel, codes = is_grid(h.code) ? h.padded * kPanel : 0, cells = batch.rows * kPanel;
  float *spread, *totals;
  uint8_t *expanded, *block;
  memory.begin(4 * floats + codes + columns * line + 4 * cells, 4);
  memory.take(spread, floats);
  memory.take(expanded, codes);
  memory.take(block, columns * line);
  memory.take(totals, cells);
  const char* const x = numbers_of(batch);
  for (int64_t panel = first; panel < last; panel++) {
    const Strip strip = open_panel(h, panel, spread, expanded);
    std::memset(totals, 0, cells * sizeof(float));
    for (int64_t column = 0; column < h.padded; column += columns) {
      const int64_t count = h.padded - column < columns ? h.padded - column : columns;
      kernels.unpack(strip, column, count, block);
      for (int64_t row = 0; row < batch.rows; row += batch.run) {
        const int64_t rows = batch.rows - row < batch.run ? batch.rows - row : batch.run;
        kernels.blocks[rows - 1](strip, batch, row, column, count, x + (row * h.padded + column * batch.run) * kernels.width, block, totals + row * kPanel);
      }
    }
    for (int64_t row = 0; row < batch.rows; row++) store(job, row, panel, totals + row * kPanel);
  }
  memory.end();
}

}  // namespace QCORE_ISA
}  // namespace qcore
