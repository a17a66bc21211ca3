// Scratch memory from torch's allocator, on the device of another tensor.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdint>

#include "common/check.h"

namespace fastunlearn {

// `elements` numbers of T, float or double, uninitialised. On a CPU it starts on 64 bytes: torch's
// allocator aligns so.
template <typename T>
Tensor workspace(const Tensor& like, int64_t elements) {
  const std::array<int64_t, 1> size{elements};
  return torch::stable::new_empty(like, {size.data(), size.size()},
                                  sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);
}

}  // namespace fastunlearn
