// Tasks of one call shared out among XLA's own threads: grouped.cc and native.cc.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Runs f(0) ... f(n - 1) on the caller and the pool. The caller never waits for a thread that has not taken a task.
// Below 4e5 operations the caller does them alone: waking a thread would cost more.
template <typename F>
void parallel(ffi::ThreadPool& pool, int64_t n, double flops, const F& f) {
  int64_t helpers = flops < 4e5 ? 0 : std::min<int64_t>(n, pool.num_threads()) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < n; i++) f(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto work = [state, n, &f] {  // past the last task f is not touched, so a late thread is harmless
    for (int64_t i; (i = state->next.fetch_add(1)) < n; state->done.fetch_add(1)) f(i);
  };
  for (int64_t h = 0; h < helpers; h++) pool.Schedule(std::decay_t<decltype(work)>(work));
  work();
  for (int spin = 0; state->done.load() < n; spin++) {
#ifdef __x86_64__
    if (spin < 4000) {
      __builtin_ia32_pause();
      continue;
    }
#endif
    sched_yield();
  }
}

}  // namespace
