// Work on torch's own threads: its OpenMP runtime is found in the process, so that there is one pool, with one size.
#pragma once
#include <cstdint>

namespace qcore {

using Work = void (*)(void* context, int64_t first, int64_t last);

// Finds the runtime among the libraries that `library`, an open handle of torch's, was linked with.
void find_threads(void* library);

// Whether it was found; else every loop runs on one thread.
bool has_threads();

// Threads that torch would use for a loop that begins here; 1 inside of one.
int threads();

// Whether a loop that begins here finds its threads waiting (see with_team), so that short ones are worth it too.
bool in_team();

// Calls work(context, first, last) for parts of 0 .. count - 1, which are taken `step` at a time by whoever is free.
void parallel(int64_t count, int64_t step, Work work, void* context);

template <class F>
void parallel(int64_t count, int64_t step, F&& f) {
  parallel(count, step, [](void* context, int64_t first, int64_t last) { (*static_cast<F*>(context))(first, last); }, &f);
}

// Calls work(context), whose loops find their threads spinning: beginning a loop then takes less than a microsecond instead of ten.
void with_team(void (*work)(void* context), void* context);

template <class F>
void with_team(F&& f) {
  with_team([](void* context) { (*static_cast<F*>(context))(); }, &f);
}

}  // namespace qcore
