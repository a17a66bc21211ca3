// sq_grad_embedding on CUDA.
#include "fisher/sq_grad_embedding.cuh"
#include "fisher/sq_grad_launch.cuh"

namespace fastunlearn {
namespace {

void sq_grad_embedding_cuda(const Tensor& out, const Tensor& indices, const Tensor& grad_output,
                            std::optional<int64_t> padding_idx) {
  const EmbeddingDoor door(out, indices, grad_output, padding_idx);
  if (door.grad.numel() == 0) return;
  const DeviceStream device(out);
  const int64_t chunks = ceil_div(door.shape.features, kEmbeddingThreads);
  dispatch_storage<CudaTypes>(door.grad.scalar_type(), [&]<typename Scalar>() {
    device.launch("sq_grad_embedding", sq_grad_embedding_kernel<Scalar>,
                  door.sorted_ids.numel() * chunks, dim3(kEmbeddingThreads),
                  data<int64_t>(door.sorted_ids), data<int64_t>(door.order),
                  data<Scalar>(door.grad), door.shape, chunks,
                  static_cast<Accumulator<Scalar>*>(out.mutable_data_ptr()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTUNLEARN_NAMESPACE, FASTUNLEARN_CUDA_KEY, m) {
  m.impl("sq_grad_embedding", TORCH_BOX(&sq_grad_embedding_cuda));
}

}  // namespace fastunlearn
