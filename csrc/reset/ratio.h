// The one number that resetting, selecting and plotting agree on, with the same bits everywhere.
#pragma once

#include "common/host_device.h"

namespace fastunlearn {

// forget / (retain + eps), rounded to float; NaN, which passes no threshold and is counted nowhere,
// for a dead weight (both importances zero).
template <typename Acc>
FASTUNLEARN_HOST_DEVICE float importance_ratio(Acc forget, Acc retain, Acc eps) {
  const float ratio = static_cast<float>(forget / (retain + eps));
  return forget == Acc(0) && retain == Acc(0) ? __builtin_nanf("") : ratio;
}

}  // namespace fastunlearn
