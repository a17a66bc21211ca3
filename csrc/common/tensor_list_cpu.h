// Threads over the chunks of a whole list, so that many small tensors cost one parallel region.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/tensor_list.h"

namespace fastunlearn {

// Calls fn(chunk) for every chunk of tensors of these sizes; each thread has neighbouring chunks.
template <typename Function>
void for_each_chunk(const std::vector<int64_t>& sizes, const Function& fn) {
  std::vector<int64_t> first_block = {0};
  for (const int64_t size : sizes) first_block.push_back(first_block.back() + list_blocks(size));
  torch::stable::parallel_for(0, first_block.back(), 1, [&](int64_t first, int64_t last) {
    const auto after = std::upper_bound(first_block.begin(), first_block.end(), first);
    int64_t i = after - first_block.begin() - 1;
    for (int64_t block = first; block < last; ++block) {
      while (block >= first_block[i + 1]) ++i;
      const int64_t begin = (block - first_block[i]) * kListChunk;
      fn(ListChunk{i, begin, std::min(begin + kListChunk, sizes[i])});
    }
  });
}

}  // namespace fastunlearn
