#include "threads.h"

#include <dlfcn.h>

#include <atomic>
#include <exception>

namespace qcore {
namespace {

// The interface that GCC's code for `#pragma omp parallel` calls; LLVM's and Intel's runtimes have it too.
void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned);
int (*omp_in_parallel)();
int (*torch_threads)();

struct Loop {
  int64_t count, step;
  void (*work)(void*, int64_t, int64_t);
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr fault;
};

void take_parts(void* argument) {
  Loop& loop = *static_cast<Loop*>(argument);
  try {
    for (;;) {
      const int64_t first = loop.next.fetch_add(loop.step, std::memory_order_relaxed);
      if (first >= loop.count) return;
      loop.work(loop.context, first, first + loop.step < loop.count ? first + loop.step : loop.count);
    }
  } catch (...) {  // no exception may leave a thread of the pool
    loop.next.store(loop.count);
    if (!loop.failed.exchange(true)) loop.fault = std::current_exception();
  }
}

}  // namespace

void find_threads(void* library) {
  auto find = [&](auto& function, const char* name) { function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name)); };
  find(gomp_parallel, "GOMP_parallel");
  find(omp_in_parallel, "omp_in_parallel");
  find(torch_threads, "_ZN2at15get_num_threadsEv");
}

int threads() {
  if (!gomp_parallel || !omp_in_parallel || !torch_threads || omp_in_parallel()) return 1;
  return torch_threads();
}

void parallel(int64_t count, int64_t step, void (*work)(void*, int64_t, int64_t), void* context) {
  const int64_t parts = (count + step - 1) / step, most = threads();
  const int64_t wanted = parts < most ? parts : most;
  if (wanted <= 1) {
    if (count > 0) work(context, 0, count);
    return;
  }
  Loop loop{count, step, work, context, {0}, {false}, nullptr};
  gomp_parallel(take_parts, &loop, static_cast<unsigned>(wanted), 0);
  if (loop.fault) std::rethrow_exception(loop.fault);
}

}  // namespace qcore
