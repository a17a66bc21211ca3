// Hopper's asynchronous hardware behind include/emulated_hopper.h: mbarriers, the copy engine,
// warpgroup products, by the PTX ISA.
//
// Compiled as runtime.cpp is: never with -fsanitize=..., told of it by EMULATOR_TSAN. The copy
// engine and the tensor cores are no threads, so ThreadSanitizer does not see their accesses; every
// address of theirs is checked here, and their order by the header's two moments.

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>
#include <emulated_hopper.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <vector>

#include "runtime.h"

#ifdef EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif

namespace emulator {
namespace {

// While one lives, ThreadSanitizer looks away from what it intercepts even here: memcpy and free.
struct Unseen {
  Unseen() {
#ifdef EMULATOR_TSAN
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  }
  ~Unseen() {
#ifdef EMULATOR_TSAN
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
  }
  Unseen(const Unseen&) = delete;
};

// Where dynamic shared memory starts in the 32-bit shared window: a multiple of 128 and no more, so
// that a kernel that needs more alignment must see to it.
constexpr uint32_t kWindow = 640;
constexpr unsigned kWarpgroup = 128;
constexpr int kRows = 64, kDepth = 16;

[[noreturn]] __attribute__((format(printf, 1, 2))) void die(const char* format, ...) {
  std::fprintf(stderr, "emulator: block (%u,%u,%u): ", blockIdx.x, blockIdx.y, blockIdx.z);
  va_list values;
  va_start(values, format);
  std::vfprintf(stderr, format, values);
  va_end(values);
  std::fprintf(stderr, "\n");
  std::abort();
}

// Where a shared address of `block` is, once all `bytes` there are known to be.
std::byte* at(unsigned block, uint32_t address, size_t bytes, const char* who) {
  const SharedMemory shared = shared_memory(block);
  if (address < kWindow || address - kWindow + bytes > shared.bytes) {
    die("%s: %zu bytes at shared address %u are outside the block's %zu bytes from %u", who, bytes,
        address, shared.bytes, kWindow);
  }
  return shared.data + (address - kWindow);
}

// ------------------------------------------------------------------------------------- mbarriers

// In the 64 bits that the kernel keeps for it, like the real one.
struct Barrier {
  uint64_t magic : 8;
  uint64_t parity : 1;     // of the phase in progress
  uint64_t arrivals : 14;  // a phase
  uint64_t missing : 14;   // of this phase
  int64_t bytes : 27;      // announced and not come; copies may be ahead of the announcement
};
static_assert(sizeof(Barrier) == 8);
constexpr uint64_t kMagic = 0x5a;

Barrier& barrier_at(std::byte* place, const char* who) {
  Barrier& barrier = *reinterpret_cast<Barrier*>(place);
  if (barrier.magic != kMagic) die("%s: there is no initialised mbarrier", who);
  return barrier;
}

void settle(Barrier& barrier) {
  if (barrier.missing != 0 || barrier.bytes != 0) return;
  barrier.parity ^= 1;
  barrier.missing = barrier.arrivals;
}

void arrive(Barrier& barrier, uint32_t bytes) {
  if (barrier.missing == 0) die("mbarrier_arrive: more arrivals than the phase expects");
  __tsan_release(&barrier);
  barrier.bytes += bytes;
  barrier.missing -= 1;
  settle(barrier);
}

struct PhaseComplete : Condition {
  const Barrier* barrier;
  uint32_t parity;
  static bool test(const Condition* condition) {
    const auto* self = static_cast<const PhaseComplete*>(condition);
    return self->barrier->parity != self->parity;
  }
};

// A place where a fixed number of threads meet, again and again.
struct Assembly {
  unsigned arrived = 0;
  unsigned generation = 0;
};
struct Assembled : Condition {
  const Assembly* assembly;
  unsigned generation;
  static bool test(const Condition* condition) {
    const auto* self = static_cast<const Assembled*>(condition);
    return self->assembly->generation != self->generation;
  }
};
void dismiss(Assembly& assembly) {
  assembly.arrived = 0;
  ++assembly.generation;
}
// Waits until somebody dismisses the assembly.
void assemble(Assembly& assembly, const char* name, Site site) {
  Assembled condition;
  condition.name = name;
  condition.holds = Assembled::test;
  condition.assembly = &assembly;
  condition.generation = assembly.generation;
  wait_for(condition, site);
}

// ------------------------------------------------------------------------------------ tensor maps

struct TensorMap {
  uint64_t magic;
  const std::byte* data;
  uint64_t sizes[3];
  uint64_t strides[3];  // bytes
  uint32_t box[3];
  uint32_t swizzled;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
constexpr uint64_t kMapMagic = 0x70616d726f736e74;
constexpr uint32_t kElementBytes = 2;

// Refuses what the driver refuses, as far as our kernels could ask for it.
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool known =
      type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (!known || rank != 3 || reinterpret_cast<uintptr_t>(address) % 16 != 0)
    return CUDA_ERROR_INVALID_VALUE;
  TensorMap encoded = {};
  encoded.magic = kMapMagic;
  encoded.data = static_cast<const std::byte*>(address);
  encoded.swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  for (int i = 0; i < 3; ++i) {
    encoded.sizes[i] = sizes[i];
    encoded.strides[i] = i == 0 ? kElementBytes : strides[i - 1];
    encoded.box[i] = box[i];
    const bool stride = i == 0 || (encoded.strides[i] % 16 == 0 && encoded.strides[i] < 1ull << 40);
    if (!stride || sizes[i] == 0 || sizes[i] > 1ull << 32 || box[i] == 0 || box[i] > 256 ||
        steps[i] != 1)
      return CUDA_ERROR_INVALID_VALUE;
  }
  const uint32_t row = box[0] * kElementBytes;
  if (row % 16 != 0 || (encoded.swizzled && row > 128)) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(map, &encoded, sizeof encoded);
  return CUDA_SUCCESS;
}

// ------------------------------------------------------------------------------- the copy engine

struct Copy {
  TensorMap map;
  unsigned block;  // of the cluster
  uint32_t to, barrier;
  int64_t origin[3];
};

// Bits 4-6 of an address, the 16-byte unit, by bits 7-9, the row of 128 bytes.
constexpr uint32_t kPatternBytes = 1024;
uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 7 & 7u) << 4; }

