// The scheduler of the emulated GPU. Always compiled without ThreadSanitizer, so that its own bookkeeping does not
// look like synchronisation; it tells the sanitizer what a barrier orders, and nothing else is ordered.
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#ifdef EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
#endif
#ifdef EMULATOR_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

#if defined(EMULATOR_TSAN) || defined(EMULATOR_ASAN)
constexpr size_t kStackBytes = 512 * 1024;  // instrumented frames are large
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr size_t kMaxSharedBytes = 227 * 1024;  // what a block may have on Hopper

cudaError_t last_error = cudaSuccess;

void release([[maybe_unused]] void* address) {
#ifdef EMULATOR_TSAN
  __tsan_release(address);
#endif
}
void acquire([[maybe_unused]] void* address) {
#ifdef EMULATOR_TSAN
  __tsan_acquire(address);
#endif
}

enum class State { kReady, kBlockBarrier, kWarpCollective, kDone };

// A CUDA thread. The stack ends in a page that may not be touched.
struct Fiber {
  ucontext_t context;
  char* mapping = nullptr;
  char* stack = nullptr;
  State state = State::kDone;
  uint3 index{};
  int linear = 0;
  unsigned mask = 0;     // of the warp collective it waits for
  uint64_t value = 0;    // what it handed over
  int predicate = 0;
  int result = 0;        // of a block barrier with a vote
  // What this thread has done before a barrier or collective is released to one of two addresses in turn: a thread
  // that runs ahead to the next one must not seem ordered before those still leaving this one.
  char warp_tokens[2] = {};
  unsigned barriers = 0, collectives = 0;
#ifdef EMULATOR_TSAN
  void* tsan = __tsan_create_fiber(0);
#endif
#ifdef EMULATOR_ASAN
  void* fake_stack = nullptr;
#endif

  Fiber() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapping = static_cast<char*>(
        mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    require(mapping != MAP_FAILED, "no memory for a fiber's stack");
    mprotect(mapping, page, PROT_NONE);
    stack = mapping + page;
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
};

struct Warp {
  std::array<uint64_t, kWarpSize> values{};
  std::array<char*, kWarpSize> tokens{};  // where each lane released what came before this collective
};

// One launch at a time: __shared__ variables are static.
std::mutex launching;

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch
  std::vector<Warp> warps;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  int threads = 0;
  dim3 grid, block;
  uint3 block_index{};
  const std::function<void()>* body = nullptr;
  std::unique_ptr<char[]> shared;
  char block_sync[2] = {};  // addresses that stand for the barriers, in turn
  char start_sync = 0;      // what a block finds written when it starts
  char end_sync = 0;        // and what it has written when it ends: two, or threads would seem to run in turn
#ifdef EMULATOR_TSAN
  void* tsan = nullptr;
#endif
#ifdef EMULATOR_ASAN
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
#endif
};
// Never destroyed: a fiber that is not finished can not be unwound.
Machine& machine = *new Machine;

void switch_to_fiber(Fiber& fiber) {
  machine.running = &fiber;
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&machine.fake_stack, fiber.stack, kStackBytes);
#endif
  swapcontext(&machine.scheduler, &fiber.context);
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
#endif
  machine.running = nullptr;
}

void switch_to_scheduler() {
  Fiber& fiber = *machine.running;
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(machine.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef EMULATOR_ASAN
  // A finished fiber gives up its fake stack.
  __sanitizer_start_switch_fiber(fiber.state == State::kDone ? nullptr : &fiber.fake_stack, machine.stack_bottom,
                                 machine.stack_size);
#endif
  swapcontext(&fiber.context, &machine.scheduler);
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &machine.stack_bottom, &machine.stack_size);
#endif
}

void fiber_main() {
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack_bottom, &machine.stack_size);
#endif
  acquire(&machine.start_sync);
  (*machine.body)();
  release(&machine.end_sync);
  machine.running->state = State::kDone;
  switch_to_scheduler();
}

void start(Fiber& fiber, int linear) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  fiber.state = State::kReady;
  fiber.linear = linear;
  fiber.barriers = fiber.collectives = 0;
  const unsigned i = static_cast<unsigned>(linear);
  fiber.index = {i % machine.block.x, i / machine.block.x % machine.block.y,
                 i / machine.block.x / machine.block.y};
}

Fiber& fiber_at(int linear) { return *machine.fibers[static_cast<size_t>(linear)]; }

[[noreturn]] void deadlock() {
  int barrier = 0, collective = 0, done = 0;
  for (int i = 0; i < machine.threads; ++i) {
    const State state = fiber_at(i).state;
    barrier += state == State::kBlockBarrier;
    collective += state == State::kWarpCollective;
    done += state == State::kDone;
  }
  const uint3& b = machine.block_index;
  std::fprintf(stderr,
               "emulator: deadlock in block (%u, %u, %u): of %d threads %d wait at a block barrier, %d at a warp "
               "collective, %d have returned\n",
               b.x, b.y, b.z, machine.threads, barrier, collective, done);
  std::abort();
}

// Lets a block barrier go when every thread that has not returned stands there.
bool open_block_barrier() {
  int waiting = 0, votes = 0;
  for (int i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = fiber_at(i);
    if (fiber.state == State::kDone) continue;
    if (fiber.state != State::kBlockBarrier) return false;
    ++waiting;
    votes += fiber.predicate != 0;
  }
  if (waiting == 0) return false;
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& fiber = fiber_at(i);
    if (fiber.state != State::kBlockBarrier) continue;
    fiber.state = State::kReady;
    fiber.result = votes * 65536 + waiting;
  }
  return true;
}

