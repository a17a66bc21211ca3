// sq_grad_linear on a CPU: the input's features are lanes, the output's are rows.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "fisher/doors.h"
#include "fisher/sq_grad_tile_cpu.h"

namespace fastunlearn {
namespace {

// [N, T, features], features contiguous.
template <typename Scalar>
struct FeatureLanes {
  using Acc = CpuAccumulator<Scalar>;
  const Scalar* data;
  int64_t positions, count;

  void pack(int64_t, int64_t sample, int64_t first, Acc* panel) const {
    constexpr int kLanes = kSquareLanes<Acc>;
    const int valid = static_cast<int>(std::min<int64_t>(kLanes, count - first));
    const Scalar* from = data + sample * positions * count + first;
    for (int64_t t = 0; t < positions; ++t, from += count, panel += kLanes) {
      for (int j = 0; j < valid; ++j) panel[j] = widen(from[j]);
      std::fill(panel + valid, panel + kLanes, Acc(0));
    }
  }
};

// The same, packed in blocks of kSubtiles register tiles: [kSubtiles, positions, kSquareRows].
template <typename Scalar>
struct FeatureRows {
  using Acc = CpuAccumulator<Scalar>;
  static constexpr int kSubtiles = 8;

  const Scalar* data;
  int64_t positions, count;
  int64_t blocks = ceil_div(count, kSubtiles* kSquareRows);
  int64_t block_size = kSubtiles * kSquareRows * positions;
  std::vector<int> offsets;

  FeatureRows(const Scalar* data, int64_t positions, int64_t count)
      : data(data), positions(positions), count(count), offsets(positions) {
    check(fits_int(positions * kSquareRows), "sq_grad_linear: ", positions,
          " positions a sample; on a CPU at most 2^31 / 6 are possible");
    for (int64_t t = 0; t < positions; ++t) offsets[t] = static_cast<int>(t * kSquareRows);
  }

  void pack(int64_t, int64_t sample, int64_t block, Acc* to) const {
    const int64_t first = block * kSubtiles * kSquareRows;
    const int64_t valid = std::min<int64_t>(kSubtiles * kSquareRows, count - first);
    const Scalar* from = data + sample * positions * count + first;
    for (int64_t t = 0; t < positions; ++t, from += count) {
      for (int64_t i = 0; i < valid; i += kSquareRows) {
        Acc* row = to + (i / kSquareRows * positions + t) * kSquareRows;
        for (int64_t r = 0; r < std::min<int64_t>(kSquareRows, valid - i); ++r)
          row[r] = widen(from[i + r]);
      }
    }
  }
  const Acc* row_pointer(int64_t, int64_t, int64_t n, const Acc* packed, int64_t chunk,
                         int64_t row) const {
    const int64_t block = row / (kSubtiles * kSquareRows);
    const int64_t subtile = row / kSquareRows % kSubtiles;
    return packed + (block * chunk + n) * block_size + subtile * positions * kSquareRows +
           row % kSquareRows;
  }
  int64_t step() const { return block_size; }
};

void sq_grad_linear_cpu(const Tensor& out, const Tensor& input, const Tensor& grad_output,
                        bool /*allow_tf32*/) {
  const LinearDoor door(out, input, grad_output);
  const SqGradShape& s = door.shape;
  if (out.numel() == 0 || s.samples == 0 || s.positions == 0) return;
  dispatch_storage<CpuTypes>(door.input.scalar_type(), [&]<typename Scalar>() {
    const FeatureLanes<Scalar> lanes{static_cast<const Scalar*>(door.input.const_data_ptr()),
                                     s.positions, s.in_features};
    const FeatureRows<Scalar> rows(static_cast<const Scalar*>(door.grad.const_data_ptr()),
                                   s.positions, s.out_features);
    sq_grad_cpu<false>(out, s, lanes, rows,
                       static_cast<CpuAccumulator<Scalar>*>(out.mutable_data_ptr()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastunlearn, CPU, m) {
  m.impl("sq_grad_linear", TORCH_BOX(&sq_grad_linear_cpu));
}

}  // namespace fastunlearn