void complete(const Copy& copy) {
  const TensorMap& map = copy.map;
  const uint32_t row_bytes = map.box[0] * kElementBytes;
  const auto inside = [&](int axis, int64_t index) {
    return index >= 0 && static_cast<uint64_t>(index) < map.sizes[axis];
  };
  uint32_t address = copy.to;
  for (uint32_t i = 0; i < map.box[1] * map.box[2]; ++i) {
    const int64_t y = copy.origin[1] + i % map.box[1], z = copy.origin[2] + i / map.box[1];
    for (uint32_t unit = 0; unit < row_bytes; unit += 16, address += 16) {
      std::byte values[16] = {};
      for (uint32_t byte = 0; byte < 16; byte += kElementBytes) {
        const int64_t x = copy.origin[0] + (unit + byte) / kElementBytes;
        if (!inside(0, x) || !inside(1, y) || !inside(2, z)) continue;
        std::memcpy(values + byte,
                    map.data + static_cast<uint64_t>(x) * map.strides[0] +
                        static_cast<uint64_t>(y) * map.strides[1] +
                        static_cast<uint64_t>(z) * map.strides[2],
                    kElementBytes);
      }
      std::memcpy(
          at(copy.block, map.swizzled ? swizzle_128(address) : address, 16, "cp.async.bulk.tensor"),
          values, 16);
    }
  }
  Barrier& barrier =
      barrier_at(at(copy.block, copy.barrier, 8, "cp.async.bulk.tensor"), "cp.async.bulk.tensor");
  barrier.bytes -= static_cast<int64_t>(row_bytes) * map.box[1] * map.box[2];
  settle(barrier);
}

// ----------------------------------------------------------------------------- warpgroup products

struct Product {
  uint64_t a, b;
  int columns;
  bool accumulate, is_bfloat16;
  unsigned issued = 0;  // threads
  bool read = false;
  std::vector<float> left, right;  // [16][64], [16][columns]
};

struct Warpgroup {
  struct Thread {
    size_t products = 0, committed = 0;  // issued so far, in groups so far
    size_t groups = 0;
    float* accumulators = nullptr;  // of the products in flight
    bool fenced = false;
  };
  Thread threads[kWarpgroup];
  std::deque<Product> in_flight;
  size_t retired = 0;              // products
  std::vector<size_t> group_ends;  // products up to each commit
  std::vector<float> sums;         // [64][columns], the accumulators of all threads
  Assembly assembly;
  int waits_for = 0;  // groups, what the others of the assembly said
};

