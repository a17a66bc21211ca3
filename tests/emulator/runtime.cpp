// The scheduler behind include/cuda_runtime.h.
//
// Never compile this file with -fsanitize=...: what the scheduler reads and writes is not the
// kernel's business. When the rest is sanitized, define EMULATOR_TSAN or EMULATOR_ASAN, and the
// sanitizer is told of every change of fibers and of exactly the orderings that CUDA promises.

#include "runtime.h"

#include <cuda_runtime.h>
#include <emulated_ptx.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

// ucontext enters the kernel at every switch to save the signal mask, and ASan unpoisons a whole
// stack each time it sees one: 0.3 us against 5 ns for the ten instructions below.
#if !defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT
#endif
#ifdef EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

#ifdef EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif
#ifdef EMULATOR_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 232448;  // what an H100 lets one block opt in to
#if defined(EMULATOR_TSAN) || defined(EMULATOR_ASAN)
constexpr size_t kStackBytes = 256 << 10;  // instrumented frames are several times larger
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// --------------------------------------------------------------------------------------- fibers

// A stack and the place where it was left. The default one stands for the OS thread that launches.
struct Fiber {
#ifdef EMULATOR_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* sanitizer = nullptr;  // TSan: its name for the fiber. ASan: the fiber's fake stack.
};

#ifndef EMULATOR_UCONTEXT
// Saves what the ABI asks a function to preserve on the stack we leave, and takes the same from the
// stack we enter. The floating-point modes stay the OS thread's: flush-to-zero holds in kernels
// too.
extern "C" void fastunlearn_emulator_switch(void** leave, void* enter)
    __attribute__((visibility("hidden")));
asm(R"(
  .text
  .hidden fastunlearn_emulator_switch
  .globl fastunlearn_emulator_switch
  .type fastunlearn_emulator_switch, @function
fastunlearn_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size fastunlearn_emulator_switch, .-fastunlearn_emulator_switch
)");
#endif

// Right after a switch to `at`, which `by` made. The launching thread's own stack is not ours, so
// ASan is asked at every arrival where `by` has its.
void arrived([[maybe_unused]] Fiber& at, [[maybe_unused]] Fiber& by) {
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(at.sanitizer, &by.stack, &by.stack_bytes);
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
#ifdef EMULATOR_TSAN
  // A change of fibers orders nothing: only barriers do, and they say so themselves.
  __tsan_switch_to_fiber(to.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&from.sanitizer, to.stack, to.stack_bytes);
#endif
#ifdef EMULATOR_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  fastunlearn_emulator_switch(&from.stack_pointer, to.stack_pointer);
#endif
  arrived(from, to);  // fibers only ever change places with the scheduler
}

// Gives `fiber` a stack on which its first switch calls `entry`.
void create_fiber(Fiber& fiber, void (*entry)(), [[maybe_unused]] size_t index) {
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  // The lowest page faults, so that a kernel which overflows its stack stops right there.
  if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) {
    std::perror("emulator: no memory for a thread's stack");
    std::abort();
  }
  std::byte* stack = static_cast<std::byte*>(memory) + guard;
  fiber.stack = stack;
  fiber.stack_bytes = kStackBytes;
#ifdef EMULATOR_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  // What the switch pops: six registers, then `entry` as the return address. One more word makes
  // the stack look as it does after a call, 8 bytes off a multiple of 16.
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  top[-2] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top - 8;
#endif
#ifdef EMULATOR_TSAN
  fiber.sanitizer = __tsan_create_fiber(0);
  __tsan_set_fiber_name(fiber.sanitizer, ("CUDA thread " + std::to_string(index)).c_str());
#endif
}

// ------------------------------------------------------------------------------------- the block

// One kind of collective among one set of threads, met again and again. What a meeting hands out is
// kept twice, by the parity of the meeting: a thread that runs ahead into the next one leaves the
// last one's results, and its ordering, to those who have yet to wake. It cannot get two ahead.
// One clock would not do: the late would take on what the early did since, and races would hide.
struct Meeting {
  explicit Meeting(const char* name, unsigned mask, Site site)
      : name(name), mask(mask), site(site) {}

  const char* name;
  unsigned mask;  // the lanes that meet; 0 for the whole block
  Site site;      // of the first arrival
  unsigned arrived = 0;
  unsigned parity = 0;
  char clock[2] = {};  // the addresses are what TSan knows the meetings by
  Votes votes[2] = {};
  std::unique_ptr<Slot[]> slots[2];  // of the 32 lanes
};

struct Thread {
  Fiber fiber;
  uint3 index;
  unsigned block = 0;  // which of the cluster's
  Meeting* waiting_at = nullptr;
  const Condition* waiting_for = nullptr;
  Site site;
  bool exited = false;
  PendingCopies copies;
};

