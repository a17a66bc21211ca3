// Uneven tasks over threads: each thread takes the next one when it is done. What a task computes
// must not depend on who runs it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace fastunlearn {

// Calls fn(task, scratch) for every task; make_scratch() runs once per thread.
template <typename MakeScratch, typename Function>
void for_each_task(int64_t tasks, const MakeScratch& make_scratch, const Function& fn) {
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(
      0, std::min<int64_t>(tasks, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
        auto scratch = make_scratch();
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
          fn(task, scratch);
        }
      });
}

}  // namespace fastunlearn
