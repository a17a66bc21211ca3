// How the sum of squared products is cut into tiles: the part shared by Linear and Conv2d.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/tile.h"

namespace fastunlearn {

// The sizes of  out[g, p, d] += sum_n (sum_t grad[g, n, t, p] * input[g, n, t, d])^2.
struct SqGradShape {
  int64_t groups = 1;
  int64_t samples = 0;
  int64_t positions = 0;
  int64_t out_features = 0;  // per group
  int64_t in_features = 0;   // per group
};

struct SqGradPlan {
  int64_t tiles_out = 0;
  int64_t tiles_in = 0;
  int64_t splits = 1;             // parts of the samples, summed in order afterwards
  int64_t samples_per_split = 0;  // the last split may have fewer
  int64_t blocks = 0;
};

// Splits the samples only as far as the tiles leave the GPU idle: two blocks per multiprocessor are
// enough to hide latency, and every split costs one more write and read of `out`. At most 16
// splits, so that the workspace stays a small multiple of the weight and never grows with the
// number of samples.
inline SqGradPlan plan_sq_grad(const SqGradShape& shape, int64_t multiprocessors) {
  SqGradPlan plan;
  plan.tiles_out = ceil_div(shape.out_features, kTileOut);
  plan.tiles_in = ceil_div(shape.in_features, kTileIn);
  const int64_t tiles = shape.groups * plan.tiles_out * plan.tiles_in;
  if (tiles == 0 || shape.samples == 0) return plan;
  const int64_t wanted = std::clamp<int64_t>(2 * multiprocessors / tiles, 1, 16);
  plan.samples_per_split = ceil_div(shape.samples, std::min(wanted, shape.samples));
  plan.splits = ceil_div(shape.samples, plan.samples_per_split);
  plan.blocks = tiles * plan.splits;
  return plan;
}

}  // namespace fastunlearn