// Everything about the launch in progress. There is one at a time (shared memory is static), under
// launch_mutex; stacks, fibers and meetings stay for the next one.
struct Device {
  Fiber scheduler;
  std::vector<std::unique_ptr<Thread>> pool;
  // Of each block of the cluster. deque: TSan's clocks must keep their addresses.
  std::deque<Meeting> block_meetings[kMaxCluster];
  std::deque<Meeting> warp_meetings[kMaxCluster * kMaxThreads / kWarp];
  char started = 0, ended = 0;  // clocks

  KernelBody body = nullptr;
  const void* closure = nullptr;
  void* shared[kMaxCluster] = {};
  size_t shared_bytes = 0;
  unsigned cluster = 1;        // blocks
  unsigned block_threads = 0;  // of one block
  unsigned threads = 0;        // of the cluster; the first so many of the pool
  unsigned live = 0;           // of the cluster
  unsigned block_live[kMaxCluster] = {};
  uint3 block_index[kMaxCluster] = {};
  const Asynchronous* asynchronous = nullptr;
  Thread* running = nullptr;
  unsigned running_id = 0;
};
Device device;
std::mutex launch_mutex;

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

// Lets everyone go who waits at `meeting`.
void conclude(Meeting& meeting) {
  meeting.arrived = 0;
  meeting.parity ^= 1;
  meeting.votes[meeting.parity] = {};
  const unsigned warp = device.running_id / kWarp * kWarp;
  const unsigned block = device.running->block * device.block_threads;
  const unsigned first = meeting.mask == 0 ? block : warp;
  const unsigned last =
      meeting.mask == 0 ? block + device.block_threads : std::min(warp + kWarp, device.threads);
  for (unsigned id = first; id < last; ++id) {
    if (device.pool[id]->waiting_at == &meeting) device.pool[id]->waiting_at = nullptr;
  }
}

// Waits until `expected` threads have come. Also the last to come gives way, so that threads leave
// a barrier in the order in which they run.
void wait_at(Meeting& meeting, unsigned expected, Site site) {
  Thread& self = *device.running;
  void* clock = &meeting.clock[meeting.parity];
  __tsan_release(clock);
  self.waiting_at = &meeting;
  self.site = site;
  if (++meeting.arrived == expected) conclude(meeting);
  switch_fiber(self.fiber, device.scheduler);
  __tsan_acquire(clock);
}

// What a fiber does all its life: one kernel thread per block, then wait for the next block.
// noexcept: an exception has nowhere to go from a kernel.
void live() noexcept {
  arrived(device.running->fiber, device.scheduler);
  for (;;) {
    Thread& self = *device.running;
    __tsan_acquire(&device.started);
    device.body(device.closure);
    __tsan_release(&device.ended);
    self.exited = true;
    --device.live;
    const unsigned live = --device.block_live[self.block];
    // Barriers count the living; this thread may have been the one they waited for.
    for (Meeting& meeting : device.block_meetings[self.block]) {
      if (meeting.arrived != 0 && meeting.arrived == live) conclude(meeting);
    }
    switch_fiber(self.fiber, device.scheduler);
  }
}

[[noreturn]] void report_deadlock() {
  std::fprintf(stderr,
               "emulator: deadlock in block (%u,%u,%u): %u of %u threads wait for threads that "
               "cannot come, %u have exited\n",
               blockIdx.x, blockIdx.y, blockIdx.z, device.live, device.threads,
               device.threads - device.live);
  // One line per place, block-wide barriers first.
  std::map<std::string, unsigned> places;
  for (unsigned id = 0; id < device.threads; ++id) {
    const Thread& thread = *device.pool[id];
    if (thread.exited) continue;
    char place[512];
    if (thread.waiting_for != nullptr) {
      std::snprintf(place, sizeof place, "at %s, %s:%u", thread.waiting_for->name,
                    thread.site.file_name(), static_cast<unsigned>(thread.site.line()));
      ++places[place];
      continue;
    }
    const Meeting& meeting = *thread.waiting_at;
    if (meeting.mask == 0) {
      std::snprintf(place, sizeof place, "at %s, %s:%u", meeting.name, thread.site.file_name(),
                    static_cast<unsigned>(thread.site.line()));
    } else {
      unsigned gone = 0;
      for (unsigned lane = 0; lane < kWarp; ++lane) {
        const unsigned other = id / kWarp * kWarp + lane;
        if (other >= device.threads || device.pool[other]->exited) gone |= 1u << lane;
      }
      const int end = std::snprintf(place, sizeof place, "in warp %u at %s, mask 0x%08x, %s:%u",
                                    id / kWarp, meeting.name, meeting.mask, thread.site.file_name(),
                                    static_cast<unsigned>(thread.site.line()));
      if ((meeting.mask & gone) != 0 && end < static_cast<int>(sizeof place)) {
        std::snprintf(place + end, sizeof place - static_cast<size_t>(end),
                      "; of the mask 0x%08x exited or never existed", meeting.mask & gone);
      }
    }
    ++places[place];
  }
  for (const auto& [place, count] : places)
    std::fprintf(stderr, "  %4u %s\n", count, place.c_str());
  std::abort();
}

