// gram_accumulate_conv2d_ on CUDA.
#include <torch/csrc/stable/library.h>

#include "common/dispatch.h"
#include "common/splits.cuh"
#include "subspace/doors.h"
#include "subspace/gram_conv2d.cuh"

namespace fastunlearn {
namespace {

template <typename Scalar, typename Master>
void launch_gram_conv2d(const Tensor& gram, const GramConv2dDoor& door) {
  using Acc = Accumulator<Scalar>;
  const DeviceStream device(gram);
  const GramPlan plan = plan_gram_conv2d(door.shape, device.multiprocessors());
  const PatchOperand<Scalar> patches{data<Scalar>(door.images), static_cast<int>(door.shape.groups),
                                     door.geometry};
  const Acc* weights = door.weights ? data<Acc>(*door.weights) : nullptr;
  with_splits<Master>(device, gram, plan.splits, [&](Master* target) {
    device.launch("gram_conv2d", gram_conv2d_kernel<Scalar, Master>, plan.blocks,
                  dim3(kTileThreads), patches, weights, door.shape, plan, target);
  });
}

void gram_accumulate_conv2d_cuda(const Tensor& gram, const Tensor& images,
                                 const std::vector<int64_t>& kernel_size,
                                 const std::vector<int64_t>& stride,
                                 const std::vector<int64_t>& padding,
                                 const std::vector<int64_t>& dilation,
                                 std::optional<Tensor> weights) {
  const GramConv2dDoor door(gram, images, kernel_size, stride, padding, dilation, weights);
  if (gram.numel() == 0 || door.shape.samples == 0) return;
  dispatch_storage<CudaTypes>(door.images.scalar_type(), [&]<typename Scalar>() {
    if (gram.scalar_type() == ScalarType::Double) {
      launch_gram_conv2d<Scalar, double>(gram, door);
    } else if constexpr (sizeof(Scalar) < sizeof(double)) {  // the door refuses the others
      launch_gram_conv2d<Scalar, float>(gram, door);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTUNLEARN_NAMESPACE, FASTUNLEARN_CUDA_KEY, m) {
  m.impl("gram_accumulate_conv2d_", TORCH_BOX(&gram_accumulate_conv2d_cuda));
}

}  // namespace fastunlearn
