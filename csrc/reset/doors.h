// The doors of the reset operators.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <cmath>
#include <vector>

#include "common/check.h"
#include "reset/threshold_reset.h"

namespace fastunlearn {

inline int64_t mask_words(int64_t elements) { return (elements + 31) / 32; }

inline Tensor new_integers(const Tensor& like, int64_t size, ScalarType type) {
  const std::array<int64_t, 1> shape{size};
  return torch::stable::new_zeros(like, {shape.data(), 1}, type);
}

inline void check_list(const char* op, const char* name, const std::vector<Tensor>& list,
                       const char* first_name, const std::vector<Tensor>& first) {
  check(list.size() == first.size(), op, ": ", first.size(), " ", first_name, " but ", list.size(), " ",
        name, "; one of each per tensor is needed");
}

inline void check_distinct(const char* op, const char* name, const std::vector<Tensor>& list, size_t i) {
  for (size_t j = 0; j < i; ++j) {
    check(!overlap(list[i], list[j]), op, ": ", name, "[", i, "] shares memory with ", name, "[", j,
          "]; pass a tied tensor once");
  }
}

struct ThresholdDoor {
  std::vector<Tensor> forget, retain;  // contiguous
  std::vector<Tensor> masks;           // int32 [ceil(size / 32)]
  Tensor counts;                       // int64 [tensors], zero
  std::vector<int64_t> sizes;

  ThresholdDoor(const std::vector<Tensor>& weights, const std::vector<Tensor>& forget_,
                const std::vector<Tensor>& retain_, double gamma) {
    constexpr const char* op = "threshold_reset_";
    check(std::isfinite(gamma) && gamma > 0, op, ": gamma = ", gamma,
          " must be a positive number; at or below 0 every weight that is used would be reset");
    check(!weights.empty(), op, ": the list of weights is empty");
    check_list(op, "forget importances", forget_, "weights", weights);
    check_list(op, "retain importances", retain_, "weights", weights);
    for (size_t i = 0; i < weights.size(); ++i) {
      const Tensor& weight = weights[i];
      check_output(op, "weight", weight);
      check(same_device(weight, weights[0]), op, ": weights[0] is ", describe(weights[0]),
            " but weights[", i, "] is ", describe(weight), "; pass one list per device");
      check(is_storage_type(weight.scalar_type()), op, ": weights[", i, "] is ", describe(weight),
            "; float32, bfloat16, float16 or float64 is needed");
      check_distinct(op, "weights", weights, i);
      add_importance(op, "forget", i, weight, forget_[i], forget);
      add_importance(op, "retain", i, weight, retain_[i], retain);
      check(forget[i].scalar_type() == retain[i].scalar_type(), op, ": forget[", i, "] is ",
            describe(forget[i]), " but retain[", i, "] is ", describe(retain[i]));
    }
    for (const Tensor& weight : weights) {
      sizes.push_back(weight.numel());
      masks.push_back(new_integers(weight, mask_words(weight.numel()), ScalarType::Int));
    }
    counts = new_integers(weights[0], static_cast<int64_t>(weights.size()), ScalarType::Long);
  }

 private:
  static void add_importance(const char* op, const char* name, size_t i, const Tensor& weight,
                             const Tensor& importance, std::vector<Tensor>& list) {
    check(same_shape(importance, weight) && same_device(importance, weight), op, ": ", name, "[", i,
          "] is ", describe(importance), " but the weight is ", describe(weight));
    check(importance.scalar_type() == ScalarType::Float || importance.scalar_type() == ScalarType::Double,
          op, ": ", name, "[", i, "] is ", describe(importance), "; importances are float32 or float64");
    list.push_back(readable(op, name, importance, weight));
  }
};

struct MaskGradsDoor {
  std::vector<Tensor> masks;
  std::vector<int64_t> sizes;

  MaskGradsDoor(const std::vector<Tensor>& grads, const std::vector<Tensor>& masks_) {
    constexpr const char* op = "mask_grads_";
    check_list(op, "masks", masks_, "gradients", grads);
    for (size_t i = 0; i < grads.size(); ++i) {
      check_output(op, "gradient", grads[i]);
      check(is_storage_type(grads[i].scalar_type()) && same_device(grads[i], grads[0]), op, ": grads[",
            i, "] is ", describe(grads[i]), "; floating point on one device is needed");
      check_distinct(op, "grads", grads, i);
      check(masks_[i].scalar_type() == ScalarType::Int && masks_[i].dim() == 1 &&
                masks_[i].size(0) == mask_words(grads[i].numel()) && same_device(masks_[i], grads[i]),
            op, ": masks[", i, "] is ", describe(masks_[i]), ", expected Int [",
            mask_words(grads[i].numel()), "] for a gradient ", describe(grads[i]));
      masks.push_back(readable(op, "mask", masks_[i], grads[i]));
      sizes.push_back(grads[i].numel());
    }
  }
};

}  // namespace fastunlearn