// Runs the blocks of one cluster to their end.
void run_cluster(bool reverse) {
  device.live = device.threads;
  for (unsigned block = 0; block < device.cluster; ++block)
    device.block_live[block] = device.block_threads;
  for (unsigned id = 0; id < device.threads; ++id) {
    device.pool[id]->exited = false;
    device.pool[id]->copies.clear();
  }
  // A fresh allocation of the exact size, so that ASan sees an overrun, and of no sensible value,
  // so that everyone sees a read before the first write.
  for (unsigned block = 0; block < device.cluster; ++block) {
    device.shared[block] = ::operator new(device.shared_bytes, std::align_val_t{128});
    std::memset(device.shared[block], 0xff, device.shared_bytes);
  }
  __tsan_release(&device.started);
  while (device.live > 0) {
    bool progress = false;
    for (unsigned turn = 0; turn < device.threads; ++turn) {
      const unsigned id = reverse ? device.threads - 1 - turn : turn;
      Thread& thread = *device.pool[id];
      if (thread.exited || thread.waiting_at != nullptr) continue;
      if (thread.waiting_for != nullptr) {
        if (!thread.waiting_for->holds(thread.waiting_for)) continue;
        thread.waiting_for = nullptr;
      }
      progress = true;
      device.running = &thread;
      device.running_id = id;
      threadIdx = thread.index;
      blockIdx = device.block_index[thread.block];
      switch_fiber(device.scheduler, thread.fiber);
    }
    if (!progress && !(device.asynchronous != nullptr && device.asynchronous->complete_one()))
      report_deadlock();
  }
  __tsan_acquire(&device.ended);
  if (device.asynchronous != nullptr) device.asynchronous->end_cluster();
  for (unsigned block = 0; block < device.cluster; ++block) {
    ::operator delete(device.shared[block], std::align_val_t{128});
    device.shared[block] = nullptr;
  }
}

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t fail(cudaError_t error) { return last_error = error; }

bool launchable(const dim3& grid, const dim3& block, size_t shared_bytes, unsigned cluster) {
  const auto within = [](unsigned size, unsigned limit) { return size >= 1 && size <= limit; };
  return within(grid.x, 0x7fffffffu) && within(grid.y, 65535) && within(grid.z, 65535) &&
         within(block.x, 1024) && within(block.y, 1024) && within(block.z, 64) &&
         static_cast<size_t>(block.x) * block.y * block.z <= kMaxThreads &&
         shared_bytes <= kMaxSharedBytes && within(cluster, kMaxCluster) &&
         // Warps of two blocks are never one warp.
         (cluster == 1 || (grid.x % cluster == 0 && block.x * block.y * block.z % kWarp == 0));
}

}  // namespace

// --------------------------------------------------------------------------- what the header calls

const Slot* meet_warp(const char* name, unsigned mask, const Slot& slot, Site site) {
  const unsigned warp = device.running_id / kWarp, lane = device.running_id % kWarp;
  if ((mask >> lane & 1u) == 0) {
    std::fprintf(stderr, "emulator: %s at %s:%u: lane %u is not in its own mask 0x%08x\n", name,
                 site.file_name(), static_cast<unsigned>(site.line()), lane, mask);
    std::abort();
  }
  Meeting* meeting = nullptr;
  for (Meeting& known : device.warp_meetings[warp]) {
    if (known.mask == mask && std::strcmp(known.name, name) == 0) meeting = &known;
  }
  if (meeting == nullptr) {
    meeting = &device.warp_meetings[warp].emplace_back(name, mask, site);
    for (auto& slots : meeting->slots) {
      slots.reset(new Slot[kWarp]);
      std::memset(slots.get(), 0xff, kWarp * sizeof(Slot));
    }
  }
  Slot* slots = meeting->slots[meeting->parity].get();
  slots[lane] =
      slot;  // not memcpy(): TSan intercepts that even here, and sees a race with the memset
  wait_at(*meeting, static_cast<unsigned>(std::popcount(mask)), site);
  return slots;
}

