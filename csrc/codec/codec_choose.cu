// codec_choose_ on CUDA.
#include <torch/csrc/stable/library.h>

#include "codec/codec_choose.cuh"
#include "codec/doors.h"
#include "common/launch.h"

namespace fastunlearn {
namespace {

template <typename Scalar>
void launch_choose(const CodecChooseDoor& door, const Tensor& distances, const Tensor& terms) {
  DeviceStream(distances).launch(
      "codec_choose_", codec_choose_kernel<Scalar>, door.rows, dim3(kChooseThreads),
      CodecChooseParams<Scalar>{static_cast<Scalar*>(distances.mutable_data_ptr()),
                                static_cast<int32_t*>(terms.mutable_data_ptr()),
                                static_cast<const Scalar*>(door.column.const_data_ptr()),
                                door.rows});
}

void codec_choose_cuda(const Tensor& distances, const Tensor& rank_terms, const Tensor& column) {
  const CodecChooseDoor door(distances, rank_terms, column);
  distances.scalar_type() == ScalarType::Double ? launch_choose<double>(door, distances, rank_terms)
                                                : launch_choose<float>(door, distances, rank_terms);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTUNLEARN_NAMESPACE, FASTUNLEARN_CUDA_KEY, m) {
  m.impl("codec_choose_", TORCH_BOX(&codec_choose_cuda));
}

}  // namespace fastunlearn
