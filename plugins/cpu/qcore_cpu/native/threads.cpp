#include "threads.h"

#include <dlfcn.h>
#include <immintrin.h>

#include <atomic>
#include <exception>
#include <thread>

namespace qcore {
namespace {

// The interface that GCC's code for `#pragma omp parallel` calls; LLVM's and Intel's runtimes have it too.
void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned);
int (*omp_in_parallel)();
int (*torch_threads)();

// The first exception of several threads; none may leave a thread of the pool.
class Fault {
 public:
  template <class F>
  bool guard(F&& f) {
    try {
      f();
      return true;
    } catch (...) {
      if (!failed_.exchange(true)) fault_ = std::current_exception();
      return false;
    }
  }
  void rethrow() {
    if (fault_) std::rethrow_exception(fault_);
  }

 private:
  std::atomic<bool> failed_{false};
  std::exception_ptr fault_;
};

// --- A loop of its own ---

struct Loop {
  int64_t count, step;
  Work work;
  void* context;
  std::atomic<int64_t> next{0};
  Fault fault{};
};

void take_parts(void* argument) {
  Loop& loop = *static_cast<Loop*>(argument);
  const bool good = loop.fault.guard([&] {
    for (;;) {
      const int64_t first = loop.next.fetch_add(loop.step, std::memory_order_relaxed);
      if (first >= loop.count) return;
      loop.work(loop.context, first, first + loop.step < loop.count ? first + loop.step : loop.count);
    }
  });
  if (!good) loop.next.store(loop.count);
}

// --- A team ---

// What a loop of a team is. A worker may look at one that is over: what it reads counts only if its ticket is still the right one.
struct Task {
  std::atomic<int64_t> count{0}, step{1}, parts{0};
  std::atomic<Work> work{nullptr};
  std::atomic<void*> context{nullptr};
};

class Team {
 public:
  explicit Team(int size) : size(size) {}

  // Of the leader.
  void run(int64_t count, int64_t step, Work work, void* context) {
    generation_++;
    Task& task = tasks_[generation_ % kTasks];
    const int64_t parts = (count + step - 1) / step;
    task.count.store(count, std::memory_order_relaxed);
    task.step.store(step, std::memory_order_relaxed);
    task.parts.store(parts, std::memory_order_relaxed);
    task.work.store(work, std::memory_order_relaxed);
    task.context.store(context, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    ticket_.store(generation_ << 32, std::memory_order_release);
    while (take()) {
    }
    while (finished_.load(std::memory_order_acquire) < parts) _mm_pause();
    fault.rethrow();
  }

  // Takes a part of the current task; false where none is left.
  bool take() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    const Task& task = tasks_[(ticket >> 32) % kTasks];
    const int64_t part = static_cast<int64_t>(ticket & 0xffffffff), parts = task.parts.load(std::memory_order_relaxed);
    const int64_t count = task.count.load(std::memory_order_relaxed), step = task.step.load(std::memory_order_relaxed);
    const Work work = task.work.load(std::memory_order_relaxed);
    void* const context = task.context.load(std::memory_order_relaxed);
    if (part >= parts) return false;
    if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) return true;  // another took it
    fault.guard([&] { work(context, part * step, (part + 1) * step < count ? (part + 1) * step : count); });
    finished_.fetch_add(1, std::memory_order_release);
    return true;
  }

  void end() { over_.store(true, std::memory_order_release); }
  bool over() const { return over_.load(std::memory_order_acquire); }

  const int size;
  Fault fault;

 private:
  static constexpr int kTasks = 8;
  uint64_t generation_ = 0;
  Task tasks_[kTasks];
  alignas(64) std::atomic<uint64_t> ticket_{0};  // generation of the task, then its next part
  alignas(64) std::atomic<int64_t> finished_{0};
  alignas(64) std::atomic<bool> over_{false};
};

thread_local Team* team = nullptr;  // that this thread leads

struct Meeting {
  Team& team;
  void (*work)(void*);
  void* context;
  std::thread::id leader;
  Fault fault{};
};

void meet(void* argument) {
  Meeting& meeting = *static_cast<Meeting*>(argument);
  if (std::this_thread::get_id() != meeting.leader) {
    while (!meeting.team.over())
      if (!meeting.team.take()) _mm_pause();
    return;
  }
  team = &meeting.team;
  meeting.fault.guard([&] { meeting.work(meeting.context); });
  team = nullptr;
  meeting.team.end();
}

}  // namespace

void find_threads(void* library) {
  auto find = [&](auto& function, const char* name) { function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name)); };
  find(gomp_parallel, "GOMP_parallel");
  find(omp_in_parallel, "omp_in_parallel");
  find(torch_threads, "_ZN2at15get_num_threadsEv");
}

bool has_threads() { return gomp_parallel && omp_in_parallel && torch_threads; }

int threads() {
  if (team) return team->size;
  if (!has_threads() || omp_in_parallel()) return 1;
  return torch_threads();
}

bool in_team() { return team; }

void parallel(int64_t count, int64_t step, Work work, void* context) {
  const int64_t parts = (count + step - 1) / step, most = threads();
  const int64_t wanted = parts < most ? parts : most;
  if (wanted <= 1) {
    if (count > 0) work(context, 0, count);
    return;
  }
  if (team) return team->run(count, step, work, context);
  Loop loop{count, step, work, context};
  gomp_parallel(take_parts, &loop, static_cast<unsigned>(wanted), 0);
  loop.fault.rethrow();
}

void with_team(void (*work)(void*), void* context) {
  const int size = threads();
  if (size <= 1 || team) return work(context);
  Team own(size);
  Meeting meeting{own, work, context, std::this_thread::get_id()};
  gomp_parallel(meet, &meeting, static_cast<unsigned>(size), 0);
  meeting.fault.rethrow();
}

}  // namespace qcore