struct State {
  bool awake = false, early = false;
  std::vector<Copy> copies;
  Assembly cluster;
  std::vector<Warpgroup> warpgroups[kMaxCluster];
};
State state;

float widen(const std::byte* place, bool is_bfloat16) {
  unsigned short bits;
  std::memcpy(&bits, place, sizeof bits);
  return is_bfloat16 ? __bfloat162float(__ushort_as_bfloat16(bits))
                     : __half2float(__ushort_as_half(bits));
}

// One operand [16][features] through its descriptor; the canonical MN-major layout with 128-byte
// swizzle (its derivation: csrc/common/hopper.cuh).
std::vector<float> read_operand(unsigned block, uint64_t descriptor, int features,
                                bool is_bfloat16) {
  const auto field = [&](int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4;
  };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  // Starts on the pattern need no base offset; what hardware does with others is not emulated.
  constexpr uint64_t kUsed = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 3ull << 62;
  if ((descriptor & ~kUsed) != 0 || descriptor >> 62 != 1 || start % kPatternBytes != 0)
    die("wgmma: descriptor %016llx; swizzle mode 1 (128 bytes) is emulated, from multiples of 1024 "
        "on",
        static_cast<unsigned long long>(descriptor));
  std::vector<float> operand(static_cast<size_t>(kDepth * features));
  for (int k = 0; k < kDepth; ++k) {
    for (int mn = 0; mn < features; ++mn) {
      const uint32_t address = start + static_cast<uint32_t>(mn) / 64 * leading +
                               static_cast<uint32_t>(k) / 8 * stride +
                               static_cast<uint32_t>(k % 8 * 128 + mn % 64 * 2);
      operand[static_cast<size_t>(k * features + mn)] =
          widen(at(block, swizzle_128(address), 2, "wgmma"), is_bfloat16);
    }
  }
  return operand;
}

void read_operands(unsigned block, Product& product) {
  if (product.read) return;
  product.read = true;
  product.left = read_operand(block, product.a, kRows, product.is_bfloat16);
  product.right = read_operand(block, product.b, product.columns, product.is_bfloat16);
}

// The element of the 64 x columns product in a thread's accumulator i: PTX ISA, "Register Fragments
// and Shared Memory Matrix Layouts" of wgmma, matrix D.
size_t element(unsigned thread, int i, int columns) {
  const int row = static_cast<int>(thread / 32 * 16 + thread % 32 / 4) + i / 2 % 2 * 8;
  const int column = i / 4 * 8 + static_cast<int>(thread % 4) * 2 + i % 2;
  return static_cast<size_t>(row * columns + column);
}

void multiply(const Product& product, std::vector<float>& sums) {
  const size_t columns = static_cast<size_t>(product.columns);
  if (!product.accumulate) std::fill(sums.begin(), sums.end(), 0.0f);
  for (size_t k = 0; k < kDepth; ++k) {
    const float* right = &product.right[k * columns];
    for (size_t row = 0; row < kRows; ++row) {
      const float left = product.left[k * kRows + row];
      float* sum = &sums[row * columns];
      for (size_t column = 0; column < columns; ++column) sum[column] += left * right[column];
    }
  }
}

Warpgroup& running_warpgroup(unsigned& thread) {
  const Place place = running_place();
  std::vector<Warpgroup>& all = state.warpgroups[place.block];
  if (all.empty()) all.resize((running_cluster().block_threads + kWarpgroup - 1) / kWarpgroup);
  thread = place.thread % kWarpgroup;
  return all[place.thread / kWarpgroup];
}