Votes meet_block(const char* name, bool vote, Site site) {
  // CUDA wants one and the same barrier of every thread; two in two branches are undefined there,
  // and two meetings here, at which everyone waits for ever.
  const unsigned block = device.running->block;
  Meeting* meeting = nullptr;
  for (Meeting& known : device.block_meetings[block]) {
    if (same_place(known.site, site) && std::strcmp(known.name, name) == 0) meeting = &known;
  }
  if (meeting == nullptr) meeting = &device.block_meetings[block].emplace_back(name, 0u, site);
  Votes& votes = meeting->votes[meeting->parity];
  votes.in_favour += vote;
  votes.cast += 1;
  wait_at(*meeting, device.block_live[block], site);
  return votes;
}

void* dynamic_shared() { return device.shared[device.running->block]; }

// ------------------------------------------------------------------------- what runtime.h promises

void wait_for(const Condition& condition, Site site) {
  Thread& self = *device.running;
  self.waiting_for = &condition;
  self.site = site;
  switch_fiber(self.fiber, device.scheduler);
}
void set_asynchronous(const Asynchronous* asynchronous) { device.asynchronous = asynchronous; }
Place running_place() {
  const Thread& self = *device.running;
  return {self.block, device.running_id % device.block_threads};
}
Cluster running_cluster() { return {device.cluster, device.block_threads}; }
SharedMemory shared_memory(unsigned block) {
  return {static_cast<std::byte*>(device.shared[block]), device.shared_bytes};
}

PendingCopies& pending_copies() { return device.running->copies; }

void launch_grid(dim3 grid, dim3 block, size_t shared_bytes, KernelBody body, const void* closure,
                 unsigned cluster) {
  if (!launchable(grid, block, shared_bytes, cluster)) {
    fail(cudaErrorInvalidConfiguration);
    return;
  }
  const std::lock_guard lock(launch_mutex);
  if (std::getenv("FASTUNLEARN_EMULATOR_TRACE") != nullptr) {
    std::fprintf(stderr, "emulator: launch of %u blocks of %u threads, %zu bytes, clusters of %u\n",
                 grid.x * grid.y * grid.z, block.x * block.y * block.z, shared_bytes, cluster);
  }
  const char* order = std::getenv("FASTUNLEARN_EMULATOR_ORDER");
  const bool reverse = order != nullptr && std::strcmp(order, "reverse") == 0;
  device.body = body;
  device.closure = closure;
  device.block_threads = block.x * block.y * block.z;
  device.cluster = cluster;
  device.threads = cluster * device.block_threads;
  device.shared_bytes = shared_bytes;
  gridDim = grid;
  blockDim = block;
#ifdef EMULATOR_TSAN
  device.scheduler.sanitizer = __tsan_get_current_fiber();
#endif
  while (device.pool.size() < device.threads) {
    device.pool.push_back(std::make_unique<Thread>());
    create_fiber(device.pool.back()->fiber, live, device.pool.size() - 1);
  }
  for (unsigned id = 0; id < device.threads; ++id) {
    const unsigned thread = id % device.block_threads;
    device.pool[id]->index = {thread % block.x, thread / block.x % block.y,
                              thread / block.x / block.y};
    device.pool[id]->block = id / device.block_threads;
  }
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  for (uint64_t turn = 0; turn < blocks; turn += cluster) {
    const uint64_t first = reverse ? blocks - cluster - turn : turn;
    for (unsigned i = 0; i < cluster; ++i) {
      const uint64_t id = first + i;
      device.block_index[i] = {static_cast<unsigned>(id % grid.x),
                               static_cast<unsigned>(id / grid.x % grid.y),
                               static_cast<unsigned>(id / grid.x / grid.y)};
    }
    blockIdx = device.block_index[0];  // for a deadlock's report
    run_cluster(reverse);
  }
}

}  // namespace emulator

// --------------------------------------------------------------------------------------- host API

using emulator::fail;
using emulator::last_error;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
  }
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
  }
  return "unrecognized error code";
}
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int index) {
  return index == 0 ? cudaSuccess : fail(cudaErrorInvalidDevice);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  if (index != 0) return fail(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;  // few, so that small problems already have several blocks per processor
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(emulator::kMaxSharedBytes);
      return cudaSuccess;
  }
  return fail(cudaErrorInvalidValue);
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  const bool known = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  const bool fits = value >= 0 && static_cast<size_t>(value) <= emulator::kMaxSharedBytes;
  return known && fits ? cudaSuccess : fail(cudaErrorInvalidValue);
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(to, byte, bytes);
  return cudaSuccess;
}
// Plain malloc: ASan then guards both ends of every buffer.
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = bytes > 0 ? std::malloc(bytes) : nullptr;
  return bytes == 0 || *memory != nullptr ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
