// What the scheduler (runtime.cpp) offers to emulated hardware that works beside the threads
// (hopper.cpp): waits that no count of threads decides, and work that goes on by itself.
#pragma once

#include <cuda_runtime.h>

namespace emulator {

inline constexpr unsigned kMaxCluster = 2;  // blocks that run at the same time

// Something a thread waits for; `name` is for the deadlock report.
struct Condition {
  const char* name;
  bool (*holds)(const Condition*);
};
// Gives way until it holds. Where no thread can run and no asynchronous work is left, the launch
// ends as a deadlock.
void wait_for(const Condition& condition, Site site);

struct Asynchronous {
  bool (*complete_one)();  // called when no thread can run; false: there is nothing
  void (*end_cluster)();   // every thread has exited
};
void set_asynchronous(const Asynchronous* asynchronous);

struct Place {
  unsigned block;   // which of the cluster's
  unsigned thread;  // in that block
};
Place running_place();

struct Cluster {
  unsigned blocks, block_threads;
};
Cluster running_cluster();

struct SharedMemory {
  std::byte* data;
  size_t bytes;
};
SharedMemory shared_memory(unsigned block);

}  // namespace emulator