// Products up to `count` since the kernel's start are done; hands out the accumulators when none
// is left in flight.
void retire(Warpgroup& group, unsigned block, size_t count) {
  const bool any = group.retired < count;
  int columns = 0;
  while (group.retired < count) {
    Product& product = group.in_flight.front();
    if (product.issued != kWarpgroup)
      die("wgmma: %u of a warpgroup's 128 threads issued a product that is waited for",
          product.issued);
    read_operands(block, product);
    multiply(product, group.sums);
    columns = product.columns;
    group.in_flight.pop_front();
    ++group.retired;
  }
  if (!any || !group.in_flight.empty()) return;
  for (unsigned thread = 0; thread < kWarpgroup; ++thread) {
    Warpgroup::Thread& own = group.threads[thread];
    for (int i = 0; i < columns / 2; ++i)
      own.accumulators[i] = group.sums[element(thread, i, columns)];
    own.accumulators = nullptr;
    own.fenced = false;
  }
}

// ------------------------------------------------------------------------- beside the threads

// Products before copies, and the latest copy first: they may complete in any order.
bool complete_one() {
  const Unseen unseen;
  for (unsigned block = 0; block < kMaxCluster; ++block) {
    for (Warpgroup& group : state.warpgroups[block]) {
      if (group.assembly.arrived != kWarpgroup) continue;
      if (group.waits_for > 0)
        retire(group, block, group.group_ends[static_cast<size_t>(group.waits_for - 1)]);
      dismiss(group.assembly);
      return true;
    }
  }
  if (state.copies.empty()) return false;
  const Copy copy = state.copies.back();
  state.copies.pop_back();
  complete(copy);
  return true;
}

void end_cluster() {
  const Unseen unseen;
  if (!state.copies.empty())
    die("%zu copies were in flight when the last thread exited", state.copies.size());
  for (const auto& warpgroups : state.warpgroups) {
    for (const Warpgroup& group : warpgroups) {
      if (!group.in_flight.empty())
        die("%zu products were in flight when the last thread exited", group.in_flight.size());
    }
  }
  state = {};
}

constexpr Asynchronous kAsynchronous = {complete_one, end_cluster};

// Before anything asynchronous of a cluster.
void wake() {
  if (state.awake) return;
  set_asynchronous(&kAsynchronous);
  const char* moment = std::getenv("FASTUNLEARN_EMULATOR_ASYNC");
  state.awake = true;
  state.early = moment != nullptr && std::strcmp(moment, "early") == 0;
}

}  // namespace

// ------------------------------------------------------------------------------- what wrappers
// call

uint32_t shared_address(const void* pointer) {
  const SharedMemory shared = shared_memory(running_place().block);
  const auto offset = static_cast<const std::byte*>(pointer) - shared.data;
  if (offset < 0 || static_cast<size_t>(offset) > shared.bytes)
    die("shared_address: %p is not in the block's dynamic shared memory", pointer);
  return kWindow + static_cast<uint32_t>(offset);
}

void mbarrier_init(uint64_t* barrier, uint32_t arrivals, Site) {
  const Unseen unseen;
  wake();
  at(running_place().block, shared_address(barrier), 8, "mbarrier_init");
  if (arrivals == 0 || arrivals >= 1u << 14) die("mbarrier_init: %u arrivals", arrivals);
  Barrier& fresh = *reinterpret_cast<Barrier*>(barrier);
  fresh.magic = kMagic;
  fresh.parity = 0;
  fresh.arrivals = fresh.missing = arrivals;
  fresh.bytes = 0;
}

void mbarrier_arrive(uint64_t* barrier, uint32_t rank, Site) {
  if (rank >= running_cluster().blocks) die("mbarrier_arrive: the cluster has no block %u", rank);
  arrive(barrier_at(at(rank, shared_address(barrier), 8, "mbarrier_arrive"), "mbarrier_arrive"), 0);
}

void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes, Site) {
  arrive(barrier_at(at(running_place().block, shared_address(barrier), 8, "mbarrier_arrive_expect"),
                    "mbarrier_arrive_expect"),
         bytes);
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site) {
  PhaseComplete condition;
  condition.name = "mbarrier_wait";
  condition.holds = PhaseComplete::test;
  condition.barrier = &barrier_at(
      at(running_place().block, shared_address(barrier), 8, "mbarrier_wait"), "mbarrier_wait");
  condition.parity = parity;
  if (!PhaseComplete::test(&condition)) wait_for(condition, site);
  __tsan_acquire(barrier);
}

uint32_t cluster_rank() { return running_place().block; }