// Lets the lanes of a mask go when all of them stand at a collective with that very mask.
bool open_warp_collectives(int warp) {
  bool opened = false;
  const int first = warp * kWarpSize;
  const int lanes = std::min(kWarpSize, machine.threads - first);
  for (int lane = 0; lane < lanes; ++lane) {
    const Fiber& leader = fiber_at(first + lane);
    if (leader.state != State::kWarpCollective) continue;
    const unsigned mask = leader.mask;
    bool complete = true;
    for (int l = 0; l < kWarpSize && complete; ++l) {
      if (!(mask >> l & 1)) continue;
      complete = l < lanes && fiber_at(first + l).state == State::kWarpCollective &&
                 fiber_at(first + l).mask == mask;
    }
    if (!complete) continue;
    for (int l = 0; l < lanes; ++l) {
      if (!(mask >> l & 1)) continue;
      Fiber& fiber = fiber_at(first + l);
      Warp& shared = machine.warps[static_cast<size_t>(warp)];
      shared.values[static_cast<size_t>(l)] = fiber.value;
      shared.tokens[static_cast<size_t>(l)] = &fiber.warp_tokens[fiber.collectives++ % 2];
      fiber.state = State::kReady;
    }
    opened = true;
  }
  return opened;
}

bool reversed() {
  const char* order = std::getenv("FASTUNLEARN_EMULATOR_ORDER");
  return order != nullptr && std::strcmp(order, "reverse") == 0;
}

void run_block(size_t shared_bytes, bool reverse) {
  // Fresh memory of just the size asked for: AddressSanitizer sees one byte too far, and poison what nobody wrote.
  machine.shared.reset(new char[shared_bytes]);
  std::memset(machine.shared.get(), 0xff, shared_bytes);
  for (int i = 0; i < machine.threads; ++i) start(fiber_at(i), i);
  release(&machine.start_sync);
  const int warps = (machine.threads + kWarpSize - 1) / kWarpSize;
  for (;;) {
    bool ran = false, alive = false;
    for (int w = 0; w < warps; ++w) {
      const int warp = reverse ? warps - 1 - w : w;
      const int lanes = std::min(kWarpSize, machine.threads - warp * kWarpSize);
      // A warp runs on for as long as its own collectives let it.
      do {
        for (int l = 0; l < lanes; ++l) {
          Fiber& fiber = fiber_at(warp * kWarpSize + (reverse ? lanes - 1 - l : l));
          if (fiber.state != State::kReady) continue;
          switch_to_fiber(fiber);
          ran = true;
        }
      } while (open_warp_collectives(warp));
      for (int l = 0; l < lanes; ++l) alive |= fiber_at(warp * kWarpSize + l).state != State::kDone;
    }
    if (!alive) return;
    if (!open_block_barrier() && !ran) deadlock();
  }
}

}  // namespace

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 ||
      grid.z == 0 || grid.z > 65535 || shared_bytes > kMaxSharedBytes) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  const std::scoped_lock lock(launching);
  machine.grid = grid;
  machine.block = block;
  machine.threads = static_cast<int>(threads);
  machine.body = &body;
  machine.warps.resize((threads + kWarpSize - 1) / kWarpSize);
  while (machine.fibers.size() < threads) machine.fibers.push_back(std::make_unique<Fiber>());
#ifdef EMULATOR_TSAN
  machine.tsan = __tsan_get_current_fiber();
#endif
  const bool reverse = reversed();
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = reverse ? blocks - 1 - i : i;
    machine.block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                           static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(shared_bytes, reverse);
    // Blocks are ordered one after another: races between them are for the order variable to show.
    acquire(&machine.end_sync);
  }
}

const uint3& thread_index() { return machine.running->index; }
const uint3& block_index() { return machine.block_index; }
const dim3& block_size() { return machine.block; }
const dim3& grid_size() { return machine.grid; }
void* dynamic_shared() { return machine.shared.get(); }
int lane() { return machine.running->linear % kWarpSize; }

int block_barrier(Vote vote, int predicate) {
  Fiber& fiber = *machine.running;
  fiber.predicate = predicate;
  fiber.state = State::kBlockBarrier;
  char* const sync = &machine.block_sync[fiber.barriers++ % 2];
  release(sync);
  switch_to_scheduler();
  acquire(sync);
  const int votes = fiber.result / 65536, waiting = fiber.result % 65536;
  switch (vote) {
    case Vote::kAny:
      return votes > 0;
    case Vote::kAll:
      return votes == waiting;
    default:
      return votes;
  }
}

const uint64_t* exchange(unsigned mask, uint64_t value) {
  Fiber& fiber = *machine.running;
  require(mask >> lane() & 1, "a thread calls a warp collective whose mask leaves it out");
  Warp& warp = machine.warps[static_cast<size_t>(fiber.linear / kWarpSize)];
  fiber.mask = mask;
  fiber.value = value;
  fiber.state = State::kWarpCollective;
  release(&fiber.warp_tokens[fiber.collectives % 2]);
  switch_to_scheduler();
  for (size_t l = 0; l < kWarpSize; ++l) {
    if (mask >> l & 1) acquire(warp.tokens[l]);
  }
  return warp.values.data();
}

}  // namespace emulator

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "invalid argument";
  }
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
