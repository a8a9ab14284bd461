// Many rows: codes of a panel are taken as they are packed, or where rows are more, are unpacked into the cache once and used by every row.
#pragma once
#include <algorithm>

#include "exact.h"
#include "grids.h"
#include "scratch.h"
#include "unpack.h"

namespace qcore {
namespace QCORE_ISA {

constexpr int64_t kBlockBytes = 16 << 10;  // that are unpacked at once: half of what the first cache holds

// Panels, two at most, and rows that share what is loaded: as many as there are registers for.
#ifdef __AVX512F__
constexpr int kPanelsAtOnce = 2;
constexpr int kFloatRun = 12, kHalfRun = 12, kIntegerRun = 8, kPackedRun = 8;
constexpr int kHeld = 24;  // sums and totals that are in registers together
constexpr int block_parts(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }
#else
constexpr int kPanelsAtOnce = 1;
#ifdef __AVXVNNI__
constexpr int kFloatRun = 6, kHalfRun = 0, kIntegerRun = 6, kPackedRun = 0;
#else
constexpr int kFloatRun = 6, kHalfRun = 0, kIntegerRun = 4, kPackedRun = 0;
#endif
constexpr int kHeld = 0;
constexpr int block_parts(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif

// What comes next from memory comes while rows are multiplied.
struct Ahead {
  Stream all[4];
  int64_t share, shares;
  QCORE_INLINE explicit Ahead(const Block& block) : share(block.share), shares(block.shares) { unroll<4>([&](auto i) QCORE_INSIDE { all[i] = block.ahead[i]; }); }
  QCORE_INLINE void fetch_chunk() {
    if (!all[0].bytes) return;
    unroll<4>([&](auto i) QCORE_INSIDE { fetch(all[i], share, shares); });
  }
};

template <int rows>
void add_floats(const Block& block, const Batch& batch, int64_t row, float* totals, int64_t apart) {
  constexpr int panels = kPanelsAtOnce;
  constexpr int parts = block_parts(rows * panels);
  const int64_t run = batch.run;
  const float* x = batch.values + row * block.strips->h->padded + block.first * run;
  const float* numbers[panels];
  F16 sum[parts][panels][rows];
  for (int p = 0; p < panels; p++) numbers[p] = reinterpret_cast<const float*>(block.numbers + p * block.bytes);
  unroll<parts * panels * rows>([&](auto i) QCORE_INSIDE { sum[i / (panels * rows)][i / rows % panels][i % rows] = zero_f(); });
  Ahead ahead(block);
  for (int64_t k = 0; k < 16 * block.columns; k += 64) {
    if (k % (16 * kChunk) == 0) ahead.fetch_chunk();
    unroll<4>([&](auto i) QCORE_INSIDE {
      F16 weight[panels];
      unroll<panels>([&](auto p) QCORE_INSIDE { weight[p] = load_f(numbers[p] + k + 16 * i); });
      unroll<rows>([&](auto r) QCORE_INSIDE {
        const F16 given = all_f(x[r]);
        unroll<panels>([&](auto p) QCORE_INSIDE {
          F16& to = sum[i % parts][p][r];
          to = fma(weight[p], given, to);
        });
      });
      advance(x, run);
    });
  }
  unroll<panels * rows>([&](auto i) QCORE_INSIDE {
    constexpr int p = i / rows, r = i % rows;
    F16 all = sum[0][p][r];
    unroll<parts - 1>([&](auto part) QCORE_INSIDE { all = add(all, sum[part + 1][p][r]); });
    float* const to = totals + p * apart + 16 * r;
    store_f(to, add(load_f(to), all));
  });
}

// Sixteen floats in memory.
struct Cell {
  float* place;
  QCORE_INLINE operator F16() const { return load_f(place); }
  QCORE_INLINE void operator=(F16 value) { store_f(place, value); }
};

// Sections end in the block: of whole numbers, and of halves.
template <class D, int rows>
void add_codes(const Block& block, const Batch& batch, int64_t row, float* totals, int64_t apart) {
  constexpr int panels = kPanelsAtOnce;
  constexpr int steps_of_half = D::width == 2 ? 8 : 4;  // half a chunk: a section may be no longer
  const Header& h = *block.strips->h;
  const int64_t run = batch.run, stop = block.first + block.columns;
  const char *x = numbers_of(batch) + (row * h.padded + block.first * run) * D::width, *numbers = block.numbers;
  const typename D::End ends[2] = {{block.strips[0], batch}, {block.strips[panels - 1], batch}};
  const typename D::Reader reader(*block.strips);
  Section section(h, batch, block.first);
  Ahead ahead(block);
  constexpr bool held = 2 * panels * rows <= kHeld;
  F16 held_totals[panels][rows];
  if constexpr (held) unroll<panels * rows>([&](auto i) QCORE_INSIDE { held_totals[i / rows][i % rows] = load_f(totals + i / rows * apart + 16 * (i % rows)); });
  for (int64_t begin = block.first, end; begin < stop; begin = end, section.next()) {
    end = begin + section.length < stop ? begin + section.length : stop;
    D dot[panels][rows];
    auto multiply = [&](auto from, auto steps) QCORE_INSIDE {
      if (from + steps == 2 * steps_of_half) ahead.fetch_chunk();
      unroll<steps>([&](auto step) QCORE_INSIDE {
        I16 codes[panels];
        unroll<panels>([&](auto p) QCORE_INSIDE { codes[p] = reader.template load<from + step>(numbers + p * block.bytes); });
        unroll<rows>([&](auto r) QCORE_INSIDE {
          const Word given = spread_word(x + 4 * r);
          unroll<panels>([&](auto p) QCORE_INSIDE { dot[p][r].add_step(codes[p], given); });
        });
        advance(x, 4 * run);
        if constexpr (step % D::fitting == D::fitting - 1 || step == steps - 1)
          unroll<panels * rows>([&](auto i) QCORE_INSIDE { dot[i / rows][i % rows].end_run(); });
      });
      if constexpr (!D::in_place) numbers += D::step_bytes * steps;
      else if constexpr (from + steps == 2 * steps_of_half) numbers += D::step_bytes * 2 * steps_of_half;
    };
    constexpr std::integral_constant<int, 0> start;
    constexpr std::integral_constant<int, steps_of_half> half;
    constexpr std::integral_constant<int, 2 * steps_of_half> whole;
    if constexpr (!D::in_place) {
      if (section.length < kChunk) multiply(start, half);
    } else if constexpr (D::short_sections) {
      if (section.length < kChunk && begin % kChunk == 0) multiply(start, half);
      else if (section.length < kChunk) multiply(half, half);
    }
    if ((D::in_place && !D::short_sections) || section.length >= kChunk)
      for (int64_t k = begin; k < end; k += kChunk) multiply(start, whole);
    end_section<panels, rows, false>(ends, row, section.number, section.of_group, [&](int p, int r) QCORE_INSIDE { return dot[p][r].take(); },
                              [&](int p, int r) QCORE_INSIDE -> decltype(auto) {
                                if constexpr (held) return (held_totals[p][r]);
                                else return Cell{totals + p * apart + 16 * r};
                              });
  }
  if constexpr (held) unroll<panels * rows>([&](auto i) QCORE_INSIDE { store_f(totals + i / rows * apart + 16 * (i % rows), held_totals[i / rows][i % rows]); });
}

// make(1), make(2) .. make(count).
template <class Made, int... before, class Make>
const Made* each_of(std::integer_sequence<int, before...>, Make make) {
  static const Made made[] = {make(std::integral_constant<int, before + 1>{})...};
  return made;
}
template <int count, class Made, class Make>
const Made* each_of(Make make) { return each_of<Made>(std::make_integer_sequence<int, count>{}, make); }

template <class Make>
const RowKernel* each_rows(Make make) {
  return each_of<kRowsAtOnce, RowKernel>(make);
}
inline const BlockKernel* float_blocks() {
  return each_of<kFloatRun, BlockKernel>([](auto rows) { return add_floats<rows>; });
}
template <class D, int most>
const BlockKernel* code_blocks() {
  return each_of<most, BlockKernel>([](auto rows) { return add_codes<D, rows>; });
}

template <Code code>
CodeKernels exact_kernels() {
  return {each_rows([](auto rows) { return exact_rows<code, rows>; }), unpack_floats<code>, float_blocks(), 4};
}
template <Code code>
CodeKernels integer_kernels() {
  using D = DotOf<code>;
  CodeKernels made{each_rows([](auto rows) { return integer_rows<code, rows>; }), unpack_codes<code>, code_blocks<D, kIntegerRun>(), D::width};
  if constexpr (kPackedRun > 0 && is_taken_packed(Numbers::kIntegers, code)) made.packed = code_blocks<PackedCodes<code>, kPackedRun>();
  return made;
}

// Of the codes and scales that come next: those of the panels behind these in the same columns where pairs of panels take turns, else the columns behind.
inline void look_ahead(Block& block, int64_t panels, bool in_turns) {
  const Header& h = *block.strips->h;
  const int64_t chunk = kPanel * kChunk * bits_of(h.code) / 8, done = (block.first + block.columns) / kChunk;
  const bool behind = in_turns || done * kChunk >= h.padded;
  for (int64_t p = 0; p < panels; p++) {
    const int64_t skip = behind ? kPanelsAtOnce * panel_bytes(h) : 0, place = in_turns ? block.first / kChunk : behind ? 0 : done;
    block.ahead[p] = {block.strips[p].codes + skip + place * chunk, chunk};
  }
  for (int64_t i = 0; i < 2; i++) {
    const Stream& next = block.strips[panels - 1].ahead[i];
    block.ahead[2 + i] = {next.at + block.first / kChunk * kPanelsAtOnce * next.bytes, kPanelsAtOnce * next.bytes};
  }
}

constexpr int64_t kRowBytes = 384 << 10;  // of rows that stay in the second cache beside what else is there
constexpr int64_t kMostPanels = 4 * kPanelsAtOnce;
constexpr int64_t kMostShares = 8;  // runs of rows that fetch what comes next: all at once would wait for each other
constexpr int64_t kRunningFrom = 32, kRunningBytes = 2 * kBlockBytes;  // rows from which making ratios of scales is worth it, and what is unpacked at once then

// What the panels that are multiplied together have in common, and their memory.
struct BlockPlan {
  const Job& job;
  const CodeKernels& kernels;
  const Running* running;  // null: totals are of sections
  int64_t columns;         // of a block
  bool in_turns;           // whether more panels than a pair are together: where all rows do not stay in the cache, they take turns at columns that do
  Strip strips[kMostPanels];
  float *spread, *ratios, *totals;
  uint8_t *expanded, *numbers;

  BlockPlan(const Job& job, const CodeKernels& kernels) : job(job), kernels(kernels) {
    const Header& h = *job.weight;
    const Batch& batch = job.batch;
    running = batch.rows >= kRunningFrom && !batch.scales ? kernels.running : nullptr;
    const int64_t usual = (running ? kRunningBytes : kBlockBytes) / kPanelsAtOnce / line();
    columns = batch.section < usual ? usual / batch.section * batch.section : batch.section;
    in_turns = batch.rows * h.padded * kernels.width > kRowBytes;
  }
  int64_t line() const { return kPanel * kernels.width; }  // bytes of an unpacked column
  int64_t together() const { return in_turns ? kMostPanels : kPanelsAtOnce; }
  int64_t cells() const { return job.batch.rows * kPanel; }
  int64_t floats() const { return 2 * job.weight->groups * kPanel; }
  int64_t codes() const { return is_grid(job.weight->code) ? job.weight->padded * kPanel : 0; }
  int64_t ratio_cells() const { return running ? (job.weight->groups + 1) * kPanel : 0; }

  void take(Scratch& memory) {
    memory.begin(together() * (4 * floats() + 4 * ratio_cells() + codes() + 4 * cells()) + kPanelsAtOnce * columns * line(), 5);
    memory.take(spread, together() * floats());
    memory.take(ratios, together() * ratio_cells());
    memory.take(expanded, together() * codes());
    memory.take(numbers, kPanelsAtOnce * columns * line());
    memory.take(totals, together() * cells());
  }
};

// The panels pair, pair + 1 of those that are together, by all rows, in some columns. panels: how many there are; a single one is multiplied twice.
// runs: whether totals are sums that run.
inline void multiply_pair(const BlockPlan& plan, int64_t pair, int64_t panels, int64_t column, bool runs) {
  const Header& h = *plan.job.weight;
  const Batch& batch = plan.job.batch;
  const CodeKernels& kernels = plan.kernels;
  const int64_t count = h.padded - column < plan.columns ? h.padded - column : plan.columns, apart = plan.columns * plan.line();
  const bool in_place = batch.in_place && kernels.packed;
  const BlockKernel* const multiply = in_place ? kernels.packed : runs ? plan.running->blocks(*plan.strips) : kernels.blocks;
  const Strip* const strips = plan.strips + pair;
  for (int64_t p = 0; p < panels && !in_place; p++) {
    kernels.unpack(strips[p], column, count, plan.numbers + p * apart);
    if (runs) plan.running->clear(strips[p], column, count, plan.numbers + p * apart);
  }
  const uint8_t* const given = in_place ? strips->codes + column * kPanel * bits_of(h.code) / 8 : plan.numbers;
  const int64_t bytes = panels < kPanelsAtOnce ? 0 : in_place ? panel_bytes(h) : apart, shares = (batch.rows + batch.run - 1) / batch.run;
  Block block{strips, column, count, reinterpret_cast<const char*>(given), bytes, {}, std::min(shares, kMostShares), 0};
  if (!is_grid(h.code)) look_ahead(block, panels, plan.in_turns);
  for (int64_t row = 0; row < batch.rows; row += batch.run) {
    const int64_t rows = batch.rows - row < batch.run ? batch.rows - row : batch.run;
    multiply[rows - 1](block, batch, row, plan.totals + pair * plan.cells() + row * kPanel, plan.cells());
    if (++block.share == block.shares) block.ahead->bytes = 0;
  }
}

// The panels first .. last - 1.
inline void multiply_blocks(const Job& job, const CodeKernels& kernels, int64_t first, int64_t last, Store store) {
  static thread_local Scratch memory;
  const Header& h = *job.weight;
  BlockPlan plan(job, kernels);
  plan.take(memory);
  const Running* const running = plan.running;
  for (int64_t panel = first; panel < last; panel += plan.together()) {
    const int64_t here = std::min(last - panel, plan.together());
    bool runs = running;
    for (int64_t p = 0; p < here; p++) {
      plan.strips[p] = open_panel(h, panel + p, plan.spread + p * plan.floats(), plan.expanded + p * plan.codes());
      runs = runs && running->fits(plan.strips[p]);
    }
    for (int64_t p = 0; runs && p < here; p++) running->open(plan.strips[p], plan.ratios + p * plan.ratio_cells());
    const int64_t paired = (here + kPanelsAtOnce - 1) / kPanelsAtOnce * kPanelsAtOnce;
    if (here < paired) plan.strips[here] = plan.strips[here - 1];
    std::memset(plan.totals, 0, paired * plan.cells() * sizeof(float));
    for (int64_t column = 0; column < h.padded; column += plan.columns)
      for (int64_t pair = 0; pair < here; pair += kPanelsAtOnce)
        multiply_pair(plan, pair, here - pair < kPanelsAtOnce ? here - pair : kPanelsAtOnce, column, runs);
    for (int64_t p = 0; runs && p < here; p++) running->close(plan.strips[p], job.batch.rows, plan.totals + p * plan.cells());
    for (int64_t row = 0; row < job.batch.rows; row++)
      for (int64_t p = 0; p < here; p++) store(job, row, panel + p, plan.totals + p * plan.cells() + row * kPanel);
  }
  memory.end();
}

}  // namespace QCORE_ISA
}  // namespace qcore