void cluster_sync(Site site) {
  const Cluster cluster = running_cluster();
  __tsan_release(&state.cluster);
  if (++state.cluster.arrived == cluster.blocks * cluster.block_threads) {
    dismiss(state.cluster);
  } else {
    assemble(state.cluster, "cluster_sync", site);
  }
  __tsan_acquire(&state.cluster);
}

void copy_tensor_3d(void* to, const CUtensorMap* map, uint64_t* barrier, int32_t x, int32_t y,
                    int32_t z, uint16_t blocks, Site) {
  const Unseen unseen;
  wake();
  Copy copy = {};
  std::memcpy(&copy.map, map, sizeof copy.map);
  if (copy.map.magic != kMapMagic) die("cp.async.bulk.tensor: this is no tensor map");
  copy.to = shared_address(to);
  copy.barrier = shared_address(barrier);
  copy.origin[0] = x;
  copy.origin[1] = y;
  copy.origin[2] = z;
  const uint32_t alignment = copy.map.swizzled ? kPatternBytes : 128;
  if (copy.to % alignment != 0)
    die("cp.async.bulk.tensor: shared address %u is no multiple of %u", copy.to, alignment);
  const unsigned own = running_place().block;
  const unsigned targets = blocks == 0 ? 1u << own : blocks;
  if (targets >> running_cluster().blocks != 0)
    die("cp.async.bulk.tensor: blocks 0x%x of a cluster of %u", targets, running_cluster().blocks);
  for (unsigned block = 0; block < kMaxCluster; ++block) {
    if ((targets >> block & 1u) == 0) continue;
    copy.block = block;
    if (state.early) {
      complete(copy);
    } else {
      state.copies.push_back(copy);
    }
  }
}

void wgmma_fence() {
  const Unseen unseen;
  wake();
  unsigned thread;
  running_warpgroup(thread).threads[thread].fenced = true;
}

void wgmma_16_bit(float* d, int columns, uint64_t a, uint64_t b, bool accumulate, bool is_bfloat16,
                  Site) {
  const Unseen unseen;
  unsigned thread;
  Warpgroup& group = running_warpgroup(thread);
  Warpgroup::Thread& own = group.threads[thread];
  if (!own.fenced) die("wgmma: no wgmma_fence since the accumulators were handed out");
  const size_t index = own.products++ - group.retired;
  if (index == group.in_flight.size()) {
    Product& fresh = group.in_flight.emplace_back();
    fresh.a = a;
    fresh.b = b;
    fresh.columns = columns;
    fresh.accumulate = accumulate;
    fresh.is_bfloat16 = is_bfloat16;
    group.sums.resize(static_cast<size_t>(kRows * columns));
  }
  Product& product = group.in_flight[index];
  if (product.a != a || product.b != b || product.columns != columns ||
      product.accumulate != accumulate || product.is_bfloat16 != is_bfloat16)
    die("wgmma: the threads of a warpgroup issue different products");
  if (own.accumulators == nullptr) {
    own.accumulators = d;
    for (int i = 0; i < columns / 2; ++i) {
      group.sums[element(thread, i, columns)] = d[i];
      d[i] = std::numeric_limits<float>::quiet_NaN();
    }
  } else if (own.accumulators != d) {
    die("wgmma: one set of accumulators in flight is emulated");
  }
  if (++product.issued == kWarpgroup && !state.early) read_operands(running_place().block, product);
}

void wgmma_commit() {
  const Unseen unseen;
  unsigned thread;
  Warpgroup& group = running_warpgroup(thread);
  Warpgroup::Thread& own = group.threads[thread];
  if (own.groups == group.group_ends.size()) group.group_ends.push_back(own.products);
  if (group.group_ends[own.groups] != own.products)
    die("wgmma_commit: the threads of a warpgroup commit different products");
  own.committed = own.products;
  ++own.groups;
}

void wgmma_wait(int pending, Site site) {
  const Unseen unseen;
  unsigned thread;
  Warpgroup& group = running_warpgroup(thread);
  const int groups = static_cast<int>(group.threads[thread].groups) - pending;
  if (group.assembly.arrived == 0) group.waits_for = groups;
  if (group.waits_for != groups)
    die("wgmma_wait: the threads of a warpgroup wait for different groups");
  ++group.assembly.arrived;
  assemble(group.assembly, "wgmma_wait", site);
}

}  // namespace emulator

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&emulator::encode_tiled) : nullptr;
  if (found != nullptr)
    *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
