// add_column_noise_ on CUDA.
#include <torch/csrc/stable/library.h>

#include "codec/column_noise.cuh"
#include "codec/doors.h"
#include "common/launch.h"

namespace fastunlearn {
namespace {

template <typename Scalar>
void launch_noise(const ColumnNoiseDoor& door, const Tensor& values, int64_t seed) {
  const int64_t threads = (door.rows + 3) / 4 * door.columns;
  if (threads == 0) return;
  DeviceStream(values).launch(
      "add_column_noise_", column_noise_kernel<Scalar>,
      (threads + kNoiseThreads - 1) / kNoiseThreads, dim3(kNoiseThreads),
      ColumnNoiseParams<Scalar>{static_cast<Scalar*>(values.mutable_data_ptr()),
                                static_cast<const Scalar*>(door.scales.const_data_ptr()), door.rows,
                                door.columns, static_cast<uint64_t>(seed)});
}

void add_column_noise_cuda(const Tensor& values, const Tensor& scales, int64_t seed) {
  const ColumnNoiseDoor door(values, scales);
  values.scalar_type() == ScalarType::Double ? launch_noise<double>(door, values, seed)
                                             : launch_noise<float>(door, values, seed);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTUNLEARN_NAMESPACE, FASTUNLEARN_CUDA_KEY, m) {
  m.impl("add_column_noise_", TORCH_BOX(&add_column_noise_cuda));
}

}  // namespace fastunlearn
