// Kernels whose sum is split over blocks: a workspace, and the ordered sum of the splits.
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>

#include "common/launch.h"
#include "common/reduce.cuh"
#include "common/tile.h"

namespace fastunlearn {

template <typename Scalar>
const Scalar* data(const Tensor& tensor) {
  return static_cast<const Scalar*>(tensor.const_data_ptr());
}

// Runs kernel(target), where target is `out` itself or a workspace [splits, out] that is then added
// to it.
template <typename Acc, typename Kernel>
void with_splits(const DeviceStream& device, const Tensor& out, int64_t splits,
                 const Kernel& kernel) {
  Acc* result = static_cast<Acc*>(out.mutable_data_ptr());
  if (splits == 1) return kernel(result);
  const int64_t count = out.numel();
  const std::array<int64_t, 2> size{splits, count};
  const Tensor workspace = torch::stable::new_empty(out, {size.data(), size.size()});
  Acc* partial = static_cast<Acc*>(workspace.mutable_data_ptr());
  kernel(partial);
  device.launch("add_splits", add_splits_kernel<Acc>, ceil_div(count, kReduceThreads),
                dim3(kReduceThreads), result, partial, splits, count);
}

}  // namespace fastunlearn
