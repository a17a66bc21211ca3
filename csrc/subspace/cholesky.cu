// cholesky_inverse_ on CUDA.
#include <torch/csrc/stable/library.h>

#include "common/launch.h"
#include "subspace/cholesky.cuh"
#include "subspace/lowrank_doors.h"

namespace fastunlearn {
namespace {

void cholesky_inverse_cuda(const Tensor& grams, const Tensor& inverses, const Tensor& ranks,
                           double tolerance) {
  const CholeskyDoor door(grams, inverses, ranks);
  if (grams.size(0) == 0) return;
  const DeviceStream device(grams);
  device.launch(
      "cholesky_inverse_", cholesky_kernel, grams.size(0), dim3(kCholeskyThreads),
      CholeskyParams{static_cast<double*>(grams.mutable_data_ptr()),
                     static_cast<double*>(inverses.mutable_data_ptr()),
                     static_cast<int64_t*>(ranks.mutable_data_ptr()), grams.size(1), tolerance});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTUNLEARN_NAMESPACE, FASTUNLEARN_CUDA_KEY, m) {
  m.impl("cholesky_inverse_", TORCH_BOX(&cholesky_inverse_cuda));
}

}  // namespace fastunlearn
