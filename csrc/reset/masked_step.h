// Optimizer steps on the weights of a bit mask. Their state is as long as the mask has bits: the
// k-th set bit of a tensor owns element k, found from the count of bits before each block of 32
// words.
#pragma once

#include <cmath>

#include "common/host_device.h"
#include "common/tensor_list.h"

namespace fastunlearn {

enum MaskPointer { kGrad, kGradMask, kMaskPointers };
enum StepPointer {
  kStepWeight,
  kStepGrad,
  kStepMask,
  kStepStarts,
  kStepFirst,
  kStepSecond,
  kStepPointers
};

inline constexpr int64_t kStartBlock = 1024;  // elements that share an entry of `starts`
static_assert(kListChunk % kStartBlock == 0);
inline int64_t mask_starts(int64_t elements) { return (elements + kStartBlock - 1) / kStartBlock; }

// The bits of a mask word that stand for elements, when `left` elements remain from its first on:
// bits beyond the end of a tensor may hold anything (of an inverted mask, ones).
FASTUNLEARN_HOST_DEVICE uint32_t valid_bits(int64_t left) {
  return left >= 32 ? 0xffffffffu : (1u << left) - 1;
}

struct MaskGradsParams {
  TensorList<kMaskPointers> list;
};

// As torch.optim.SGD without dampening: the buffer starts at zero.
struct SgdRule {
  double lr, momentum, weight_decay;
  bool nesterov;

  template <typename Acc>
  FASTUNLEARN_HOST_DEVICE Acc step(Acc weight, Acc grad, Acc* buffer, Acc*) const {
    const auto mu = static_cast<Acc>(momentum);
    grad += static_cast<Acc>(weight_decay) * weight;
    if (momentum != 0) {
      *buffer = mu * *buffer + grad;
      grad = nesterov ? grad + mu * *buffer : *buffer;
    }
    return weight - static_cast<Acc>(lr) * grad;
  }
};

// As torch.optim.AdamW, with the bias corrections of its step worked out beforehand.
struct AdamWRule {
  double lr, beta1, beta2, eps, weight_decay;
  double correction1, sqrt_correction2;  // 1 - beta1^step, sqrt(1 - beta2^step)

  template <typename Acc>
  FASTUNLEARN_HOST_DEVICE Acc step(Acc weight, Acc grad, Acc* mean, Acc* square) const {
    weight *= static_cast<Acc>(1 - lr * weight_decay);
    *mean += static_cast<Acc>(1 - beta1) * (grad - *mean);
    *square = static_cast<Acc>(beta2) * *square + static_cast<Acc>(1 - beta2) * grad * grad;
    using std::sqrt;
    const Acc root = sqrt(*square) * static_cast<Acc>(1 / sqrt_correction2);
    return weight - static_cast<Acc>(lr / correction1) * *mean / (root + static_cast<Acc>(eps));
  }
};

inline AdamWRule adamw_rule(double lr, double beta1, double beta2, double eps, double weight_decay,
                            int64_t step) {
  const auto t = static_cast<double>(step);
  return {lr,
          beta1,
          beta2,
          eps,
          weight_decay,
          1 - std::pow(beta1, t),
          std::sqrt(1 - std::pow(beta2, t))};
}

template <typename Rule>
struct MaskedStepParams {
  TensorList<kStepPointers> list;
  Rule rule;
};

}  // namespace fastunlearn
