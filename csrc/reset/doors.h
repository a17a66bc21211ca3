// The doors of the reset operators.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <vector>

#include "common/check.h"
#include "reset/threshold_reset.h"

namespace fastunlearn {

inline int64_t mask_words(int64_t elements) { return (elements + 31) / 32; }

inline void check_list(const char* op, const char* name, const std::vector<Tensor>& list,
                       const char* first_name, const std::vector<Tensor>& first) {
  check(list.size() == first.size(), op, ": ", first.size(), " ", first_name, " but ", list.size(),
        " ", name, "; one of each per tensor is needed");
}

inline void check_distinct(const char* op, const char* name, const std::vector<Tensor>& list,
                           size_t i) {
  for (size_t j = 0; j < i; ++j) {
    check(!overlap(list[i], list[j]), op, ": ", name, "[", i, "] shares memory with ", name, "[", j,
          "]; pass a tied tensor once");
  }
}

inline void check_mask(const char* op, size_t i, const Tensor& mask, const Tensor& masked) {
  check(mask.scalar_type() == ScalarType::Int && mask.dim() == 1 &&
            mask.size(0) == mask_words(masked.numel()) && same_device(mask, masked),
        op, ": masks[", i, "] is ", describe(mask), ", expected Int [", mask_words(masked.numel()),
        "] beside ", describe(masked));
}

struct ThresholdDoor {
  std::vector<Tensor> forget, retain;  // contiguous
  std::vector<int64_t> sizes;

  ThresholdDoor(const std::vector<Tensor>& weights, const std::vector<Tensor>& forget_,
                const std::vector<Tensor>& retain_, double gamma, const std::vector<Tensor>& masks,
                const Tensor& counts) {
    constexpr const char* op = "threshold_reset_";
    check(std::isfinite(gamma) && gamma > 0, op, ": gamma = ", gamma,
          " must be a positive number; at or below 0 every weight that is used would be reset");
    check_list(op, "forget importances", forget_, "weights", weights);
    check_list(op, "retain importances", retain_, "weights", weights);
    check_list(op, "masks", masks, "weights", weights);
    check_output(op, "counts", counts);
    check(counts.scalar_type() == ScalarType::Long && counts.dim() == 1 &&
              counts.size(0) == static_cast<int64_t>(weights.size()),
          op, ": counts is ", describe(counts), ", expected Long [", weights.size(), "]");
    for (size_t i = 0; i < weights.size(); ++i) {
      const Tensor& weight = weights[i];
      check_output(op, "weight", weight);
      check(same_device(weight, counts), op, ": weights[", i, "] is ", describe(weight),
            " but counts is ", describe(counts), "; pass one list per device");
      check(is_storage_type(weight.scalar_type()), op, ": weights[", i, "] is ", describe(weight),
            "; float32, bfloat16, float16 or float64 is needed");
      check_distinct(op, "weights", weights, i);
      add_importance(op, "forget", i, weight, forget_[i], forget);
      add_importance(op, "retain", i, weight, retain_[i], retain);
      check(forget[i].scalar_type() == retain[i].scalar_type(), op, ": forget[", i, "] is ",
            describe(forget[i]), " but retain[", i, "] is ", describe(retain[i]));
      check_mask(op, i, masks[i], weight);
      check_output(op, "mask", masks[i]);
      check_distinct(op, "masks", masks, i);
      sizes.push_back(weight.numel());
    }
  }

 private:
  static void add_importance(const char* op, const char* name, size_t i, const Tensor& weight,
                             const Tensor& importance, std::vector<Tensor>& list) {
    check(same_shape(importance, weight) && same_device(importance, weight), op, ": ", name, "[", i,
          "] is ", describe(importance), " but the weight is ", describe(weight));
    check(importance.scalar_type() == ScalarType::Float ||
              importance.scalar_type() == ScalarType::Double,
          op, ": ", name, "[", i, "] is ", describe(importance),
          "; importances are float32 or float64");
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
      check(is_storage_type(grads[i].scalar_type()) && same_device(grads[i], grads[0]), op,
            ": grads[", i, "] is ", describe(grads[i]), "; floating point on one device is needed");
      check_distinct(op, "grads", grads, i);
      check_mask(op, i, masks_[i], grads[i]);
      masks.push_back(readable(op, "mask", masks_[i], grads[i]));
      sizes.push_back(grads[i].numel());
    }
  }
};

}  // namespace fastunlearn
