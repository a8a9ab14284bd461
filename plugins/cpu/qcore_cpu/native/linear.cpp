#include "linear.h"

#include <cstdlib>
#include <new>

#include "threads.h"

namespace qcore {
namespace {

constexpr int64_t kRowsOfABatch = 512;
constexpr int64_t kBlock = 32;     // rounded activations that share a scale
constexpr int64_t kFloatSum = 256;   // products that are summed before they go to a sum of such sums: long sums lose digits
constexpr int64_t kWholeSum = 2048;  // the same of whole numbers, which are exact: for the sake of the caches
constexpr int64_t kWorthWaking = 320 << 10;
constexpr int64_t kScratchKept = 4 << 20;  // bytes that a thread keeps from one call to the next

// Memory in lines of 64 bytes, cut into arrays.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  void begin(int64_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(memory_);
    size_ = bytes;
    memory_ = static_cast<char*>(std::aligned_alloc(64, rounded(bytes)));
    if (!memory_) {
      size_ = 0;
      throw std::bad_alloc();
    }
  }
  void end() {
    if (size_ <= kScratchKept) return;
    std::free(memory_);
    memory_ = nullptr;
    size_ = 0;
  }
  template <class T>
  void take(T*& array, int64_t count) {
    array = count ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += rounded(count * static_cast<int64_t>(sizeof(T)));
  }
  static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  char* memory_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

thread_local Scratch scratch;

// How the rows are multiplied, without their memory.
Batch plan(const Kernels& kernels, const Header& h, int64_t rows, Float type) {
  Batch batch{};
  const bool tiles = kernels.tiles_from && rows >= kernels.tiles_from;
  const bool integers = h.input != Input::kExact;
  if (integers) batch.method = tiles ? Method::kIntegerTiles : Method::kIntegers;
  else if (type == Float::kBF16 && kernels.has_halves) batch.method = tiles ? Method::kHalfTiles : Method::kHalves;
  else batch.method = Method::kFloats;
  batch.rows = rows;
  const int64_t most = h.input == Input::kBlocks ? kBlock : integers ? kWholeSum : kFloatSum;
  batch.section = h.group > most && (h.groups == 1 || h.group % most == 0) ? most : h.group;
  batch.sections = (h.padded + batch.section - 1) / batch.section;
  if (batch.method == Method::kHalfTiles) batch.tile_bytes = batch.section % 32 ? 32 : 64;
  if (batch.method == Method::kIntegerTiles)
    batch.tile_bytes = batch.sections == 1 || batch.section % 64 == 0 ? 64 : batch.section % 32 ? 16 : 32;
  if (!batch.tile_bytes) batch.tile_bytes = 64;
  return batch;
}

void take_memory(const Kernels& kernels, const Header& h, Batch& batch) {
  const int64_t cells = batch.rows * h.padded, parts = batch.rows * batch.sections;
  const bool integers = is_integer(batch.method);
  const int64_t floats = batch.method == Method::kFloats ? cells : 0, halves = batch.method == Method::kHalves ? cells : 0;
  const int64_t codes = batch.method == Method::kIntegers ? cells : 0;
  const int64_t pairs = codes && kernels.has_pairs && h.code >= Code::kInt8 ? cells : 0;  // tables and grids give 8 bits
  const int64_t tiles = in_tiles(batch.method) ? (batch.rows + 15) / 16 * tile_steps(batch, h.padded) * 16 * batch.tile_bytes : 0;
  scratch.begin(4 * floats + 2 * halves + codes + 2 * pairs + tiles + (integers ? 8 * parts : 0) + 4 * parts + 9 * 64);
  scratch.take(batch.values, floats);
  scratch.take(batch.halves, halves);
  scratch.take(batch.codes, codes);
  scratch.take(batch.pairs, pairs);
  scratch.take(batch.tiles, tiles);
  scratch.take(batch.scales, integers ? parts : 0);
  scratch.take(batch.totals, integers ? parts : 0);
  scratch.take(batch.sums, parts);
}

void multiply(const Kernels& kernels, const Header& h, const void* x, int64_t rows, int64_t stride, Float type, void* out) {
  Job job{&h, plan(kernels, h, rows, type), x, stride, out, type};
  take_memory(kernels, h, job.batch);
  parallel(rows, 16, [&](int64_t first, int64_t last) { kernels.prepare(job, first, last); });
  const int64_t panels = panels_of(h), workers = threads();
  // Waking threads takes about ten microseconds, in which one alone reads this many bytes.
  const bool alone = workers == 1 || (!in_team() && h.total * (1 + rows / 4) < kWorthWaking);
  const int64_t step = alone ? panels : panels / (8 * workers) > 1 ? panels / (8 * workers) : 1;
  parallel(panels, step, [&](int64_t first, int64_t last) { kernels.multiply(job, first, last); });
  scratch.end();
}

}  // namespace

void linear(const Kernels& kernels, const Header& h, const void* x, int64_t rows, int64_t stride, Float type, void* out) {
  for (int64_t row = 0; row < rows; row += kRowsOfABatch) {
    const int64_t count = rows - row < kRowsOfABatch ? rows - row : kRowsOfABatch;
    multiply(kernels, h, static_cast<const char*>(x) + row * stride * width_of(type), count, stride, type,
             static_cast<char*>(out) + row * h.rows * width_of(type));
  }
}

const char* fault_of(const Header* h, int64_t bytes) {
  if (bytes < static_cast<int64_t>(sizeof(Header)) || h->magic != kMagic) return "this is no packed weight";
  if (h->version != kVersion) return "the weight was packed by another version";
  if (h->total != bytes) return "the packed weight has another size than its header says";
  return nullptr;
}

}  // namespace qcore
