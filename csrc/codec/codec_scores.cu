// codec_scores on CUDA.
#include <torch/csrc/stable/library.h>

#include "codec/codec_scores.cuh"
#include "codec/doors.h"
#include "common/launch.h"
#include "common/workspace.h"

namespace fastunlearn {
namespace {

constexpr const char* kOp = "codec_scores";

template <typename Scalar>
void launch_codec(const CodecScoresDoor& door, const DeviceStream& device,
                  unsigned long long* sums) {
  using Tile = CodecTile<Scalar>;
  const auto* features = static_cast<const Scalar*>(door.features.const_data_ptr());
  if (door.distances) {
    const int64_t row_blocks = (door.rows + Tile::kBlockRows - 1) / Tile::kBlockRows;
    const int64_t tiles = (door.columns + Tile::kBlockCandidates - 1) / Tile::kBlockCandidates;
    device.launch(kOp, codec_joined_kernel<Scalar>, row_blocks * tiles, dim3(32 * kCodecWarps),
                  CodecParams<Scalar>{features, door.rank(),
                                      static_cast<const Scalar*>(door.distances->const_data_ptr()),
                                      sums, door.rows, door.columns, row_blocks});
    return;
  }
  const LinePlan plan = plan_line(door.rows, door.columns, sizeof(Scalar), device.multiprocessors(),
                                  device.max_shared_bytes());
  const Tensor lines = workspace<double>(door.features, plan.workspace_bytes / 8);
  device.launch_shared(
      kOp, codec_line_kernel<Scalar>, plan.blocks, dim3(kLineThreads), plan.shared_bytes,
      CodecLineParams<Scalar>{features, door.rank(), door.wanted(), sums,
                              plan.workspace_bytes ? lines.mutable_data_ptr() : nullptr, door.rows,
                              door.columns, plan.padded});
}

void codec_scores_cuda(const Tensor& scores, const Tensor& features, const Tensor& rank_terms,
                       const std::optional<Tensor>& distances, const Tensor& candidates) {
  const CodecScoresDoor door(scores, features, rank_terms, distances, candidates);
  if (door.columns == 0) return;
  const DeviceStream device(scores);
  Tensor sums_like = workspace<double>(scores, door.columns);
  torch::stable::zero_(sums_like);  // all bits 0: integers 0 too
  auto* sums = static_cast<unsigned long long*>(sums_like.mutable_data_ptr());
  if (features.scalar_type() == ScalarType::Double) {
    launch_codec<double>(door, device, sums);
  } else {
    launch_codec<float>(door, device, sums);
  }
  device.launch(
      kOp, codec_finish_kernel, (door.columns + kFormulaThreads - 1) / kFormulaThreads,
      dim3(kFormulaThreads),
      CodecFinishParams{static_cast<double*>(scores.mutable_data_ptr()), sums, door.rank(),
                        door.wanted(), door.rows, door.columns, door.distances.has_value()});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTUNLEARN_NAMESPACE, FASTUNLEARN_CUDA_KEY, m) {
  m.impl("codec_scores_", TORCH_BOX(&codec_scores_cuda));
}

}  // namespace fastunlearn
