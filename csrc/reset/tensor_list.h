// Lists of tensors in one launch: pointers packed into the kernel's arguments, one block per chunk.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastunlearn {

inline constexpr int kListTensors = 64;  // tensors per launch
inline constexpr int kListThreads = 256;
inline constexpr int64_t kListChunk = 65536;  // elements per block, a whole number of mask words
static_assert(kListChunk % kListThreads == 0 && kListThreads % 32 == 0);

// One entry of a list: `kPointers` arrays of `size` elements that belong together.
template <int kPointers>
struct ListEntry {
  void* pointers[kPointers];
  int64_t size;
  int32_t element_bytes;  // of the tensor that is written
  int32_t wide;           // importances are float64 instead of float32
};

// Kernel arguments: 64 entries stay below the 4 KiB that every architecture takes.
template <int kPointers>
struct TensorList {
  ListEntry<kPointers> entries[kListTensors];
  int32_t first_block[kListTensors + 1];  // blocks before entry i; the last one is the grid
  int32_t first_tensor[kListTensors];     // index of entry i in the caller's list
  int32_t count;
};
static_assert(sizeof(TensorList<4>) <= 4032, "kernel arguments are limited to 4 KiB");

inline int64_t list_blocks(int64_t elements) { return (elements + kListChunk - 1) / kListChunk; }

struct ListLaunch {
  std::vector<int64_t> tensors;  // which of the caller's tensors, empty ones left out
  int64_t blocks = 0;
};

// Cuts a list into launches of at most kListTensors tensors and max_blocks blocks; empty tensors
// need none. A tensor with more blocks than that is alone in its launch, which then fails loudly in
// DeviceStream::launch.
inline std::vector<ListLaunch> plan_tensor_list(const std::vector<int64_t>& sizes,
                                                int64_t max_blocks = INT32_MAX) {
  std::vector<ListLaunch> launches;
  for (int64_t i = 0; i < static_cast<int64_t>(sizes.size()); ++i) {
    const int64_t blocks = list_blocks(sizes[i]);
    if (blocks == 0) continue;
    if (launches.empty() || launches.back().tensors.size() == kListTensors ||
        launches.back().blocks + blocks > max_blocks) {
      launches.emplace_back();
    }
    launches.back().tensors.push_back(i);
    launches.back().blocks += blocks;
  }
  return launches;
}

}  // namespace fastunlearn
