#include "linear.h"

#include "scratch.h"
#include "threads.h"

namespace qcore {
namespace {

constexpr int64_t kBlock = 128;    // rounded activations that share a scale, at most
constexpr int64_t kFloatSum = 256;   // products that are summed before they go to a sum of such sums: long sums lose digits
constexpr int64_t kWholeSum = 512;  // the same of whole numbers, which are exact: for the sake of the caches
constexpr int64_t kFewRows = 4;   // that are quicker by themselves than as blocks, where some are multiplied at once
constexpr int64_t kIntegersInPlace = 64, kHalvesInPlace = 31;  // rows up to which codes are not unpacked
constexpr int64_t kIntegerTilesFrom = 9, kHalfTilesFrom = 3;  // rows from which tiles are worth it
constexpr int64_t kWorthWaking = 320 << 10;

thread_local Scratch scratch;

// How the rows are multiplied, without their memory.
Batch plan(const Kernels& kernels, const Header& h, int64_t rows, Float type) {
  Batch batch{};
  const bool integers = is_whole(h.input);
  const bool halves = !integers && (type == Float::kBF16 || is_float8(h.input)) && kernels.has_halves && !(rows == 1 && is_grid(h.code));  // which has its own way
  const bool floats = !integers && !halves;
  batch.numbers = integers ? Numbers::kIntegers : halves ? Numbers::kHalves : Numbers::kFloats;
  const int64_t tiles_from = !kernels.has_tiles || floats ? INT64_MAX : integers ? kIntegerTilesFrom : kHalfTilesFrom;
  int64_t few = floats ? 2 : 1;  // two rows of floats are quicker one by one than what unpacking takes
  if (kernels.rows_at_once > 1) few = tiles_from <= kFewRows ? tiles_from - 1 : kFewRows;
  if (is_grid(h.code)) few = 1;
  batch.way = rows <= few ? Way::kRows : rows >= tiles_from ? Way::kTiles : Way::kBlocks;
  const int64_t most = batch.way == Way::kTiles ? 1 : batch.way == Way::kRows ? kernels.rows_at_once : floats ? kernels.float_run : halves ? kernels.half_run : kernels.integer_run;
  const int64_t longest = h.input == Input::kBlocks || h.input == Input::kFloatBlocks ? kBlock : integers ? kWholeSum : kFloatSum;
  batch.section = h.group > longest && (h.groups == 1 || h.group % longest == 0) ? longest : h.group;
  batch.sections = (h.padded + batch.section - 1) / batch.section;
  batch.in_place = batch.way == Way::kBlocks && rows <= (integers ? kIntegersInPlace : kHalvesInPlace) && kernels.packed_run &&
                   is_taken_packed(batch.numbers, h.code) && (batch.section >= kChunk || in_short_sections(batch.numbers, h.code));
  const int64_t run = batch.in_place ? kernels.packed_run : most, runs = (rows + run - 1) / run;
  batch.run = (rows + runs - 1) / runs;
  batch.rows = rows;
  batch.tile_bytes = 64;
  if (batch.numbers == Numbers::kHalves && batch.section % 32) batch.tile_bytes = 32;
  if (batch.numbers == Numbers::kIntegers && batch.sections > 1 && batch.section % 64) batch.tile_bytes = batch.section % 32 ? 16 : 32;
  return batch;
}

void take_memory(const Kernels& kernels, const Header& h, Batch& batch) {
  const bool integers = batch.numbers == Numbers::kIntegers, in_tiles = batch.way == Way::kTiles;
  const int64_t whole_runs = (batch.rows + batch.run - 1) / batch.run * batch.run;
  const int64_t cells = in_tiles ? 0 : whole_runs * h.padded, parts = whole_runs * batch.sections;
  const int64_t floats = batch.numbers == Numbers::kFloats ? cells : 0, halves = batch.numbers == Numbers::kHalves ? cells : 0;
  const bool wide = kernels.has_pairs && h.code >= Code::kInt8 && !by_grid_rows(h, batch.way);  // tables and grids give 8 bits
  const int64_t pairs = integers && wide ? cells : 0, codes = integers && !wide ? cells : 0;
  const int64_t tiles = in_tiles ? (batch.rows + 15) / 16 * tile_steps(batch, h.padded) * 16 * batch.tile_bytes : 0;
  const bool scaled = integers || (batch.numbers == Numbers::kHalves && is_float8(h.input));
  scratch.begin(4 * floats + 2 * halves + codes + 2 * pairs + tiles + (integers ? 12 : scaled ? 4 : 0) * parts + 4 * parts, 9);
  scratch.take(batch.values, floats);
  scratch.take(batch.halves, halves);
  scratch.take(batch.codes, codes);
  scratch.take(batch.pairs, pairs);
  scratch.take(batch.tiles, tiles);
  scratch.take(batch.scales, scaled ? parts : 0);
  scratch.take(batch.totals, integers ? parts : 0);
  scratch.take(batch.shifts, integers ? parts : 0);
  scratch.take(batch.sums, parts);
}

// Whether activations that were made ready for one weight serve for another.
bool alike(const Header& a, const Header& b) {
  if (a.columns != b.columns || a.group != b.group || a.groups != b.groups || a.input != b.input || a.order || b.order) return false;
  if (is_grid(a.code) != is_grid(b.code)) return false;  // rows of grids want other numbers (plan)
  if (a.input == Input::kExact) return in_place(a.code) == in_place(b.code);
  return a.code == b.code && a.zero == b.zero && a.input_scale == b.input_scale;
}

// One of the rows that were made ready.
Batch row_of(Batch batch, int64_t row, int64_t padded) {
  auto skip = [](auto& part, int64_t count) {
    if (part) part += count;
  };
  batch.rows = 1;
  skip(batch.values, row * padded), skip(batch.halves, row * padded), skip(batch.codes, row * padded), skip(batch.pairs, row * padded);
  const int64_t parts = row * batch.sections;
  skip(batch.scales, parts), skip(batch.totals, parts), skip(batch.shifts, parts), skip(batch.sums, parts);
  return batch;
}

// Panels that a thread takes at a time, an even number: blocks are made of pairs. What is only read is read fastest in long runs, which
// nobody else fetches the beginning of; where there is more to it, whoever is late has less left to do.
int64_t part_of(int64_t panels, int64_t workers, int64_t bytes) {
  constexpr int64_t kRun = 1 << 20, kMost = 8;
  const int64_t runs = bytes / (kRun * workers), parts = workers * (runs < 1 ? 1 : runs > kMost ? kMost : runs);
  return ((panels + parts - 1) / parts + 1) / 2 * 2;
}

// The rows by weights that are alike, their panels one after the other; own: row i by the i-th of them.
void multiply(const Kernels& kernels, const Product* products, int count, const Given& given, Float out_type, bool own) {
  const Header& h = *products->weight;
  const int64_t rows = given.rows;
  Job job{&h, plan(kernels, h, own ? 1 : rows, given.type), given.x, given.stride, nullptr, given.type, out_type};
  job.batch.rows = rows;
  take_memory(kernels, h, job.batch);
  parallel(rows, 16, [&](int64_t first, int64_t last) { kernels.prepare(job, first, last); });
  int64_t panels = 0, bytes = 0;
  for (int i = 0; i < count; i++) panels += panels_of(*products[i].weight), bytes += products[i].weight->total;
  const int64_t workers = threads();
  // Waking threads takes about ten microseconds, in which one alone reads this many bytes.
  const bool alone = workers == 1 || (!in_team() && bytes * (1 + rows / 4) < kWorthWaking);
  const int64_t step = alone ? panels : part_of(panels, workers, job.batch.way == Way::kRows ? bytes : INT64_MAX);
  parallel(panels, step, [&](int64_t first, int64_t last) {
    for (int i = 0; i < count && last > 0; i++) {
      const int64_t panels_here = panels_of(*products[i].weight), from = first > 0 ? first : 0, to = last < panels_here ? last : panels_here;
      Job part = job;
      part.weight = products[i].weight, part.out = products[i].out;
      if (own) part.batch = row_of(job.batch, i, h.padded);
      if (from < to) kernels.multiply(part, from, to);
      first -= panels_here, last -= panels_here;
    }
  });
  scratch.end();
}

// Given's rows from `first` on.
Given rows_of(const Given& given, int64_t first, int64_t count) {
  return {static_cast<const char*>(given.x) + first * given.stride * width_of(given.type), count, given.stride, given.type};
}

}  // namespace

void linear(const Kernels& kernels, const Header& h, const Given& given, void* out) {
  for (int64_t row = 0; row < given.rows; row += kRowsOfABatch) {
    const int64_t count = given.rows - row < kRowsOfABatch ? given.rows - row : kRowsOfABatch;
    const Product product{&h, static_cast<char*>(out) + row * h.rows * width_of(given.type)};
    multiply(kernels, &product, 1, rows_of(given, row, count), given.type, false);
  }
}

void linears(const Kernels& kernels, const Product* products, int count, const Given& given, Float out_type, bool own) {
  for (int first = 0, last; first < count; first = last) {
    for (last = first + 1; last < count && alike(*products[first].weight, *products[last].weight);) last++;
    multiply(kernels, products + first, last - first, own ? rows_of(given, first, last - first) : given, out_type, own);
  }
}

const char* fault_of(const Header* h, int64_t bytes) {
  if (bytes < static_cast<int64_t>(sizeof(Header)) || h->magic != kMagic) return "this is no packed weight";
  if (h->version != kVersion) return "the weight was packed by another version";
  if (h->total != bytes) return "the packed weight has another size than its header says";
  return nullptr;
}

}  // namespace qcore
