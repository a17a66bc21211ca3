// orthogonal_rows_ on CUDA.
#include <torch/csrc/stable/library.h>

#include "common/launch.h"
#include "subspace/jacobi.cuh"
#include "subspace/lowrank_doors.h"

namespace fastunlearn {
namespace {

template <typename T>
void launch_jacobi(const Tensor& rows, const std::optional<Tensor>& rotation,
                   const Tensor& sweeps) {
  const DeviceStream device(rows);
  const JacobiPlan plan =
      plan_jacobi(rows.size(1), sizeof(T), rotation.has_value(), device.max_shared_bytes());
  device.launch_shared(
      "orthogonal_rows_", plan.shared_bytes ? jacobi_kernel<T, true> : jacobi_kernel<T, false>,
      rows.size(0), dim3(32 * plan.warps), plan.shared_bytes,
      JacobiParams{rows.mutable_data_ptr(), rotation ? rotation->mutable_data_ptr() : nullptr,
                   static_cast<int64_t*>(sweeps.mutable_data_ptr()),
                   static_cast<int32_t>(rows.size(1))});
}

void orthogonal_rows_cuda(const Tensor& rows, const std::optional<Tensor>& rotation,
                          const Tensor& sweeps) {
  const JacobiDoor door(rows, rotation, sweeps);
  if (rows.size(0) == 0 || rows.size(1) == 0) return;
  if (rows.scalar_type() == ScalarType::Double)
    return launch_jacobi<double>(rows, rotation, sweeps);
  launch_jacobi<float>(rows, rotation, sweeps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTUNLEARN_NAMESPACE, FASTUNLEARN_CUDA_KEY, m) {
  m.impl("orthogonal_rows_", TORCH_BOX(&orthogonal_rows_cuda));
}

}  // namespace fastunlearn
