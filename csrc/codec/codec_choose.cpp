// codec_choose_ on a CPU: one pass over the distances.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "codec/codec_scan_cpu.h"
#include "codec/doors.h"

namespace fastunlearn {
namespace {

template <typename T>
void choose(const CodecChooseDoor& door, const Tensor& distances, const Tensor& rank_terms) {
  auto* distance = static_cast<T*>(distances.mutable_data_ptr());
  const auto* column = static_cast<const T*>(door.column.const_data_ptr());
  auto* rank = static_cast<int32_t*>(rank_terms.mutable_data_ptr());
  const int64_t n = door.rows;
  torch::stable::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t nearest = join_feature_cpu(distance + i * n, column, n, i);
      rank[n + i] = nearest < 0 ? 0 : std::min(rank[i], rank[nearest]);
    }
  });
}

void codec_choose_cpu(const Tensor& distances, const Tensor& rank_terms, const Tensor& column) {
  const CodecChooseDoor door(distances, rank_terms, column);
  distances.scalar_type() == ScalarType::Double ? choose<double>(door, distances, rank_terms)
                                                : choose<float>(door, distances, rank_terms);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("codec_choose_", TORCH_BOX(&codec_choose_cpu));
}

}  // namespace fastunlearn
