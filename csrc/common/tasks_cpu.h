// Uneven tasks over threads: a thread takes the next one when it is done, since tasks differ in
// cost and cores in speed. What a task computes must not depend on who runs it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace fastunlearn {

// Calls work(scratch, task) for every task; make_scratch() runs once per thread.
template <typename MakeScratch, typename Work>
void for_each_task(int64_t tasks, const MakeScratch& make_scratch, const Work& work) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(tasks, torch::stable::get_num_threads()), 1,
                              [&](int64_t, int64_t) {
                                auto scratch = make_scratch();
                                for (int64_t task = next++; task < tasks; task = next++)
                                  work(scratch, task);
                              });
}

// The same with a Scratch of fixed size, too large for a stack.
template <typename Scratch, typename Work>
void for_each_task(int64_t tasks, const Work& work) {
  for_each_task(
      tasks, [] { return std::make_unique<Scratch>(); },
      [&](const std::unique_ptr<Scratch>& scratch, int64_t task) { work(*scratch, task); });
}

}  // namespace fastunlearn
