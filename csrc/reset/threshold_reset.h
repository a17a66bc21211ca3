// Replaces every weight whose ratio of importances passes gamma; bit mask and count of what was
// replaced come from the same pass.
#pragma once

#include "common/tensor_list.h"

namespace fastunlearn {

enum ThresholdPointer { kWeight, kForget, kRetain, kResetMask, kInitial, kThresholdPointers };
enum ResetMode : int32_t {
  kFill,    // weight = fill
  kInit,    // weight = initial
  kDampen,  // weight *= min(1, dampening / ratio)
};
// Columns of the table of rules, one row per tensor.
enum ResetRule { kGamma, kEps, kFillValue, kResetRules };

struct ThresholdResetParams {
  TensorList<kThresholdPointers> list;
  const double* rules;  // [tensors, kResetRules]
  int64_t* counts;      // [tensors], starts at zero
  double dampening;
  ResetMode mode;
};

}  // namespace fastunlearn
