// Lists of tensors in one launch: pointers packed into the kernel's arguments, one block per chunk.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastunlearn {

inline constexpr int kListTensors = 400;  // tensors per launch
inline constexpr int kListThreads = 256;
inline constexpr int64_t kListChunk = 65536;  // elements per block, a whole number of mask words
static_assert(kListChunk % kListThreads == 0 && kListThreads % 32 == 0);

enum ElementType : int32_t { kFloat, kBFloat16, kHalf, kDouble };

// One entry of a list: `kPointers` arrays of `size` elements that belong together.
template <int kPointers>
struct ListEntry {
  void* pointers[kPointers];
  int64_t size;
  ElementType type;        // of the tensor that is written
  ElementType importance;  // of the importances, where there are any
};

// Kernel arguments. CUDA passes up to 32,764 bytes of them since 12.1.
template <int kPointers>
struct TensorList {
  ListEntry<kPointers> entries[kListTensors];
  int32_t first_block[kListTensors + 1];  // blocks before entry i; the last one is the grid
  int32_t tensor[kListTensors];           // index of entry i in the caller's list
  int32_t count;
};
static_assert(sizeof(TensorList<6>) <= 32764 - 256, "the list and a few scalars must fit");

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

// Fills a launch's arguments; entry_of(i) describes the caller's tensor i.
template <int kPointers, typename EntryOf>
TensorList<kPointers> pack(const ListLaunch& launch, const EntryOf& entry_of) {
  TensorList<kPointers> list = {};
  for (const int64_t tensor : launch.tensors) {
    const int32_t i = list.count++;
    list.entries[i] = entry_of(tensor);
    list.tensor[i] = static_cast<int32_t>(tensor);
    list.first_block[i + 1] =
        list.first_block[i] + static_cast<int32_t>(list_blocks(list.entries[i].size));
  }
  return list;
}

struct ListChunk {
  int64_t entry;
  int64_t begin, end;  // elements of that entry
};

}  // namespace fastunlearn
