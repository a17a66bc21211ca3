// weight = 0 where forget > gamma * retain; bit mask and count of what was reset, in the same pass.
#pragma once

#include "reset/tensor_list.h"

namespace fastunlearn {

enum ThresholdPointer { kWeight, kForget, kRetain, kResetMask, kThresholdPointers };
enum MaskPointer { kGrad, kGradMask, kMaskPointers };

struct ThresholdResetParams {
  TensorList<kThresholdPointers> list;
  double gamma;
  int64_t* counts;  // [tensors], starts at zero
};

struct MaskGradsParams {
  TensorList<kMaskPointers> list;
};

}  // namespace fastunlearn
